"""This engine and llama.cpp in turns on one model: prefill, and decode after some held tokens.

    python -m bench.duel --checkpoint smollm2 --gguf smollm2.q8_0.gguf --quantize int8
    python -m bench.duel --gguf smollm2.bf16.gguf --held 32 508 4092 --plot held.png

A figure is the median of the rounds; a ratio, ours over theirs, the median of the rounds' own, with
the least and the greatest of them. llama-cpp-python may lie in an environment of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from bench.clocks import rounds
from bench.llamacpp import add_peer, llama_cpp
from bench.products import emulate
from cli import load_arguments, make_parser, number
from eval import check_plot
from generate import generate, make_cache, warm
from kv_cache import KVCache
from load import load
from model import Transformer
from terminal import say, user_errors
from threads import keep_threads

PREFILLS = 128, 10  # tokens to read
STEPS = 24  # decode steps a round


def prompt(n: int) -> list[int]:
    """The ids that bench/llamacpp_peer.py takes, too."""
    return [100 + i % 1000 for i in range(n)]


def token_times(model: Transformer, cache: KVCache, ids: list[int], n: int) -> list[float]:
    """Seconds until each of the n tokens that follow ids. The first includes reading them."""
    cache.reset()
    clock = [time.perf_counter()]
    for _ in generate(model, cache, ids, n, stop_ids=()):
        clock.append(time.perf_counter())
    return [after - before for before, after in zip(clock, clock[1:])]


def prefill(model: Transformer, cache: KVCache, n: int) -> float:
    """Seconds to read n tokens."""
    first, second = token_times(model, cache, prompt(n), 2)
    return first - second


def decode(model: Transformer, cache: KVCache, held: int) -> float:
    """Median seconds of STEPS steps that follow `held` tokens."""
    return statistics.median(token_times(model, cache, prompt(held), STEPS + 2)[2:])


def in_turns(args, ours: Callable[[], float], theirs: Callable[[], float]) -> dict:
    """The medians of both in seconds, and of ours over theirs in speed, after a round that only
    warms; with the least and the greatest ratio of a round."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in rounds(args.rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return dict(ours_s=statistics.median(a for a, _ in pairs),
                theirs_s=statistics.median(b for _, b in pairs),
                ratio=statistics.median(ratios), lowest=ratios[0], highest=ratios[-1])


@torch.no_grad()
def measure(args, model: Transformer, cache: KVCache, ask: Callable) -> list[dict]:
    """One record for each prefill and for each number of held tokens."""
    records = []
    for n in PREFILLS:
        found = in_turns(args, partial(prefill, model, cache, n), partial(ask, "prefill", n=n))
        records.append(dict(what=f"prefill of {n}", tokens=n, **found))
    for held in args.held:
        found = in_turns(args, partial(decode, model, cache, held),
                         partial(ask, "decode", held=held, n=STEPS))
        records.append(dict(what=f"decode, {held} held", tokens=1, held=held, **found))
    return records


def plot_decode(path: str, records: list[dict]) -> None:
    """Decode speed of both by the number of held tokens."""
    from matplotlib import pyplot as plt
    decoded = [record for record in records if "held" in record]
    figure, axes = plt.subplots(figsize=(8, 4))
    for name, key in (("gpt-stream", "ours_s"), ("llama.cpp", "theirs_s")):
        axes.plot([r["held"] for r in decoded], [1 / r[key] for r in decoded], "o-", label=name)
    axes.set(xlabel="tokens held in the cache", ylabel="tokens a second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    parser = make_parser(__doc__, "smollm2")
    add = parser.add_argument
    add_peer(parser)
    add("--held", type=number(int, 1), nargs="+", default=[32], metavar="N",
        help="tokens in both caches before the timed steps")
    add("--rounds", type=number(int, 1), default=9, metavar="N", help="rounds of a figure")
    add("--eager", action="store_true", help="do not compile")
    add("--emulate", choices=["avx2"], help="compute without AVX-512 where the CPU has it")
    add("--plot", metavar="FILE.png", help="draw it")
    add("--json", action="store_true", help="JSON on stdout")
    with user_errors(parser):
        args = parser.parse_args()
        if args.plot:
            check_plot(args.plot)
        if args.emulate:
            emulate()
        keep_threads()
        model, _ = load(args.checkpoint, **load_arguments(args), compile=not args.eager)
        cache = make_cache(model, window=args.window)
        context = max(args.held) + STEPS + max(PREFILLS)
        with llama_cpp(args.llama_python, args.gguf, context, torch.get_num_threads()) as ask:
            say("compiling")
            warm(model, cache)
            records = measure(args, model, cache, ask)
    for record in records:
        if args.json:
            print(json.dumps(record))
            continue
        ours, theirs = (record["tokens"] / record[key] for key in ("ours_s", "theirs_s"))
        print(f"{record['what']:18} {ours:8.1f} {theirs:8.1f} tok/s   ratio {record['ratio']:.2f}"
              f" ({record['lowest']:.2f} to {record['highest']:.2f})")
    if args.plot:
        plot_decode(args.plot, records)


if __name__ == "__main__":
    main()
