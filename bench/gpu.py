"""A table for a GPU: decode and prefill against its limits, beside peers, and with many rows.

    python -m bench --gpu limits
    python -m bench --gpu decode  --shape 8b [--quantize int8]     # bf16, int8 and int4, or one
    python -m bench --gpu peers   --shape 7b --gpt-fast DIR --turns mt_bench.jsonl
    python -m bench --gpu batches --shape 8b                       # rows, loading, a draft

Each row is printed as a JSON line as soon as it is measured, so a command that is stopped loses
nothing. The table of all rows comes last. Each model runs in a process of its own: its memory and
its failures are then its own, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator

import torch

from bench import peers
from bench.apart import apart
from bench.clocks import rounds
from bench.gpu_figures import (
    TOKENS,
    batch_figures,
    decode_figures,
    device_facts,
    draft_figures,
    load_figures,
    make_limits,
    our_tokens,
    spread,
    turns_figures,
    warm_figures,
)
from bench.models import peer_settings
from load import check_device
from terminal import say

WINDOW = 2044  # with 4 sinks the context of the smallest shapes
BATCH_WINDOW = 1020  # so that the cache of 64 rows of 7b fits 80 GB beside the weights


def bench_gpu(args) -> None:
    """Print the rows of args.gpu as they come, and then their table. On a CPU these take hours, so
    that has to be asked for with --device cpu."""
    args.device = str(check_device(args.device or "cuda"))
    args.window = args.window or (BATCH_WINDOW if args.gpu == "batches" else WINDOW)
    args.shape = args.shape or ("7b" if args.gpu == "peers" else "8b")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in {"limits": limits_rows, "decode": decode_rows, "peers": peers_rows,
                    "batches": batches_rows}[args.gpu](args, folder):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print("\n| row | figure | value |\n| --- | --- | --- |")
    for row in rows:
        for name, value in list(row.items())[1:]:
            text = f"{value:,.3f}" if isinstance(value, float) else value
            print(f"| {row['row']} | {name} | {text} |")


def apart_rows(name: str, figures: Callable[..., Iterator[dict]], *given) -> Iterator[dict]:
    """The rows of a generator of figures that runs in a process of its own. An error is a row, too.
    """
    say(name)
    try:
        with apart(one_by_one, figures, *given) as following:
            while (found := following()) is not None:
                yield dict(row=name, **found)
    except (ValueError, torch.OutOfMemoryError) as error:
        yield dict(row=name, error=str(error).splitlines()[0])


def one_by_one(figures: Callable[..., Iterator[dict]], *given) -> Callable[[], dict | None]:
    """A function that returns the generator's next figures, or None. It runs nothing before its
    first call, so that errors are raised there."""
    iterator = figures(*given)
    return lambda: next(iterator, None)


# ------------------------------------------------------------------------------ the four commands


def limits_rows(args, folder: str) -> Iterator[dict]:
    device = check_device(args.device)
    yield dict(row="machine", **device_facts(device))
    limits = make_limits(device)
    copies, products = zip(*(limits() for _ in rounds(args.rounds)))
    yield dict(row="limits", copy_GB_s=statistics.median(copies), copy_spread=spread(copies),
               matmul_TFLOP_s=statistics.median(products), matmul_spread=spread(products))


def decode_rows(args, folder: str) -> Iterator[dict]:
    kinds = {"bf16": None, "int8": "int8", f"int4 in groups of {args.group_size}": "int4"}
    if args.quantize:
        kinds = {kind: quantize for kind, quantize in kinds.items() if quantize == args.quantize}
    for kind, quantize in kinds.items():
        # Each kind has its own compile cache, empty at first, so that every compile is cold.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{quantize}"
        yield from apart_rows(f"{args.shape} {kind}", decode_figures, as_asked(args, quantize))
    for kind, quantize in kinds.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{quantize}"
        yield from apart_rows(f"{args.shape} {kind}", warm_figures, as_asked(args, quantize))


def as_asked(args, quantize: str | None) -> argparse.Namespace:
    """The same arguments with another --quantize."""
    return argparse.Namespace(**{**vars(args), "quantize": quantize})


def peers_rows(args, folder: str) -> Iterator[dict]:
    settings, full = peer_settings(args), 4 + args.window
    for quantize in (None, "int8") if args.gpt_fast else ():
        yield from in_turns(as_asked(args, quantize), f"gpt-fast {quantize or 'bf16'}",
                            peers.gpt_fast, args.gpt_fast, *settings, quantize, full, TOKENS)
    yield from in_turns(as_asked(args, None), "transformers compiled, static cache",
                        peers.transformers_tokens, *settings, full, TOKENS)
    if args.turns:
        yield from apart_rows("StreamingLLM's way", turns_figures, as_asked(args, None))


def in_turns(args, name: str, make: Callable, *given) -> Iterator[dict]:
    """A row of our tokens a second and a peer's on the same shape, measured in turns."""
    say(name)
    try:
        with apart(make, *given) as theirs, apart(our_tokens, args) as ours:
            times = [(ours(), theirs()) for _ in rounds(args.rounds)]
    except (ValueError, torch.OutOfMemoryError) as error:
        yield dict(row=f"{args.shape} beside {name}", error=str(error).splitlines()[0])
        return
    ours, theirs = zip(*times)
    yield dict(row=f"{args.shape} beside {name}", tok_s=TOKENS / statistics.median(ours),
               their_tok_s=TOKENS / statistics.median(theirs),
               over_theirs=statistics.median(b / a for a, b in times))


def batches_rows(args, folder: str) -> Iterator[dict]:
    yield from apart_rows(f"{args.shape} rows", batch_figures, args)
    yield from apart_rows(f"{args.shape} loading", load_figures, as_asked(args, None), folder)
    yield from apart_rows(f"{args.shape} and a 160m draft", draft_figures,
                          as_asked(args, None))
