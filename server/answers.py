"""What goes into the engine and comes out: jobs, their answers, and the events of these."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from formats.tool_calls import Reader
from formats.tools import calls_for_template
from server.prefix_cache import CachedPrefix
from server.protocol import ApiError, Request
from tokenizer import GeneratedText


@dataclass
class Token:
    """A token with its log-probability, and the likeliest ones in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass
class Event:
    """What one decode step adds to one choice."""

    choice: int
    text: str
    token: Token | None = None  # if the request wants logprobs
    finish: str | None = None  # "stop", "length" or "tool_calls", with the last event
    calls: Sequence[dict] = ()  # what it adds to calls of functions, as OpenAI streams them


@dataclass(eq=False)
class Job:
    """One prompt of a request, and its n answers."""

    request: Request
    ids: list[int]  # to prefill
    first_choice: int  # its answers are this choice of the request and the next ones
    prefix: CachedPrefix | None = None  # the conversation that the ids go on from
    key: str = ""  # of the messages, in the prefix cache; none: its answers are not cached
    parent_key: str = ""  # of the prefix
    n_system: int = 0  # the first of the ids: a system turn that is to be cached by itself
    system_key: str = ""
    new_tokens: int = 0
    cancelled: bool = False  # its client left, or its request ended
    queue: asyncio.Queue | None = None  # of its request's events
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def cached_tokens(self) -> int:
        return len(self.prefix.ids) if self.prefix else 0

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + len(self.ids)

    def all_ids(self) -> list[int]:
        return (self.prefix.ids if self.prefix else []) + self.ids

    def post(self, event: Event | ApiError) -> None:
        """Send an event to the request. The engine's thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)


@dataclass(eq=False)
class Answer:
    """One answer of a job, and how far its text came with each of its tokens."""

    job: Job
    choice: int
    generated: GeneratedText
    reader: Reader | None = None  # finds calls in the text, where there are tools
    # Of the decoded text, shown or held back, after each token.
    text_lengths: list[int] = field(default_factory=list)
    finish: str = "length"

    def add(self, token_id: int) -> tuple[str, Sequence[dict]]:
        """Take a token. Returns the text that can be shown now, and what is told of calls."""
        text = self.generated.add(token_id)
        self.text_lengths.append(self.generated.decoded_length)
        return self.reader.add(text) if self.reader else (text, ())

    def add_unshown(self, token_id: int) -> None:
        """Take a token of a job that is cancelled."""
        self.generated.ids.append(token_id)
        self.text_lengths.append(self.generated.decoded_length)

    def flush(self) -> tuple[str, Sequence[dict]]:
        """What was held back, at the end; no text after a stop text, nothing after a cancellation.
        """
        if self.job.cancelled:
            return "", ()
        text = self.generated.flush()
        if self.reader is None:
            return text, ()
        shown, calls = self.reader.add(text)
        last_shown, last_calls = self.reader.end(cut=self.finish == "length")
        if self.reader.calls and self.finish == "stop":
            self.finish = "tool_calls"
        return shown + last_shown, [*calls, *last_calls]

    @property
    def ended(self) -> bool:
        """Whether nothing that the model goes on with can be shown."""
        return self.generated.stopped or self.reader is not None and self.reader.done

    def message(self) -> dict | None:
        """The answer as a client sends it back; None for one that no client can."""
        if self.reader is None:
            return {"role": "assistant", "content": self.generated.text}
        message = self.reader.message()
        if "tool_calls" not in message:
            return message
        if self.reader.overran:
            return None
        with contextlib.suppress(ValueError):  # a call that was cut
            return {**message, "tool_calls": calls_for_template(message["tool_calls"], "")}
        return None
