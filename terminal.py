"""What a program shares with its terminal: streams, bars, signals, and errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import logging
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tp
from formats.files import name_leftovers
from threads import adapt_threads, keep_threads

# The signals that asked the program to end, the first of which it ends by, and those that may ask.
ending: list[int] = []
heeded: list[int] = []


@contextlib.contextmanager
def user_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A program's main does its work in this context. An error of the user's ends it with one line
    and status 2; a signal, or a stdout that nobody reads any more, ends it without a line. What
    the engine logs meanwhile goes to stderr."""
    open_streams()
    behave_as_rank()
    adapt_threads()
    # It advises a setting that no program has: what is asked for in float32 is computed in it.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32")
    with log_to_stderr():
        try:
            with end_on_signals(), finish(parser):
                yield
        except (Exception, KeyboardInterrupt) as error:
            status = report(parser, error)
            if status is None:
                raise
            sys.exit(status)
        finally:
            keep_threads()
            ending.clear()
            heeded.clear()


@contextlib.contextmanager
def finish(parser: argparse.ArgumentParser) -> Iterator[None]:
    """At the end of a program's work, write out stdout, wait for the other ranks, and exit by the
    signal that asked for it, if one did."""
    try:
        yield
    except Exception as error:
        if not ending:
            raise
        # Raised while saving during shutdown, or by C code that wrapped our SystemExit.
        fail(parser, error_line(error))
    finally:
        sys.stdout.flush()  # here, so that a failure is reported here and not by Python at its exit
    tp.part()
    if ending:
        sys.exit(128 + ending[0])


def report(parser: argparse.ArgumentParser, error: BaseException) -> int | None:
    """Say in one line what ended the program; its exit status. None for a fault of the program
    itself, which a traceback should show."""
    if isinstance(error, BrokenPipeError):  # nobody reads stdout any more
        drop_output()
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
        if sys.flags.dev_mode:  # python -X dev: whoever changes the code wants to see where
            return None
        if tp.local_rank() == 0 or not isinstance(error, ValueError):  # once a machine
            fail(parser, error_line(error))
        return 2
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # a CPU's allocator
        fail(parser, str(error).partition("] . ")[2] or str(error))
        return 2
    if isinstance(error, RuntimeError) and tp.n_ranks() > 1:
        fail(parser, f"rank {tp.rank()}: a process was lost, or failed: {error}")
        return 1
    return None


def error_line(error: Exception) -> str:
    """What to say of an error. One of stdout's own, as a full disk, counts before it."""
    return unwritten() or str(error) or type(error).__name__


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Say what the engine logs."""
    log, handler = logging.getLogger("gpt_stream"), LogHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


class LogHandler(logging.Handler):
    """Says every record, but an information only once: a draft may log what its model did."""

    def __init__(self):
        super().__init__()
        self.said = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.said or record.levelno > logging.INFO:
            self.said.add(line)
            say(line)


@functools.cache
def behave_as_rank() -> None:
    """What the programs call as they begin: under torchrun rank 0 alone writes to stdout, Ctrl-C
    ends the process, and so does the end of torchrun."""
    if tp.n_ranks() == 1:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun ends then, and with it every rank
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if tp.rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end_with(parent: int) -> None:
    """End this rank when torchrun has gone without ending it, as kill -9 does. (Whoever starts the
    ranks by other means, a shell for one, may leave them.)"""
    while os.getppid() == parent or "TORCHELASTIC_RUN_ID" not in os.environ:
        time.sleep(0.3)
    os._exit(1)


# ------------------------------------------------------------------------------ streams


class Lossy(io.FileIO):
    """A stream that drops what it cannot write."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """Open what a shell closed (`2>&-`), to nowhere: a file opened later would get its number, and
    what is printed. What stderr cannot take is dropped: a full disk, or a terminal that has gone,
    must not stop the work. The Hub's bars take several lines, which need a cursor that moves."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # and nobody listens in
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(Lossy(2, "w", closefd=False)), line_buffering=True,
            encoding=getattr(sys.stderr, "encoding", None), errors="backslashreplace")
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def fail(parser: argparse.ArgumentParser, message: str) -> None:
    line = message.splitlines()[0]
    line = line if len(line) <= 600 else f"{line[:450]} ... {line[-100:]}"
    sys.stderr.write(f"{parser.prog}: error: {line}\n")


def unwritten() -> str | None:
    """What keeps stdout from being written, as a full disk; None where nothing does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        return f"stdout: {error.strerror}"


def drop_output() -> None:
    """Or Python would try to write to stdout again when it ends, and say so in its own words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    if tp.rank() == 0:
        print(line, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Write to stdout at once, above progress bars. Raises OSError naming it, as on a full disk.
    When it is a terminal that has closed, the SIGHUP that comes of it may come later than this:
    what that signal ends, ends."""
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        with bar.external_write_mode() if bar else contextlib.nullcontext():
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        if error.errno != errno.EIO:
            raise OSError(f"stdout: {error.strerror}") from None
        signal.raise_signal(signal.SIGHUP)


@contextlib.contextmanager
def progress(doing: str, unit: str) -> Iterator[Callable[..., None]]:
    """How far long work is: yields show(count, total=None, note=""), to be called at each step.

    On a terminal that is one moving line; elsewhere, and on a dumb one, a plain line every ten
    seconds, and the last. Under torchrun rank 0 shows it for all."""
    try:
        from tqdm import tqdm
    except ImportError:  # then nothing is shown
        yield lambda count, total=None, note="": None
        return
    plain, said = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb", []

    def write(text: str) -> None:  # what tqdm would write over and over on one line, a line each
        if (line := text.strip()) and line not in said[-1:]:
            said.append(line)
            sys.stderr.write(f"{line}\n")

    lines = types.SimpleNamespace(flush=sys.stderr.flush, write=write)
    with tqdm(desc=doing, unit=f" {unit}", miniters=1, mininterval=10 if plain else 0.1,
              delay=1e-9, dynamic_ncols=True, leave=False, disable=tp.rank() > 0,
              file=lines if plain else sys.stderr) as bar:
        def update(count: int, total: int | None = None, note: str = "") -> None:
            bar.total, bar.leave = total, True  # of what never began, nothing is left
            if plain:
                of = f" of {total}" if total else ""
                bar.bar_format = f"{{desc}}: {count}{of} {unit}, {{elapsed}} passed{{postfix}}"
            bar.set_postfix_str(note, refresh=False)
            bar.update(count - bar.n)
        yield update


def wrote(path: Path) -> None:
    say(f"wrote {path}")
    name_leftovers(path)


# ------------------------------------------------------------------------------ signals


def ending_signals() -> list[int]:
    """What asks a program to end: SIGTERM, and the SIGHUP of a terminal that closes. One that was
    ignored when the program began, as under nohup, stays so."""
    kinds = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))  # one is not Windows'
    return [kind for kind in kinds if kind and signal.getsignal(kind) != signal.SIG_IGN]


def on_signals(kinds: list[int], handler: Callable) -> contextlib.ExitStack:
    """A context in which these signals have a handler. Under torchrun they have none, since a rank
    that waits for another could not run it: there they end every process (behave_as_rank)."""
    stack = contextlib.ExitStack()
    for kind in kinds if tp.n_ranks() == 1 else ():
        if (before := signal.getsignal(kind)) != signal.SIG_IGN:
            signal.signal(kind, handler)
            stack.callback(signal.signal, kind, before or signal.SIG_DFL)  # None is of C code
    return stack


def end_on_signals() -> contextlib.ExitStack:
    """SIGTERM and SIGHUP raise SystemExit in this context, and so leave nothing half-written. Once:
    what they interrupt may be cleaning up already. A third one is obeyed at once, if none is held.
    """
    def end(signal_number, frame):
        ending.append(signal_number)
        if len(ending) == 1:
            sys.exit(128 + signal_number)
        if len(ending) > 2:
            os._exit(128 + signal_number)

    heeded[:] = ending_signals()
    return on_signals(heeded, end)


@contextlib.contextmanager
def hold_interrupt():
    """Collect Ctrl-C in the list that this yields instead of raising it: half a step would leave
    the cache's length and its slots apart. A second one is raised as usual. What ends the program
    is collected too, and in `ending`; so is what came before, in a hold around this one."""
    caught = list(ending)

    def note(signal_number, frame):
        if signal_number != signal.SIGINT:
            ending.append(signal_number)
        elif caught:
            raise KeyboardInterrupt
        caught.append(signal_number)

    with on_signals([signal.SIGINT, *heeded], note):
        yield caught


@contextlib.contextmanager
def unheld_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process at once, where the program made exceptions of them: for
    those the Hub's library waits until its threads have fetched their files. Its cache is whole
    after a kill."""
    kinds = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
    before = {kind: signal.signal(kind, signal.SIG_DFL) for kind in kinds
              if kind and callable(signal.getsignal(kind))
              and threading.current_thread() is threading.main_thread()}  # no other may change them
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
