"""The routes: HTTP in front of an Engine, as OpenAI's clients speak it.

Nothing here waits for the model: an answer's events come from the engine's thread through an
asyncio.Queue. Prompts and answers are never logged, and errors are logged without their message.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.answers import Event, Job
from server.engine import Engine
from server.grammars import check_tools, compile_grammar
from server.jobs import make_jobs
from server.metrics import Metrics
from server.protocol import (
    MAX_PROMPT,
    ApiError,
    parse_request,
)
from server.requests import (
    Settings,
    check_host,
    check_json,
    check_key,
    read_body,
    request_id,
    way_round,
)
from server.responses import ResponseWriter
from server.responses_api import ItemWriter, chat_body
from server.tokenize import detokenize, tokenize, tokenizer_info

log = logging.getLogger("gpt_stream")
PAGE = Path(__file__).parent / "page.html"
READ_TIMEOUT = 60  # seconds that a client may take to read a piece of its answer
VERSION = "1.0"  # of the API


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application of one engine, which is running."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)
    created = int(time.time())
    html = PAGE.read_text(encoding="utf-8")
    html_headers = page_headers(html)

    def route(path: str, *methods: str, any_host: bool = False):
        """Serve a path with an async function that takes the request. Whatever it raises becomes
        OpenAI's error object. With any_host, what it says is no secret (check_host)."""
        def add(handle: Callable):
            async def handle_errors(request: HttpRequest) -> Response:
                try:
                    if not any_host:
                        check_host(request, settings)
                    response = await handle(request)
                except ApiError as error:
                    response = error_response(error)
                except ClientDisconnect:
                    response = error_response(client_left())
                except Exception as error:
                    response = error_response(internal_error(error))
                metrics.count(path, response.status_code)
                response.headers["x-request-id"] = request_id(request)
                return response

            app.add_api_route(path, handle_errors, methods=list(methods), response_model=None)
            return handle
        return add

    def describe_model() -> dict:
        """OpenAI's fields, vLLM's, and two of ours: the model sees a conversation's first `sink`
        tokens and its last `window`, of as many as max_model_len."""
        return {"id": settings.model, "object": "model", "created": created,
                "owned_by": "gpt-stream", "max_model_len": MAX_PROMPT,
                "sink": engine.batch.cache.n_sink, "window": engine.batch.cache.window}

    async def complete(request: HttpRequest, chat: bool, as_items: bool = False) -> Response:
        client = check_key(request, settings)
        check_json(request)
        engine.check_room()
        body = await read_body(request)
        parsed = await asyncio.to_thread(
            parse_request, chat_body(body) if as_items else body, chat, settings.model,
            settings.max_new_tokens, engine.model.suggested, settings.max_tokens_limit)
        if parsed.chat:
            check_tools(engine, parsed)
        if parsed.grammar_field:
            await compile_grammar(engine, parsed)
        jobs = await asyncio.to_thread(make_jobs, engine, parsed, client)
        writer = (ItemWriter(parsed, settings.model, body) if as_items else
                  ResponseWriter(parsed, settings.model, engine.fingerprint))
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

    @route("/v1/responses", "POST")
    async def responses(request: HttpRequest) -> Response:
        return await complete(request, chat=True, as_items=True)

    @route("/tokenize", "POST")
    async def text_to_ids(request: HttpRequest) -> Response:
        return await about_tokens(request, tokenize)

    @route("/detokenize", "POST")
    async def ids_to_text(request: HttpRequest) -> Response:
        return await about_tokens(request, detokenize)

    async def about_tokens(request: HttpRequest, answer: Callable) -> Response:
        check_key(request, settings)
        check_json(request)
        body = await read_body(request)
        return json_response(await asyncio.to_thread(answer, engine, body))

    @route("/tokenizer_info", "GET")
    async def about_tokenizer(request: HttpRequest) -> Response:
        check_key(request, settings)
        return json_response(tokenizer_info(engine))

    @route("/version", "GET")
    async def version(request: HttpRequest) -> Response:
        return json_response({"version": VERSION})

    @route("/v1/models/", "GET")
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

    @route("/v1/health", "GET", "HEAD", any_host=True)
    @route("/health", "GET", "HEAD", any_host=True)
    async def health(request: HttpRequest) -> Response:
        state = engine.state()
        return json_response({"status": state}, 200 if state == "ok" else 503)

    @route("/metrics", "GET", any_host=True)
    async def prometheus_metrics(request: HttpRequest) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @route("/", "GET", "HEAD")
    async def page(request: HttpRequest) -> Response:
        return HTMLResponse(html, headers=html_headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: HttpRequest, error: HTTPException) -> Response:
        """The error for a path or a method that is not there."""
        metrics.count("other", error.status_code)
        path = request.url.path
        said = f"{request.method} {path[:200]}: {error.detail}. "
        if error.status_code == 404:
            said += way_round(path, settings.model)
        response = error_response(ApiError(error.status_code, said.strip()), error.headers)
        response.headers["x-request-id"] = request_id(request)
        return response

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


# ------------------------------------------------------------------------------ completions


async def whole_response(request: HttpRequest, events: AsyncIterator[list[Event]],
                         jobs: list[Job], writer: ResponseWriter | ItemWriter) -> Response:
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
                       writer: ResponseWriter | ItemWriter) -> AsyncIterator[bytes]:
    """The completion chunk by chunk, as server-sent events."""
    try:
        async for step in events:
            if chunks := writer.chunks(step, jobs):
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


async def wait_for_disconnect(receive: Callable) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
