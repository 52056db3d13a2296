"""The bodies of requests, field by field, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from server.fields import join_text_parts

MAX_MESSAGES = 20_000
MAX_N, MAX_STOPS, MAX_BIAS = 16, 16, 1024


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
    name: Annotated[str, StringConstraints(max_length=1000)] | None = None
    cache_control: Any = None  # a label, unless the template looks at it


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


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
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int = Field(0, ge=0, le=1 << 30)
    ignore_eos: bool = False
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=MAX_STOPS)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=MAX_BIAS)
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
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Any = None  # validated in tools_of, as tool_choice is
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class Completion(Options):
    # A text, several, token ids, or several lists of them: validated in prompts_of.
    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = True
