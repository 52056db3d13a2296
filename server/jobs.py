"""From a request to jobs: token ids, and of a conversation only those that are not cached."""

from __future__ import annotations

import json

from generate import check_ids
from server.answers import Job
from server.engine import Engine
from server.prefix_cache import CachedPrefix, cancelled_key, prefix_keys
from server.protocol import MAX_PROMPT, ApiError, Request


def make_jobs(engine: Engine, request: Request, client: str) -> list[Job]:
    """Turn a request into token ids, a job for each prompt. A client goes on only from its own
    cached conversations. Raises ApiError for what the chat template or the model refuses."""
    check_token_ids(engine, request)
    if request.top_logprobs is not None:
        _ = engine.names.bytes  # here, and not in the engine's thread
    try:
        jobs = [make_chat_job(engine, request, client)] if request.chat else [
            Job(request, ids if isinstance(ids, list) else
                encode(engine, ids, request.add_special_tokens), at * request.n)
            for at, ids in enumerate(request.prompts)]
        for job in jobs:
            check_ids(engine.model, job.ids)
    except ValueError as error:
        raise ApiError(400, f"{error}.", "messages" if request.chat else "prompt",
                       "invalid_value") from None
    if (n := max(len(job.ids) for job in jobs)) > MAX_PROMPT:
        raise ApiError(400, f"The prompt has {n} tokens; at most {MAX_PROMPT} are read.",
                       "messages" if request.chat else "prompt", "context_length_exceeded")
    return jobs


def make_chat_job(engine: Engine, request: Request, client: str) -> Job:
    """The job of a conversation: only what follows the longest cached prefix is prefilled."""
    messages = with_pinned(engine, without_labels(engine, request.messages))
    template_args = request.template_args
    if request.ends_with != "answer":  # nothing that is cached ends so
        return Job(request, engine.tokenizer.conversation(
            messages, template_args, ends_with=request.ends_with), 0)
    start = f"{engine.fingerprint} {client}"
    if template_args:
        start += f" {json.dumps(template_args, sort_keys=True)}"
    keys = prefix_keys(start, messages)
    last, prefix = find_prefix(engine, messages, keys)
    if prefix is not None and (
            ids := ids_after(engine, messages, last, prefix, template_args)):
        return Job(request, ids, 0, prefix, keys[-1], keys[last])
    job = Job(request, engine.tokenizer.conversation(messages, template_args), 0, key=keys[-1])
    if (messages[0]["role"] == "system" and messages[0]["content"].strip()
            and engine.prefix_cache.max_bytes):
        system = engine.tokenizer.system_turn(messages[0]["content"], template_args)
        if job.ids[:len(system)] == system and len(system) < len(job.ids):
            job.n_system, job.system_key = len(system), keys[0]
    return job


def without_labels(engine: Engine, messages: list[dict]) -> list[dict]:
    """The messages without cache_control, unless the chat template looks at it."""
    sources = engine.tokenizer.chat_template.sources.values()
    if any("cache_control" in source for source in sources):
        return messages
    return [{name: value for name, value in message.items() if name != "cache_control"}
            for message in messages]


def find_prefix(engine: Engine, messages: list[dict],
                keys: list[str]) -> tuple[int, CachedPrefix] | tuple[None, None]:
    """The longest cached prefix of a conversation: its last message's index, and it."""
    last, prefix = engine.prefix_cache.find_longest(keys)
    answered = max((n for n, message in enumerate(messages)
                    if message["role"] == "assistant"), default=0)
    # The answer may have been cancelled, before it could call anything.
    if answered > (last or 0) and "tool_calls" not in messages[answered]:
        _, longer = engine.prefix_cache.find_longest([cancelled_key(keys[answered - 1])])
        if longer and (longer := longer.cut_after(messages[answered]["content"])):
            return answered, longer
    return last, prefix


def with_pinned(engine: Engine, messages: list[dict]) -> list[dict]:
    """The messages behind the pinned system turn."""
    if not engine.pinned or messages[0] == engine.pinned[0]:
        return messages
    if messages[0]["role"] == "system":
        raise ApiError(400, "This server has a system turn of its own (--pin-system); leave "
                            "yours out.", "messages.0", "invalid_value")
    return engine.pinned + messages


def ids_after(engine: Engine, messages: list[dict], last: int, prefix: CachedPrefix,
              template_args: dict) -> list[int]:
    """The ids that follow the cached prefix, which ends with messages[last]. Empty where the
    template does not go on from there."""
    if messages[last]["role"] == "system":
        ids = engine.tokenizer.conversation(messages, template_args)
        return ids[len(prefix.ids):] if ids[:len(prefix.ids)] == prefix.ids else []
    try:
        return engine.tokenizer.turns_after(messages, last, prefix.ids[-1], template_args)
    except ValueError:
        return []


def check_token_ids(engine: Engine, request: Request) -> None:
    """Raises ApiError for a field with an id that the vocabulary does not have."""
    size = engine.model.config.vocab_size
    for field, ids in (("stop_token_ids", request.stop_token_ids),
                       ("logit_bias", [i for i, _ in request.sampling.logit_bias])):
        if max(ids, default=0) >= size:
            raise ApiError(400, f"{field}: {max(ids)} is no token id; the last is {size - 1}.",
                           field, "invalid_value")


def encode(engine: Engine, text: str, add_special_tokens: bool = True) -> list[int]:
    """Ids of a raw prompt, behind what the tokenizer puts in front, or without it."""
    ids = engine.tokenizer.encode(text)
    return ids if add_special_tokens else ids[len(engine.tokenizer.front):]
