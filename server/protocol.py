"""What OpenAI's clients send, checked: a body becomes a Request, or an ApiError that says why not.

A field is obeyed or refused, never ignored: what is not supported is taken as long as it asks for
nothing (null, an empty list, the default), unknown fields are refused, and labels that ask for
nothing anyway (`user`, `metadata`) are taken. Types are strict: "0.5" is no number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from sample import Sampling

MAX_BODY = 4 << 20  # bytes
MAX_MESSAGES = 20_000
MAX_PROMPT = 400_000  # tokens that one request may have read: minutes of work
MAX_PROMPTS, MAX_N, MAX_STOPS = 64, 16, 16
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields that are refused unless they ask for nothing.
NEUTRAL = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "logit_bias": ({},), "modalities": (["text"],), "audio": (), "prediction": (),
    "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "web_search_options": (), "prompt_cache_retention": (), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "store": (False,)}
NEUTRAL_IN_MESSAGE = {
    "name": (), "tool_calls": ([],), "tool_call_id": (), "function_call": (), "refusal": (),
    "audio": (), "annotations": ([],), "reasoning_content": ("",)}


class ApiError(Exception):
    """A refusal, as OpenAI's clients read one."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Request:
    """One checked request. n answers to each prompt; a chat is one prompt."""

    chat: bool
    messages: list[dict]
    prompts: list[str | list[int]]
    max_new_tokens: int
    sampling: Sampling
    n: int
    stop: list[str]
    top_logprobs: int | None  # None: no logprobs at all
    stream: bool
    include_usage: bool


# ------------------------------------------------------------------------------ bodies


def text_of(content: Any) -> Any:
    """A message's content as one text; a list of text parts is joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(
                part.get("text"), str) or len(part) > 2:
            raise ValueError("every part must be {'type': 'text', 'text': ...}; images, sounds and "
                             "files are not supported")
        texts.append(part["text"])
    return "".join(texts)


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_of)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Options(Strict):
    """What both kinds of request may say."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 30)  # -1 and 0: all
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Annotated[list[Stop], BeforeValidator(as_list)] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class Chat(Options):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Completion(Options):
    # a text, several, token ids, or several lists of them: looked at in prompts_of
    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=5)


# ------------------------------------------------------------------------------ checking


def parse(body: bytes, chat: bool, model: str, max_new_tokens: int) -> Request:
    """The request in a body. model is the name that is served, max_new_tokens its limit for an
    answer, and the default. Raises ApiError."""
    said = check(Chat if chat else Completion, read_json(body))
    if said.model != model:
        raise ApiError(404, f"The model {said.model[:200]!r} does not exist; this server has "
                            f"{model!r}.", "model", "model_not_found")
    limit, field = said.max_tokens, "max_tokens"
    if chat and said.max_completion_tokens is not None:
        limit, field = said.max_completion_tokens, "max_completion_tokens"
    if limit is not None and limit > max_new_tokens:
        raise ApiError(400, f"{field} is {limit}; this server's limit is {max_new_tokens} "
                            "(--max-new-tokens).", field, "invalid_value")
    if chat and said.top_logprobs and not said.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true.", "top_logprobs",
                       "invalid_value")
    if "stream_options" in said.model_fields_set and not said.stream:
        raise ApiError(400, "stream_options goes with stream: true.", "stream_options",
                       "invalid_value")
    top = said.logprobs if not chat else said.top_logprobs if said.logprobs else None
    return Request(
        chat=chat, messages=messages_of(said) if chat else [],
        prompts=[] if chat else prompts_of(said.prompt), max_new_tokens=limit or max_new_tokens,
        sampling=Sampling(
            temperature=said.temperature, top_k=max(said.top_k, 0), top_p=said.top_p,
            min_p=said.min_p, repetition_penalty=said.repetition_penalty,
            presence_penalty=said.presence_penalty, frequency_penalty=said.frequency_penalty,
            seed=None if said.seed is None else said.seed % 2**64),
        n=said.n, stop=[check_text(text, "stop") for text in said.stop], top_logprobs=top,
        stream=said.stream, include_usage=said.stream_options.include_usage)


def read_json(body: bytes) -> dict:
    """The object in a body, without its fields that ask for nothing."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8 is the former
        raise ApiError(400, "The body is not JSON in UTF-8.", code="invalid_json") from None
    if not isinstance(said, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    said = without_neutral(said, {**NEUTRAL, "best_of": (1, said.get("n"))}, "")
    if isinstance(said.get("messages"), list):
        said["messages"] = [
            without_neutral(message, NEUTRAL_IN_MESSAGE, f"messages.{at}.")
            if isinstance(message, dict) else message
            for at, message in enumerate(said["messages"])]
    return {name: value for name, value in said.items() if name not in LABELS}


def without_neutral(said: dict, neutral: dict[str, tuple], where: str) -> dict:
    """Fields with a meaning here. Raises ApiError for one that is known, asks for something, and is
    not supported."""
    for name in said.keys() & neutral.keys():
        if said[name] is not None and not any(  # True is no 1 here
                type(said[name]) is type(value) and said[name] == value
                for value in neutral[name]):
            raise ApiError(400, f"{where}{name} is not supported by this server.", where + name,
                           "unsupported_parameter")
    return {name: value for name, value in said.items()
            if value is not None and name not in neutral}


def check(kind: type[Strict], said: dict) -> Any:
    """A body as its model. Raises ApiError for the first thing that is wrong with it."""
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part)[:100] for part in first["loc"])
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(
        first["type"], "invalid_value")
    if code == "unknown_parameter":
        raise ApiError(400, f"Unrecognized field: {param!r}.", param, code)
    reason = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"Invalid {param!r}: {reason}.", param, code)


def messages_of(said: Chat) -> list[dict]:
    return [{"role": "system" if message.role == "developer" else message.role,
             "content": check_text(message.content, f"messages.{at}.content")}
            for at, message in enumerate(said.messages)]


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """A completion's prompts, each a text or token ids."""
    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)

    prompts = prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt must be 1 to {MAX_PROMPTS} prompts.", "prompt",
                       "invalid_value")
    for value in prompts:
        if not (isinstance(value, str) and value or is_ids(value)):
            raise ApiError(400, "prompt must be a text, token ids, or a list of either, and none "
                                "of them empty.", "prompt", "invalid_value")
        if isinstance(value, str):
            check_text(value, "prompt")
    return prompts


def check_text(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
        raise ApiError(400, f"{param} is not Unicode text.", param, "invalid_value") from None
    return text
