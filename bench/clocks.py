"""Seconds and bytes: how long a call takes, and how much memory it took."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from generate import warm
from kv_cache import KVCache
from load import compile_model
from model import Transformer
from terminal import progress

STEPS, ROUNDS = 16, 9  # decode steps a round; rounds a figure


def seconds(run: Callable, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def median_step(run: Callable[[], object]) -> float:
    return statistics.median(seconds(run) for _ in range(STEPS))


@torch.no_grad()
def step(model: Transformer, cache: KVCache) -> None:
    """One token for every row, greedy and read by the host, as in the decode loop."""
    logits = model(torch.zeros_like(cache.length)[:, None], cache)
    logits.argmax(-1).tolist()


def decode_at(model: Transformer, cache: KVCache, position: int) -> float:
    cache.length.fill_(position)
    return median_step(lambda: step(model, cache))


def compile_all(model: Transformer, *caches: KVCache) -> float:
    """Compile and run every graph, as often as generate.warm says; seconds."""
    def compile_and_run():
        compile_model(model)
        for cache in caches:
            if cache.batch_size == 1:
                warm(model, cache)
                continue
            for _ in range(3 if cache.length.is_cuda else 1):
                step(model, cache)
    return seconds(compile_and_run)


def rounds() -> Iterator[int]:
    """The numbers of the rounds, with a progress bar."""
    with progress("measuring", "rounds") as show:
        for n in range(ROUNDS):
            yield n
            show(n + 1, ROUNDS)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had, since `forget_peak` where that works."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss begins with the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """What loading and compiling took would hide how much memory running takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
