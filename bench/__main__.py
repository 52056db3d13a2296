"""Speed and memory against the machine's measured limits, and against peers, in one run.

    python -m bench
    python -m bench --shape 1.1b --quantize int4 --peer transformers

What is measured, with the peer that it can be held against:

    python -m bench --shape 1.1b [--peer transformers]            # steps: decode and prefill
    python -m bench --shape 1.1b --window 508 --turns mt_bench.jsonl [--peer streaming]
    python -m bench --shape 1.1b --streams 64 [--batch 8] [--peer transformers]
    python -m bench --shape 1.1b --busy 2                         # beside programs that never sleep
    python -m bench --checkpoint smollm2 --sampling [--batch 8]   # drawing a token, beside a step
    python -m bench --checkpoint smollm2 --grammar [--batch 8]    # what a schema adds to a step
    python -m bench --products [bf16 int8 ...]                    # linear.TABLE's on this CPU
    python -m bench --gpu limits|decode|peers|batches             # a table, see gpu.py

A step reads every weight once, so it takes at least bytes / bandwidth. The speed of shared machines
drifts, so what is compared is measured in turns, round after round. A figure is the median of the
rounds, and a ratio is the median of the ratios of each round. --turns takes a file's turns as one
endless conversation; --streams generates from many prompts by continuous batching. A --shape has
random weights, made on the device: speed does not depend on their values. With --emulate avx2 a
machine with AVX-512 computes as one without: such figures are called emulated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from bench.busy import bench_busy
from bench.gpu import bench_gpu
from bench.grammar import bench_grammar
from bench.models import SHAPES, open_model
from bench.products import KINDS, bench_products, emulate
from bench.sampling import bench_sampling
from bench.steps import bench_steps
from bench.streams import bench_streams
from bench.turns import bench_turns
from cli import make_parser, number
from terminal import user_errors
from threads import keep_threads


def check(args) -> None:
    """Raises ValueError for flags that do not go together, and fills in the defaults that depend on
    other flags."""
    modes = [mode for mode in ("turns", "streams", "busy", "sampling", "grammar")
             if getattr(args, mode)]
    steps, rows = not modes, args.batch or 1
    for given, together, rule in (
            (len(modes) > 1, False, " and ".join(f"--{mode}" for mode in modes)
             + " exclude each other"),
            (args.busy, not (args.peer or rows > 1), "--busy goes with one row and no --peer"),
            (args.sampling, not args.peer, "--sampling goes with no --peer"),
            (args.grammar, not (args.peer or args.shape),
             "--grammar goes with no --peer or --shape"),
            (args.gpt_fast, args.gpu == "peers", "--gpt-fast goes with --gpu peers"),
            (args.gpu, not (set(modes) - {"turns"} or args.batch or args.peer),
             "--gpu says itself what it measures: no --streams, --busy, --sampling, --batch "
             "or --peer"),
            (args.gpu and args.quantize, args.gpu in ("decode", "batches"),
             "of --gpu, --quantize goes with decode and batches"),
            (args.rounds, args.gpu, "--rounds goes with --gpu"),
            (args.limit, args.turns, "--limit goes with --turns"),
            (args.max_new_tokens, args.turns, "--max-new-tokens goes with --turns"),
            (args.turns, rows == 1, "--turns goes with one row"),
            (args.speculate, steps and args.shape and rows == 1 and not args.quantize,
             "--speculate goes with --shape, one row and no --quantize"),
            (args.recompute, steps and rows == 1, "--recompute goes with one row"),
            (args.peer, args.shape and (args.streams or rows == 1),
             "--peer goes with --shape and one row, or with --shape and --streams"),
            (args.peer == "streaming", args.turns, "--peer streaming goes with --turns"),
            (args.peer == "transformers", not args.turns,
             "--peer transformers does not go with --turns; --peer streaming does")):
        if given and not together:
            raise ValueError(rule)
    args.batch = args.batch or (8 if args.streams else 1)
    args.max_new_tokens = args.max_new_tokens or 128


def measured(args) -> Callable:
    """The function that measures what the flags ask for."""
    for flag, function in ((args.turns, bench_turns), (args.streams, bench_streams),
                           (args.busy, bench_busy), (args.sampling, bench_sampling),
                           (args.grammar, bench_grammar)):
        if flag:
            return function
    return bench_steps


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="JSON on stdout")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens, never evicted; default 4")
    add("--shape", choices=SHAPES,
        help="a model of this size with random weights; default: a checkpoint")
    add("--batch", type=number(int, 1), metavar="B",
        help="streams side by side; default 1, with --streams 8")
    add("--peer", choices=["transformers", "streaming"], help="time it too, in turns with ours")
    add("--recompute", action="store_true", help="time the sliding window with recomputation too")
    add("--speculate", type=number(int, 1), metavar="K",
        help="time speculation at its best (K proposals, all accepted) and worst")
    add("--turns", metavar="FILE", help="time an endless conversation of a prompts file's turns")
    add("--limit", type=number(int, 1), metavar="N",
        help="of --turns, the first N turns only; default 20")
    add("--max-new-tokens", type=number(int, 2), metavar="N",
        help="an answer's tokens, at most; default 128")
    add("--streams", type=number(int, 1), metavar="N",
        help="time continuous batching of N synthetic prompts")
    add("--busy", type=number(int, 1), metavar="N",
        help="time decoding beside N programs that never sleep, and alone")
    add("--sampling", action="store_true", help="time how tokens are drawn")
    add("--grammar", action="store_true", help="time what a JSON Schema adds to a step")
    add("--products", nargs="*", choices=KINDS, metavar="KIND",
        help=f"time every product of linear.TABLE, of these kinds of weight: {', '.join(KINDS)}")
    add("--emulate", choices=["avx2"], help="compute without AVX-512 where the CPU has it")
    add("--gpu", choices=["limits", "decode", "peers", "batches"], help="a part of gpu.py's table")
    add("--rounds", type=number(int, 1), metavar="N", help="rounds of --gpu; default 9")
    add("--gpt-fast", metavar="DIR", help="a copy of gpt-fast, for --gpu peers")
    with user_errors(parser):
        args = parser.parse_args()
        check(args)
        if args.emulate:
            emulate()
        keep_threads()  # every figure is of the same number, and --busy says where it adapts
        if args.gpu:
            bench_gpu(args)
            return
        if args.products is not None:
            bench_products(args)
            return
        start = time.perf_counter()
        model = open_model(args)
        load_s = time.perf_counter() - start
        figures = measured(args)(args, model)
    weight = model.norm.weight
    figures = dict(model=args.shape or str(args.checkpoint), device=str(weight.device),
                   torch=torch.__version__, threads=torch.get_num_threads(), emulated=args.emulate,
                   dtype=str(weight.dtype), quantize=args.quantize,
                   load_s=None if args.shape else load_s, **figures)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
