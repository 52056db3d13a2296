"""What goes into the engine and comes out: jobs, their answers, and the events of these."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from batch import Stream
from draw import NOT_FINITE
from server.prefix_cache import CachedPrefix
from server.protocol import ApiError, Request
from server.tokens import Token
from tokenizer import GeneratedText

log = logging.getLogger("gpt_stream")


@dataclass
class Event:
    """What one decode step adds to one choice."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()  # if the request wants logprobs
    echo: bool = False  # it is the prompt, and nothing that was generated
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
    ended: int = 0  # of its answers
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
    echoed: int = 0  # characters of the prompt that stand before it

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


def fault_of(stream: Stream) -> ApiError:
    """What a client is told of a stream that a fault ended."""
    if stream.error == NOT_FINITE:
        log.error("an answer broke off: %s", NOT_FINITE)
        return ApiError(500, f"The answer broke off: {NOT_FINITE}.")
    field, _ = stream.prompt.hooks.owner.request.grammar
    return ApiError(400, f"Invalid {field!r}: {stream.error}.", field, "invalid_value")


async def receive_events(queue: asyncio.Queue, n_choices: int) -> AsyncIterator[list[Event]]:
    """A request's events until all its choices have ended. Raises an ApiError among them."""
    while n_choices:
        events = [await queue.get()]
        while not queue.empty():
            events.append(queue.get_nowait())
        for event in events:
            if isinstance(event, ApiError):
                raise event
            n_choices -= event.finish is not None
        yield events
