"""Decoding beside programs that never sleep: adaptive threads against one thread and all."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from bench.clocks import compile_all, step
from generate import make_cache
from kv_cache import KVCache
from model import Transformer
from terminal import say
from threads import adapt_threads, keep_threads

TURN, ROUNDS = 10.0, 3  # seconds of a turn; turns of each kind


@contextlib.contextmanager
def others(n: int) -> Iterator[None]:
    """Run n programs that never sleep. Each has a session of its own, since Linux may share the
    cores out by session."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
               for _ in range(n)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def tokens_a_second(model: Transformer, cache: KVCache, threads: int, adaptive: bool) -> float:
    """The rate of one turn of TURN seconds, on this number of threads, or adaptive with at most
    that number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    adapt_threads() if adaptive else keep_threads()
    cache.length.fill_(32)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() < start + TURN:
        step(model, cache)
        steps += 1
    keep_threads()
    torch.set_num_threads(before)
    return steps / (time.perf_counter() - start)


def bench_busy(args, model: Transformer) -> dict:
    """Tokens a second with adaptive threads ("chosen"), with one and with all, in turns, on an idle
    machine and beside args.busy programs."""
    cache, most = make_cache(model, args.sink, args.window), torch.get_num_threads()
    compile_all(model, cache)
    turns = {"chosen": (most, True), "one": (1, False), "all": (most, False)}
    figures = {}
    for n in (0, args.busy):
        values = {name: [] for name in turns}
        for _ in range(ROUNDS):
            for name, turn in turns.items():
                with others(n):
                    values[name].append(tokens_a_second(model, cache, *turn))
                say(f"beside {n}: {name} {values[name][-1]:.1f} tok/s")
        middle = {name: statistics.median(rates) for name, rates in values.items()}
        figures |= {f"beside_{n}_{name}_tok_s": rate for name, rate in middle.items()}
        figures |= {f"beside_{n}_chosen_over_{name}": statistics.median(
            a / b for a, b in zip(values["chosen"], values[name])) for name in ("one", "all")}
    return figures
