"""Replicas of the server on Ray Serve: an engine each, and a conversation stays with its replica.

    pip install -r requirements-ray.txt
    serve run server.ray_app:app replicas=2 checkpoint=smollm2 batch=8

The settings are the flags of `python -m server`, without the dashes; a Serve config file has them
under `args`, and Serve's own settings (replicas, autoscaling, threads) beside them. Ray Serve
starts, watches, scales and balances the replicas. This file says which requests are one
conversation: Serve's ConsistentHashRouter sends them to the replica that has it cached, and to the
next one on its ring while that one is gone or full.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import ipaddress
import json
import types
from collections.abc import AsyncIterator

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cli import number
from server.__main__ import (
    engine_arguments,
    make_server_parser,
    make_settings,
    start_engine,
    validate_arguments,
)
from server.app import error_response, internal_error, make_app
from server.fields import join_text_parts
from server.prefix_cache import prefix_keys
from server.protocol import ApiError
from server.requests import check_host, read_body
from server.responses import server_sent_event
from threads import adapt_threads

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Serve has its own settings for these: where it listens, how long running answers may take.
SERVES_OWN = ("host", "port", "grace")
SWITCHES = ("compile", "compile_prefill", "no_auth")
REPLICA_GONE = (RayActorError, DeploymentUnavailableError)


# ------------------------------------------------------------------------------ which conversation


def conversation_key(client: str, body: bytes) -> str | None:
    """A hash of what all requests of a conversation have in common: the client, its labels, and
    all messages up to the user's first one. None for a body that is no conversation."""
    try:
        fields = json.loads(body)
        first = [message["role"] for message in fields["messages"]].index("user")
        messages = [{"role": message["role"], "content": join_text_parts(message["content"])}
                    for message in fields["messages"][:first + 1]]
        labels = json.dumps([client, fields.get("prompt_cache_key"), fields.get("user")])
        return prefix_keys(labels, messages)[-1]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# ------------------------------------------------------------------------------ the deployments


@serve.deployment(request_router_config=RequestRouterConfig(request_router_class=ROUTER))
class Replica:
    """An engine and its routes, in a process that Serve watches."""

    def __init__(self, engine: dict, settings: dict):
        """Takes what make_engine and make_settings take."""
        adapt_threads()
        self.engine = start_engine(**engine)
        self.app = make_app(self.engine, make_settings(**settings))

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[dict]:
        """The ASGI messages of the response to a request, one by one."""
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        sent, never = asyncio.Queue(), asyncio.Event()

        async def receive() -> dict:
            if not incoming:
                await never.wait()  # cancelled below when the client leaves
            return incoming.pop()

        answering = asyncio.ensure_future(self.app(scope, receive, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while message := await sent.get():
                yield message
            await answering
        finally:
            answering.cancel()

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its /metrics."""
        scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": b"",
                 "headers": [(b"host", b"localhost")]}
        parts = [message.get("body", b"") async for message in self.answer(scope, b"")]
        return serve.get_replica_context().replica_id.unique_id, b"".join(parts).decode()

    def check_health(self) -> None:
        if self.engine.state() != "ok":
            raise RuntimeError(f"the engine is {self.engine.state()}")


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
class Ingress:
    """Routes every request to the replica that has its conversation cached."""

    def __init__(self, replicas: DeploymentHandle, settings: dict, local_only: bool):
        """settings are what make_settings takes."""
        self.replicas = replicas.options(method_name="answer", stream=True)
        self.settings, self.local_only = make_settings(**settings), local_only

    async def __call__(self, request: HttpRequest) -> Response:
        try:
            self.check_client(request)
            if request.method == "GET" and request.url.path.endswith("/metrics"):
                texts = await self.replicas.broadcast("metrics").results_async()
                return Response(merge_metrics(texts), media_type="text/plain; version=0.0.4")
            body = await read_body(request)
        except ApiError as error:
            return error_response(error)
        client = hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
        key = await asyncio.to_thread(conversation_key, client, body)
        replicas = self.replicas.options(session_id=key) if key else self.replicas
        return Relay(replicas.remote(picklable(request.scope), body))

    def check_client(self, request: HttpRequest) -> None:
        """Raises ApiError for a client that may not ask. Serve decides where it listens, so only
        the client's address says whether it is local. The replicas check its key."""
        check_host(request, self.settings)
        if self.local_only and not is_local(request):
            raise ApiError(403, "This server is for its own machine: start it with api-key-file, "
                                "or with no-auth if everyone who reaches it may ask.")


def is_local(request: HttpRequest) -> bool:
    with contextlib.suppress(AttributeError, ValueError):
        return ipaddress.ip_address(request.client.host).is_loopback
    return False


def merge_metrics(texts: list[tuple[str, str]]) -> bytes:
    """The metrics of all replicas (name, text) as one text, each sample labelled with the name."""
    families: dict[str, Metric] = {}
    for replica, text in texts:
        for family in text_string_to_metric_families(text):
            same = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type))
            same.samples += [sample._replace(labels={**sample.labels, "replica": replica})
                             for sample in family.samples]
    return generate_latest(types.SimpleNamespace(collect=families.values))


def picklable(scope: dict) -> dict:
    """The part of an ASGI scope that can go to another process."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path",
             "query_string", "root_path", "headers", "client", "server")
    return {name: scope[name] for name in names if name in scope}


class Relay(Response):
    """A replica's response, passed on as it comes. The status is sent with the first piece of the
    body: when the replica dies before, the client gets a 503, which it tries again. A stream that
    has begun ends with an error event."""

    def __init__(self, messages: DeploymentResponseGenerator):
        super().__init__()
        self.messages = messages

    async def __call__(self, scope, receive, send) -> None:
        start, begun = None, False
        try:
            async for message in self.messages:
                if message["type"] == "http.response.start":
                    start = message
                    continue
                if not begun:
                    await send(start)
                    begun = True
                await send(message)
        except Exception as error:
            if not begun:
                await error_response(replica_error(error))(scope, receive, send)
            else:
                await send({"type": "http.response.body", "more_body": False,
                            "body": server_sent_event(replica_error(error).body)})
        finally:
            self.messages.cancel()


def replica_error(error: Exception) -> ApiError:
    """The client's error when a replica does not answer, or not to the end."""
    if isinstance(error, REPLICA_GONE):
        return ApiError(503, "The replica that was to answer is gone; try again.", retry_after=1)
    if isinstance(error, BackPressureError):
        return ApiError(429, "Too many requests are waiting already; try again.",
                        code="queue_full", retry_after=1)
    return internal_error(error)


# ------------------------------------------------------------------------------ the application


def read_arguments(given: dict) -> argparse.Namespace:
    """Settings by name, parsed as flags of `python -m server`. Raises ValueError naming a wrong
    one."""
    parser = make_server_parser()
    parser.allow_abbrev = False
    parser.add_argument("--replicas", type=number(int, 1))

    def refuse(message: str) -> None:
        raise ValueError(f"server.ray_app:app: {message}")

    parser.error = refuse
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if flag[2:] in SERVES_OWN:
            refuse(f"{name} is a setting of Ray Serve itself")
        if name.replace("-", "_") in SWITCHES:
            argv += [flag] if str(value).lower() in ("true", "1", "") else []
        else:
            argv += [f"{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    args = parser.parse_args(argv)
    validate_arguments(args)
    return args


def app(given: dict) -> Application:
    """The application that `serve run server.ray_app:app NAME=VALUE ...` runs."""
    args = read_arguments(given)
    settings = dict(checkpoint=args.checkpoint, max_new_tokens=args.max_new_tokens,
                    max_tokens_limit=args.max_tokens_limit, api_key_file=args.api_key_file,
                    hosts=args.allow_host, origins=args.allow_origin)
    make_settings(**settings)  # raises here for wrong ones, and not in every replica
    room = args.batch + args.queue  # so it is the engine that refuses, with its own error
    options = {"num_replicas": args.replicas} if args.replicas else {}
    replicas = Replica.options(max_ongoing_requests=room, **options).bind(
        engine_arguments(args), settings)
    return Ingress.bind(replicas, settings, local_only=not (args.no_auth or args.api_key_file))
