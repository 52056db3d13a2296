"""One model, one thread, many answers: batch.py's continuous batching, fed from a queue.

The event loop's side is `plan` (which takes its time: in a worker thread), `submit`, and `leave`
when an answer is complete or nobody waits for it. Another thread is in `run`: `generate_batch`
takes the next prompt when it has room, and sends every token's text to the loop as it comes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from batch import LONG, Batch, Hooks, Prompt, Stream, generate_batch
from generate import LARGE_CHUNK, check_ids
from kv_cache import KVCache
from model import Transformer
from server.answers import Answer, Event, Job, Token
from server.keep import Keep, Kept, chain, extended, put, take
from server.protocol import MAX_PROMPT, ApiError, Request
from tokenizer import GeneratedText, Tokenizer

log = logging.getLogger("gpt_stream")


class Engine:
    """Owns the model's memory. Raises ValueError for sizes that cannot be."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8,
                 n_sink: int | None = None, window: int | None = None, keep_bytes: int = 2 << 30,
                 max_queue: int = 64, pin_system: str | None = None):
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.pinned = [{"role": "system", "content": pin_system}] if pin_system else []
        self.fingerprint = model.fingerprint
        self.names = {token_id: text for text, token_id in tokenizer.specials.items()}
        self.batch = Batch(model, batch_size, n_sink, window, n_staging=2, n_chunks=4)
        self.keep = Keep(keep_bytes)
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []  # that somebody waits for
        self.answers: dict[Stream, Answer] = {}  # that are in a row
        self.wake = threading.Condition()
        self.draining = self.closed = False
        self.ended = threading.Event()

    # -------------------------------------------------------------------------- the loop's side

    def start(self) -> Engine:
        """Run in a thread of its own. (The main thread is better: see `run`.)"""
        threading.Thread(target=self.run, name="engine", daemon=True).start()
        return self

    def state(self) -> str:
        if self.draining:
            return "shutting down"
        return "failed" if self.ended.is_set() else "ok"

    def busy(self) -> int:
        return len(self.batch.rows) - self.batch.rows.count(None)

    def waiting_count(self) -> int:
        return len(self.waiting)

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError when n more prompts cannot wait."""
        if self.state() != "ok":
            raise ApiError(503, f"The server is {self.state()}.", retry_after=5)
        if n > self.max_queue:
            raise ApiError(400, f"{n} prompts in one request; this server lets {self.max_queue} "
                                "wait (--queue).", "prompt", "invalid_value")
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
        at, kept = self.find(messages, keys)
        if kept is not None and (ids := self.rest(messages, at, kept)):
            return Job(asked, ids, 0, kept, keys[-1], keys[at])
        job = Job(asked, self.tokenizer.conversation(messages), 0, key=keys[-1])
        if (messages[0]["role"] == "system" and messages[0]["content"].strip()
                and self.keep.max_bytes):
            system = self.tokenizer.system_turn(messages[0]["content"])
            if job.ids[:len(system)] == system and len(system) < len(job.ids):
                job.system, job.system_key = len(system), keys[0]
        return job

    def find(self, messages: list[dict],
             keys: list[str]) -> tuple[int, Kept] | tuple[None, None]:
        """The longest beginning of a conversation that is kept: its last message, and the cache."""
        at, kept = self.keep.get(keys)
        said = max((n for n, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
        if said > (at or 0):  # perhaps an answer that was stopped
            _, longer = self.keep.get([stopped(keys[said - 1])])
            if longer and (longer := longer.up_to(messages[said]["content"])):
                return said, longer
        return at, kept

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
                self.jobs.append(job)
            self.wake.notify()
        return arriving(queue, sum(job.asked.n for job in jobs))

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def idle(self) -> bool:
        return not self.jobs

    def leave(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: what they hold is free within a step."""
        for job in jobs:
            job.cancelled = True
        self.end_reading()
        with self.wake:
            self.jobs = [job for job in self.jobs if job not in jobs]
            self.waiting = deque(job for job in self.waiting if job not in jobs)

    def stop(self) -> None:
        """End `run`. Answers that are not complete end with an error."""
        with self.wake:
            self.draining = self.closed = True
            self.fail("The server is shutting down.", 503)
            self.wake.notify()

    def end_reading(self) -> None:
        """Let go of prompts that are being read for nobody. (Rows are when they tell a token.)"""
        for prefill in list(self.batch.prefills):
            for stream in list(prefill.streams):
                if stream.prompt.hooks.owner.cancelled:
                    stream.cancel()

    def fail(self, message: str, status: int = 500) -> None:
        """End all that is running or waiting with an error."""
        with self.wake:
            jobs = self.jobs
            self.leave(jobs)
        for job in jobs:  # once told, somebody may ask again at once
            job.post(ApiError(status, message, retry_after=1))

    # -------------------------------------------------------------------------- the engine's thread

    def run(self) -> None:
        """Answer until stopped. OpenMP's threads wait for each other fastest where the main thread
        is among them: 275 tokens a second on two cores, and 167 in any other."""
        try:
            while not self.closed:
                self.answer()
        finally:
            self.ended.set()

    def answer(self) -> None:
        try:
            for stream, token_id in generate_batch(self.model, self.prompts(), batch=self.batch):
                self.tell(stream, token_id)
        except Exception as error:  # the message could quote a prompt
            log.error("the engine failed: %s; running answers are lost", type(error).__name__)
            self.fail("The engine failed at this; try again.")
            self.answers.clear()
            self.batch.reset(self.model.config.vocab_size)

    def prompts(self) -> Iterator[Prompt | None]:
        """What generate_batch takes next: None while nothing waits, the end when closed."""
        while True:
            with self.wake:
                while not (self.waiting or self.closed or not self.batch.idle):
                    self.wake.wait()
                if self.closed:
                    return
                self.end_reading()  # of those that left while they were taken
                # One staging row stays free of long prompts, so that short ones overtake them.
                busy = any(len(stream.prompt.ids) > LONG for prefill in self.batch.prefills
                           for stream in prefill.streams)
                job = next((job for job in self.waiting if not busy or len(job.ids) <= LONG), None)
                if job:
                    self.waiting.remove(job)
            yield self.prompt(job) if job else None

    def prompt(self, job: Job) -> Prompt:
        """A job as generate_batch takes one."""
        hooks = Hooks(
            prefix_ids=job.kept.ids if job.kept else (),
            restore_prefix=functools.partial(put, job.kept) if job.kept else None,
            n_shared=job.system,
            save_shared=functools.partial(self.share, job) if job.system else None, owner=job)
        return Prompt(job.ids, job.asked.sampling, job.asked.max_new_tokens,
                      samples=job.asked.n, logprobs=job.asked.top_logprobs, hooks=hooks)

    def share(self, job: Job, cache: KVCache) -> None:
        """Keep a system turn, which has just been read, for others."""
        self.keep.add(job.system_key, take(cache, 0, job.ids[:job.system]))

    def tell(self, stream: Stream, token_id: int | None) -> None:
        """Pass on what generate_batch says of a stream: a token, or its end."""
        job = stream.prompt.hooks.owner
        if token_id is None:
            if answer := self.answers.pop(stream, None):  # none where it was not even read
                self.end(answer, stream)
            return
        if stream not in self.answers:
            self.answers[stream] = Answer(job, job.first_choice + stream.sample,
                                          GeneratedText(self.tokenizer, job.asked.stop))
        answer = self.answers[stream]
        if job.cancelled:
            stream.cancel()
            answer.add_unshown(token_id)
            return
        job.new_tokens += 1
        text = answer.add(token_id)
        if answer.generated.stopped:
            stream.cancel()
        if answer.generated.stopped or token_id in self.model.config.eos_ids:
            answer.finish = "stop"
        token = self.token(token_id, *stream.logprobs.pop()) if stream.logprobs else None
        job.post(Event(answer.choice, text, token))

    def end(self, answer: Answer, stream: Stream) -> None:
        """Keep a conversation that has ended for now, and only then say so."""
        job, rest = answer.job, answer.flush()
        if job.key and self.keep.max_bytes:
            text = answer.generated.text
            kept = take(self.batch.cache, self.batch.rows.index(stream),
                        job.all_ids() + answer.generated.ids)
            key = extended(job.key, "assistant", text)
            if job.cancelled:  # where its reader stopped will be told by the next request
                kept.text, kept.lengths, key = text, answer.lengths, stopped(job.key)
            elif answer.generated.stopped:
                kept.text, kept.lengths = text, answer.lengths
                kept = kept.up_to(text)
            if kept:
                self.keep.add(key, kept, job.found)
        if not job.cancelled:
            job.post(Event(answer.choice, rest, finish=answer.finish))

    def token(self, token_id: int, logprob: float, likeliest: dict[int, float]) -> Token:
        return Token(self.name(token_id), logprob,
                     [(self.name(i), value) for i, value in likeliest.items()])

    def name(self, token_id: int) -> str:
        """A token's text; special ones have a name."""
        return self.names.get(token_id) or self.tokenizer.decode([token_id])

    def warm(self) -> None:
        """Run every graph that answering needs, so that none is compiled later."""
        for _ in range(3 if self.batch.cache.length.is_cuda else 1):
            prompts = [[0] * (LARGE_CHUNK + 1), [0]]  # at the end one is left, which is a graph
            list(generate_batch(self.model, prompts, max_new_tokens=[9, 3], stop_ids=(),
                                batch=self.batch))


def stopped(key: str) -> str:
    """Where an answer to this conversation is kept that its reader stopped."""
    return extended(key, "stopped", "")


async def arriving(queue: asyncio.Queue, n_choices: int) -> AsyncIterator[list[Event]]:
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
