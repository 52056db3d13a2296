"""Many independent streams side by side, each of them endless: continuous batching.

    python batch.py --prompts mt_bench.jsonl --batch 8 --compile

All B rows decode together, one token each a step, always in the one shape (B, 1), or where only
one is busy, on a CPU, (1, 1). Meanwhile the next prompt is prefilled in a staging row of its own, a
chunk between two steps, so that no stream waits long for it. When a stream ends, the staged row is
copied over its row, which goes on at once.

A result is a JSON line, with or without --json, written when its stream ends. Of {"turns": ...}
lines only the first turn is answered: what comes after it is a conversation, for chat.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cli import (
    add_generation,
    check_text,
    load_arguments,
    make_parser,
    number,
    read_prompts,
    sampling_of,
)
from draw import Rows, new_seed
from generate import (
    Transcript,
    check_ids,
    get_ready,
    make_cache,
    open_model,
    prefill_chunks,
    start_reading,
)
from kv_cache import KVCache
from model import Transformer
from sample import Sampling, check_range, log_probabilities
from terminal import hold_interrupt, progress, say, show, user_errors
from tokenizer import Tokenizer
from tp import agree

LONG = 1024  # tokens of a prompt which others need not wait for
TOP_LOGPROBS = 20  # the most alternatives that a prompt may ask for


@dataclass
class Prompt:
    """What is asked for: the ids, how the answer is drawn, and when it ends."""

    ids: Sequence[int]
    sampling: Sampling = Sampling()
    max_new_tokens: int = 64
    stop_ids: Sequence[int] | None = None  # each ends an answer, as its last; None: the EOS ids
    samples: int = 1  # answers; the first has the seed, the next ones have those that follow it
    logprobs: int | None = None  # alternatives whose log-probabilities are noted, if any are
    # What the ids go on from: `begin` puts it into the staging row, one with the batch's sizes.
    before: Sequence[int] = ()
    begin: Callable[[KVCache], None] | None = None
    # `shared` is shown the staging row when it holds the first n_shared of the ids, for others.
    n_shared: int = 0
    shared: Callable[[KVCache], None] | None = None
    owner: object = None  # whoever asks; not looked at here

    def __post_init__(self):
        """Raises ValueError naming the number, its value and what would be right."""
        check_range("max_new_tokens", self.max_new_tokens, 1, math.inf)
        check_range("samples", self.samples, 1, math.inf)
        if self.logprobs is not None:
            check_range("logprobs", self.logprobs, 0, TOP_LOGPROBS)


@dataclass
class Stream:
    """An answer on its way."""

    index: int
    prompt: Prompt
    left: int  # tokens that may still come
    started: float  # when its prefill began and ended, the others' steps in between included
    prefilled: float = 0.0
    length: int = 0  # tokens in its row
    # Of each token yielded: its own log-probability, and {id: log-probability} of the likeliest.
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)


@dataclass
class Reading:
    """A prompt on its way into a staging row, and from there, once whole, to its streams' rows."""

    cache: KVCache  # the staging row
    streams: list[Stream]
    chunks: Iterator[Tensor | None]
    unread: int  # tokens, at least
    logits: Tensor | None = None  # (1, 1, V) after the last token


class Batch:
    """The memory of B streams side by side, which of them is in which row, and how it went.

    A server goes on from here: its prompts are an iterator that waits for requests, but yields None
    while others are answered (see `idle`). More staging rows take turns, a chunk each, so that
    short prompts overtake a long one. When (index, None) is yielded, `cache` still holds the prompt
    and exactly the tokens yielded, in the row of `stream(index)`, for the `begin` of another
    Prompt; then they are overwritten with zeros, and no other stream could see them before."""

    def __init__(self, model: Transformer, batch_size: int = 8, n_sink: int | None = None,
                 window: int | None = None, n_staging: int = 1, n_chunks: int | None = None):
        """Sizes as in generate.make_cache. At most n_chunks of prompts come between two steps; None
        is one, and one more for each idle row. Raises ValueError naming a size that cannot be."""
        self.n_chunks = n_chunks or 1 + batch_size
        self.cache = make_cache(model, n_sink, window, batch_size)
        self.staging = [make_cache(model, n_sink, window) for _ in range(n_staging)]
        self.rows, self.reading = [], []
        self.clear(model.config.vocab_size)

    def clear(self, vocab_size: int) -> None:
        """Nothing is on its way. What was, because of an error, is overwritten, too."""
        for cache, rows in ((self.cache, [row for row, stream in enumerate(self.rows) if stream]),
                            *((reading.cache, [0]) for reading in self.reading)):
            for row in rows:
                cache.clear_row(row)
        size, device = self.cache.batch_size, self.cache.length.device
        self.sampler = Rows(size, vocab_size, device)
        self.tokens = torch.zeros(size, 1, dtype=torch.int64, device=device)  # not in the cache yet
        self.noted = {}  # of rows that ask for it: log_probabilities of their tokens
        self.rows: list[Stream | None] = [None] * size
        self.live = torch.zeros(size, dtype=torch.int64, device=device)  # 1 where a stream is
        self.reading: list[Reading] = []
        self.prefill_credit = 0.0  # seconds that long prompts may take: as many as steps took
        self.steps = self.busy = 0  # decode steps, and rows that were busy, counted at each

    @property
    def idle(self) -> bool:
        """Nothing is answered or read: whoever has no prompt may wait for one."""
        return not self.reading and not any(self.rows)

    def stream(self, index: int) -> Stream:
        """The stream that is yielded as index. Setting its `left` to 0 ends it: at once if that is
        done as a token of it is yielded, and else with the next one."""
        streams = [*self.rows, *(stream for reading in self.reading for stream in reading.streams)]
        return next(stream for stream in streams if stream and stream.index == index)


@torch.no_grad()
def generate_batch(model: Transformer, prompts: Iterable[Sequence[int] | Prompt | None],
                   batch_size: int = 8, n_sink: int | None = None, window: int | None = None,
                   max_new_tokens: int | Sequence[int] = 64, ignore_eos: bool = False,
                   batch: Batch | None = None, generator: torch.Generator | None = None,
                   **sampling) -> Iterator[tuple[int, int | None]]:
    """Continue every prompt, B at a time: yields (index, token id) as the tokens come, an EOS id
    too, and (index, None) after a stream's last one.

    A prompt is taken from the iterable when its prefill begins; None says that there is none now.
    A Prompt says itself what it wants. For plain ids, max_new_tokens may be a number for each, and
    sampling is that of a Sampling, a seed being drawn from the generator for each. Streams are
    numbered as they begin, several samples of a prompt one after the other, and in float32 what one
    says depends on nothing beside it. A batch that is given brings its own sizes, counts the steps,
    and lets a stream be ended early. Raises ValueError for an unusable prompt, and then all streams
    end: a server calls generate.check_ids before."""
    batch = batch or Batch(model, batch_size, n_sink, window)
    batch.clear(model.config.vocab_size)
    streams = streams_of(model, prompts, max_new_tokens, ignore_eos, generator, **sampling)
    more = True
    while more or not batch.idle:
        if any(batch.rows):
            began = time.perf_counter()
            yield from step(model, batch)
            batch.prefill_credit = min(batch.prefill_credit + time.perf_counter() - began, 0.1)
        # One chunk between two steps, so that no stream waits long, and one for each idle row.
        for _ in range(min(1 + batch.rows.count(None), batch.n_chunks)):
            more = more and admit(model, batch, streams)
            read_on(batch)
            yield from seat(batch)


def streams_of(model: Transformer, prompts: Iterable[Sequence[int] | Prompt | None],
               max_new_tokens: int | Sequence[int], ignore_eos: bool,
               generator: torch.Generator | None, **sampling) -> Iterator[list[Stream]]:
    """The streams of each prompt, one a sample; none where there is no prompt now."""
    index = n = 0
    for prompt in prompts:
        if prompt is None:
            yield []
            continue
        if not isinstance(prompt, Prompt):
            limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[n]
            prompt = Prompt(prompt, Sampling(**sampling), limit, () if ignore_eos else None)
        check_ids(model, prompt.ids)
        seed = new_seed(generator) if prompt.sampling.seed is None else prompt.sampling.seed
        stop_ids = model.config.eos_ids if prompt.stop_ids is None else prompt.stop_ids
        each = [replace(prompt, sampling=replace(prompt.sampling, seed=seed + i), stop_ids=stop_ids)
                for i in range(prompt.samples)]
        yield [Stream(i, one, one.max_new_tokens, time.perf_counter(),
                      length=len(one.before) + len(one.ids)) for i, one in enumerate(each, index)]
        index, n = index + prompt.samples, n + 1


def admit(model: Transformer, batch: Batch, waiting: Iterator[list[Stream]]) -> bool:
    """Begin to read a prompt if a staging row is free. False once there are no more."""
    free = [cache for cache in batch.staging if all(r.cache is not cache for r in batch.reading)]
    if not free:
        return True
    streams = next(waiting, None)
    if streams:
        prompt, cache = streams[0].prompt, free[0]
        batch.reading.append(Reading(cache, streams, chunks_of(model, cache, prompt),
                                     len(prompt.ids)))
    return streams is not None


def chunks_of(model: Transformer, cache: KVCache, prompt: Prompt) -> Iterator[Tensor | None]:
    """generate.prefill_chunks of the prompt: first of the beginning that others may share."""
    ids, n = list(prompt.ids), prompt.n_shared
    if prompt.begin:
        prompt.begin(cache)
    if n:
        for _ in prefill_chunks(model, cache, ids[:n]):
            yield None
        prompt.shared(cache)
    yield from prefill_chunks(model, cache, ids[n:])


def read_on(batch: Batch) -> None:
    """Prefill one chunk of the prompt whose latest chunk is the longest ago. Beside streams, a long
    prompt gets no more time than their steps take."""
    must_wait = any(batch.rows) and batch.prefill_credit <= 0  # whether a long one must
    reading = next((reading for reading in batch.reading if reading.logits is None
                    and not (must_wait and reading.unread > LONG)), None)
    if reading is None:
        return
    began = time.perf_counter()
    reading.logits = next(reading.chunks)
    if reading.logits is not None and reading.logits.is_cuda:
        torch.cuda.synchronize(reading.logits.device)
    for stream in reading.streams:
        stream.prefilled = time.perf_counter()
    if reading.unread > LONG:
        batch.prefill_credit -= time.perf_counter() - began
    reading.unread -= reading.cache.max_chunk
    batch.reading.remove(reading)
    batch.reading.append(reading)


def seat(batch: Batch) -> Iterator[tuple[int, None]]:
    """Copy prompts that are whole to idle rows, and draw their first tokens. The events are those
    of streams that were ended before."""
    for reading in list(batch.reading):
        for stream in list(reading.streams):
            if not stream.left:
                yield stream.index, None
            elif reading.logits is not None and None in batch.rows:
                row = batch.rows.index(None)
                batch.cache.copy_row(row, reading.cache, n_tokens=stream.length)
                begin(batch, row, stream, reading.logits)
            else:
                continue
            reading.streams.remove(stream)
            length = stream.length
        if not reading.streams:
            reading.cache.clear_row(0, length + reading.cache.max_chunk)  # the padding, too
            batch.reading.remove(reading)


def begin(batch: Batch, row: int, stream: Stream, logits: Tensor) -> None:
    """Draw a stream's first token from its prompt's logits (1, 1, V)."""
    prompt, batch.rows[row], batch.live[row] = stream.prompt, stream, 1
    batch.sampler.begin(row, prompt.sampling, [*prompt.before, *prompt.ids])
    batch.tokens[row:row + 1] = batch.sampler.sample(logits, slice(row, row + 1))
    note_logprobs(batch, [] if prompt.logprobs is None else [row], logits)


def step(model: Transformer, batch: Batch) -> Iterator[tuple[int, int | None]]:
    """The next token of every row, and the events of the latest ones.

    As in generate.decode, a GPU is at the next step already while those are read. Idle rows step
    along, unread and always from position 0, and so does, once, a row that ends here."""
    read = start_reading(batch.tokens)
    noted = {row: [start_reading(x) for x in pair] for row, pair in batch.noted.items()}
    busy = len(batch.rows) - batch.rows.count(None)
    if busy < len(batch.rows):
        batch.cache.length.mul_(batch.live)
    if busy == 1 and not batch.tokens.is_cuda:
        logits = step_alone(model, batch)
    else:
        logits = model(batch.tokens, batch.cache)
        batch.tokens = batch.sampler.sample(logits)  # (B, 1)
    batch.steps, batch.busy = batch.steps + 1, batch.busy + busy
    for row, (values, tokens) in noted.items():
        (own, *others), (_, *likeliest) = values(), tokens()
        batch.rows[row].logprobs.append((own, dict(zip(likeliest, others, strict=True))))
    note_logprobs(batch, list(noted), logits)
    yield from emit(batch, read())


def step_alone(model: Transformer, batch: Batch) -> Tensor:
    """The next token of the only row that is busy, in the shape of a single stream, which is
    much less work for a CPU; a GPU reads the weights once for all rows anyway.
    Returns the logits (1, 1, V)."""
    row = next(row for row, stream in enumerate(batch.rows) if stream)
    cache, some = batch.cache.row(row), slice(row, row + 1)
    logits = model(batch.tokens[some], cache)
    batch.cache.overhang[row] = cache.overhang[0]
    batch.tokens = batch.tokens.clone()  # the old ones are yet to be read
    batch.tokens[some] = batch.sampler.sample(logits, some)
    return logits


def note_logprobs(batch: Batch, rows: list[int], logits: Tensor) -> None:
    """Keep what is to be known of the rows' latest tokens, where logits (B, 1, V), or (1, 1, V) for
    one row, are what those were drawn from."""
    for row in rows:
        raw, n = logits[row if len(logits) > 1 else 0], batch.rows[row].prompt.logprobs
        batch.noted[row] = log_probabilities(raw, batch.tokens[row:row + 1], n)


def emit(batch: Batch, ids: list[int]) -> Iterator[tuple[int, int | None]]:
    """The events of a step's tokens, one a row. The row of a stream that ends becomes idle."""
    for row, (stream, token_id) in enumerate(zip(batch.rows, ids, strict=True)):
        if stream is None:
            continue
        stream.left = 0 if token_id in stream.prompt.stop_ids else max(0, stream.left - 1)
        stream.length += 1
        yield stream.index, token_id
        if not stream.left:
            yield stream.index, None
            batch.sampler.end(row)
            batch.cache.clear_row(row, stream.length)
            batch.rows[row], batch.live[row] = None, 0
            batch.noted.pop(row, None)


# ------------------------------------------------------------------------------ command line


def ask(prompts: list[list[int]], sampling: Sampling, max_new_tokens: int,
        stop_ids: Sequence[int] | None, samples: int) -> list[Prompt]:
    """What the command line wants of the prompts. Every answer has a seed of its own, so it does
    not depend on the batch size or on the other prompts."""
    return [Prompt(ids, replace(sampling, seed=sampling.seed + n * samples), max_new_tokens,
                   stop_ids, samples) for n, ids in enumerate(prompts)]


def write_results(model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], batch: Batch,
                  stop: Sequence[str], compile_s: float) -> None:
    """Print every stream's figures, a JSON line, as soon as it ends, and at last those of all. On
    Ctrl-C the step is finished, what has not ended is dropped, and the program ends."""
    transcripts, done, new_tokens, steps, start = {}, 0, 0, 0, time.perf_counter()
    samples, seed = prompts[0].samples, prompts[0].sampling.seed
    n_streams, what = len(prompts) * samples, "prompts" if samples == 1 else "answers"

    def busy() -> str:
        return f"rows busy {batch.busy / max(1, batch.steps * batch.cache.batch_size):.0%}"

    with hold_interrupt() as interrupted, progress("generating", "tokens") as advance:
        for index, token_id in generate_batch(model, prompts, batch=batch):
            if interrupted and batch.steps > steps:
                break
            steps, stream = batch.steps, batch.stream(index)
            if token_id is None:
                transcript = transcripts.pop(index)
                transcript.start, transcript.prefilled = stream.started, stream.prefilled
                length = len(stream.prompt.ids) + len(transcript.said.ids)
                record = transcript.record(model, [batch.cache, *batch.staging], length,
                                        stream.prompt.stop_ids, stream.prompt.sampling.seed)
                of, sample = divmod(index, samples)
                which = {"index": of} if samples == 1 else {"index": of, "sample": sample}
                show(json.dumps({**which, **record, "compile_s": compile_s}) + "\n")
                done += 1
            else:
                new_tokens += 1
                if index not in transcripts:
                    transcripts[index] = Transcript(tokenizer, len(stream.prompt.ids), stop)
                if transcripts[index].add(token_id):
                    stream.left = 0
            advance(new_tokens, note=f"{done} of {n_streams} {what}, {busy()}")
    say(f"{done} of {n_streams} {what}, {new_tokens} new tokens, "
        f"{new_tokens / (time.perf_counter() - start):.1f} tok/s, {busy()} of {batch.steps} steps, "
        f"compiled in {compile_s:.1f} s, seed {seed}")
    if interrupted:
        sys.exit(128 + interrupted[0])


def main():
    parser = add_generation(make_parser(__doc__), samples=True)
    parser.add_argument("--prompts", required=True, metavar="FILE",
                        help="what to say, a JSON object a line; of several turns, only the first")
    parser.add_argument("--limit", type=number(int, 1), metavar="N",
                        help="of --prompts, the first N prompts only; default: all")
    parser.add_argument("--batch", type=number(int, 1), default=8, metavar="B",
                        help="streams side by side")
    with user_errors(parser):
        args = parser.parse_args()
        for flag in ("draft", "lookup", "speculate"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} works on one stream, and batch.py has many")
        entries = read_prompts(args.prompts)[:args.limit]
        stop = [check_text("--stop", stop_text) for stop_text in args.stop]
        compiling = dict(compile=args.compile, compile_prefill=args.compile_prefill)
        model, tokenizer = open_model(args.checkpoint, **compiling, **load_arguments(args))
        prompts = agree([tokenizer.opening(entry) for entry in entries])
        batch = Batch(model, args.batch, args.sink, args.window)
        compile_s, how = get_ready(model, batch.staging[0], sampling_of(args), **compiling)
        if args.compile:  # the step of all rows, as often as generate.warm runs the others
            start = time.perf_counter()
            list(generate_batch(model, [[0]] * 2, max_new_tokens=3, ignore_eos=True, batch=batch))
            compile_s += time.perf_counter() - start
        asked = ask(prompts, how, args.max_new_tokens, () if args.ignore_eos else None,
                    args.samples)
        write_results(model, tokenizer, asked, batch, stop, compile_s)


if __name__ == "__main__":
    main()
