"""Many independent streams side by side, each of them endless: continuous batching.

    python batch.py --prompts mt_bench.jsonl --batch 8 --compile

All B rows decode together, one token each a step, always in the one shape (B, 1). Meanwhile the
next prompt is prefilled in a staging row of its own, a chunk between two steps, so that no stream
waits long for it. When a stream ends, the staged row is copied over its row, which goes on at once.

A result is a JSON line, with or without --json, written when its stream ends. Of {"turns": ...}
lines only the first turn is said: what comes after it is a conversation, for chat.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
from model import Transformer
from sample import sample
from tokenizer import Tokenizer
from tp import agree


@dataclass
class Stream:
    """A prompt on its way."""

    index: int
    left: int  # tokens that may still come
    started: float  # when its prefill began and ended, the others' steps in between included
    prefilled: float = 0.0


class Batch:
    """The memory of B streams side by side, which of them is in which row, and how it went."""

    def __init__(self, model: Transformer, batch_size: int = 8, n_sink: int | None = None,
                 window: int | None = None):
        """Sizes as in generate.make_cache. Raises ValueError naming one that cannot be."""
        self.cache = make_cache(model, n_sink, window, batch_size)
        self.staging = make_cache(model, n_sink, window)
        self.rows: list[Stream | None] = [None] * batch_size
        self.steps = self.busy = 0  # decode steps, and rows that were busy, counted at each

    def stream(self, index: int) -> Stream:
        """The stream of a prompt that is in a row. Setting its `left` to 0 ends it."""
        return next(stream for stream in self.rows if stream and stream.index == index)


@torch.no_grad()
def generate_batch(model: Transformer, prompts: Iterable[list[int]], batch_size: int = 8,
                   n_sink: int | None = None, window: int | None = None,
                   max_new_tokens: int | Sequence[int] = 64, ignore_eos: bool = False,
                   batch: Batch | None = None, **sampling) -> Iterator[tuple[int, int | None]]:
    """Continue every prompt, B at a time: yields (index, token id) as the tokens come, an EOS id
    too, and (index, None) after a stream's last one.

    A prompt is taken from the iterable when its prefill begins. max_new_tokens may be a number for
    each; sampling is generate's. A batch that is given brings its own sizes, counts the steps, and
    lets a stream be ended early. Raises ValueError for an unusable prompt."""
    batch = batch or Batch(model, batch_size, n_sink, window)
    rows, eos_ids = batch.rows, () if ignore_eos else model.config.eos_ids
    rows[:] = [None] * len(rows)
    tokens = torch.zeros(len(rows), 1, dtype=torch.int64, device=batch.cache.length.device)
    stages = stage(model, batch, prompts, max_new_tokens, **sampling)
    stream, first = next(stages, (None, None))  # the staged one, and its first token once whole
    while stream or rows.count(None) < len(rows):
        if rows.count(None) < len(rows):
            # As in generate.decode, a GPU is at the next step already while this one's tokens are
            # read. Idle rows step along, unread, and so does, once, a row that ends here.
            read = start_reading(tokens)
            tokens = sample(model(tokens, batch.cache), **sampling)  # (B, 1)
            batch.steps, batch.busy = batch.steps + 1, batch.busy + len(rows) - rows.count(None)
            yield from tell(rows, read(), eos_ids)
        # One chunk between two steps, so that no stream waits long, and one for each idle row.
        for _ in range(1 + rows.count(None)):
            if first is None:
                stream, first = next(stages, (None, None))
            if first is not None and None in rows:
                row = rows.index(None)
                batch.cache.copy_row(row, batch.staging)
                tokens[row], rows[row], first = first[0], stream, None


def stage(model: Transformer, batch: Batch, prompts: Iterable[list[int]],
          max_new_tokens: int | Sequence[int],
          **sampling) -> Iterator[tuple[Stream, Tensor | None]]:
    """Prefill one prompt after the other in the staging row. Yields after every chunk the stream,
    and once the prompt is whole, its first token (1, 1)."""
    for index, prompt_ids in enumerate(prompts):
        limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[index]
        if limit < 1:
            raise ValueError(f"max_new_tokens {limit} must be at least 1")
        stream = Stream(index, limit, time.perf_counter())
        batch.staging.reset()
        for logits in prefill_chunks(model, batch.staging, prompt_ids):
            first = None if logits is None else sample(logits, **sampling)
            if first is not None and first.is_cuda:
                torch.cuda.synchronize()
            stream.prefilled = time.perf_counter()
            yield stream, first


def tell(rows: list[Stream | None], ids: list[int],
         eos_ids: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """The events of a step's tokens, one a row. The row of a stream that ends becomes idle."""
    for row, (stream, token_id) in enumerate(zip(rows, ids, strict=True)):
        if stream is None:
            continue
        stream.left = 0 if token_id in eos_ids else stream.left - 1
        yield stream.index, token_id
        if not stream.left:
            yield stream.index, None
            rows[row] = None


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
                record = transcript.end(model, length, batch.cache, batch.staging)
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
        generator = get_ready(model, batch.staging, args)
        if args.compile:  # the step of all rows, as often as generate.warm runs the others
            start = time.perf_counter()
            list(generate_batch(model, [[0]], max_new_tokens=3, ignore_eos=True, batch=batch))
            args.compile_s += time.perf_counter() - start
            batch.steps = batch.busy = 0
        if write_results(model, tokenizer, prompts, batch, args, generator):
            sys.exit(130)


if __name__ == "__main__":
    main()
