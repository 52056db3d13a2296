"""What is asked of the engine, and what it answers: jobs and their answers, token by token."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from server.keep import Kept
from server.protocol import ApiError, Request
from tokenizer import Tokenizer, stop_at


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
    """One stream: what has been said of it, and what has been shown."""

    job: Job
    choice: int
    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    text: str = ""  # shown
    lengths: list[int] = field(default_factory=list)  # of all text, shown or not, after each token
    stopped: bool = False  # by a stop text
    finish: str = "length"

    def __post_init__(self):
        self.detokenize, self.stop = self.tokenizer.stream(), stop_at(self.job.asked.stop)

    def add(self, token_id: int) -> str:
        """Take a token; the text that can be shown now."""
        piece = self.detokenize(token_id)
        self.ids.append(token_id)
        self.lengths.append((self.lengths[-1] if self.lengths else 0) + len(piece))
        text, stopped = self.stop(piece)
        self.stopped |= stopped
        self.text += text
        return text

    def add_unshown(self, token_id: int) -> None:
        """Take a token that nobody waits for any more."""
        self.ids.append(token_id)
        self.lengths.append(self.lengths[-1] if self.lengths else 0)

    def flush(self) -> str:
        """The text that was held back, at the end: none after a stop text, or for nobody."""
        if self.stopped or self.job.cancelled:
            return ""
        text, _ = self.stop(self.detokenize(None), final=True)
        self.text += text
        return text
