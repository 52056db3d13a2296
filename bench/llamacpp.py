"""Talking to bench/llamacpp_peer.py, which runs llama.cpp in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

PEER = Path(__file__).with_name("llamacpp_peer.py")


def add_peer(parser) -> None:
    """The arguments that name llama.cpp and its model."""
    parser.add_argument("--gguf", required=True, metavar="FILE",
                        help="the same model for llama.cpp, in its type that is to be compared")
    parser.add_argument("--llama-python", default="python", metavar="PYTHON",
                        help="a Python that has llama-cpp-python")


@contextlib.contextmanager
def llama_cpp(python: str, gguf: str, context: int, threads: int,
              exactly: bool = False) -> Iterator[Callable]:
    """Yield a function that sends a request, such as ask("prefill", n=128), and returns the answer.
    Raises ValueError when llama.cpp cannot be had or its process is lost, or if it rounds up a
    context that must be exactly this one."""
    if not Path(gguf).is_file():
        raise ValueError(f"--gguf {gguf}: no such file")
    settings = dict(gguf=gguf, context=context, threads=threads)
    try:
        process = subprocess.Popen([python, str(PEER), json.dumps(settings)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError:
        raise ValueError(f"--llama-python {python}: no such program") from None

    def answer():
        line = process.stdout.readline()
        if not line:
            raise ValueError(f"--llama-python {python}: llama.cpp's process ended, see above")
        return json.loads(line)

    def ask(do: str, **request):
        process.stdin.write(json.dumps(dict(do=do, **request)) + "\n")
        process.stdin.flush()
        return answer()

    try:
        begun = answer()
        if "error" in begun:
            raise ValueError(begun["error"])
        if exactly and begun["context"] != context:
            raise ValueError(f"--sink and --window are {context} together, which llama.cpp rounds "
                             f"up to {begun['context']}; choose such a sum")
        yield ask
    finally:
        process.kill()
        process.wait()
