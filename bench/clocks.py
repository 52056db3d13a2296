"""Measuring seconds and bytes of a call."""

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
    """Of run(*args)."""
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def median_step(run: Callable[[], object]) -> float:
    """Median seconds of a step."""
    return statistics.median(seconds(run) for _ in range(STEPS))


@torch.no_grad()
def step(model: Transformer, cache: KVCache) -> None:
    """Decode a token of every row, greedily, and read it on the host as the decode loop does."""
    logits = model(torch.zeros_like(cache.length)[:, None], cache)
    logits.argmax(-1).tolist()


def decode_at(model: Transformer, cache: KVCache, position: int) -> float:
    """Median seconds of a decode step at this position."""
    cache.length.fill_(position)
    return median_step(lambda: step(model, cache))


def compile_all(model: Transformer, *caches: KVCache) -> float:
    """Compile every graph and run it as often as it needs (generate.warm). Returns the seconds."""
    def compile_and_run():
        compile_model(model)
        for cache in caches:
            if cache.batch_size == 1:
                warm(model, cache)
                continue
            for _ in range(3 if cache.length.is_cuda else 1):
                step(model, cache)
    return seconds(compile_and_run)


def rounds(most: int | None = None) -> Iterator[int]:
    """The numbers of so many rounds, with a progress bar."""
    most = most or ROUNDS
    with progress("measuring", "rounds") as show:
        for n in range(most):
            yield n
            show(n + 1, most)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had, since `forget_peak` where the system allows it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, whose ru_maxrss would begin with the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Measure peak_bytes from here on: loading and compiling may take more memory than running."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
