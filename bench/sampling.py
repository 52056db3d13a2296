"""What drawing a token costs, beside a step of the model."""

from __future__ import annotations

import statistics
import time

import torch

from bench.clocks import STEPS, compile_all, rounds
from bench.models import sizes
from draw import RowSampler
from generate import make_cache
from model import Transformer
from sample import Sampling
from terminal import say

SETTINGS = {  # row r of a batch has setting r modulo the list's length
    "greedy": [Sampling()],
    "free": [Sampling(1.0, seed=1)],
    "default": [Sampling(0.8, top_p=0.95, seed=1)],
    "top_k": [Sampling(0.8, 50, 0.95, seed=1)],
    "min_p": [Sampling(1.0, min_p=0.05, seed=1)],
    "penalties": [Sampling(0.8, 0, 0.95, 0, 1.1, 0.1, 0.1, seed=1)],
    "mixed": [Sampling(0.8, top_p=0.95, seed=1), Sampling(), Sampling(0.8, 50, 0.95, seed=2),
              Sampling(1.0, min_p=0.05, seed=3)],
}


@torch.no_grad()
def bench_sampling(args, model: Transformer) -> dict:
    """Seconds of drawing tokens, for each of SETTINGS, beside those of a step. Each step reads the
    tokens that were drawn, so a trained model's distributions are those of real text."""
    cache = make_cache(model, args.sink, args.window, args.batch)
    say("compiling")
    out = dict(**sizes(cache), compile_s=compile_all(model, cache))
    device, vocab_size = cache.length.device, model.config.vocab_size
    kinds = {}
    for name, asked in SETTINGS.items():
        kinds[name] = RowSampler(args.batch, vocab_size, device)
        for row in range(args.batch):
            kinds[name].begin(row, asked[row % len(asked)], [0])
    steps, draws = [], {name: [] for name in kinds}
    tokens = torch.ones_like(cache.length)[:, None]
    for _ in rounds():
        for name, rows in kinds.items():
            took = []
            for _ in range(STEPS):
                start = time.perf_counter()
                logits = model(tokens, cache)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                computed = time.perf_counter()
                tokens = rows.sample(logits)
                tokens.tolist()
                steps.append(computed - start)
                took.append(time.perf_counter() - computed)
            draws[name].append(statistics.mean(took))
    out["step_s"] = statistics.median(steps)
    for name, took in draws.items():
        out[f"{name}_s"] = statistics.median(took)
        out[f"{name}_share"] = out[f"{name}_s"] / out["step_s"]
    return out
