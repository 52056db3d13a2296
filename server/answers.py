"""What goes into the engine and comes out: jobs, their answers, and the events of these."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from draw import NOT_FINITE
from formats.tool_calls import Reader
from formats.tools import calls_for_template
from server.prefix_cache import CachedPrefix
from server.protocol import ApiError, Request
from server.tokens import Token
from streams import Stream
from tokenizer import GeneratedText

log = logging.getLogger("gpt_stream")


@dataclass
class Event:
    """What one decode step adds to one choice."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()  # if the request wants logprobs
    finish: str | None = None  # "stop", "length" or "tool_calls", with the last event
    calls: Sequence[dict] = ()  # what it adds to calls of functions, as OpenAI streams them
    echo: bool = False  # it is the prompt, and nothing that was generated


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
    reader: Reader | None = None  # finds calls in the text, where there are tools
    # Of the decoded text, shown or held back, after each token.
    text_lengths: list[int] = field(default_factory=list)
    finish: str = "length"
    echoed: int = 0  # characters of the prompt that stand before it

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


def fault_of(stream: Stream) -> ApiError:
    """What a client is told of a stream that a fault ended."""
    if stream.error == NOT_FINITE:
        log.error("an answer broke off: %s", NOT_FINITE)
        return ApiError(500, f"The answer broke off: {NOT_FINITE}.")
    field = stream.prompt.hooks.owner.request.grammar_field
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
