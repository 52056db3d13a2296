"""What is asked of every request before its body is looked at: its host, its key, its size."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass

from fastapi import Request as HttpRequest

from server.protocol import MAX_ANSWER, MAX_BODY, ApiError

BODY_TIMEOUT = 30  # seconds that a request's body may take to arrive
# What other servers have and this one has not, by the beginning of its path, and the way round.
ELSEWHERE = {
    "/v1/embeddings": "This model makes text, and no embeddings: use a server of an embedding model"
                      " for these.",
    "/v1/messages": "This server does not speak Anthropic's API. litellm translates it: its model "
                    "hosted_vllm/{model} with api_base http://HOST:PORT/v1.",
    "/api/": "This server does not speak Ollama's API. Set the client to an OpenAI-compatible "
             "server at http://HOST:PORT/v1, or use litellm's model hosted_vllm/{model}.",
    "/v1/audio": "This server takes text only.", "/v1/images": "This server makes text only.",
    "/v1/rerank": "This model makes text, and ranks nothing.",
    "/chat/completions": "The base URL ends in /v1: http://HOST:PORT/v1.",
    "/completions": "The base URL ends in /v1: http://HOST:PORT/v1.",
    "/models": "The base URL ends in /v1: http://HOST:PORT/v1."}
ELSEWHERE |= {path.removeprefix("/v1"): ELSEWHERE[path] for path in (
    "/v1/embeddings", "/v1/messages", "/v1/rerank")}


@dataclass
class Settings:
    """The routes' settings, beside the engine's."""

    model: str  # the name that clients give
    max_new_tokens: int = 512  # of an answer whose request does not say
    max_tokens_limit: int = MAX_ANSWER  # the most tokens of an answer; a higher number is lowered
    keys: tuple[bytes, ...] = ()  # API keys; none: no client needs one
    hosts: tuple[str, ...] = ()  # names that this server goes by, beside localhost and addresses
    origins: tuple[str, ...] = ()  # other sites whose pages may send requests (CORS)


def request_id(request: HttpRequest) -> str:
    """The client's own name for a request, or a random one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\x21-\x7e]{1,200}", given) else secrets.token_hex(16)


def way_round(path: str, model: str) -> str:
    """What a client is told that asks for a path which is not there."""
    for begin, text in ELSEWHERE.items():
        if path.startswith(begin):
            return text.format(model=model)
    return ("This server has /v1/chat/completions, /v1/completions, /v1/responses and "
            "/v1/models.")


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
        raise ApiError(421, f"This server does not go by the name {name[:200]!r}; start it with "
                            f"--allow-host {name[:200] or 'NAME'}.")


def check_json(request: HttpRequest) -> None:
    """Raises ApiError for a body that its headers call something else than JSON as it is. (A page
    of another site may send other types without being asked, and so no command.)"""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, and it is "
                            f"{kind[:100] or 'missing'}; curl needs "
                            "-H 'Content-Type: application/json'.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding {encoding[:100]} is not supported: send the body "
                            "without compression.")


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
