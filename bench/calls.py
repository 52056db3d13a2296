"""How long a model's other calls take, in decode steps of one row: steps of eight rows, six tokens
of a row, which speculation checks, an eager step, and prompts of ten and of 128 tokens.

    python -m bench.calls --checkpoint smollm2 --quantize int8
    python -m bench.calls --checkpoint smollm2 --emulate avx2

All but prefill and the eager step are compiled. The calls take turns; a figure is the median of the
rounds, and a ratio the median of the rounds' own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial

import torch

from bench.clocks import rounds, seconds
from bench.products import emulate
from cli import load_arguments, make_parser, number
from generate import make_cache, prefill
from kv_cache import KVCache
from load import load
from model import Transformer
from terminal import say, user_errors
from threads import keep_threads

HELD = 32  # tokens in a cache before its first timed call


def feed(model: Transformer, cache: KVCache, n_tokens: int) -> None:
    """Feed n_tokens to every row, and wait for what the last ones say."""
    tokens = torch.full((cache.batch_size, n_tokens), 5, device=cache.length.device)
    model(tokens, cache)[:, -1].argmax(-1).tolist()


def read(model: Transformer, cache: KVCache, n_tokens: int) -> None:
    """Read a prompt of n_tokens from the beginning, and wait for what it says."""
    cache.reset()
    prefill(model, cache, list(range(n_tokens))).argmax(-1).tolist()


def all_calls(model: Transformer, eager: Transformer, window: int | None) -> dict[str, Callable]:
    """What is timed, by name; the step of one row comes first."""
    calls = {}
    for name, m, n_rows, n_tokens in (("a step", model, 1, 1), ("8 rows", model, 8, 1),
                                      ("6 tokens", model, 1, 6), ("eager step", eager, 1, 1)):
        cache = make_cache(m, window=window, batch_size=n_rows)
        for _ in range(HELD // n_tokens):
            feed(m, cache, n_tokens)
        calls[name] = partial(feed, m, cache, n_tokens)
    for n_tokens in (10, 128):
        calls[f"prompt of {n_tokens}"] = partial(
            read, model, make_cache(model, window=window), n_tokens)
    return calls


@torch.no_grad()
def measure(args, calls: dict[str, Callable]) -> list[dict]:
    """A record for each call: its seconds, and how many steps that is."""
    def once() -> dict[str, float]:
        return {name: statistics.median(seconds(call) for _ in range(args.calls))
                for name, call in calls.items()}

    once()  # only warms
    times = [once() for _ in rounds(args.rounds)]
    return [dict(what=name, seconds=statistics.median(time[name] for time in times),
                 steps=statistics.median(time[name] / time["a step"] for time in times))
            for name in calls]


def main():
    parser = make_parser(__doc__, "smollm2")
    add = parser.add_argument
    add("--rounds", type=number(int, 1), default=7, metavar="N", help="rounds of a figure")
    add("--calls", type=number(int, 1), default=5, metavar="N", help="calls of each in a round")
    add("--emulate", choices=["avx2"], help="compute without AVX-512 where the CPU has it")
    add("--json", action="store_true", help="JSON on stdout")
    with user_errors(parser):
        args = parser.parse_args()
        if args.emulate:
            emulate()
        keep_threads()
        model, eager = (load(args.checkpoint, **load_arguments(args), compile=compiled)[0]
                        for compiled in (True, False))
        say("compiling")
        with torch.no_grad():
            calls = all_calls(model, eager, args.window)
        records = measure(args, calls)
    for record in records:
        if args.json:
            print(json.dumps(record))
        else:
            print(f"{record['what']:14} {1e3 * record['seconds']:8.2f} ms {record['steps']:6.2f} "
                  "steps")


if __name__ == "__main__":
    main()
