"""How many threads a CPU's steps run on, when other programs want the cores, too.

A model alone runs on PyTorch's number of threads. The programs let it adapt (`adapt_threads`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from statistics import median

import torch


class Threads:
    """How many threads this process's steps run on: all, or fewer while others want their cores.

    The threads of a step wait for each other 200 times. When one of them has to share its core, all
    wait for the scheduler every time: beside one other program SmolLM2 says 1 to 14 words a second
    on two cores, and with one thread 65. So when steps get less than their core, half the threads
    are tried for a few steps, and kept if they are faster; more are tried again from time to time,
    the more rarely the longer that is in vain. Where nothing else runs, nothing is tried."""

    def __init__(self, n: int):
        self.most = self.now = n
        self.seconds: dict = {}  # kind of step -> those of the latest few, with `now` threads
        self.trial_of = None  # while `now` is on trial: threads before, and a kind's seconds then
        self.crowded = self.calm = 0  # steps in a row with less than their core, and with all of it
        self.wait, self.rest = 0.0, 0.5  # seconds to the next trial, and between two

    def note(self, kind, seconds: float, cpu_seconds: float) -> None:
        """Take note of a step: how long it was and how much of that this thread ran. Steps of one
        kind are compared. May change `now`, for the steps to come."""
        self.seconds[kind] = latest = [*self.seconds.get(kind, ())[-4:], seconds]
        if self.trial_of:
            self.judge(*self.trial_of)
            return
        free = cpu_seconds > 0.8 * seconds
        self.crowded, self.calm = (0, self.calm + 1) if free else (self.crowded + 1, 0)
        self.wait = min(self.wait, 0.5) if self.calm == 10 else self.wait  # somebody may have gone
        self.wait -= seconds
        if self.wait > 0 or len(latest) < 3:
            return
        if self.now > 1 and self.crowded >= 3:
            self.try_out(self.now // 2, kind)
        elif self.now < self.most:
            self.try_out(min(2 * self.now, self.most), kind)

    def try_out(self, n: int, kind) -> None:
        self.trial_of = self.now, kind, median(self.seconds[kind])
        self.now, self.seconds = n, {}

    def judge(self, before: int, kind, seconds_before: float) -> None:
        """Three steps decide, or one that is very slow."""
        seconds = self.seconds.get(kind, [])
        if len(seconds) < 3 and max(seconds, default=0) < 3 * seconds_before:
            return
        better = median(seconds) < 0.95 * seconds_before
        self.rest = 0.5 if better else min(2 * self.rest, 4.0)
        self.wait = max(self.rest, 10 * sum(seconds))  # a trial in vain costs a tenth at most
        self.now = self.now if better else before
        self.trial_of, self.seconds = None, {}
# Of this process: None is PyTorch's own number, always.
adaptive: Threads | None = None


def adapt_threads() -> None:
    """From now on run the steps of this process on as many threads as run undisturbed, PyTorch's
    number at most. The programs call it: it changes that number between two steps."""
    global adaptive
    adaptive = Threads(torch.get_num_threads())


def keep_threads() -> None:
    """Run steps on PyTorch's number of threads again."""
    global adaptive
    if adaptive and torch.get_num_threads() == adaptive.now:
        torch.set_num_threads(adaptive.most)
    adaptive = None


def most_threads() -> int:
    """How many there may be: PyTorch's number, unless it is one that was found here."""
    now = torch.get_num_threads()
    return adaptive.most if adaptive and now == adaptive.now else now


@contextlib.contextmanager
def timed_step(kind) -> Iterator[None]:
    """Around a step on a CPU: notes how long it took, where threads adapt. torch.set_num_threads
    still says how many there may be at most."""
    global adaptive
    if adaptive is None:
        yield
        return
    if most_threads() != adaptive.most:  # somebody set it
        adaptive = Threads(torch.get_num_threads())
    start, cpu_start = time.perf_counter(), time.thread_time()
    yield
    if adaptive.most > 1:
        adaptive.note(kind, time.perf_counter() - start, time.thread_time() - cpu_start)
        torch.set_num_threads(adaptive.now)


@contextlib.contextmanager
def at_most(n: int) -> Iterator[None]:
    """Run on n threads, or fewer where there are fewer already."""
    before = torch.get_num_threads()
    if before <= n:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
