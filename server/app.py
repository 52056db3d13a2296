"""The routes: HTTP in front of an Engine, as OpenAI's clients speak it.

Nothing here waits for the model: an answer's events come from the engine's thread through an
asyncio.Queue. Prompts and answers are never logged, and errors are logged without their message.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.answers import Event, Job
from server.engine import Engine
from server.metrics import Metrics
from server.protocol import MAX_BODY, ApiError, Request, parse_request
from server.responses import ResponseWriter

log = logging.getLogger("gpt_stream")
PAGE = Path(__file__).parent / "page.html"
GRAMMAR_TIMEOUT = 0.9  # seconds that reading a grammar may take
BODY_TIMEOUT = 30  # seconds that a request's body may take to arrive
READ_TIMEOUT = 60  # seconds that a client may take to read a piece of its answer


@dataclass
class Settings:
    """The routes' settings, beside the engine's."""

    model: str  # the name that clients give
    max_new_tokens: int = 512  # of one answer: the default, and the limit
    keys: tuple[bytes, ...] = ()  # API keys; none: no client needs one
    hosts: tuple[str, ...] = ()  # names that this server goes by, beside localhost and addresses
    origins: tuple[str, ...] = ()  # other sites whose pages may send requests (CORS)


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application of one engine, which is running."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)
    created = int(time.time())
    html = PAGE.read_text(encoding="utf-8")
    html_headers = page_headers(html)

    def route(path: str, *methods: str):
        """Serve a path with an async function that takes the request. Whatever it raises becomes
        OpenAI's error object."""
        def add(handle: Callable):
            async def handle_errors(request: HttpRequest) -> Response:
                try:
                    check_host(request, settings)
                    response = await handle(request)
                except ApiError as error:
                    response = error_response(error)
                except ClientDisconnect:
                    response = error_response(client_left())
                except Exception as error:
                    response = error_response(internal_error(error))
                metrics.count(path, response.status_code)
                return response

            app.add_api_route(path, handle_errors, methods=list(methods), response_model=None)
            return handle
        return add

    def describe_model() -> dict:
        """OpenAI's fields and two of ours: the model sees a conversation's first `sink` tokens and
        its last `window`."""
        return {"id": settings.model, "object": "model", "created": created,
                "owned_by": "gpt-stream", "sink": engine.batch.cache.n_sink,
                "window": engine.batch.cache.window}

    async def complete(request: HttpRequest, chat: bool) -> Response:
        client = check_key(request, settings)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != (
                "application/json"):
            raise ApiError(415, "Content-Type must be application/json.")
        engine.check_room()
        body = await read_body(request)
        parsed = await asyncio.to_thread(parse_request, body, chat, settings.model,
                                         settings.max_new_tokens, engine.model.suggested)
        if parsed.chat:
            engine.check_tools(parsed)
        if parsed.grammar_field:
            await compile_grammar(engine, parsed)
        jobs = await asyncio.to_thread(engine.make_jobs, parsed, client)
        writer = ResponseWriter(parsed, settings.model, engine.fingerprint)
        events = metrics.watch(engine.submit(jobs), jobs)
        if parsed.stream:
            return EventStream(write_chunks(events, jobs, writer), lambda: engine.cancel(jobs))
        try:
            return await whole_response(request, events, jobs, writer)
        finally:
            engine.cancel(jobs)

    @route("/v1/chat/completions", "POST")
    async def chat_completions(request: HttpRequest) -> Response:
        return await complete(request, chat=True)

    @route("/v1/completions", "POST")
    async def completions(request: HttpRequest) -> Response:
        return await complete(request, chat=False)

    @route("/v1/models", "GET")
    async def models(request: HttpRequest) -> Response:
        check_key(request, settings)
        return json_response({"object": "list", "data": [describe_model()]})

    @route("/v1/models/{name:path}", "GET")
    async def model(request: HttpRequest) -> Response:
        check_key(request, settings)
        if request.path_params["name"] != settings.model:
            raise ApiError(404, f"The model does not exist; this server has {settings.model!r}.",
                           "model", "model_not_found")
        return json_response(describe_model())

    @route("/health", "GET", "HEAD")
    async def health(request: HttpRequest) -> Response:
        state = engine.state()
        return json_response({"status": state}, 200 if state == "ok" else 503)

    @route("/metrics", "GET")
    async def prometheus_metrics(request: HttpRequest) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @route("/", "GET", "HEAD")
    async def page(request: HttpRequest) -> Response:
        return HTMLResponse(html, headers=html_headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: HttpRequest, error: HTTPException) -> Response:
        """The error for a path or a method that is not there."""
        path = f"{request.method} {request.url.path[:200]}"
        return error_response(ApiError(error.status_code, f"{path}: {error.detail}."),
                              error.headers)

    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins,
                           allow_methods=["GET", "POST"],
                           allow_headers=["*"])
    return app


def json_response(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    """JSON in ASCII, which can also hold half of a surrogate pair."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(error: ApiError, headers: dict | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


def client_left() -> ApiError:
    """The error of a request whose client left: nobody reads it, but it is counted."""
    return ApiError(499, "The client went away.")


def internal_error(error: Exception) -> ApiError:
    """The error for a fault of ours. The log gets its place, and not its message, which may quote
    a prompt."""
    log.error("%s at %s", type(error).__name__, " <- ".join(
        f"{frame.filename}:{frame.lineno}"
        for frame in reversed(traceback.extract_tb(error.__traceback__))))
    return ApiError(500, "The server failed at this request.")


def page_headers(html: str) -> dict[str, str]:
    """The page's Content-Security-Policy. Its own script and style run, by their hashes, and no
    others. Nothing is loaded from elsewhere (its icon is in it) or sent elsewhere. Where browsers
    know Trusted Types, no text can become HTML."""
    def hashes(tag: str) -> str:
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL))

    return {"Content-Security-Policy":
            f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


# ------------------------------------------------------------------------------ requests


def check_host(request: HttpRequest, settings: Settings) -> None:
    """Raises ApiError when the Host header is a name that this server does not go by. A page of
    another site can point its own name at this machine (DNS rebinding), but it has no address for
    a name and no key. So addresses pass, and with keys all names do."""
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return
    known = {"localhost", *map(str.lower, settings.hosts)}
    if not settings.keys and name.lower() not in known:
        raise ApiError(421, f"This server does not go by the name {name[:200]!r}; --allow-host "
                            "NAME adds one.")


def check_key(request: HttpRequest, settings: Settings) -> str:
    """The client: a hash of its API key, or "" where the server has no keys. Raises ApiError."""
    if not settings.keys:
        return ""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Hashes are of one length, whatever was given.
    given = hashlib.sha256(given.strip().encode("latin-1")).digest()
    known = [hmac.compare_digest(given, hashlib.sha256(key).digest()) for key in settings.keys]
    if kind.lower() != "bearer" or not any(known):
        raise ApiError(401, "No valid API key: send it as 'Authorization: Bearer KEY'.",
                       code="invalid_api_key")
    return given.hex()


async def read_body(request: HttpRequest) -> bytes:
    """A request's body. Raises ApiError for one that is too large or arrives too slowly."""
    body = bytearray()
    too_large = ApiError(413, f"The body is larger than {MAX_BODY} bytes.")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > MAX_BODY:
        raise too_large

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT} s.") from None
    return bytes(body)


# ------------------------------------------------------------------------------ completions


async def whole_response(request: HttpRequest, events: AsyncIterator[list[Event]],
                         jobs: list[Job], writer: ResponseWriter) -> Response:
    """The completion as one object. Raises ApiError when the client leaves before its end."""
    async def collect() -> None:
        async for step in events:
            writer.add(step)

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise client_left()
        await collecting
        return json_response(writer.completion(jobs))
    finally:
        collecting.cancel()
        leaving.cancel()


async def write_chunks(events: AsyncIterator[list[Event]], jobs: list[Job],
                       writer: ResponseWriter) -> AsyncIterator[bytes]:
    """The completion chunk by chunk, as server-sent events."""
    try:
        async for step in events:
            if chunks := writer.chunks(step):
                yield chunks
        yield writer.last_chunks(jobs)
    except ApiError as error:
        yield writer.error_chunk(error)
    except Exception as error:
        yield writer.error_chunk(internal_error(error))


class EventStream(Response):
    """A stream of server-sent events. It ends, and calls on_end, when all is sent, and when the
    client leaves or stops reading."""

    def __init__(self, chunks: AsyncIterator[bytes], on_end: Callable[[], None]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.chunks, self.on_end = chunks, on_end

    async def __call__(self, scope, receive, send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    await asyncio.wait_for(send({"type": "http.response.body", "body": chunk,
                                                 "more_body": True}), READ_TIMEOUT)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        sending = asyncio.ensure_future(send_all())
        leaving = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.on_end()
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.TimeoutError, OSError):
                await sending


async def compile_grammar(engine: Engine, request: Request) -> None:
    """Compile what a request's answers must fit, in another thread. Raises ApiError when that takes
    too long: the thread goes on, within the limits of grammar.py, and nobody waits for it."""
    await asyncio.to_thread(engine.prepare_grammars)
    try:
        await asyncio.wait_for(asyncio.to_thread(engine.compile_grammar, request), GRAMMAR_TIMEOUT)
    except asyncio.TimeoutError:
        field = request.grammar_field
        raise ApiError(400, f"Invalid {field!r}: it takes too long to read; ask for less.", field,
                       "invalid_value") from None


async def wait_for_disconnect(receive: Callable) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
