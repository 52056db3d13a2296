"""What goes into the engine and comes out: jobs, their answers, and the events of these."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

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
    finish: str | None = None  # "stop" or "length", with the last event


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
    # Of the decoded text, shown or held back, after each token.
    text_lengths: list[int] = field(default_factory=list)
    finish: str = "length"

    def add(self, token_id: int) -> str:
        """Take a token. Returns the text that can be shown now."""
        text = self.generated.add(token_id)
        self.text_lengths.append(self.generated.decoded_length)
        return text

    def add_unshown(self, token_id: int) -> None:
        """Take a token of a job that is cancelled."""
        self.generated.ids.append(token_id)
        self.text_lengths.append(self.generated.decoded_length)

    def flush(self) -> str:
        """The text that was held back, at the end; none after a stop text or a cancellation."""
        return "" if self.job.cancelled else self.generated.flush()
