"""How many threads the model's steps run on, on a CPU that other programs use too.

By itself a model runs on PyTorch's number of threads. The programs let that number adapt
(`adapt_threads`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from statistics import median

import torch


class ThreadTuner:
    """Chooses how many threads steps run on: all, or fewer while other programs use the cores.

    The threads of a step wait for each other at every operator. When one of them shares its core
    with another program, all of them wait for the scheduler each time, and one thread alone may be
    faster than all. So when steps get less than their core, half the threads are tried for a few
    steps, and kept if they are faster. From time to time twice as many are tried again, more rarely
    after each trial that fails. On an idle machine there are no trials."""

    def __init__(self, n: int):
        self.most = n  # threads that there may be
        self.now = n  # threads that the next step runs on
        self.seconds: dict = {}  # kind of step -> seconds of its latest steps with `now` threads
        # During a trial of `now`: (threads before, kind of step, median seconds of it before).
        self.trial: tuple | None = None
        self.crowded = 0  # steps in a row that shared their core
        self.calm = 0  # steps in a row that had their core to themselves
        self.wait = 0.0  # seconds until the next trial may start
        self.rest = 0.5  # seconds between two trials

    def note(self, kind, seconds: float, cpu_seconds: float) -> None:
        """Record a step: its seconds, and for how many of them this thread ran. Only steps of one
        kind are compared with each other. This may change `now`, for the steps that follow."""
        latest = [*self.seconds.get(kind, ())[-4:], seconds]
        self.seconds[kind] = latest
        if self.trial:
            self.end_trial()
            return
        if cpu_seconds > 0.8 * seconds:
            self.crowded, self.calm = 0, self.calm + 1
        else:
            self.crowded, self.calm = self.crowded + 1, 0
        if self.calm == 10:  # the other program may have ended
            self.wait = min(self.wait, 0.5)
        self.wait -= seconds
        if self.wait > 0 or len(latest) < 3:
            return
        if self.now > 1 and self.crowded >= 3:
            self.start_trial(self.now // 2, kind)
        elif self.now < self.most:
            self.start_trial(min(2 * self.now, self.most), kind)

    def start_trial(self, n: int, kind) -> None:
        self.trial = self.now, kind, median(self.seconds[kind])
        self.now, self.seconds = n, {}

    def end_trial(self) -> None:
        """Keep the new number of threads, or go back, once three steps can be compared. One very
        slow step is enough."""
        before, kind, seconds_before = self.trial
        seconds = self.seconds.get(kind, [])
        if len(seconds) < 3 and max(seconds, default=0) < 3 * seconds_before:
            return
        if median(seconds) < 0.95 * seconds_before:
            self.rest = 0.5
        else:
            self.rest = min(2 * self.rest, 4.0)
            self.now = before
        self.wait = max(self.rest, 10 * sum(seconds))  # trials take a tenth of the time at most
        self.trial, self.seconds = None, {}


# This process's tuner. None: steps run on PyTorch's own number of threads.
adaptive: ThreadTuner | None = None


def adapt_threads() -> None:
    """Run this process's steps on as many threads as run undisturbed, at most PyTorch's number.
    Only programs call this, since it changes PyTorch's number between two steps."""
    global adaptive
    adaptive = ThreadTuner(torch.get_num_threads())


def keep_threads() -> None:
    """Run steps on PyTorch's number of threads again."""
    global adaptive
    if adaptive and torch.get_num_threads() == adaptive.now:
        torch.set_num_threads(adaptive.most)
    adaptive = None


def most_threads() -> int:
    """How many threads there may be: PyTorch's number, unless the tuner has set it."""
    now = torch.get_num_threads()
    return adaptive.most if adaptive and now == adaptive.now else now


@contextlib.contextmanager
def timed_step(kind) -> Iterator[None]:
    """The context of a step on a CPU. Where threads adapt, it records how long the step took.
    torch.set_num_threads still sets the most threads that there may be."""
    global adaptive
    if adaptive is None:
        yield
        return
    if most_threads() != adaptive.most:  # the user has set another number
        adaptive = ThreadTuner(torch.get_num_threads())
    start, cpu_start = time.perf_counter(), time.thread_time()
    yield
    if adaptive.most > 1:
        adaptive.note(kind, time.perf_counter() - start, time.thread_time() - cpu_start)
        torch.set_num_threads(adaptive.now)


@contextlib.contextmanager
def at_most(n: int) -> Iterator[None]:
    """Run the block on n threads, or on fewer where PyTorch's number is lower."""
    before = torch.get_num_threads()
    if before <= n:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
