"""Run a function in a process of its own, so that its memory and its imports are its own, too."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator

import torch

from terminal import say


@contextlib.contextmanager
def apart(make: Callable[..., Callable], *args) -> Iterator[Callable]:
    """Yield a function that calls, in a process of its own, the function that make(*args) returned
    there. make has returned when the block begins. Raises ValueError when the process is lost,
    and whatever ValueError or OutOfMemoryError a call raises there."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, make, args))
    process.start()
    there.close()  # now only the process holds it, so here.recv fails when the process dies

    def answer():
        try:
            result = here.recv()
        except (EOFError, ConnectionError):
            raise ValueError("a process was lost, see above") from None
        if isinstance(result, Exception):
            raise result
        return result

    try:
        answer()
        yield lambda *given: here.send(given) or answer()
    except BaseException:  # the process may be in a long call
        process.terminate()
        raise
    finally:
        here.close()
        process.join()


def serve(pipe, make: Callable[..., Callable], args: tuple) -> None:
    """The process's own work: answer calls until the other end of the pipe is closed."""
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        try:
            function = make(*args)
            pipe.send(None)
            while True:
                pipe.send(function(*pipe.recv()))
        except (ValueError, torch.OutOfMemoryError) as error:
            pipe.send(error)


def beside(args, make: Callable[..., Callable], *peer_args):
    """The peer that --peer names, in a process of its own (`apart`), or None. There its memory is
    measured alone. Importing transformers here would make our model compile again: it registers
    pytree nodes, and every graph has a guard on those."""
    if not args.peer:
        return contextlib.nullcontext()
    say(f"preparing {args.peer}")
    return apart(make, *peer_args)
