"""One model, one thread, many answers: batch.py's continuous batching, fed from a queue.

The event loop's side is `plan` (which takes its time: in a worker thread), `submit`, and
`Job.cancel`. The engine's thread runs `generate_batch`, which takes the next prompt when it has
room, and sends every token's text to the loop as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import torch

from batch import Batch, Prompt, generate_batch
from generate import check_ids
from model import Transformer
from server.keep import Keep, Kept, chain, extended, put, take
from server.protocol import MAX_PROMPT, ApiError, Request
from tokenizer import Tokenizer, stop_at

log = logging.getLogger("gpt_stream")


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


@dataclass
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
    cancelled: bool = False
    answers: int = 0  # that have begun
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

    def cancel(self) -> None:
        """Nobody waits for it any more: its rows are free within a step."""
        self.cancelled = True

    def post(self, event: Event | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)


@dataclass
class Answer:
    """One stream: what has been said of it, and what has been shown."""

    job: Job
    choice: int
    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    text: str = ""  # shown
    lengths: list[int] = field(default_factory=list)  # of all text, after each token
    finish: str = "length"

    def __post_init__(self):
        self.detokenize, self.stop = self.tokenizer.stream(), stop_at(self.job.asked.stop)

    def add(self, token_id: int | None) -> str:
        """Take a token, at last None; the text that can be shown now."""
        piece = self.detokenize(token_id)
        text, stopped = self.stop(piece, final=token_id is None)
        if token_id is not None:
            self.ids.append(token_id)
            self.lengths.append((self.lengths[-1] if self.lengths else 0) + len(piece))
        self.finish = "stop" if stopped else self.finish
        self.text += text
        return text

    def unshown(self) -> int:
        """The last tokens of which no text was shown; -1 if the text shown ends within a token."""
        shown = len(self.text)
        if not shown:
            return len(self.ids)
        return len(self.ids) - 1 - self.lengths.index(shown) if shown in self.lengths else -1


class Engine:
    """Owns the model's memory. Raises ValueError for sizes that cannot be."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8,
                 n_sink: int | None = None, window: int | None = None, keep_bytes: int = 2 << 30,
                 max_queue: int = 64, pin_system: str | None = None):
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.pinned = [{"role": "system", "content": pin_system}] if pin_system else []
        self.fingerprint = getattr(model, "fingerprint", "random")
        self.batch = Batch(model, batch_size, n_sink, window)
        self.keep = Keep(keep_bytes)
        self.waiting: deque[Job] = deque()
        self.answers: dict[int, Answer] = {}
        self.wake = threading.Condition()
        self.draining = self.closed = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # -------------------------------------------------------------------------- the loop's side

    def start(self) -> Engine:
        self.thread.start()
        return self

    def state(self) -> str:
        if self.draining:
            return "shutting down"
        return "ok" if self.thread.is_alive() else "failed"

    def busy(self) -> int:
        return len(self.batch.rows) - self.batch.rows.count(None)

    def waiting_count(self) -> int:
        return len(self.waiting)

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError when n more requests cannot wait."""
        if self.state() != "ok":
            raise ApiError(503, f"The server is {self.state()}.", retry_after=5)
        if len(self.waiting) + n > self.max_queue:
            raise ApiError(429, f"{len(self.waiting)} requests are waiting already (--queue "
                                f"{self.max_queue}); try again.", code="queue_full", retry_after=1)

    def plan(self, asked: Request, who: str) -> list[Job]:
        """Turn a request into token ids; who asks decides which kept conversations it may go on
        from. Raises ApiError for what the chat template or the model cannot take."""
        try:
            jobs = [self.plan_chat(asked, who)] if asked.chat else [
                Job(asked, ids if isinstance(ids, list) else self.tokenizer.encode(ids),
                    at * asked.n) for at, ids in enumerate(asked.prompts)]
            for job in jobs:
                check_ids(self.model, job.ids)
        except ValueError as error:
            raise ApiError(400, f"{error}.", "messages" if asked.chat else "prompt",
                           "invalid_value") from None
        if (n := max(len(job.ids) for job in jobs)) > MAX_PROMPT:
            raise ApiError(400, f"The prompt has {n} tokens; at most {MAX_PROMPT} are read.",
                           "messages" if asked.chat else "prompt", "context_length_exceeded")
        return jobs

    def plan_chat(self, asked: Request, who: str) -> Job:
        messages = self.with_pinned(asked.messages)
        keys = chain(f"{self.fingerprint} {who}", messages)
        at, kept = self.keep.get(keys)
        if kept is not None and (ids := self.rest(messages, at, kept)):
            return Job(asked, ids, 0, kept, keys[-1], keys[at])
        job = Job(asked, self.tokenizer.conversation(messages), 0, key=keys[-1])
        if messages[0]["role"] == "system" and messages[0]["content"].strip():
            system = self.tokenizer.system_turn(messages[0]["content"])
            if job.ids[:len(system)] == system and len(system) < len(job.ids):
                job.system, job.system_key = len(system), keys[0]
        return job

    def with_pinned(self, messages: list[dict]) -> list[dict]:
        """The messages behind the pinned system turn."""
        if not self.pinned or messages[0] == self.pinned[0]:
            return messages
        if messages[0]["role"] == "system":
            raise ApiError(400, "This server has a system turn of its own (--pin-system); leave "
                                "yours out.", "messages.0", "invalid_value")
        return self.pinned + messages

    def rest(self, messages: list[dict], at: int, kept: Kept) -> list[int]:
        """The ids that follow what is kept of messages[:at + 1]; none if they do not follow."""
        if messages[at]["role"] == "system":
            ids = self.tokenizer.conversation(messages)
            return ids[len(kept.ids):] if ids[:len(kept.ids)] == kept.ids else []
        try:
            return self.tokenizer.turns_after(messages, at, kept.ids[-1])
        except ValueError:
            return []

    def submit(self, jobs: list[Job]) -> AsyncIterator[list[Event]]:
        """Queue a request's jobs; their events, several at once when they come together. Raises
        ApiError when the queue is full, and while iterating when the engine fails."""
        queue, loop = asyncio.Queue(), asyncio.get_running_loop()
        with self.wake:
            self.check_room(len(jobs))
            for job in jobs:
                job.queue, job.loop = queue, loop
                self.waiting.append(job)
            self.wake.notify()
        return arriving(queue, sum(job.asked.n for job in jobs))

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def idle(self) -> bool:
        return not (self.waiting or self.answers)

    def stop(self) -> None:
        """End the thread. Answers that are not complete end with an error."""
        with self.wake:
            self.draining = self.closed = True
            self.fail("The server is shutting down.", 503)
            self.wake.notify()
        self.thread.join(timeout=30)

    def fail(self, message: str, status: int = 500) -> None:
        """End all that is running or waiting with an error."""
        jobs = [*self.waiting, *{id(a.job): a.job for a in [*self.answers.values()]}.values()]
        self.waiting.clear()
        for job in jobs:
            job.cancel()
            job.post(ApiError(status, message, retry_after=1))

    # -------------------------------------------------------------------------- the engine's thread

    def run(self) -> None:
        while not self.closed:
            try:
                for index, token in generate_batch(self.model, self.prompts(), batch=self.batch):
                    self.tell(index, token)
            except Exception as error:  # the message could quote a prompt
                log.error("the engine failed: %s; running answers are lost", type(error).__name__)
                self.fail("The engine failed at this; try again.")
                self.answers.clear()
                self.batch.clear()

    def prompts(self) -> Iterator[Prompt | None]:
        """What generate_batch takes next: None while nothing waits, the end when closed."""
        while True:
            with self.wake:
                while not (self.waiting or self.closed or not self.batch.idle()):
                    self.wake.wait()
                if self.closed:
                    return
                job = self.waiting.popleft() if self.waiting else None
            yield self.prompt(job) if job and not job.cancelled else None
