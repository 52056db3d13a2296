"""Replicas of the server on Ray Serve: an engine each, and a conversation stays with its replica.

    pip install -r requirements-ray.txt
    serve run server.ray_app:app replicas=2 checkpoint=smollm2 batch=8

What follows are the flags of `python -m server`, without the dashes; a Serve config file has them
under `args`, and Serve's own settings (replicas, autoscaling, threads) beside them. Ray Serve
starts, watches, scales and balances. Of ours is one thing: which requests are one conversation.
Serve's ConsistentHashRouter then takes them to the replica that keeps it, and to the next on its
ring while that one is gone or full.
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
from server.__main__ import arguments, check, engine_arguments, make_engine, make_settings
from server.app import check_host, failure, make_app, read_body, refusal
from server.forms import event_of
from server.keep import chain
from server.protocol import ApiError, text_of
from threads import adapt_threads

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Serve says these itself: where it listens, how long it waits for answers at the end.
NOT_HERE = ("host", "port", "grace")
SWITCHES = ("compile", "compile_prefill", "no_auth")
LOST = (RayActorError, DeploymentUnavailableError)


# ------------------------------------------------------------------------------ which conversation


def conversation(who: str, body: bytes) -> str | None:
    """What all requests of a conversation have in common, hashed: who asks, the labels that clients
    give, and all up to the user's first words. None where there is no conversation, or nothing that
    a replica would take."""
    try:
        said = json.loads(body)
        messages = [{"role": message["role"], "content": text_of(message["content"])}
                    for message in said["messages"]]
        first = [message["role"] for message in messages].index("user")
        labels = json.dumps([who, said.get("prompt_cache_key"), said.get("user")])
        return chain(labels, messages[:first + 1])[-1]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# ------------------------------------------------------------------------------ the deployments


@serve.deployment(request_router_config=RequestRouterConfig(request_router_class=ROUTER))
class Replica:
    """An engine and its routes, in a process that Serve watches."""

    def __init__(self, engine: dict, settings: dict):
        """Takes what make_engine and make_settings take."""
        adapt_threads()
        self.engine = make_engine(**engine).start()
        self.app = make_app(self.engine, make_settings(**settings))

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[dict]:
        """What the application sends in answer to a request, message by message (ASGI's)."""
        asked = [{"type": "http.request", "body": body, "more_body": False}]
        sent, never = asyncio.Queue(), asyncio.Event()

        async def receive() -> dict:
            if not asked:
                await never.wait()  # when its client goes away, this is cancelled
            return asked.pop()

        answering = asyncio.ensure_future(self.app(scope, receive, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while message := await sent.get():
                yield message
            await answering
        finally:
            answering.cancel()

    async def figures(self) -> tuple[str, str]:
        """This replica's name, and what its /metrics says."""
        scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": b"",
                 "headers": [(b"host", b"localhost")]}
        said = [message.get("body", b"") async for message in self.answer(scope, b"")]
        return serve.get_replica_context().replica_id.unique_id, b"".join(said).decode()

    def check_health(self) -> None:
        if self.engine.state() != "ok":
            raise RuntimeError(f"the engine is {self.engine.state()}")


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
class Ingress:
    """Takes every request to the replica that has its conversation."""

    def __init__(self, replicas: DeploymentHandle, settings: dict, local_only: bool):
        """settings are what make_settings takes."""
        self.replicas = replicas.options(method_name="answer", stream=True)
        self.settings, self.local_only = make_settings(**settings), local_only

    async def __call__(self, request: HttpRequest) -> Response:
        try:
            self.check(request)
            if request.method == "GET" and request.url.path.endswith("/metrics"):
                told = await self.replicas.broadcast("figures").results_async()
                return Response(labelled(told), media_type="text/plain; version=0.0.4")
            body = await read_body(request)
        except ApiError as error:
            return refusal(error)
        who = hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
        key = await asyncio.to_thread(conversation, who, body)
        replicas = self.replicas.options(session_id=key) if key else self.replicas
        return Relay(replicas.remote(plain(request.scope), body))

    def check(self, request: HttpRequest) -> None:
        """Raises ApiError for who may not ask. (Serve decides where it listens, so who could reach
        it is seen here only. Keys are looked at by the replicas.)"""
        check_host(request, self.settings)
        if self.local_only and not is_local(request):
            raise ApiError(403, "This server is for its own machine: start it with api-key-file, "
                                "or with no-auth if everyone who reaches it may ask.")


def is_local(request: HttpRequest) -> bool:
    with contextlib.suppress(AttributeError, ValueError):
        return ipaddress.ip_address(request.client.host).is_loopback
    return False


def labelled(told: list[tuple[str, str]]) -> bytes:
    """All replicas' figures as one text, each with its replica's name."""
    families: dict[str, Metric] = {}
    for replica, text in told:
        for family in text_string_to_metric_families(text):
            same = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type))
            same.samples += [sample._replace(labels={**sample.labels, "replica": replica})
                             for sample in family.samples]
    return generate_latest(types.SimpleNamespace(collect=families.values))


def plain(scope: dict) -> dict:
    """What of an ASGI scope can go to another process."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path",
             "query_string", "root_path", "headers", "client", "server")
    return {name: scope[name] for name in names if name in scope}


class Relay(Response):
    """A replica's answer, as it comes. It begins with the first piece of the body, so a replica
    that dies before that is a 503, which clients try again; a stream that has begun ends with
    an error event."""

    def __init__(self, messages: DeploymentResponseGenerator):
        super().__init__()
        self.messages = messages

    async def __call__(self, scope, receive, send) -> None:
        start = begun = None
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
                await refusal(lost(error))(scope, receive, send)
            else:
                await send({"type": "http.response.body", "body": event_of(lost(error).body),
                            "more_body": False})
        finally:
            self.messages.cancel()


def lost(error: Exception) -> ApiError:
    """What a client hears when no answer, or no more of it, comes from a replica."""
    if isinstance(error, LOST):
        return ApiError(503, "The replica that was to answer is gone; try again.", retry_after=1)
    if isinstance(error, BackPressureError):
        return ApiError(429, "Too many requests are waiting already; try again.",
                        code="queue_full", retry_after=1)
    return failure(error)


# ------------------------------------------------------------------------------ the application


def read_arguments(given: dict) -> argparse.Namespace:
    """The flags of `python -m server`, by name. Raises ValueError for what they cannot be."""
    parser = arguments()
    parser.allow_abbrev = False
    parser.add_argument("--replicas", type=number(int, 1))

    def refuse(message: str) -> None:
        raise ValueError(f"server.ray_app:app: {message}")

    parser.error = refuse
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if flag[2:] in NOT_HERE:
            refuse(f"{name} is a setting of Ray Serve itself")
        if name.replace("-", "_") in SWITCHES:
            argv += [flag] if str(value).lower() in ("true", "1", "") else []
        else:
            argv += [f"{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    args = parser.parse_args(argv)
    check(args)
    return args


def app(given: dict) -> Application:
    """What `serve run server.ray_app:app NAME=VALUE ...` runs."""
    args = read_arguments(given)
    settings = dict(checkpoint=args.checkpoint, max_new_tokens=args.max_new_tokens,
                    api_key_file=args.api_key_file, hosts=args.allow_host,
                    origins=args.allow_origin)
    make_settings(**settings)  # what is wrong with them is said here, and not by every replica
    room = args.batch + args.queue  # then the engine itself says that it is full
    options = {"num_replicas": args.replicas} if args.replicas else {}
    replicas = Replica.options(max_ongoing_requests=room, **options).bind(
        engine_arguments(args), settings)
    return Ingress.bind(replicas, settings, local_only=not (args.no_auth or args.api_key_file))
