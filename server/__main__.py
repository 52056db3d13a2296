"""An OpenAI-style server of endless conversations: continuous batching, nothing prefilled twice.

    python -m server                                        # SmolLM2 on http://127.0.0.1:8000
    python -m server --checkpoint NAME --batch 8 --compile --api-key-file KEYS --host 0.0.0.0

Every answer's memory is constant, so the server admits as many as it has rows, and never guesses
lengths. A finished answer's cache is kept in host memory: when its conversation goes on, only the
new turn is prefilled. SIGTERM ends it: no new requests, and running answers have --grace seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import ipaddress
import queue
import signal
import socket
import threading
import time
from pathlib import Path

import uvicorn

from cli import check_text, load_arguments, make_parser, number, say_suggested
from load import load
from server.app import Settings, make_app
from server.engine import Engine
from server.protocol import MAX_ANSWER
from terminal import ending_signals, say, say_compiling, user_errors
from tp import n_ranks


def make_server_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, checkpoint="smollm2")
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on")
    add("--port", type=number(int, 0, 65535), default=8000, metavar="P",
        help="port to listen on; 0 is any that is free")
    add("--batch", type=number(int, 1), default=8, metavar="B",
        help="streams side by side")
    add("--queue", type=number(int, 1), default=64, metavar="N",
        help="requests that may wait")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N",
        help="an answer's tokens, unless its request says another number")
    add("--max-tokens-limit", type=number(int, 1), default=MAX_ANSWER, metavar="N",
        help="an answer's tokens, at most, whatever a request asks for")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens, never evicted; default 4")
    add("--pin-system", metavar="TEXT", help="a system turn that is never evicted")
    add("--keep-gb", type=number(float, 0), default=2.0, metavar="G",
        help="GiB of memory for conversations that may go on")
    add("--compile", action="store_true", help="compile the model for this machine first")
    add("--compile-prefill", action="store_true",
        help="compile how prompts are read, too: worth it for long ones")
    add("--api-key-file", metavar="FILE",
        help="who may ask: a key a line; default: whoever is on this machine")
    add("--no-auth", action="store_true", help="let everyone who reaches another --host ask")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="a name that this server goes by, beside localhost; may be repeated")
    add("--allow-origin", action="append", default=[], metavar="URL",
        help="a site whose pages may ask from browsers (CORS); may be repeated")
    add("--grace", type=number(float, 0), default=30.0, metavar="SECONDS",
        help="how long running answers may go on after SIGTERM")
    return parser


def read_keys(path: str) -> tuple[bytes, ...]:
    """The keys in a file, one a line. Raises ValueError or OSError naming the file."""
    keys = tuple(line.strip() for line in Path(path).read_bytes().splitlines() if line.strip())
    if not keys:
        raise ValueError(f"{path}: no key in it; it needs one a line")
    return keys


def validate_arguments(args) -> None:
    """Raises ValueError for flags that exclude each other, and under torchrun."""
    if args.pin_system is not None and args.sink is not None:
        raise ValueError("--pin-system decides the number of sinks; leave --sink out")
    if n_ranks() > 1:
        raise ValueError("the server works without torchrun; replicas are for several processes")
    if args.max_new_tokens > args.max_tokens_limit:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is above --max-tokens-limit "
                         f"{args.max_tokens_limit}")
    check_exposure(args.host, args.api_key_file, args.no_auth)


def check_exposure(host: str, api_key_file: str | None, no_auth: bool) -> None:
    """Raises ValueError for a server that strangers could use because a flag was forgotten."""
    if api_key_file and no_auth:
        raise ValueError("--api-key-file and --no-auth exclude each other")
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if not (local or api_key_file or no_auth):
        raise ValueError(f"--host {host} lets others in: give --api-key-file FILE, or "
                         "--no-auth if everyone there may ask")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, which accepts nobody yet. Raises OSError naming the address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror}") from None
    return sock


def model_name(checkpoint: str) -> str:
    """The model's name for clients: the checkpoint's, without folders or .gguf."""
    path = Path(checkpoint)
    return path.name.removesuffix(".gguf") if path.exists() else str(checkpoint)


def make_settings(checkpoint: str, max_new_tokens: int, max_tokens_limit: int,
                  api_key_file: str | None, hosts: list[str], origins: list[str]) -> Settings:
    """The routes' settings. Raises ValueError or OSError for a key file without keys."""
    keys = read_keys(api_key_file) if api_key_file else ()
    return Settings(model_name(checkpoint), max_new_tokens, max_tokens_limit, keys, tuple(hosts),
                    tuple(origins))


def engine_arguments(args) -> dict:
    """What make_engine takes of a command line."""
    return dict(checkpoint=args.checkpoint, batch_size=args.batch, n_sink=args.sink,
                window=args.window, cache_bytes=int(args.keep_gb * 2**30), max_queue=args.queue,
                pin_system=args.pin_system, compile=args.compile,
                compile_prefill=args.compile_prefill, **load_arguments(args))


def make_engine(checkpoint: str, batch_size: int, n_sink: int | None, window: int | None,
                cache_bytes: int, max_queue: int, pin_system: str | None, compile: bool,
                **load_options) -> Engine:
    """Load the model, and run every graph once. A pinned system turn fills the sinks."""
    say(f"loading {checkpoint}")
    model, tokenizer = load(checkpoint, compile=compile, **load_options)
    say_suggested(model.suggested)
    if pin_system is not None:
        n_sink = len(tokenizer.system_turn(check_text("--pin-system", pin_system)))
    engine = Engine(model, tokenizer, batch_size, n_sink, window, cache_bytes, max_queue,
                    pin_system)
    if compile:
        say_compiling()
    engine.warm()
    return engine


def start_engine(**arguments) -> Engine:
    """`make_engine`, and run it, all in one thread that is not the caller's: CUDA graphs belong to
    the thread that records them. Returns when it answers; raises what make_engine raises."""
    made = concurrent.futures.Future()

    def make_and_run() -> None:
        try:
            engine = make_engine(**arguments)
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(engine)
        engine.run()

    threading.Thread(target=make_and_run, name="engine", daemon=True).start()
    return made.result()


async def serve(app, sock: socket.socket, engine: Engine, grace: float,
                signals: queue.SimpleQueue) -> None:
    """Answer until a signal. Then take no more requests, and end when running answers are complete,
    after grace seconds, or at a second signal."""
    server = uvicorn.Server(uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=5, use_colors=False))
    serving = asyncio.ensure_future(server.serve([sock]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    host, port, *_ = sock.getsockname()
    say(f"http://{f'[{host}]' if ':' in host else host}:{port} serves")
    while signals.empty() and not serving.done():
        await asyncio.sleep(0.05)
    engine.drain()
    say("shutting down")
    deadline = time.monotonic() + grace
    while not engine.idle() and signals.qsize() < 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    engine.stop()
    await asyncio.sleep(0.1)  # for the last events
    server.should_exit = True
    await serving


def serve_beside(app, sock: socket.socket, engine: Engine, grace: float) -> threading.Thread:
    """Serve in a thread, which stops the engine at its end. The main thread passes signals on."""
    signals = queue.SimpleQueue()
    for kind in (signal.SIGINT, *ending_signals()):
        signal.signal(kind, lambda kind, frame: signals.put(kind))

    def serve_then_stop_engine() -> None:
        try:
            asyncio.run(serve(app, sock, engine, grace, signals))
        finally:
            engine.stop()

    thread = threading.Thread(target=serve_then_stop_engine, name="http")
    thread.start()
    return thread


def main():
    parser = make_server_parser()
    with user_errors(parser):
        args = parser.parse_args()
        validate_arguments(args)
        settings = make_settings(args.checkpoint, args.max_new_tokens, args.max_tokens_limit,
                                 args.api_key_file, [args.host, *args.allow_host],
                                 args.allow_origin)
        sock = listen(args.host, args.port)
        engine = make_engine(**engine_arguments(args))
        serving = serve_beside(make_app(engine, settings), sock, engine, args.grace)
        engine.run()
        serving.join()


if __name__ == "__main__":
    main()
