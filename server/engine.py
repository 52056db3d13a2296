"""One model, one thread, many answers: batch.py's continuous batching, fed from a queue.

The event loop calls `make_jobs` (in a worker thread, since it takes time), `submit`, and `cancel`
when an answer is complete or its client has left. The engine's thread is in `run`: generate_batch
takes the next prompt when it has room, and the event loop gets every token's text as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

from batch import LONG_PROMPT, Batch, Hooks, Prompt, Stream, generate_batch
from draw import NOT_FINITE
from formats.tool_calls import Reader, find_ability, form_of_calls, hidden_marks
from formats.tools import grammar_of_calls
from generate import LARGE_CHUNK, chat_stop_ids, check_ids
from grammar import Grammar, vocabulary
from kv_cache import KVCache
from model import Transformer
from server.answers import Answer, Event, Job, Token
from server.prefix_cache import (
    CachedPrefix,
    PrefixCache,
    cancelled_key,
    copy_from_row,
    copy_to_row,
    message_key,
    prefix_keys,
)
from server.protocol import MAX_PROMPT, ApiError, Request, refused
from tokenizer import GeneratedText, Tokenizer

log = logging.getLogger("gpt_stream")
LEAST_LOGPROB = -9999.0


class Engine:
    """Owns the model's memory. Raises ValueError for sizes that cannot be."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8,
                 n_sink: int | None = None, window: int | None = None, cache_bytes: int = 2 << 30,
                 max_queue: int = 64, pin_system: str | None = None):
        """Sizes as in batch.Batch; cache_bytes is the prefix cache's limit, 0 for none."""
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.pinned = [{"role": "system", "content": pin_system}] if pin_system else []
        self.fingerprint = model.fingerprint
        self.chat_stop_ids = chat_stop_ids(model, tokenizer)
        self.ability = find_ability(tokenizer.chat_template)  # to say tools and calls
        self.special_names = {token_id: text for text, token_id in tokenizer.specials.items()}
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
        """Raises ApiError when n more prompts cannot wait."""
        if self.state() != "ok":
            raise ApiError(503, f"The server is {self.state()}.", retry_after=5)
        if n > self.max_queue:
            raise ApiError(400, f"{n} prompts in one request; this server lets {self.max_queue} "
                                "wait (--queue).", "prompt", "invalid_value")
        if len(self.waiting) + n > self.max_queue:
            raise ApiError(429, f"{len(self.waiting)} requests are waiting already (--queue "
                                f"{self.max_queue}); try again.", code="queue_full", retry_after=1)

    def prepare_grammars(self) -> None:
        """Make the table of tokens that grammars need, once. Raises ApiError where it cannot be."""
        try:
            vocabulary(self.tokenizer, self.model.config.vocab_size)
        except ValueError as error:
            raise ApiError(400, f"{error}.", code="unsupported_parameter") from None

    def compile_grammar(self, request: Request) -> None:
        """Compile what a request's answers must fit. Raises ApiError naming the field."""
        (field, source), config = request.grammar or ("tools", {}), self.model.config
        try:
            if source:
                grammar = Grammar(self.tokenizer, config.vocab_size, **source)
            if request.tools:
                grammar = grammar_of_calls(request.tools, self.ability.form, self.tokenizer,
                                           config.vocab_size, source.get("schema"))
            grammar.check_fits(config.vocab_size,
                               self.chat_stop_ids if request.chat else config.eos_ids)
        except ValueError as error:
            raise refused(error, field) from None
        request.sampling = replace(request.sampling, grammar=grammar)

    def check_tools(self, request: Request) -> None:
        """Raises ApiError where the chat template cannot say a request's tools, or calls and
        results in its messages."""
        try:
            if request.tools:
                form_of_calls(self.ability, "tools")
        except ValueError as error:
            raise refused(error) from None
        for at, message in enumerate(request.messages):
            of_call = message["role"] == "tool" or "tool_calls" in message
            if of_call and not self.ability.writes_calls[bool(request.tools)]:
                raise ApiError(400, "The chat template of this model cannot say calls and their "
                                    f"results{'' if request.tools else ' without tools'}.",
                               f"messages.{at}", "unsupported_parameter")

    def make_jobs(self, request: Request, client: str) -> list[Job]:
        """Turn a request into token ids, a job for each prompt. A client goes on only from its own
        cached conversations. Raises ApiError for what the chat template or the model refuses."""
        try:
            jobs = [self.make_chat_job(request, client)] if request.chat else [
                Job(request, ids if isinstance(ids, list) else self.tokenizer.encode(ids),
                    at * request.n) for at, ids in enumerate(request.prompts)]
            for job in jobs:
                check_ids(self.model, job.ids)
        except ValueError as error:
            raise ApiError(400, f"{error}.", "messages" if request.chat else "prompt",
                           "invalid_value") from None
        if (n := max(len(job.ids) for job in jobs)) > MAX_PROMPT:
            raise ApiError(400, f"The prompt has {n} tokens; at most {MAX_PROMPT} are read.",
                           "messages" if request.chat else "prompt", "context_length_exceeded")
        return jobs

    def make_chat_job(self, request: Request, client: str) -> Job:
        """The job of a conversation: only what follows the longest cached prefix is prefilled."""
        messages = self.with_pinned(request.messages)
        template_args = request.template_args
        start = f"{self.fingerprint} {client}"
        if template_args:
            start += f" {json.dumps(template_args, sort_keys=True)}"
        keys = prefix_keys(start, messages)
        last, prefix = self.find_prefix(messages, keys)
        if prefix is not None and (
                ids := self.ids_after(messages, last, prefix, template_args)):
            return Job(request, ids, 0, prefix, keys[-1], keys[last])
        job = Job(request, self.tokenizer.conversation(messages, template_args), 0, key=keys[-1])
        if (messages[0]["role"] == "system" and messages[0]["content"].strip()
                and self.prefix_cache.max_bytes):
            system = self.tokenizer.system_turn(messages[0]["content"], template_args)
            if job.ids[:len(system)] == system and len(system) < len(job.ids):
                job.n_system, job.system_key = len(system), keys[0]
        return job

    def find_prefix(self, messages: list[dict],
                    keys: list[str]) -> tuple[int, CachedPrefix] | tuple[None, None]:
        """The longest cached prefix of a conversation: its last message's index, and it."""
        last, prefix = self.prefix_cache.find_longest(keys)
        answered = max((n for n, message in enumerate(messages)
                        if message["role"] == "assistant"), default=0)
        # The answer may have been cancelled, before it could call anything.
        if answered > (last or 0) and "tool_calls" not in messages[answered]:
            _, longer = self.prefix_cache.find_longest([cancelled_key(keys[answered - 1])])
            if longer and (longer := longer.cut_after(messages[answered]["content"])):
                return answered, longer
        return last, prefix

    def with_pinned(self, messages: list[dict]) -> list[dict]:
        """The messages behind the pinned system turn."""
        if not self.pinned or messages[0] == self.pinned[0]:
            return messages
        if messages[0]["role"] == "system":
            raise ApiError(400, "This server has a system turn of its own (--pin-system); leave "
                                "yours out.", "messages.0", "invalid_value")
        return self.pinned + messages

    def ids_after(self, messages: list[dict], last: int, prefix: CachedPrefix,
                  template_args: dict) -> list[int]:
        """The ids that follow the cached prefix, which ends with messages[last]. Empty where the
        template does not go on from there."""
        if messages[last]["role"] == "system":
            ids = self.tokenizer.conversation(messages, template_args)
            return ids[len(prefix.ids):] if ids[:len(prefix.ids)] == prefix.ids else []
        try:
            return self.tokenizer.turns_after(messages, last, prefix.ids[-1], template_args)
        except ValueError:
            return []

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
                      stop_ids=self.chat_stop_ids if request.chat else None, samples=request.n,
                      logprobs=request.top_logprobs, hooks=hooks)

    def cache_system_turn(self, job: Job, staging: KVCache) -> None:
        """Cache a system turn, which was just prefilled, for other conversations."""
        prefix = copy_from_row(staging, 0, job.ids[:job.n_system])
        self.prefix_cache.add(job.system_key, prefix)

    def on_token(self, stream: Stream, token_id: int) -> None:
        """Send a stream's next token to its client, or cancel the stream if the job is."""
        job = stream.prompt.hooks.owner
        if stream not in self.answers:
            self.answers[stream] = self.new_answer(job, job.first_choice + stream.sample)
        answer = self.answers[stream]
        if job.cancelled:
            stream.cancel()
            answer.add_unshown(token_id)
            return
        job.new_tokens += 1
        text, calls = answer.add(token_id)
        if answer.ended:
            stream.cancel()
        if answer.ended or token_id in stream.prompt.stop_ids:
            answer.finish = "stop"
        token = self.token(token_id, *stream.logprobs.pop()) if stream.logprobs else None
        job.post(Event(answer.choice, text, token, calls=calls))

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
        job, answer = stream.prompt.hooks.owner, self.answers.pop(stream, None)
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
        if job.cancelled or answer.generated.stopped:
            prefix.answer_text, prefix.text_lengths = text, answer.text_lengths
        if job.cancelled:  # the next request says how much of the answer its client has seen
            return self.prefix_cache.add(cancelled_key(job.key), prefix, job.parent_key)
        if answer.generated.stopped:
            prefix = prefix.cut_after(text)
        message = answer.message()
        if prefix and message:
            self.prefix_cache.add(message_key(job.key, message), prefix, job.parent_key)

    def token(self, token_id: int, logprob: float, likeliest: dict[int, float]) -> Token:
        """A token with its log-probabilities. JSON has no -inf, and OpenAI's is LEAST_LOGPROB."""
        return Token(self.token_text(token_id), max(logprob, LEAST_LOGPROB),
                     [(self.token_text(i), max(value, LEAST_LOGPROB))
                      for i, value in likeliest.items()])

    def token_text(self, token_id: int) -> str:
        """A token's text; special ones have a name."""
        return self.special_names.get(token_id) or self.tokenizer.decode([token_id])

    def warm(self) -> None:
        """Make and run all that answering needs, so that nothing is compiled later."""
        with contextlib.suppress(ApiError):  # llguidance is optional: a request says so
            self.prepare_grammars()
        for _ in range(3 if self.batch.cache.length.is_cuda else 1):
            # Two rows, and then the step of one row alone, which is another graph.
            prompts = [[0] * (LARGE_CHUNK + 1), [0]]
            list(generate_batch(self.model, prompts, max_new_tokens=[9, 3], stop_ids=(),
                                batch=self.batch))


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
