"""One model, one thread, many answers: streams.py's continuous batching, fed from a queue.

The event loop makes jobs (jobs.make_jobs, in a worker thread, since that takes time), and calls
`submit`, and `cancel` when an answer is complete or its client has left. The engine's thread is in
`run`: generate_batch takes the next prompt when it has room, and the event loop gets every token's
text as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from formats.tool_calls import Reader, find_ability, hidden_marks
from generate import LARGE_CHUNK, chat_stop_ids
from grammar import vocabulary
from kv_cache import KVCache
from model import Transformer
from server.answers import Answer, Event, Job, fault_of, receive_events
from server.prefix_cache import (
    PrefixCache,
    cancelled_key,
    copy_from_row,
    copy_to_row,
    message_key,
)
from server.protocol import ApiError, Request
from server.tokens import TokenNames
from streams import LONG_PROMPT, Batch, Hooks, Prompt, Stream, generate_batch
from tokenizer import GeneratedText, Tokenizer

log = logging.getLogger("gpt_stream")


class Engine:
    """Owns the model's memory. Raises ValueError for sizes that cannot be."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8,
                 n_sink: int | None = None, window: int | None = None, cache_bytes: int = 2 << 30,
                 max_queue: int = 64, pin_system: str | None = None):
        """Sizes as in streams.Batch; cache_bytes is the prefix cache's limit, 0 for none."""
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.pinned = [{"role": "system", "content": pin_system}] if pin_system else []
        self.fingerprint = model.fingerprint
        self.chat_stop_ids = chat_stop_ids(model, tokenizer)
        self.names = TokenNames(tokenizer, model.config.vocab_size)
        self.ability = find_ability(tokenizer.chat_template)  # to say tools and calls
        self.batch = Batch(model, batch_size, n_sink, window, n_staging=2, n_chunks=4)
        self.prefix_cache = PrefixCache(cache_bytes)
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []  # all that are neither complete nor cancelled
        self.answers: dict[Stream, Answer] = {}  # of streams that are in a row
        self.wake = threading.Condition()
        self.draining = self.closed = False
        self.ended = threading.Event()

    # -------------------------------------------------------------------------- the event loop

    def start(self) -> Engine:
        """Run in a thread of its own. (The main thread is better: see `run`.)"""
        threading.Thread(target=self.run, name="engine", daemon=True).start()
        return self

    def state(self) -> str:
        if self.draining:
            return "shutting down"
        return "failed" if self.ended.is_set() else "ok"

    def n_busy_rows(self) -> int:
        return len(self.batch.rows) - self.batch.rows.count(None)

    def n_waiting(self) -> int:
        return len(self.waiting)

    def check_room(self, n: int = 1) -> None:
        """Raises ApiError when n more prompts cannot wait. What a free row can take does not."""
        if self.state() != "ok":
            raise ApiError(503, f"The server is {self.state()}.", retry_after=5)
        free, waiting = len(self.batch.rows), 0
        if n > free + self.max_queue:
            raise ApiError(400, f"{n} prompts in one request; this server has {free} rows (--batch)"
                                f" and lets {self.max_queue} wait (--queue).", "prompt",
                           "invalid_value")
        for rows_needed in [job.request.n - job.ended for job in self.jobs] + [1] * n:
            if rows_needed <= free:
                free -= rows_needed
            else:
                free, waiting = 0, waiting + 1
        if waiting > self.max_queue:
            raise ApiError(429, f"All rows are busy, and {len(self.waiting)} requests are waiting "
                                f"already (--queue {self.max_queue}); try again.",
                           code="queue_full", retry_after=1)

    def stop_ids_of(self, request: Request) -> tuple[int, ...]:
        """The tokens that end a request's answers."""
        ends = self.chat_stop_ids if request.chat else self.model.config.eos_ids
        return (*(() if request.ignore_eos else ends), *request.stop_token_ids)

    def decode(self, ids: list[int]) -> str:
        """The text of a raw prompt's ids. Some vocabularies put a space in front of a text, which
        is not in it."""
        text = self.tokenizer.decode(ids)
        shorter, n_front = text.removeprefix(" "), len(self.tokenizer.front)
        same = shorter != text and self.tokenizer.encode(shorter)
        return shorter if same and ids in (same, same[n_front:]) else text
    def submit(self, jobs: list[Job]) -> AsyncIterator[list[Event]]:
        """Queue a request's jobs. Returns their events, in a list those that come together. Raises
        ApiError when the queue is full, and while iterating when the engine fails."""
        queue, loop = asyncio.Queue(), asyncio.get_running_loop()
        with self.wake:
            self.check_room(len(jobs))
            for job in jobs:
                job.queue, job.loop = queue, loop
                self.waiting.append(job)
                self.jobs.append(job)
            self.wake.notify()
        return receive_events(queue, sum(job.request.n for job in jobs))

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def idle(self) -> bool:
        return not self.jobs

    def cancel(self, jobs: list[Job]) -> None:
        """Give up these jobs, which may be complete. Rows and staging rows are free within a step:
        prefills are cancelled here, and decoding rows at their next token (see on_token)."""
        for job in jobs:
            job.cancelled = True
        self.cancel_prefills()
        with self.wake:
            self.jobs = [job for job in self.jobs if job not in jobs]
            self.waiting = deque(job for job in self.waiting if job not in jobs)

    def cancel_prefills(self) -> None:
        """Cancel prefills whose job is cancelled."""
        for prefill in list(self.batch.prefills):
            for stream in list(prefill.streams):
                if stream.prompt.hooks.owner.cancelled:
                    stream.cancel()

    def stop(self) -> None:
        """End `run`. Answers that are not complete end with an error."""
        with self.wake:
            self.draining = self.closed = True
            self.fail_all("The server is shutting down.", 503)
            self.wake.notify()

    def fail_all(self, message: str, status: int = 500) -> None:
        """End every job, running or waiting, with an error."""
        with self.wake:
            jobs = self.jobs
            self.cancel(jobs)
        for job in jobs:  # last, since a client may ask again at once
            job.post(ApiError(status, message, retry_after=1))

    # -------------------------------------------------------------------------- the engine's thread

    def run(self) -> None:
        """Answer until stopped. The main thread is the best one for this: OpenMP's threads wait for
        each other much faster where the main thread is among them."""
        try:
            while not self.closed:
                self.run_batch()
        finally:
            self.ended.set()

    def run_batch(self) -> None:
        """Answer until closed, or until the model fails, which ends every job with an error."""
        try:
            prompts = self.next_prompts()
            for stream, token_id in generate_batch(self.model, prompts, batch=self.batch):
                if token_id is None:
                    self.on_end(stream)
                else:
                    self.on_token(stream, token_id)
        except Exception as error:  # the message could quote a prompt
            log.error("the engine failed: %s; running answers are lost", type(error).__name__)
            self.fail_all("The engine failed at this; try again.")
            self.answers.clear()
            self.batch.reset(self.model.config.vocab_size)

    def next_prompts(self) -> Iterator[Prompt | None]:
        """The prompts for generate_batch: None while no job waits, and the end when closed."""
        while True:
            with self.wake:
                while not (self.waiting or self.closed or not self.batch.idle):
                    self.wake.wait()
                if self.closed:
                    return
                self.cancel_prefills()  # of jobs that were cancelled while they were taken
                # One staging row stays free of long prompts, so that short ones overtake them.
                busy = any(len(stream.prompt.ids) > LONG_PROMPT for prefill in self.batch.prefills
                           for stream in prefill.streams)
                job = next((job for job in self.waiting
                            if not busy or len(job.ids) <= LONG_PROMPT), None)
                if job:
                    self.waiting.remove(job)
            yield self.make_prompt(job) if job else None

    def make_prompt(self, job: Job) -> Prompt:
        """A job as generate_batch takes one."""
        request, prefix = job.request, job.prefix
        hooks = Hooks(
            prefix_ids=prefix.ids if prefix else (),
            restore_prefix=functools.partial(copy_to_row, prefix) if prefix else None,
            n_shared=job.n_system,
            save_shared=functools.partial(self.cache_system_turn, job) if job.n_system else None,
            owner=job)
        return Prompt(job.ids, request.sampling, request.max_new_tokens,
                      stop_ids=self.stop_ids_of(request), samples=request.n,
                      logprobs=request.top_logprobs, hooks=hooks,
                      prompt_logprobs=request.top_logprobs if request.echo else None)

    def cache_system_turn(self, job: Job, staging: KVCache) -> None:
        """Cache a system turn, which was just prefilled, for other conversations."""
        prefix = copy_from_row(staging, 0, job.ids[:job.n_system])
        self.prefix_cache.add(job.system_key, prefix)

    def on_token(self, stream: Stream, token_id: int) -> None:
        """Send a stream's next token to its client, or cancel the stream if the job is."""
        job, answer = stream.prompt.hooks.owner, self.answer_of(stream)
        if job.cancelled:
            stream.cancel()
            answer.add_unshown(token_id)
            return
        job.new_tokens += 1
        offset = answer.echoed + answer.generated.decoded_length
        text, calls = answer.add(token_id)
        if answer.ended:
            stream.cancel()
        if answer.ended or token_id in stream.prompt.stop_ids:
            answer.finish = "stop"
        tokens = [self.names.token(token_id, *pair, offset) for pair in stream.logprobs]
        stream.logprobs.clear()
        job.post(Event(answer.choice, text, tokens, calls=calls))

    def answer_of(self, stream: Stream) -> Answer:
        """The answer of a stream. With echo, its prompt is sent before its first token."""
        job = stream.prompt.hooks.owner
        if stream not in self.answers:
            answer = self.new_answer(job, job.first_choice + stream.sample)
            self.answers[stream] = answer
            if job.request.echo and not job.cancelled:
                given = job.request.prompts[job.first_choice // job.request.n]
                text = given if isinstance(given, str) else self.decode(given)
                tokens = (self.names.prompt_tokens(job.ids, stream.prompt_logprobs, text)
                          if job.request.top_logprobs is not None else ())
                answer.echoed = len(text)
                job.post(Event(answer.choice, text, tokens, echo=True))
        return self.answers[stream]

    def new_answer(self, job: Job, choice: int) -> Answer:
        request, form = job.request, self.ability.form
        if request.tools is None:
            return Answer(job, choice, GeneratedText(self.tokenizer, request.stop))
        reader = Reader(form, request.tools.functions, sure=request.sampling.grammar is not None,
                        parallel=request.tools.parallel)
        marks = hidden_marks(form, self.tokenizer)
        return Answer(job, choice, GeneratedText(self.tokenizer, request.stop, marks), reader)

    def on_end(self, stream: Stream) -> None:
        """Cache the conversation, and only then send the last event: the client may go on at once.
        A stream that was cancelled before its first token has no answer. A fault ends its request
        with an error, and nothing of it is cached."""
        job = stream.prompt.hooks.owner
        job.ended += 1
        if not job.request.max_new_tokens:  # its prompt was only read
            self.answer_of(stream)
        answer = self.answers.pop(stream, None)
        if stream.error and not job.cancelled:
            job.post(fault_of(stream))
        if stream.error or answer is None:
            return
        rest, calls = answer.flush()
        if job.key and self.prefix_cache.max_bytes:
            self.cache_answer(answer, self.batch.rows.index(stream))
        if not job.cancelled:
            job.post(Event(answer.choice, rest, finish=answer.finish, calls=calls))

    def cache_answer(self, answer: Answer, row: int) -> None:
        """Cache a conversation up to the end of an answer, which is still in its row."""
        job, text = answer.job, answer.generated.text
        prefix = copy_from_row(self.batch.cache, row, job.all_ids() + answer.generated.ids)
        prefix.answer_text, prefix.text_lengths = text, answer.text_lengths
        if job.cancelled:  # the next request says how much of the answer its client has seen
            return self.prefix_cache.add(cancelled_key(job.key), prefix, job.parent_key)
        if answer.generated.stopped:
            prefix = prefix.cut_after(text)
        message = answer.message()
        if prefix and message:
            aliases = {}
            if message["content"] == text and "tool_calls" not in message:
                aliases = {message_key(job.key, {**message, "content": stripped}): cut
                           for stripped, cut in prefix.as_stripped().items()}
            self.prefix_cache.add(message_key(job.key, message), prefix, job.parent_key, aliases)

    def warm(self) -> None:
        """Make and run all that answering needs, so that nothing is compiled later."""
        with contextlib.suppress(ValueError):  # llguidance is optional: a request says so
            vocabulary(self.tokenizer, self.model.config.vocab_size)
        for _ in range(3 if self.batch.cache.length.is_cuda else 1):
            # Two rows, and then the step of one row alone, which is another graph.
            prompts = [[0] * (LARGE_CHUNK + 1), [0]]
            list(generate_batch(self.model, prompts, max_new_tokens=[9, 3], stop_ids=(),
                                batch=self.batch))
