"""Responses in OpenAI's form: whole completions, and the chunks of a streamed one."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable

from server.answers import Event, Job
from server.protocol import ApiError, Request
from server.tokens import Token


class ResponseWriter:
    """Writes one request's response, from the events of its answers as they come."""

    def __init__(self, request: Request, model: str, fingerprint: str):
        self.chat, self.include_usage = request.chat, request.include_usage
        self.usage_in_every_chunk = request.usage_in_every_chunk
        n_choices = request.n * max(1, len(request.prompts))
        self.events: list[list[Event]] = [[] for _ in range(n_choices)]  # of each choice
        self.opened = [False] * n_choices  # its first chunk was sent
        self.new_tokens = 0  # sent so far in a stream
        self.top_logprobs = request.top_logprobs
        self.head = {"id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
                     "object": "chat.completion" if self.chat else "text_completion",
                     "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    # -------------------------------------------------------------------------- whole completions

    def add(self, events: list[Event]) -> None:
        for event in events:
            self.events[event.choice].append(event)

    def completion(self, jobs: list[Job]) -> dict:
        """The whole completion, once all events were added."""
        choices = [self.choice(index, events) for index, events in enumerate(self.events)]
        return {**self.head, "choices": choices, "usage": usage(jobs)}

    def choice(self, index: int, events: list[Event]) -> dict:
        text = "".join(event.text for event in events)
        content = {"text": text}
        if self.chat:
            calls = whole_calls(delta for event in events for delta in event.calls)
            content = {"message": {"role": "assistant", "content": None if calls and not text
                                   else text, "refusal": None,
                                   **({"tool_calls": calls} if calls else {})}}
        return {"index": index, **content, "logprobs": self.logprobs(events),
                "finish_reason": events[-1].finish}

    # -------------------------------------------------------------------------- streams

    def chunks(self, events: list[Event], jobs: list[Job]) -> bytes:
        """The chunks of one decode step; none for text that is held back."""
        parts = []
        for event in events:
            self.new_tokens += not (event.echo or event.finish)
            if self.chat and not self.opened[event.choice]:
                parts.append(self.chunk(event.choice, {"role": "assistant", "content": ""}, jobs))
            self.opened[event.choice] = True
            logprobs = self.logprobs([event]) if event.tokens else None
            if event.text or logprobs:
                delta = {"content": event.text} if self.chat else event.text
                parts.append(self.chunk(event.choice, delta, jobs, logprobs))
            for call in event.calls:
                parts.append(self.chunk(event.choice, {"tool_calls": [call]}, jobs))
            if event.finish:
                delta = {} if self.chat else ""
                parts.append(self.chunk(event.choice, delta, jobs, None, event.finish))
        return b"".join(parts)

    def chunk(self, index: int, delta: dict | str, jobs: list[Job], logprobs: dict | None = None,
              finish: str | None = None) -> bytes:
        choice = {"index": index, "delta" if self.chat else "text": delta, "logprobs": logprobs,
                  "finish_reason": finish}
        told = {}
        if self.include_usage:
            told["usage"] = usage(jobs, self.new_tokens) if self.usage_in_every_chunk else None
        return self.chunk_event({"choices": [choice], **told})

    def chunk_event(self, content: dict) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return server_sent_event({**self.head, "object": kind, **content})

    def last_chunks(self, jobs: list[Job]) -> bytes:
        last = b"data: [DONE]\n\n"
        if self.include_usage:
            return self.chunk_event({"choices": [], "usage": usage(jobs)}) + last
        return last

    def error_chunk(self, error: ApiError) -> bytes:
        """The end of a stream that fails: its status was sent, so the error is an event."""
        return server_sent_event(error.body)

    # -------------------------------------------------------------------------- logprobs

    def logprobs(self, events: list[Event]) -> dict | None:
        """The logprobs object of a choice's events; None where the request wants none."""
        if self.top_logprobs is None:
            return None
        tokens = [token for event in events for token in event.tokens]
        if self.chat:
            return {"content": [{**token_logprob(token), "top_logprobs": [
                token_logprob(other) for other in token.top]} for token in tokens], "refusal": None}
        return {"tokens": [token.text for token in tokens],
                "text_offset": [token.offset for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [top_logprobs(token) for token in tokens] if self.top_logprobs
                else None}


def whole_calls(deltas: Iterable[dict]) -> list[dict]:
    """Calls, of what was told of them."""
    calls = []
    for delta in deltas:
        if delta["index"] == len(calls):
            calls.append({"id": delta["id"], "type": delta["type"],
                          "function": {**delta["function"]}})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


def token_logprob(token: Token) -> dict:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}



def top_logprobs(token: Token) -> dict[str, float] | None:
    """The likeliest tokens by their text, and the token itself even if it is none of them. Of
    tokens with the same text the likeliest is shown. None for the first of a prompt."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in (*token.top, token):
        found.setdefault(one.text, one.logprob)
    return found


def usage(jobs: list[Job], new_tokens: int | None = None) -> dict:
    """The tokens of a request; new_tokens are those sent so far, None all."""
    prompt = sum(job.prompt_tokens for job in jobs)
    new = sum(job.new_tokens for job in jobs) if new_tokens is None else new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs)}}


def server_sent_event(content: dict) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()
