"""Answers in the words of OpenAI's API: whole objects, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time

from server.answers import Event, Job
from server.protocol import ApiError, Request


class Form:
    """What is written about one request's answers, as they come."""

    def __init__(self, asked: Request, model: str, fingerprint: str):
        self.chat, self.include_usage = asked.chat, asked.include_usage
        count = asked.n * max(1, len(asked.prompts))
        self.events: list[list[Event]] = [[] for _ in range(count)]
        self.offsets = [0] * count  # characters of each choice before the next token's
        self.opened = [False] * count
        self.logprobs = asked.top_logprobs
        self.head = {"id": ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12),
                     "object": "chat.completion" if asked.chat else "text_completion",
                     "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    # -------------------------------------------------------------------------- whole answers

    def add(self, events: list[Event]) -> None:
        for event in events:
            self.events[event.choice].append(event)

    def whole(self, jobs: list[Job]) -> dict:
        return {**self.head, "choices": [self.choice(index, events) for index, events in
                                         enumerate(self.events)], "usage": usage(jobs)}

    def choice(self, index: int, events: list[Event]) -> dict:
        text = "".join(event.text for event in events)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **(said if self.chat else {"text": text}),
                "logprobs": self.written(index, events), "finish_reason": events[-1].finish}

    # -------------------------------------------------------------------------- streams

    def chunk(self, events: list[Event]) -> bytes:
        """What a step has to say, as server-sent events; nothing for text that is held back."""
        parts = []
        for event in events:
            if self.chat and not self.opened[event.choice]:
                parts.append(self.piece(event.choice, {"role": "assistant", "content": ""}))
            self.opened[event.choice] = True
            logprobs = self.written(event.choice, [event]) if event.token else None
            if event.text or logprobs:
                said = {"content": event.text} if self.chat else event.text
                parts.append(self.piece(event.choice, said, logprobs))
            if event.finish:
                parts.append(self.piece(event.choice, {} if self.chat else "", None, event.finish))
        return b"".join(parts)

    def piece(self, index: int, said: dict | str, logprobs: dict | None = None,
              finish: str | None = None) -> bytes:
        choice = {"index": index, "delta" if self.chat else "text": said, "logprobs": logprobs,
                  "finish_reason": finish}
        return self.sent({"choices": [choice], **({"usage": None} if self.include_usage else {})})

    def sent(self, content: dict) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event_of({**self.head, "object": kind, **content})

    def last(self, jobs: list[Job]) -> bytes:
        figures = self.sent({"choices": [], "usage": usage(jobs)}) if self.include_usage else b""
        return figures + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """A stream that has begun can only end with the error as an event."""
        return event_of(error.body)

    # -------------------------------------------------------------------------- logprobs

    def written(self, index: int, events: list[Event]) -> dict | None:
        if self.logprobs is None:
            return None
        tokens = [event.token for event in events if event.token]
        if self.chat:
            return {"content": [{**named(token.text, token.logprob), "top_logprobs": [
                named(*pair) for pair in token.top]} for token in tokens], "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token.text)
        return {"tokens": [token.text for token in tokens], "text_offset": offsets,
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [dict(token.top) for token in tokens] if self.logprobs else None}


def named(text: str, logprob: float) -> dict:
    """A token; half of a character has no text, and so no bytes."""
    return {"token": text, "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode())}


def usage(jobs: list[Job]) -> dict:
    prompt, new = sum(job.prompt_tokens for job in jobs), sum(job.new_tokens for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs)}}


def event_of(content: dict) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()
