"""Many independent streams side by side, each of them endless: continuous batching.

    python batch.py --prompts mt_bench.jsonl --batch 8 --compile

All B rows decode together, one token each a step, always in the one shape (B, 1). Meanwhile the
next prompt is prefilled in a staging row of its own, a chunk between two steps, so that no stream
waits long for it. When a stream ends, the staged row is copied over its row, which goes on at once.

A result is a JSON line, with or without --json, written when its stream ends. Of {"turns": ...}
lines only the first turn is said: what comes after it is a conversation, for chat.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cli import add_generation, hold_interrupt, make_parser, number, read_prompts, say, user_errors
from convert_hf import progress
from generate import (
    Transcript,
    get_ready,
    make_cache,
    open_model,
    prefill_chunks,
    sampling,
    start_reading,
)
from kv_cache import KVCache
from model import Transformer
from sample import Rows, Sampling, random_keys
from tokenizer import Tokenizer
from tp import agree

OVERTAKEN = 3  # chunks of shorter prompts that come before one of the longest


@dataclass
class Prompt:
    """What to continue, and how."""

    ids: list[int]
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()  # its seed, if it is not greedy, is the first sample's
    samples: int = 1  # streams that continue it; it is read once
    top_logprobs: int | None = None  # likeliest tokens that each step tells of, if it is to tell
    before: Sequence[int] = ()  # what the ids follow, and
    begin: Callable[[KVCache], None] | None = None  # what puts it into the staging row
    n_shared: int = 0  # ids at whose end
    shared: Callable[[KVCache], None] | None = None  # is shown the staging row
    owner: object = None  # whoever asked; not looked at here
    dropped: bool = False  # set by whoever does not want it any more; rows: see Stream.left


@dataclass
class Stream:
    """A sample of a prompt on its way."""

    index: int
    prompt: Prompt
    number: int  # which of its samples
    left: int  # tokens that may still come; 0 or less ends it with the next
    started: float  # when its prefill began and ended, the others' steps in between included
    prefilled: float = 0.0
    length: int = 0  # tokens in its row
    logprobs: tuple | None = None  # of the latest token, as `note` tells it


@dataclass
class Reading:
    """A prompt in a staging row."""

    cache: KVCache
    prompt: Prompt
    streams: list[Stream]  # that wait for it
    chunks: Iterator[Tensor | None]
    left: int  # tokens, about
    logits: Tensor | None = None  # (1, 1, V) once it is whole


class Batch:
    """The memory of B streams side by side, which of them is in which row, and how it went."""

    def __init__(self, model: Transformer, batch_size: int = 8, n_sink: int | None = None,
                 window: int | None = None, n_staging: int = 1, n_chunks: int | None = None):
        """Sizes as in generate.make_cache; with two staging rows short prompts overtake a long one.
        n_chunks of prompts come between two steps at most, by default one and one for each idle
        row, which fills them soonest. Raises ValueError naming a size that cannot be."""
        self.cache = make_cache(model, n_sink, window, batch_size)
        self.staging = [make_cache(model, n_sink, window) for _ in range(n_staging)]
        self.n_chunks = n_chunks or 1 + batch_size
        self.device, self.vocab_size = self.cache.length.device, model.config.vocab_size
        self.steps = self.busy = 0  # decode steps, and rows that were busy, counted at each
        self.begin()

    def begin(self) -> None:
        """Forget all streams."""
        n_rows = self.cache.batch_size
        self.rows: list[Stream | None] = [None] * n_rows
        self.draws = Rows(n_rows, self.vocab_size, self.device)
        self.notes: list[tuple | None] = [None] * n_rows  # logprobs of the tokens to be told next
        self.tokens = torch.zeros(n_rows, 1, dtype=torch.int64, device=self.device)
        self.live = torch.zeros(n_rows, dtype=torch.int64, device=self.device)  # 1: a busy row
        self.readings: list[Reading] = []  # the oldest first
        self.chunks = self.taken = 0  # of prompts, read; streams, begun
        for cache in (self.cache, *self.staging):
            cache.reset()

    def idle(self) -> bool:
        return not self.readings and self.rows.count(None) == len(self.rows)

    def stream(self, index: int) -> Stream:
        """The stream of a prompt that is in a row. Setting its `left` to 0 ends it."""
        return next(stream for stream in self.rows if stream and stream.index == index)

    def row(self, index: int) -> int:
        """Its row, until its end has been told: there it holds all tokens that were."""
        return self.rows.index(self.stream(index))


@torch.no_grad()
def generate_batch(model: Transformer, prompts: Iterable[list[int] | Prompt | None],
                   batch_size: int = 8, n_sink: int | None = None, window: int | None = None,
                   max_new_tokens: int | Sequence[int] = 64, ignore_eos: bool = False,
                   batch: Batch | None = None, generator: torch.Generator | None = None,
                   **sampling) -> Iterator[tuple[int, int | None]]:
    """Continue every prompt, B at a time: yields (index, token id) as the tokens come, an EOS id
    too, and (index, None) after a stream's last one; a prompt's samples are counted one by one.

    A prompt is taken from the iterable when its prefill begins; None there is that none waits now.
    A Prompt says all about itself; of one that is only its ids, max_new_tokens may be a number for
    each, sampling is Sampling's fields, and seeds come from the generator. A batch that is given
    brings its own sizes, counts the steps, and lets a stream be ended early. Raises ValueError for
    an unusable prompt."""
    batch = batch or Batch(model, batch_size, n_sink, window)
    batch.begin()
    eos_ids = () if ignore_eos else model.config.eos_ids
    source = described(prompts, max_new_tokens, sampling, generator)
    more = True
    while more or not batch.idle():
        if (idle := batch.rows.count(None)) < len(batch.rows):
            if idle:  # they step along, unread, and are kept short
                batch.cache.length.mul_(batch.live)
            # As in generate.decode, a GPU is at the next step already while this one's tokens are
            # read.
            read, notes = start_reading(batch.tokens), batch.notes
            logits = model(batch.tokens, batch.cache)
            batch.tokens = batch.draws.sample(logits)  # (B, 1)
            batch.notes = [stream and note(logits[row], batch.tokens[row], stream.prompt)
                           for row, stream in enumerate(batch.rows)]
            batch.steps, batch.busy = batch.steps + 1, batch.busy + len(batch.rows) - idle
            yield from tell(batch, read(), notes, eos_ids)
        # One chunk between two steps, so that no stream waits long, and one for each idle row.
        for _ in range(min(1 + batch.rows.count(None), batch.n_chunks)):
            more = take(model, batch, source) if more else False
            advance(batch)
            place(batch)


def described(prompts: Iterable[list[int] | Prompt | None], max_new_tokens: int | Sequence[int],
              sampling: dict, generator: torch.Generator | None) -> Iterator[Prompt | None]:
    """Every prompt as a Prompt. Raises ValueError for one that may not say anything."""
    for at, prompt in enumerate(prompts):
        if isinstance(prompt, list):
            limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[at]
            seed = int(random_keys(1, "cpu" if generator is None else generator.device, generator))
            given = {name: value for name, value in sampling.items() if value is not None}
            prompt = Prompt(prompt, limit, Sampling(**{**given, "seed": seed}))
        if prompt and prompt.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {prompt.max_new_tokens} must be at least 1")
        yield prompt


def take(model: Transformer, batch: Batch, source: Iterator[Prompt | None]) -> bool:
    """Begin to read the next prompts where a staging row is free; False after the last one."""
    while len(batch.readings) < len(batch.staging):
        try:
            prompt = next(source)
        except StopIteration:
            return False
        if prompt is None:
            break
        taken = [reading.cache for reading in batch.readings]
        cache = next(cache for cache in batch.staging if not any(cache is c for c in taken))
        streams = [Stream(batch.taken + n, prompt, n, prompt.max_new_tokens, time.perf_counter(),
                          length=len(prompt.before) + len(prompt.ids))
                   for n in range(prompt.samples)]
        batch.taken += prompt.samples
        batch.readings.append(Reading(cache, prompt, streams, chunks(model, cache, prompt),
                                      len(prompt.ids)))
    return True


def chunks(model: Transformer, cache: KVCache, prompt: Prompt) -> Iterator[Tensor | None]:
    """Prefill a prompt: yields after every chunk, None until the last one's logits (1, 1, V)."""
    if prompt.begin:
        prompt.begin(cache)
    if prompt.n_shared:
        for _ in prefill_chunks(model, cache, prompt.ids[:prompt.n_shared]):
            yield None
        prompt.shared(cache)
    yield from prefill_chunks(model, cache, prompt.ids[prompt.n_shared:])


def advance(batch: Batch) -> None:
    """Read one chunk of a prompt: of the one that will be whole first, and now and then of the one
    that was begun first."""
    for reading in [r for r in batch.readings if r.prompt.dropped]:
        leave(batch, reading)
    if waiting := [reading for reading in batch.readings if reading.logits is None]:
        batch.chunks += 1
        oldest = batch.chunks % (OVERTAKEN + 1) == 0
        reading = waiting[0] if oldest else min(waiting, key=lambda reading: reading.left)
        reading.logits = next(reading.chunks)
        reading.left -= reading.cache.max_chunk
        if reading.logits is not None and reading.logits.is_cuda:
            torch.cuda.synchronize()
        for stream in reading.streams:
            stream.prefilled = time.perf_counter()


def place(batch: Batch) -> None:
    """Copy what is whole over idle rows, and draw its first token there."""
    for reading in [reading for reading in batch.readings if reading.logits is not None]:
        while reading.streams and None in batch.rows:
            row, stream, prompt = batch.rows.index(None), reading.streams.pop(0), reading.prompt
            batch.cache.copy_row(row, reading.cache, n_tokens=stream.length)
            one = prompt.sampling
            if one.seed is not None:
                one = dataclasses.replace(one, seed=(one.seed + stream.number) % 2**64)
            batch.draws.begin(row, one, [*prompt.before, *prompt.ids])
            batch.tokens[row] = batch.draws.sample(reading.logits, slice(row, row + 1))[0]
            batch.notes[row] = note(reading.logits[0], batch.tokens[row], prompt)
            batch.rows[row], batch.live[row] = stream, 1
        if not reading.streams:
            leave(batch, reading)


def leave(batch: Batch, reading: Reading) -> None:
    """Free a staging row. What was said in it is overwritten, and the padding that followed."""
    batch.readings = [other for other in batch.readings if other is not reading]
    reading.cache.clear_row(0, len(reading.prompt.before) + len(reading.prompt.ids)
                            + reading.cache.max_chunk)


def note(logits: Tensor, token: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor] | None:
    """What logits (1, V) say of a token (1,) and of the likeliest, if that is asked for: its log
    probability (1,), theirs (n,) and their ids (n,), before penalties and temperature."""
    if prompt.top_logprobs is None:
        return None
    logprobs = logits[0].log_softmax(-1)
    return logprobs[token], *logprobs.topk(prompt.top_logprobs)


def tell(batch: Batch, ids: list[int], notes: list[tuple | None],
         eos_ids: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """The events of a step's tokens, one a row. The row of a stream that ends becomes idle."""
    for row, (stream, token_id) in enumerate(zip(batch.rows, ids, strict=True)):
        if stream is None:
            continue
        stream.left = 0 if token_id in eos_ids else stream.left - 1
        stream.length += 1
        stream.logprobs = notes[row]
        yield stream.index, token_id
        if stream.left <= 0:
            yield stream.index, None
            batch.rows[row], batch.live[row] = None, 0
            batch.draws.end(row)
            batch.cache.clear_row(row, stream.length)


# ------------------------------------------------------------------------------ command line


def opening(tokenizer: Tokenizer, entry: dict) -> list[int]:
    """The ids of a prompts file's entry: raw text, or the first turn in the chat template."""
    if "prompt" in entry:
        return tokenizer.encode(entry["prompt"])
    return tokenizer.first_turn(entry["turns"][0])


def write_results(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], batch: Batch,
                  args, generator: torch.Generator) -> bool:
    """Print every stream's figures, a JSON line, as soon as it ends, and at last those of all.
    True if Ctrl-C came before: then the step is finished, and what has not ended is dropped."""
    from tqdm import tqdm
    transcripts, done, new_tokens, steps, start = {}, 0, 0, 0, time.perf_counter()

    def busy() -> str:
        return f"rows busy {batch.busy / max(1, batch.steps * args.batch):.0%}"

    with hold_interrupt() as interrupted, progress("generating", "tokens") as show:
        for index, token_id in generate_batch(
                model, prompts, max_new_tokens=args.max_new_tokens, ignore_eos=args.ignore_eos,
                batch=batch, generator=generator, **sampling(args)):
            if interrupted and batch.steps > steps:
                break
            steps, stream = batch.steps, batch.stream(index)
            if token_id is None:
                transcript = transcripts.pop(index)
                transcript.start, transcript.prefilled = stream.started, stream.prefilled
                length = len(prompts[index]) + len(transcript.ids)
                record = transcript.end(model, length, batch.cache, *batch.staging)
                tqdm.write(json.dumps({"index": index, **record}))  # above the progress bar
                sys.stdout.flush()
                done += 1
            else:
                new_tokens += 1
                if index not in transcripts:
                    transcripts[index] = Transcript(tokenizer, len(prompts[index]), args)
                if transcripts[index].add(token_id):
                    stream.left = 0
            show(new_tokens, note=f"{done} of {len(prompts)} prompts, {busy()}")
    say(f"{done} of {len(prompts)} prompts, {new_tokens} new tokens, "
        f"{new_tokens / (time.perf_counter() - start):.1f} tok/s, {busy()} of {batch.steps} steps, "
        f"compiled in {args.compile_s:.1f} s, seed {args.seed}")
    return bool(interrupted)


def main():
    parser = add_generation(make_parser(__doc__))
    parser.add_argument("--prompts", required=True, metavar="FILE",
                        help="prompts, a JSON object a line; of several turns, only the first")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="first N prompts only")
    parser.add_argument("--batch", type=number(int, 1), default=8, metavar="B",
                        help="streams side by side; default 8")
    args = parser.parse_args()
    with user_errors(parser):
        for flag in ("draft", "lookup", "speculate"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} works on one stream, and batch.py has many")
        entries = read_prompts(args.prompts)[:args.limit]
        model, tokenizer = open_model(args)
        prompts = agree([opening(tokenizer, entry) for entry in entries])
        batch = Batch(model, args.batch, args.sink, args.window)
        generator = get_ready(model, batch.staging[0], args)
        if args.compile:  # the step of all rows, as often as generate.warm runs the others
            start = time.perf_counter()
            list(generate_batch(model, [[0]], max_new_tokens=3, ignore_eos=True, batch=batch))
            args.compile_s += time.perf_counter() - start
            batch.steps = batch.busy = 0
        if write_results(model, tokenizer, prompts, batch, args, generator):
            sys.exit(130)


if __name__ == "__main__":
    main()
