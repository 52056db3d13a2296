"""What is asked of the engine, and what it answers: jobs and their answers, token by token."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from server.keep import Kept
from server.protocol import ApiError, Request
from tokenizer import GeneratedText


@dataclass
class Token:
    """A token as logprobs tell of it."""

    text: str
    logprob: float
    top: list[tuple[str, float]]  # the likeliest instead


@dataclass
class Event:
    """What one step adds to one choice."""

    choice: int
    text: str
    token: Token | None = None  # where logprobs are asked for
    finish: str | None = None  # "stop" or "length", with the last event


@dataclass(eq=False)
class Job:
    """One prompt of a request, and its n answers."""

    asked: Request
    ids: list[int]  # what is to be read
    first_choice: int  # its answers are this choice of the request and the next ones
    kept: Kept | None = None  # what was read before
    key: str = ""  # of the messages, for what will be kept; none: nothing is
    found: str = ""  # the key of what was found
    system: int = 0  # the first of ids that others may share
    system_key: str = ""
    new_tokens: int = 0
    cancelled: bool = False  # nobody waits for it
    queue: asyncio.Queue | None = None
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def cached_tokens(self) -> int:
        return len(self.kept.ids) if self.kept else 0

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + len(self.ids)

    def all_ids(self) -> list[int]:
        return (self.kept.ids if self.kept else []) + self.ids

    def post(self, event: Event | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)


@dataclass(eq=False)
class Answer:
    """One answer of a job, and how far its text came with each of its tokens."""

    job: Job
    choice: int
    generated: GeneratedText
    lengths: list[int] = field(default_factory=list)  # of all text, shown or not, after each token
    finish: str = "length"

    def add(self, token_id: int) -> str:
        """Take a token; the text that can be shown now."""
        text = self.generated.add(token_id)
        self.lengths.append(self.generated.decoded_length)
        return text

    def add_unshown(self, token_id: int) -> None:
        """Take a token that nobody waits for any more."""
        self.generated.ids.append(token_id)
        self.lengths.append(self.generated.decoded_length)

    def flush(self) -> str:
        """The text that was held back, at the end: none after a stop text, or for nobody."""
        return "" if self.job.cancelled else self.generated.flush()
