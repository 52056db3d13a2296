"""What OpenAI's clients send, validated: a body becomes a Request, or raises an ApiError.

A field is obeyed or refused, never ignored: fields.py lists the labels, and what asks for nothing.
Unknown fields are refused. Types are strict: "0.5" is no number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from formats.chat_template import check_args
from formats.tools import Tools, calls_for_template, tools_of
from sample import RANGES, Sampling
from server.bodies import Chat, Completion, Message, Options, Strict
from server.fields import (
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    asks_for_nothing,
    without_labels,
)

MAX_BODY = 4 << 20  # bytes
MAX_PROMPT = 400_000  # tokens of one request's prompt: minutes of prefill
MAX_ANSWER = 32_768  # tokens, unless --max-tokens-limit says another number
MAX_PROMPTS = 64


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
    usage_in_every_chunk: bool
    template_args: dict  # what else the chat template is given
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    echo: bool = False  # the prompt stands before each answer
    add_special_tokens: bool = True  # a text gets what the tokenizer puts in front, such as BOS
    # Where the template's text ends: "answer", where an answer begins; "turn", after the last
    # message; "message", within it, so that the answer goes on from there.
    ends_with: str = "answer"
    # The field that says what an answer must fit, and what it says, as grammar.Grammar takes it.
    grammar: tuple[str, dict] | None = None
    tools: Tools | None = None  # that the answers may call

    @property
    def grammar_field(self) -> str:
        """The field for which the answers have a grammar; "" where they have none."""
        if self.grammar:
            return self.grammar[0]
        return "tools" if self.tools and (self.tools.forced or self.tools.strict) else ""


# ------------------------------------------------------------------------------ validation


def parse_request(body: bytes, chat: bool, model: str, max_new_tokens: int,
                  suggested: dict[str, float] | None = None, limit: int = MAX_ANSWER) -> Request:
    """The request in a body. model is the name that is served; max_new_tokens is an answer's length
    where the request says none, and limit the most that it gets; suggested are the model's own
    settings of sampling, which take the place of the API's defaults. Raises ApiError."""
    fields = validate(Chat if chat else Completion, read_json(body, chat))
    if fields.model != model:
        raise ApiError(404, f"The model {fields.model[:200]!r} does not exist; this server has "
                            f"{model!r}.", "model", "model_not_found")
    asked = fields.max_tokens
    if chat and fields.max_completion_tokens is not None:
        asked = fields.max_completion_tokens
    asked = min(max_new_tokens if asked is None else asked, limit)
    if chat and asked == 0:
        raise ApiError(400, "max_tokens must be at least 1.", "max_tokens", "invalid_value")
    if fields.min_tokens > asked:
        raise ApiError(400, f"min_tokens is {fields.min_tokens}, and the answer has at most {asked}"
                            " tokens.", "min_tokens", "invalid_value")
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
    request = Request(
        chat=chat, messages=messages_of(fields) if chat else [],
        prompts=[] if chat else prompts_of(fields.prompt), max_new_tokens=asked,
        sampling=sampling_of(fields, suggested or {}),
        n=fields.n, stop=[check_text(text, "stop") for text in fields.stop], top_logprobs=top,
        stream=fields.stream, include_usage=fields.stream_options.include_usage,
        usage_in_every_chunk=fields.stream_options.continuous_usage_stats,
        template_args=template_args_of(fields, tools) if chat else {},
        ignore_eos=fields.ignore_eos, stop_token_ids=tuple(fields.stop_token_ids),
        echo=not chat and fields.echo, add_special_tokens=chat or fields.add_special_tokens,
        ends_with=ending_of(fields) if chat else "answer", grammar=grammar, tools=tools)
    for name in ("ignore_eos", "min_tokens"):
        if request.grammar_field and getattr(fields, name):
            raise ApiError(400, f"{name} and {request.grammar_field} exclude each other: the answer"
                                " must end.", name, "invalid_value")
    return request


def ending_of(chat: Chat) -> str:
    """Request.ends_with of a chat. Raises ApiError where its fields contradict each other."""
    if not chat.continue_final_message:
        return "answer" if chat.add_generation_prompt else "turn"
    field = "continue_final_message"
    if chat.add_generation_prompt and "add_generation_prompt" in chat.model_fields_set:
        raise ApiError(400, f"{field} and add_generation_prompt exclude each other.", field,
                       "invalid_value")
    if chat.messages[-1].role != "assistant" or chat.messages[-1].tool_calls:
        raise ApiError(400, f"{field} needs a last message of the assistant's, without calls.",
                       field, "invalid_value")
    return "message"


def sampling_of(fields: Options, suggested: dict[str, float]) -> Sampling:
    """How a request's answers are drawn: as it says, else as the model suggests."""
    settings = {name: getattr(fields, name) for name in RANGES if hasattr(fields, name)}
    settings |= {name: value for name, value in suggested.items()
                 if name not in fields.model_fields_set}
    settings["top_k"] = max(settings["top_k"], 0)
    seed = None if fields.seed is None else fields.seed % 2**64
    return Sampling(**settings, seed=seed, logit_bias=bias_of(fields), min_tokens=fields.min_tokens)


def bias_of(fields: Options) -> tuple[tuple[int, float], ...]:
    """Sampling.logit_bias of a body, whose names are token ids. Raises ApiError."""
    for name in fields.logit_bias:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise ApiError(400, f"logit_bias: {name[:40]!r} is no token id.", "logit_bias",
                           "invalid_value")
    return tuple((int(name), float(value)) for name, value in fields.logit_bias.items())


def read_object(body: bytes) -> dict:
    """The object in a body. Raises ApiError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # a body that is not UTF-8 is a ValueError
        raise ApiError(400, "The body is not JSON in UTF-8.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return fields


def read_json(body: bytes, chat: bool) -> dict:
    """The object in a body, without fields that ask for nothing. Raises ApiError."""
    fields = read_object(body)
    neutral = {**NEUTRAL, "best_of": (1, fields.get("n"))}
    if chat:
        neutral |= {"echo": (False,), "add_special_tokens": (False,)}
    else:
        neutral |= {"tools": ([],), "tool_choice": ("none", "auto"),
                    "parallel_tool_calls": (True, False), "reasoning_effort": ("none",),
                    "add_generation_prompt": (True,), "continue_final_message": (False,),
                    "chat_template_kwargs": ({},)}
    fields = without_neutral(without_labels(fields), neutral, "")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [read_message(message, f"messages.{at}.")
                              for at, message in enumerate(fields["messages"])]
    return fields


def read_message(message: Any, where: str) -> Any:
    """A message without fields that ask for nothing. Raises ApiError."""
    if not isinstance(message, dict):
        return message
    if "content" in message and message["content"] is None and not message.get("tool_calls"):
        raise ApiError(400, f"{where}content is null; it must be a text, which may be empty.",
                       f"{where}content", "invalid_value")
    return without_neutral(message, NEUTRAL_IN_MESSAGE, where)


def without_neutral(fields: dict, neutral: dict[str, tuple], where: str) -> dict:
    """The fields that are supported or unknown. Raises ApiError for a neutral one, by its name,
    that has none of its neutral values: it asks for something that is not supported."""
    for name in fields.keys() & neutral.keys():
        if not asks_for_nothing(fields[name], neutral[name]):
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
    belongs = {"tool_calls": role == "assistant", "tool_call_id": role == "tool"}
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
    if message.name is not None:
        check_text(message.name, f"{where}.name")
    labels = {"tool_call_id": message.tool_call_id, "name": message.name,
              "cache_control": message.cache_control}
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


def template_args_of(chat: Chat, tools: Tools | None = None) -> dict:
    """What else the chat template is given: chat_template_kwargs, reasoning_effort, the tools."""
    given = chat.chat_template_kwargs
    if chat.reasoning_effort is not None:
        given = {"reasoning_effort": chat.reasoning_effort, **given}
    try:
        check_args(given)
        if tools and "tools" in given:
            raise ValueError("tools is a field of its own")
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair is a ValueError
        raise ApiError(400, f"chat_template_kwargs: {error}.", "chat_template_kwargs",
                       "invalid_value") from None
    return {**given, **({"tools": list(tools.tools)} if tools else {})}


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
