"""One long text, token by token: our stream beside llama.cpp, whose context shifts when it is full.

    python -m bench.shift --gguf smollm2.bf16.gguf --text book.txt --window 508 --max-tokens 20000

Both hold the same weights and S + W tokens at most. llama.cpp keeps the first S when its context
is full, drops half of the rest, and rotates the keys of what remains anew. Perplexity is of the
same tokens, and a step's time includes whatever it has to make room for. They take turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from bench.clocks import compile_all, peak_bytes
from bench.llamacpp import add_peer, llama_cpp
from cli import load_arguments, make_parser, number
from eval import nll, perplexity, read_text
from generate import make_cache
from kv_cache import KVCache
from load import load
from model import Transformer
from terminal import progress, say, user_errors
from threads import keep_threads

TURN = 500  # tokens that one of the two reads before the other does


@torch.no_grad()
def stream(model: Transformer, cache: KVCache, ids: list[int]) -> tuple[list[float], list[float]]:
    """Feed ids, all but the last, one by one. Nats of each following token, seconds of each step.
    """
    nats, times = [], []
    for token_id, following in zip(ids, ids[1:]):
        start = time.perf_counter()
        logits = model(torch.tensor([[token_id]], device=cache.length.device), cache)[0]
        times.append(time.perf_counter() - start)
        nats.append(nll(logits, torch.tensor([following], device=logits.device)).item())
    return nats, times


def measure(model: Transformer, cache: KVCache, ask: Callable, ids: list[int]) -> tuple[list, list]:
    """(nats, seconds) of ours, and of llama.cpp's."""
    ours, theirs, position = ([], []), ([], []), 0
    cache.reset()
    with progress("reading", "tokens") as show:
        for first in range(0, len(ids) - 1, TURN):
            some = ids[first:first + TURN + 1]
            answer = ask("shift", ids=some, n_keep=cache.n_sink, position=position)
            position = answer["position"]
            for all_of_them, new in zip(ours + theirs, (*stream(model, cache, some),
                                                        answer["nats"], answer["seconds"])):
                all_of_them += new
            show(min(first + TURN, len(ids) - 1), len(ids) - 1)
    return ours, theirs


def figures(nats: list[float], times: list[float], size: int) -> dict:
    """Perplexity of all tokens and of those after the context was first full; seconds of a step."""
    ordered = sorted(times)
    return dict(perplexity=perplexity(statistics.mean(nats)),
                perplexity_when_full=perplexity(statistics.mean(nats[size:])),
                step_median_s=statistics.median(times),
                step_p99_s=ordered[int(0.99 * len(ordered))], longest_s=ordered[-1])


def main():
    parser = make_parser(__doc__, "smollm2")
    add = parser.add_argument
    add_peer(parser)
    add("--sink", type=number(int, 0), default=4, metavar="S", help="first tokens, never evicted")
    add("--text", default="tests/text.txt", metavar="FILE", help="UTF-8 text, plain or .xz")
    add("--max-tokens", type=number(int, 2), default=20000, metavar="N",
        help="first N tokens of the text only")
    add("--json", action="store_true", help="JSON on stdout")
    with user_errors(parser):
        args = parser.parse_args()
        keep_threads()
        model, tokenizer = load(args.checkpoint, **load_arguments(args))
        ids = tokenizer.encode(read_text(args.text))[:args.max_tokens + 1]
        cache = make_cache(model, args.sink, args.window)
        size = cache.n_sink + cache.window
        if len(ids) <= size + 1:
            raise ValueError(f"--text {args.text} has {len(ids)} tokens; they must be more than "
                             f"S + W + 1 = {size + 1}")
        say("compiling")
        compile_all(model, cache)
        with llama_cpp(args.llama_python, args.gguf, size, torch.get_num_threads(),
                       exactly=True) as ask:
            ours, theirs = measure(model, cache, ask, ids)
            record = {"tokens": len(ids) - 1, "context": size, "cache_bytes": cache.nbytes(),
                      "gpt-stream": dict(figures(*ours, size),
                                         peak_bytes=peak_bytes(cache.length.device)),
                      "llama.cpp": dict(figures(*theirs, size), peak_bytes=ask("peak_bytes"))}
    if args.json:
        print(json.dumps(record))
        return
    for name, value in record["gpt-stream"].items():
        print(f"{name:22} {value:16.5g} {record['llama.cpp'][name]:16.5g}")


if __name__ == "__main__":
    main()
