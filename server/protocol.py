"""What OpenAI's clients send, validated: a body becomes a Request, or raises an ApiError.

A field is obeyed or refused, never ignored. A field that is not supported is accepted as long as it
asks for nothing (null, an empty list, the default). Labels (`user`, `metadata`), which never ask
for anything, are accepted. Unknown fields are refused. Types are strict: "0.5" is no number.
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

from chat_template import check_args
from formats.tools import Tools, calls_for_template, tools_of
from sample import RANGES, Sampling

MAX_BODY = 4 << 20  # bytes
MAX_MESSAGES = 20_000
MAX_PROMPT = 400_000  # tokens of one request's prompt: minutes of prefill
MAX_PROMPTS, MAX_N, MAX_STOPS = 64, 16, 16
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Fields that are refused unless they ask for nothing.
NEUTRAL = {
    "functions": ([],), "function_call": ("none", "auto"), "logit_bias": ({},),
    "modalities": (["text"],), "audio": (), "prediction": (),
    "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "web_search_options": (), "prompt_cache_retention": (), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "store": (False,)}
NEUTRAL_IN_MESSAGE = {
    "function_call": (), "refusal": (), "audio": (), "annotations": ([],),
    "reasoning_content": ("",)}


class ApiError(Exception):
    """An error response in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Request:
    """One validated request: n answers to each prompt. A chat is one prompt."""

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
    template_args: dict  # what else the chat template is given
    # The field that says what an answer must fit, and what it says, as grammar.Grammar takes it.
    grammar: tuple[str, dict] | None = None
    tools: Tools | None = None  # that the answers may call

    @property
    def grammar_field(self) -> str:
        """The field for which the answers have a grammar; "" where they have none."""
        if self.grammar:
            return self.grammar[0]
        return "tools" if self.tools and (self.tools.forced or self.tools.strict) else ""


# ------------------------------------------------------------------------------ bodies


def join_text_parts(content: Any) -> Any:
    """A message's content as one text: a list of text parts is joined, anything else returned as it
    is. Raises ValueError for other parts."""
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


def without_none(value: Any) -> Any:
    """An object without the fields that ask for nothing, in it and in the objects in it that are no
    JSON Schema."""
    if not isinstance(value, dict):
        return value
    return {name: inner if name in ("json", "schema") else without_none(inner)
            for name, inner in value.items() if inner is not None}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """A message; message_of says which fields belong to which role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_text_parts)] = None
    tool_calls: Any = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    """A schema with labels. It is obeyed exactly, `strict` or not."""

    schema_: Any = Field(alias="schema")
    name: str = ""
    description: str = ""
    strict: bool = True


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's field: one of these. The names in Python are those of its older fields."""

    guided_json: Any = Field(None, alias="json")
    guided_regex: str | None = Field(None, alias="regex")
    guided_choice: list[str] | None = Field(None, alias="choice", min_length=1)
    guided_grammar: str | None = Field(None, alias="grammar")
    json_object: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Options(Strict):
    """The fields of both kinds of request."""

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
    response_format: Annotated[ResponseFormat | None, BeforeValidator(without_none)] = None
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(without_none)] = None
    guided_json: Any = None  # vLLM's older fields
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None


class Chat(Options):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}
    tools: Any = None  # validated in tools_of, as tool_choice is
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class Completion(Options):
    # A text, several, token ids, or several lists of them: validated in prompts_of.
    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=5)


# ------------------------------------------------------------------------------ validation


def parse_request(body: bytes, chat: bool, model: str, max_new_tokens: int,
                  suggested: dict[str, float] | None = None) -> Request:
    """The request in a body. model is the name that is served; max_new_tokens is the limit of an
    answer, and the default; suggested are the model's own settings of sampling, which take the
    place of the API's defaults. Raises ApiError."""
    fields = validate(Chat if chat else Completion, read_json(body))
    if fields.model != model:
        raise ApiError(404, f"The model {fields.model[:200]!r} does not exist; this server has "
                            f"{model!r}.", "model", "model_not_found")
    limit, field = fields.max_tokens, "max_tokens"
    if chat and fields.max_completion_tokens is not None:
        limit, field = fields.max_completion_tokens, "max_completion_tokens"
    if limit is not None and limit > max_new_tokens:
        raise ApiError(400, f"{field} is {limit}; this server's limit is {max_new_tokens} "
                            "(--max-new-tokens).", field, "invalid_value")
    if chat and fields.top_logprobs and not fields.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true.", "top_logprobs",
                       "invalid_value")
    if "stream_options" in fields.model_fields_set and not fields.stream:
        raise ApiError(400, "stream_options goes with stream: true.", "stream_options",
                       "invalid_value")
    tools = tools_asked(fields) if chat else None
    grammar = grammar_of(fields)
    if grammar and tools and "schema" not in grammar[1]:
        raise ApiError(400, f"{grammar[0]} works without tools.", grammar[0], "invalid_value")
    top = fields.logprobs if not chat else fields.top_logprobs if fields.logprobs else None
    return Request(
        chat=chat, messages=messages_of(fields) if chat else [],
        prompts=[] if chat else prompts_of(fields.prompt), max_new_tokens=limit or max_new_tokens,
        sampling=sampling_of(fields, suggested or {}),
        n=fields.n, stop=[check_text(text, "stop") for text in fields.stop], top_logprobs=top,
        stream=fields.stream, include_usage=fields.stream_options.include_usage,
        template_args=template_args_of(fields, tools) if chat else {},
        grammar=grammar, tools=tools)


def sampling_of(fields: Options, suggested: dict[str, float]) -> Sampling:
    """How a request's answers are drawn: as it says, else as the model suggests."""
    settings = {name: getattr(fields, name) for name in RANGES}
    settings |= {name: value for name, value in suggested.items()
                 if name not in fields.model_fields_set}
    settings["top_k"] = max(settings["top_k"], 0)
    seed = None if fields.seed is None else fields.seed % 2**64
    return Sampling(**settings, seed=seed)


def read_json(body: bytes) -> dict:
    """The object in a body, without fields that ask for nothing. Raises ApiError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # a body that is not UTF-8 is a ValueError
        raise ApiError(400, "The body is not JSON in UTF-8.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    fields = without_neutral(fields, {**NEUTRAL, "best_of": (1, fields.get("n"))}, "")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [
            without_neutral(message, NEUTRAL_IN_MESSAGE, f"messages.{at}.")
            if isinstance(message, dict) else message
            for at, message in enumerate(fields["messages"])]
    return {name: value for name, value in fields.items() if name not in LABELS}


def without_neutral(fields: dict, neutral: dict[str, tuple], where: str) -> dict:
    """The fields that are supported or unknown. Raises ApiError for a neutral one, by its name,
    that has none of its neutral values: it asks for something that is not supported."""
    for name in fields.keys() & neutral.keys():
        if fields[name] is not None and not any(  # True is no 1 here
                type(fields[name]) is type(value) and fields[name] == value
                for value in neutral[name]):
            raise ApiError(400, f"{where}{name} is not supported by this server.", where + name,
                           "unsupported_parameter")
    return {name: value for name, value in fields.items()
            if value is not None and name not in neutral}


def validate(kind: type[Strict], fields: dict) -> Any:
    """A body as its pydantic model. Raises ApiError for the first thing that is wrong with it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part)[:100] for part in first["loc"])
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(
        first["type"], "invalid_value")
    if code == "unknown_parameter":
        raise ApiError(400, f"Unrecognized field: {param!r}.", param, code)
    reason = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"Invalid {param!r}: {reason}.", param, code)


def messages_of(chat: Chat) -> list[dict]:
    return [message_of(message, f"messages.{at}") for at, message in enumerate(chat.messages)]


def message_of(message: Message, where: str) -> dict:
    """A message as the chat template takes it. Raises ApiError for a field that is missing, and for
    one that does not belong to its role."""
    role, calls = message.role, message.tool_calls
    belongs = {"tool_calls": role == "assistant", "tool_call_id": role == "tool",
               "name": role == "tool"}
    for field in (field for field, here in belongs.items() if not here):
        if getattr(message, field):
            raise ApiError(400, f"{where}.{field} is not supported by this server where the role "
                                f"is {role}.", f"{where}.{field}", "unsupported_parameter")
    for field, needed in (("content", not calls), ("tool_call_id", role == "tool")):
        if needed and getattr(message, field) is None:
            raise ApiError(400, f"Invalid '{where}.{field}': Field required.", f"{where}.{field}",
                           "missing_required_parameter")
    found = {"role": "system" if role == "developer" else role,
             "content": check_text(message.content or "", f"{where}.content")}
    try:
        if calls:
            found["tool_calls"] = calls_for_template(calls, f"{where}.tool_calls")
    except ValueError as error:
        raise refused(error) from None
    labels = {"tool_call_id": message.tool_call_id, "name": message.name}
    return {**found, **{field: value for field, value in labels.items() if value is not None}}


def tools_asked(chat: Chat) -> Tools | None:
    try:
        return tools_of(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    except ValueError as error:
        raise refused(error) from None


def refused(error: ValueError, field: str = "") -> ApiError:
    """The response to an error of this field, or of the one that its message begins with."""
    place, _, reason = str(error).partition(": ")
    if place.split(".")[0] not in ("tools", "tool_choice", "messages"):
        place, reason = field, str(error)
    return ApiError(400, f"Invalid {place!r}: {reason}.", place, "invalid_value")


def template_args_of(chat: Chat, tools: Tools | None) -> dict:
    """What else the chat template is given: chat_template_kwargs, and the tools."""
    try:
        check_args(chat.chat_template_kwargs)
        if tools and "tools" in chat.chat_template_kwargs:
            raise ValueError("tools is a field of its own")
        json.dumps(chat.chat_template_kwargs, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair is a ValueError
        raise ApiError(400, f"chat_template_kwargs: {error}.", "chat_template_kwargs",
                       "invalid_value") from None
    return {**chat.chat_template_kwargs, **({"tools": list(tools.tools)} if tools else {})}


def grammar_of(fields: Options) -> tuple[str, dict] | None:
    """Request.grammar of a body. Raises ApiError where more than one field asks for a grammar."""
    asked, form = {}, fields.response_format
    if form and form.type == "json_object":
        asked["response_format"] = {"schema": {"type": "object"}}
    if form and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs json_schema.",
                           "response_format.json_schema", "invalid_value")
        asked["response_format.json_schema.schema"] = {"schema": form.json_schema.schema_}
    for prefix, holder in (("guided_", fields), ("structured_outputs.", fields.structured_outputs)):
        for kind in ("json", "regex", "choice", "grammar") if holder else ():
            if (source := getattr(holder, f"guided_{kind}")) is not None:
                asked[prefix + kind] = source_of(prefix + kind, kind, source)
    if fields.structured_outputs and fields.structured_outputs.json_object:
        asked["structured_outputs.json_object"] = {"schema": {"type": "object"}}
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise ApiError(400, f"{first} and {second} exclude each other.", second, "invalid_value")
    return next(iter(asked.items()), None)


def source_of(field: str, kind: str, source: Any) -> dict:
    """What grammar.Grammar takes of a field: a JSON Schema (or its text), a regular expression, a
    list of choices or a grammar."""
    if kind == "choice":
        return {"lark": "start: " + " | ".join(json.dumps(choice) for choice in source)}
    if kind != "json":
        return {"lark" if kind == "grammar" else kind: source}
    if isinstance(source, str):
        try:
            source = json.loads(source)
        except (ValueError, RecursionError):
            raise ApiError(400, f"{field} is not JSON.", field, "invalid_value") from None
    return {"schema": source}


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
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise ApiError(400, f"{param} is not Unicode text.", param, "invalid_value") from None
    return text
