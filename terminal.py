"""What programs do with their terminal: one-line errors, streams, progress bars and signals.

The module's state belongs to the process. Programs use it; the engine itself only raises and logs.
"""

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
from formats.files import first_line, name_leftovers
from threads import adapt_threads, keep_threads

# The signals that have asked the program to end, in the order in which they came.
received_signals: list[int] = []
# The signals that it ends by (see ending_signals), while it is in end_on_signals.
handled_signals: list[int] = []


@contextlib.contextmanager
def user_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A program's main does its work in this context. An error of the user's ends it with one line
    and status 2; a signal, or a stdout that nobody reads any more, ends it without a line. What
    the engine logs meanwhile goes to stderr."""
    open_streams()
    behave_as_rank()
    adapt_threads()
    # PyTorch advises to compute float32 in fewer bits; no program offers that.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32")
    # PyTorch's compiler warns when a CUDA build finds no GPU. It then works as a CPU build does.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
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
            received_signals.clear()
            handled_signals.clear()


@contextlib.contextmanager
def finish(parser: argparse.ArgumentParser) -> Iterator[None]:
    """At the end of a program's work, write out stdout, wait for the other ranks, and exit by the
    signal that asked for it, if one did."""
    try:
        yield
    except Exception as error:
        if not received_signals:
            raise
        # Raised while saving during shutdown, or by C code that wrapped our SystemExit.
        fail(parser, error_line(error))
    finally:
        sys.stdout.flush()  # here, so that a failure is reported here and not by Python at its exit
    tp.barrier()
    if received_signals:
        sys.exit(128 + received_signals[0])


def report(parser: argparse.ArgumentParser, error: BaseException) -> int | None:
    """Say in one line what ended the program; its exit status. None for a fault of the program
    itself, which a traceback should show."""
    if isinstance(error, BrokenPipeError):  # nobody reads stdout any more
        drop_output()
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (ValueError, OSError, MemoryError)):
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
    if isinstance(error, RuntimeError) and not sys.flags.dev_mode and (help := may_help(error)):
        cause = getattr(error, "inner_exception", error)  # what the compiler's own error is about
        fail(parser, f"{first_line(cause)[:300]}; {help} (python -X dev shows where it failed)")
        return 2
    return None


def may_help(error: RuntimeError) -> str | None:
    """What to try where a GPU failed, or PyTorch's compiler. None for other faults."""
    if torch.cuda.is_initialized() or "CUDA" in str(error):
        return "--device cpu, or leaving --compile out, may help"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "leaving --compile out may help"
    return None


def error_line(error: Exception) -> str:
    """What to say of an error. When stdout cannot be written, that is the reason to name."""
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
    """Says every record; one of level INFO only once, since a draft may log what its model did."""

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
    """Under torchrun, only rank 0 writes to stdout. Ctrl-C ends the process, and so does the end
    of torchrun. Programs call this as they begin."""
    if tp.n_ranks() == 1:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun gets it too and ends every rank
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if tp.rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end_with(parent: int) -> None:
    """End this rank when torchrun is gone without having ended it, as after kill -9. Ranks that
    something else has started, as a shell, may outlive it."""
    while os.getppid() == parent or "TORCHELASTIC_RUN_ID" not in os.environ:
        time.sleep(0.3)
    os._exit(1)


# ------------------------------------------------------------------------------ streams


class DroppingFileIO(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """Prepare stdin, stdout and stderr for a program.

    A standard stream that the shell closed (`2>&-`) is opened to /dev/null: otherwise a file opened
    later would get its number, and what is printed would go into that file. What stderr cannot
    write is dropped: a full disk or a closed terminal must not stop the work. What an encoding
    lacks, as ASCII does, is written as \\xe9, and bytes that it does not know can be read. The
    Hub's progress bars are off where the cursor cannot move, since they take several lines."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    if sys.stderr is sys.__stderr__:  # not replaced, as a test's capture does
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(DroppingFileIO(2, "w", closefd=False)), line_buffering=True,
            encoding=getattr(sys.stderr, "encoding", None), errors="backslashreplace")
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def fail(parser: argparse.ArgumentParser, message: str) -> None:
    """Write the message's first line to stderr as the program's error, cut to 600 characters."""
    line = message.splitlines()[0]
    line = line if len(line) <= 600 else f"{line[:450]} ... {line[-100:]}"
    sys.stderr.write(f"{parser.prog}: error: {line}\n")


def unwritten() -> str | None:
    """Why stdout cannot be written, as "stdout: No space left on device"; None if it can."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        return f"stdout: {error.strerror}"


def drop_output() -> None:
    """Send stdout to /dev/null. Otherwise Python would try to write the rest at its exit, and print
    an error of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Write a line to stderr, on rank 0 only."""
    if tp.rank() == 0:
        print(line, file=sys.stderr, flush=True)


def say_compiling() -> None:
    """Say that graphs are about to be compiled. How long one takes depends on the machine by a
    factor of ten, so each is then reported with its time (load.CompiledStep)."""
    say("compiling: a few seconds a graph if it was compiled here before, else half a minute or "
        "more, on a GPU minutes")


def show(text: str) -> None:
    """Write to stdout at once, above progress bars. Raises OSError naming stdout, for one when the
    disk is full. When stdout is a terminal that has closed, it raises the signal SIGHUP, since the
    system's own may come later."""
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
    """A progress bar. It yields update(count, total=None, note=""), to be called at each step.

    On a terminal the bar is one moving line. Elsewhere, and on a dumb terminal, it is a plain line
    every ten seconds and a last one. Under torchrun only rank 0 shows it."""
    try:
        from tqdm import tqdm
    except ImportError:  # without tqdm nothing is shown
        yield lambda count, total=None, note="": None
        return
    plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    said = []

    def write_line(text: str) -> None:
        """Write what tqdm redraws on one line as lines of their own, each only once."""
        if (line := text.strip()) and line not in said[-1:]:
            said.append(line)
            sys.stderr.write(f"{line}\n")

    lines = types.SimpleNamespace(flush=sys.stderr.flush, write=write_line)
    with tqdm(desc=doing, unit=f" {unit}", miniters=1, mininterval=10 if plain else 0.1,
              delay=1e-9, dynamic_ncols=True, leave=False, disable=tp.rank() > 0,
              file=lines if plain else sys.stderr) as bar:
        def update(count: int, total: int | None = None, note: str = "") -> None:
            bar.total, bar.leave = total, True  # a bar that was never updated leaves no line
            if plain:
                of = f" of {total}" if total else ""
                bar.bar_format = f"{{desc}}: {count}{of} {unit}, {{elapsed}} passed{{postfix}}"
            bar.set_postfix_str(note, refresh=False)
            bar.update(count - bar.n)
        yield update


def wrote(path: Path) -> None:
    """Say that `path` was written, and what killed runs left beside it."""
    say(f"wrote {path}")
    name_leftovers(path)


# ------------------------------------------------------------------------------ signals


def ending_signals() -> list[int]:
    """The signals that ask a program to end: SIGTERM, and the SIGHUP of a terminal that closes. A
    signal that was ignored when the program began, as under nohup, stays ignored."""
    kinds = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
    return [kind for kind in kinds if kind and signal.getsignal(kind) != signal.SIG_IGN]


def on_signals(kinds: list[int], handler: Callable) -> contextlib.ExitStack:
    """A context in which these signals have this handler. Under torchrun they keep their default
    and end the process, since a rank that waits for another could not run a handler."""
    stack = contextlib.ExitStack()
    for kind in kinds if tp.n_ranks() == 1 else ():
        if (before := signal.getsignal(kind)) != signal.SIG_IGN:
            signal.signal(kind, handler)
            stack.callback(signal.signal, kind, before or signal.SIG_DFL)  # None: set by C code
    return stack


def end_on_signals() -> contextlib.ExitStack:
    """A context in which the first SIGTERM or SIGHUP raises SystemExit, so that nothing is left
    half-written. The second does nothing, since the program may be cleaning up. The third ends
    the process at once. In hold_interrupt, all of them are only collected."""
    def end(signal_number, frame):
        received_signals.append(signal_number)
        if len(received_signals) == 1:
            sys.exit(128 + signal_number)
        if len(received_signals) > 2:
            os._exit(128 + signal_number)

    handled_signals[:] = ending_signals()
    return on_signals(handled_signals, end)


@contextlib.contextmanager
def hold_interrupt():
    """Collect signals in the list that this yields, instead of raising them: after half a step, the
    cache's length and its slots would not agree. A second Ctrl-C raises KeyboardInterrupt. Signals
    that end the program are collected in `received_signals` too, and the list begins with those
    that came before."""
    caught = list(received_signals)

    def note(signal_number, frame):
        if signal_number != signal.SIGINT:
            received_signals.append(signal_number)
        elif caught:
            raise KeyboardInterrupt
        caught.append(signal_number)

    with on_signals([signal.SIGINT, *handled_signals], note):
        yield caught


@contextlib.contextmanager
def unheld_signals() -> Iterator[None]:
    """A context in which the signals that a program handles end it at once, for a download by the
    Hub's library: an exception would wait until its threads have fetched their files. The library's
    cache stays whole when it is killed. Signals of a caller that is no program of ours stay."""
    before = {kind: signal.signal(kind, signal.SIG_DFL) for kind in handled_signals
              if callable(signal.getsignal(kind))
              and threading.current_thread() is threading.main_thread()}  # only it may set signals
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
