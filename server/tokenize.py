"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: text to ids and back."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from server.bodies import MAX_MESSAGES, Chat, Message, Strict
from server.engine import Engine
from server.jobs import encode, with_pinned
from server.protocol import (
    MAX_PROMPT,
    ApiError,
    check_text,
    ending_of,
    messages_of,
    read_object,
    template_args_of,
    validate,
)


class Tokenize(Strict):
    """A raw prompt, or messages as /v1/chat/completions takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class Detokenize(Strict):
    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_PROMPT)


def tokenize(engine: Engine, body: bytes) -> dict:
    """The ids of a prompt or of a conversation. Raises ApiError."""
    fields = validate(Tokenize, read_object(body))
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "prompt or messages is needed, and not both.", "prompt",
                       "invalid_value")
    if fields.prompt is not None:
        ids = encode(engine, check_text(fields.prompt, "prompt"), fields.add_special_tokens is not
                            False)
    else:
        given = fields.model_dump(include={"add_generation_prompt", "continue_final_message",
                                           "chat_template_kwargs"}, exclude_unset=True)
        chat = Chat(model="", messages=fields.messages, **given)
        try:
            ids = engine.tokenizer.conversation(
                with_pinned(engine, messages_of(chat)), template_args_of(chat),
                ends_with=ending_of(chat))
        except ValueError as error:
            raise ApiError(400, f"{error}.", "messages", "invalid_value") from None
    names = [engine.names.token(token_id, None).text for token_id in ids]
    return {"count": len(ids), "max_model_len": MAX_PROMPT, "tokens": ids,
            "token_strs": names if fields.return_token_strs else None}


def detokenize(engine: Engine, body: bytes) -> dict:
    """The text of ids. Raises ApiError."""
    ids, size = validate(Detokenize, read_object(body)).tokens, engine.model.config.vocab_size
    if ids and not (min(ids) >= 0 and max(ids) < size):
        raise ApiError(400, f"tokens must be ids from 0 to {size - 1}.", "tokens", "invalid_value")
    return {"prompt": engine.decode(ids)}


def tokenizer_info(engine: Engine) -> dict:
    """What lm-evaluation-harness asks before it lets a server split its texts into tokens."""
    special = engine.tokenizer.special_tokens
    return {"tokenizer_class": "gpt-stream", "model_max_length": MAX_PROMPT,
            **{name: special.get(name) for name in ("bos_token", "eos_token", "pad_token",
                                                    "unk_token")},
            "chat_template": engine.tokenizer.chat_template.sources.get("default")}
