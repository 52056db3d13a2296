"""A stream of a million tokens: its memory, its logits and its speed.

    python tests/stress/endless.py --tokens 1000000 --compile
    python tests/stress/endless.py --tokens 20000 --window 28        # a short one

The embedded model talks to itself in float32, past its window again and again. Measured are how
much memory grew after the ring was full for the first time, how far the last token's logits are
from the oracle's (oracle.py, which is fed the sinks and the n_layers x W tokens that can matter, in
float64), and a step on this cache against one on a cache that has just become full, in turns. Exits
with 1 where memory grew by more than 1 MB or a logit is off by more than 1e-4.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median

STRESS = Path(__file__).parent
sys.path[:0] = [str(STRESS.parent.parent), str(STRESS.parent), str(STRESS)]

import torch  # noqa: E402

from cli import number, plain_parser  # noqa: E402
from generate import generate, load, make_cache  # noqa: E402
from oracle import Stream  # noqa: E402

TINY = STRESS.parent.parent / "checkpoints" / "tiny"
STEPS = 100  # in a turn


def resident() -> int:
    """Bytes of memory in use by this process; off Linux, the most so far."""
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def talk(model, cache, prompt_ids: list[int], tokens: int):
    """Generate this many tokens. Returns the first n_sink ids, the latest n_layers x W, and the
    bytes by which memory grew after the ring had been full twice."""
    ids = list(prompt_ids)
    latest = deque(ids, maxlen=model.config.n_layers * cache.window)
    warm, every, grown, base = 2 * cache.of_layer[0].n_used, max(1, tokens // 20), 0, 0
    said = generate(model, cache, prompt_ids, tokens, stop_ids=(), temperature=0.8, seed=0)
    for n, token_id in enumerate(said, 1):
        latest.append(token_id)
        if len(ids) < cache.n_sink:
            ids.append(token_id)
        if n == warm:
            base = resident()
        elif n > warm and n % every == 0 or n == tokens:
            grown = max(grown, resident() - base)
            print(f"{n} tokens, {grown / 1e6:.2f} MB more than after {warm}", file=sys.stderr)
    return ids[:cache.n_sink], list(latest), grown


@torch.no_grad()
def off_by(model, cache, sinks: list[int], latest: list[int]) -> float:
    """The largest difference between the latest token's logits and the oracle's."""
    cache.rollback(1)
    logits = model(torch.tensor([latest[-1:]]), cache)[0, -1]
    plain, _ = load(TINY, "cpu", torch.float32)  # in eager mode, with its weights in rows
    oracle = Stream(plain, cache.n_sink, cache.window)
    for token_id in sinks + latest:
        expected = oracle.feed(token_id)
    return (logits - expected).abs().max().item()


@torch.no_grad()
def old_over_young(model, old, turns: int) -> float:
    """A step's time on an old cache over that on one that has just become full; the median of
    turns."""
    young = make_cache(model, old.n_sink, old.window)
    token = torch.zeros(1, 1, dtype=torch.int64)
    while int(young.length) < young.of_layer[0].n_used:
        model(token, young)

    def steps(cache) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            model(token, cache)
        return time.perf_counter() - start

    steps(old), steps(young)
    return median(steps(old) / steps(young) for _ in range(turns))


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("--tokens", type=number(int, 1), default=1_000_000, metavar="N",
                        help="tokens that are said")
    parser.add_argument("--window", type=number(int, 1, 252), default=252, metavar="W",
                        help="latest tokens seen")
    parser.add_argument("--turns", type=number(int, 1), default=41, metavar="N",
                        help="turns that a step is timed in")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model for this machine first")
    args = parser.parse_args()
    model, tokenizer = load(TINY, "cpu", torch.float32, compile=args.compile)
    cache = make_cache(model, window=args.window)
    least = 300 + max(2 * cache.of_layer[0].ring, model.config.n_layers * cache.window)
    if args.tokens < least:
        parser.error(f"--tokens {args.tokens} is too few to be old; at least {least}")
    start = time.perf_counter()
    sinks, latest, grown = talk(model, cache, tokenizer.encode("It was a dark"), args.tokens)
    seconds = time.perf_counter() - start
    record = dict(tokens=int(cache.length), tok_s=args.tokens / seconds, grown_bytes=grown,
                  off_by=off_by(model, cache, sinks, latest),
                  old_over_young=old_over_young(model, cache, args.turns))
    print(json.dumps(record))
    sys.exit(grown > 1e6 or not record["off_by"] < 1e-4)


if __name__ == "__main__":
    main()
