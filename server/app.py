"""The routes: HTTP in front of an Engine, in the form that OpenAI's clients speak.

Nothing here waits for the model: an answer's events come from the engine's thread through an
asyncio.Queue. What people say is never logged, in errors neither.
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

from server.answers import Job
from server.engine import Engine
from server.forms import Form
from server.metrics import Metrics
from server.protocol import MAX_BODY, ApiError, parse

log = logging.getLogger("gpt_stream")
PAGE = Path(__file__).parent / "page.html"
BODY_TIMEOUT = 30  # seconds that a request's body may take to arrive
READ_TIMEOUT = 60  # seconds that a client may take to read a piece of its answer


@dataclass
class Settings:
    """What the routes need to know beside the engine."""

    model: str  # the name that clients give
    max_new_tokens: int = 512  # of one answer: the default, and the limit
    keys: tuple[bytes, ...] = ()  # none: everyone may ask
    hosts: tuple[str, ...] = ()  # names, beside localhost and addresses, that this server goes by
    origins: tuple[str, ...] = ()  # other sites whose pages may ask


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application of one engine, which is running."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)
    created = int(time.time())
    html = PAGE.read_text(encoding="utf-8")
    html_headers = page_headers(html)

    def route(path: str, *methods: str):
        """Serve a path with an async function that takes the request; what it raises becomes
        OpenAI's error object."""
        def add(handle: Callable):
            async def answered(request: HttpRequest) -> Response:
                try:
                    check_host(request, settings)
                    response = await handle(request)
                except ApiError as error:
                    response = refusal(error)
                except ClientDisconnect:
                    response = refusal(gone())
                except Exception as error:
                    response = refusal(failure(error))
                metrics.count(path, response.status_code)
                return response

            app.add_api_route(path, answered, methods=list(methods), response_model=None)
            return handle
        return add

    def described() -> dict:
        """Our own fields: every talk's first `sink` tokens and its last `window` are seen."""
        return {"id": settings.model, "object": "model", "created": created,
                "owned_by": "gpt-stream", "sink": engine.batch.cache.n_sink,
                "window": engine.batch.cache.window}

    async def ask(request: HttpRequest, chat: bool) -> Response:
        key = check_key(request, settings)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != (
                "application/json"):
            raise ApiError(415, "Content-Type must be application/json.")
        engine.check_room()
        body = await read_body(request)
        asked = await asyncio.to_thread(parse, body, chat, settings.model, settings.max_new_tokens)
        jobs = await asyncio.to_thread(engine.plan, asked, key)
        form = Form(asked, settings.model, engine.fingerprint)
        events = metrics.watch(engine.submit(jobs), jobs)
        if asked.stream:
            return EventStream(stream(events, jobs, form), lambda: engine.leave(jobs))
        try:
            return await whole(request, events, jobs, form)
        finally:
            engine.leave(jobs)

    @route("/v1/chat/completions", "POST")
    async def chat_completions(request: HttpRequest) -> Response:
        return await ask(request, chat=True)

    @route("/v1/completions", "POST")
    async def completions(request: HttpRequest) -> Response:
        return await ask(request, chat=False)

    @route("/v1/models", "GET")
    async def models(request: HttpRequest) -> Response:
        check_key(request, settings)
        return reply({"object": "list", "data": [described()]})

    @route("/v1/models/{name:path}", "GET")
    async def model(request: HttpRequest) -> Response:
        check_key(request, settings)
        if request.path_params["name"] != settings.model:
            raise ApiError(404, f"The model does not exist; this server has {settings.model!r}.",
                           "model", "model_not_found")
        return reply(described())

    @route("/health", "GET", "HEAD")
    async def health(request: HttpRequest) -> Response:
        state = engine.state()
        return reply({"status": state}, 200 if state == "ok" else 503)

    @route("/metrics", "GET")
    async def figures(request: HttpRequest) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @route("/", "GET", "HEAD")
    async def page(request: HttpRequest) -> Response:
        return HTMLResponse(html, headers=html_headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: HttpRequest, error: HTTPException) -> Response:
        """A path or a method that is not there."""
        return refusal(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: "
                                f"{error.detail}."), error.headers)

    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins,
                           allow_methods=["GET", "POST"],
                           allow_headers=["*"])
    return app


def reply(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    """JSON in ASCII, which can say half of a surrogate pair, too."""
    return Response(json.dumps(content), status, headers, "application/json")


def refusal(error: ApiError, headers: dict | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return reply(error.body, error.status, headers)


def gone() -> ApiError:
    """What a client is told that has left: nobody reads it, but it is counted."""
    return ApiError(499, "The client went away.")


def failure(error: Exception) -> ApiError:
    """What a client hears of a fault of ours. Logged is where it was, and not its message, which
    may quote a prompt."""
    log.error("%s at %s", type(error).__name__, " <- ".join(
        f"{frame.filename}:{frame.lineno}"
        for frame in reversed(traceback.extract_tb(error.__traceback__))))
    return ApiError(500, "The server failed at this request.")


def page_headers(html: str) -> dict[str, str]:
    """A policy under which the page's own script and style run, by their hashes, and no others;
    under which nothing is loaded (its icon is in it) or sent anywhere but here; and, where browsers
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


# ------------------------------------------------------------------------------ who may ask


def check_host(request: HttpRequest, settings: Settings) -> None:
    """Raises ApiError when the Host is a name that this server does not go by. A page of another
    site can point its own name at this machine (DNS rebinding), but not an address, and it knows no
    key."""
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
    """Who asks: a hash of the key, the same for all where there are none. Raises ApiError."""
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
    """A request's body. Raises ApiError for one that is too large or does not come."""
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


# ------------------------------------------------------------------------------ answers


async def whole(request: HttpRequest, events: AsyncIterator, jobs: list[Job],
                form: Form) -> Response:
    """The answer as one object, when all of it is there."""
    async def collect() -> None:
        async for event in events:
            form.add(event)

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise gone()
        await collecting
        return reply(form.whole(jobs))
    finally:
        collecting.cancel()
        leaving.cancel()


async def stream(events: AsyncIterator, jobs: list[Job], form: Form) -> AsyncIterator[bytes]:
    """The answer piece by piece, as server-sent events."""
    try:
        async for event in events:
            if chunk := form.chunk(event):
                yield chunk
        yield form.last(jobs)
    except ApiError as error:
        yield form.failed(error)
    except Exception as error:
        yield form.failed(failure(error))


class EventStream(Response):
    """A stream of server-sent events, which ends when the client goes away or stops reading."""

    def __init__(self, chunks: AsyncIterator[bytes], at_end: Callable[[], None]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.chunks, self.at_end = chunks, at_end

    async def __call__(self, scope, receive, send) -> None:
        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    await asyncio.wait_for(send({"type": "http.response.body", "body": chunk,
                                                 "more_body": True}), READ_TIMEOUT)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        running = asyncio.ensure_future(run())
        leaving = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.at_end()
            leaving.cancel()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.TimeoutError, OSError):
                await running


async def until_gone(receive: Callable) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
