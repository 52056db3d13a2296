"""Continuous batching of many prompts, beside padded batches."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator

from bench import peers
from bench.apart import beside
from bench.clocks import compile_all, decode_at, rounds, seconds
from bench.models import peer_settings, sizes
from model import Transformer
from streams import Batch, Stream, generate_batch
from terminal import progress, say


def synthetic(n: int, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 10 to 400 tokens, and how many new ones each of them wants, 10 to 200."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(vocab_size) for _ in range(numbers.randint(10, 400))]
               for _ in range(n)]
    return prompts, [numbers.randint(10, 200) for _ in range(n)]


def listen(events: Iterator[tuple[Stream, int | None]], n: int) -> None:
    """Run generate_batch until n more streams have ended."""
    for _, token_id in events:
        n -= token_id is None
        if not n:
            return


def bench_streams(args, model: Transformer) -> dict:
    prompts, wanted = synthetic(args.streams, model.config.vocab_size)
    batch = Batch(model, args.batch, args.sink, args.window)
    say("compiling")
    compile_s = compile_all(model, batch.staging[0], batch.cache)
    list(generate_batch(model, [[0]] * 2, max_new_tokens=3, stop_ids=(), batch=batch))
    events = generate_batch(model, prompts, max_new_tokens=wanted, stop_ids=(), batch=batch)
    ours, theirs = [], []
    with (beside(args, peers.static_batches, *peer_settings(args)) as peer,
          progress("measuring", "streams") as show):
        for first in range(0, len(prompts), args.batch):  # in turns: as many end here as there
            some = slice(first, first + args.batch)
            ours.append(seconds(listen, events, len(prompts[some])))
            if peer:
                theirs.append(seconds(peer, prompts[some], max(wanted[some])))
            show(len(prompts[:some.stop]), len(prompts))
    size = batch.cache.n_sink + batch.cache.window
    steps = [[decode_at(model, cache, size) for cache in (batch.staging[0], batch.cache)]
             for _ in rounds()]
    out = dict(**sizes(batch.cache), compile_s=compile_s, streams=len(prompts),
               prompt_tokens=sum(map(len, prompts)), new_tokens=sum(wanted),
               tok_s=sum(wanted) / sum(ours), steps=batch.steps,
               rows_busy=batch.row_steps / (batch.steps * args.batch),
               single_step_s=statistics.median(one for one, _ in steps),
               batch_step_s=statistics.median(many for _, many in steps),
               batch_over_single=statistics.median(args.batch * a / b for a, b in steps))
    if theirs:
        out["transformers_static_tok_s"] = sum(wanted) / sum(theirs)
        out["over_transformers_static"] = sum(theirs) / sum(ours)
    return out
