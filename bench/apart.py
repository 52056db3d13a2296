"""A function in a process of its own: what it takes, and what it imports, is then only its own."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator

import torch

from terminal import say


@contextlib.contextmanager
def apart(make: Callable[..., Callable], *args) -> Iterator[Callable]:
    """The function that make(*args) returns, in a process of its own, to be called from here. It
    is ready, and the process at rest, when the block begins."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, make, args))
    process.start()
    there.close()  # only the process has it now, so its end is seen here

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
    except BaseException:  # it may be in the middle of something long
        process.terminate()
        raise
    finally:
        here.close()
        process.join()


def serve(pipe, make: Callable[..., Callable], args: tuple) -> None:
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):  # nobody asks any more
        try:
            function = make(*args)
            pipe.send(None)
            while True:
                pipe.send(function(*pipe.recv()))
        except (ValueError, torch.OutOfMemoryError) as error:
            pipe.send(error)


def beside(args, make: Callable[..., Callable], *peer_args):
    """The peer, if one is asked for, apart: the memory that it takes is then only its own, and
    importing transformers does not make ours compile again (it registers pytree nodes, which
    every graph has a guard on)."""
    if not args.peer:
        return contextlib.nullcontext()
    say(f"preparing {args.peer}")
    return apart(make, *peer_args)
