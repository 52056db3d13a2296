"""What a grammar adds to a step: its mask, and drawing from what is left."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from bench.clocks import STEPS, compile_all, rounds
from bench.models import sizes
from draw import RowSampler
from formats.hub import find
from generate import make_cache
from grammar import Grammar
from model import Transformer
from sample import Sampling
from terminal import say
from tokenizer import Tokenizer

SCHEMA = {"type": "array", "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags", "born"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0},
                   "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
                   "born": {"type": "string", "format": "date"}}}}


@torch.no_grad()
def bench_grammar(args, model: Transformer) -> dict:
    """Seconds of a step, and of drawing its tokens with a grammar and without one, in turns. A GPU
    computes while the host masks, so there both are the seconds of the step with its draw. A row
    whose answer ends begins another one."""
    cache = make_cache(model, args.sink, args.window, args.batch)
    say("compiling")
    out = dict(**sizes(cache), compile_s=compile_all(model, cache))
    began = time.perf_counter()
    tokenizer, config = Tokenizer(find(args.checkpoint)[0]), model.config
    free = Sampling(0.8, top_p=0.95, seed=1)
    ways = {"free": free,
            "grammar": replace(free, grammar=Grammar(tokenizer, config.vocab_size, schema=SCHEMA))}
    out["first_grammar_s"] = time.perf_counter() - began
    samplers = {way: RowSampler(args.batch, config.vocab_size, cache.length.device) for way in ways}
    for way, sampler in samplers.items():
        for row in range(args.batch):
            sampler.begin(row, ways[way], [0], config.eos_ids)
    steps, draws = [], {way: [] for way in ways}
    tokens = torch.ones_like(cache.length)[:, None]
    for _ in rounds():
        for way, sampler in samplers.items():
            took = []
            for _ in range(STEPS):
                start = time.perf_counter()
                logits = model(tokens, cache)
                computed = time.perf_counter()
                tokens = sampler.sample(logits)
                ids = tokens[:, 0].tolist()
                end = time.perf_counter()
                took.append(end - (start if tokens.is_cuda else computed))
                steps.append(end - start)
                for row in (row for row, token_id in enumerate(ids) if token_id in config.eos_ids):
                    sampler.begin(row, ways[way], [0], config.eos_ids)
            draws[way].append(statistics.mean(took))
    out["step_s"] = statistics.median(steps)
    out.update({f"{way}_s": statistics.median(took) for way, took in draws.items()})
    added = [ours - plain for ours, plain in zip(draws["grammar"], draws["free"], strict=True)]
    out["added_share"] = statistics.median(added) / out["step_s"]
    return out
