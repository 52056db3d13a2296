"""Continuous batching: many independent streams side by side, each of them endless.

All B rows decode together, one token each a step, always in one shape, (B, 1); on a CPU a row that
is busy alone decodes in the shape (1, 1). Meanwhile the next prompt is prefilled in a staging row,
between two steps, so that no stream waits long for it. When a stream ends, the staging row is
copied over its row, and the next step decodes the new prompt's answer there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from draw import NOT_FINITE, UNDRAWN, RowSampler, copy_to_host, new_seed
from generate import check_ids, make_cache, prefill_chunks
from kv_cache import KVCache
from model import Transformer
from sample import Sampling, check_range, log_probabilities

LONG_PROMPT = 1024  # tokens; others need not wait for a prompt that has more
TOP_LOGPROBS = 20  # the most alternatives that a prompt may have
PAUSE = 1.5  # between two steps a CPU prefills for so many times as long as a step takes
SCORED = 16  # tokens of a chunk whose log-probabilities (V,) are computed at a time


@dataclass(frozen=True)
class Hooks:
    """A server's part of a prompt: what it shares with other prompts, and whose it is."""

    prefix_ids: Sequence[int] = ()  # the tokens of a cached prefix, which the ids go on from
    restore_prefix: Callable[[KVCache], None] | None = None  # copies the prefix to a staging row
    n_shared: int = 0  # the first of the ids, which other prompts begin with, too
    save_shared: Callable[[KVCache], None] | None = None  # is given a staging row that holds those
    owner: object = None  # whose prompt it is: a server's own object, which batch.py never reads


@dataclass
class Prompt:
    """A prompt's ids, how its answers are drawn, and when they end."""

    ids: Sequence[int]
    sampling: Sampling = Sampling()
    max_new_tokens: int = 64  # 0: the prompt is only read
    stop_ids: Sequence[int] | None = None  # each ends an answer, as its last; None: the EOS ids
    samples: int = 1  # answers; the first has the seed, the next ones have those that follow it
    logprobs: int | None = None  # alternatives in Stream.logprobs; None: no logprobs at all
    prompt_logprobs: int | None = None  # and in Stream.prompt_logprobs
    hooks: Hooks = Hooks()  # for a server

    def __post_init__(self):
        """Raises ValueError naming the number, its value and what would be right."""
        check_range("max_new_tokens", self.max_new_tokens, 0, math.inf)
        check_range("samples", self.samples, 1, math.inf)
        for name in ("logprobs", "prompt_logprobs"):
            if (n := getattr(self, name)) is not None:
                check_range(name, n, 0, TOP_LOGPROBS)

    def all_ids(self) -> list[int]:
        """The ids of the prefix and the prompt."""
        return [*self.hooks.prefix_ids, *self.ids]


@dataclass(eq=False)
class Stream:
    """One answer, from its prefill to its last token."""

    index: int  # streams are numbered as their prefills begin
    sample: int  # which of its prompt's answers
    prompt: Prompt
    new_tokens_left: int
    started: float  # time.perf_counter() when its prefill began
    prefilled: float = 0.0  # and when it ended, after steps of other streams in between
    length: int = 0  # tokens in its row
    error: str = ""  # at its end: the fault that ended it, a grammar's or draw.NOT_FINITE
    # For each token yielded: its log-probability, and {id: log-probability} of the likeliest ones,
    # as the model has them: no limit, penalty or grammar is in these.
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    # The same for each of its prompt's ids after the first, once they are prefilled. The samples of
    # a prompt share this list.
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        """End the stream early: in yield_tokens, or while its prompt is prefilled in fill_rows. It
        has no more tokens if this is called when one of its own was just yielded, and otherwise
        one more. A stream that is still prefilled has none."""
        self.new_tokens_left, self.cancelled = 0, True


@dataclass
class Prefill:
    """A prompt that is prefilled in a staging row, until its streams have rows of their own."""

    cache: KVCache  # the staging row
    streams: list[Stream]  # those without a row
    chunks: Iterator[Tensor | None]
    prompt_tokens_left: int  # at least so many are to be prefilled: a chunk counts as max_chunk
    logits: Tensor | None = None  # (1, 1, V) after the last token


class Batch:
    """The caches of B streams, which stream is in which row, the prefills, and the steps so far.

    A server's prompts are an iterator that waits for requests while the batch is `idle`, and yields
    None while it is not. Several staging rows take turns, a chunk each, so that short prompts
    overtake a long one. When (stream, None) is yielded, row `rows.index(stream)` of `cache` still
    holds the prompt and exactly the tokens yielded: a server copies it then, for another prompt's
    hooks. Afterwards it is zeroed. No other stream ever sees it."""

    def __init__(self, model: Transformer, batch_size: int = 8, n_sink: int | None = None,
                 window: int | None = None, n_staging: int = 1, n_chunks: int | None = None):
        """Sizes as in generate.make_cache. Between two steps at most n_chunks are prefilled; None
        is one, and one more for each idle row. Raises ValueError naming a size that cannot be."""
        self.n_chunks = n_chunks or 1 + batch_size
        self.cache = make_cache(model, n_sink, window, batch_size)
        self.staging = [make_cache(model, n_sink, window) for _ in range(n_staging)]
        self.rows, self.prefills = [], []
        self.reset(model.config.vocab_size)

    def reset(self, vocab_size: int) -> None:
        """Drop every stream and prefill, which an error may have left, and zero their rows."""
        for row, stream in enumerate(self.rows):
            if stream is not None:
                self.cache.clear_row(row)
        for prefill in self.prefills:
            prefill.cache.clear_row(0)
        size, device = self.cache.batch_size, self.cache.length.device
        self.sampler = RowSampler(size, vocab_size, device)
        self.tokens = torch.zeros(size, 1, dtype=torch.int64, device=device)  # not in the cache yet
        self.logprobs = {}  # of `tokens`, for rows that want them: row -> (values, ids)
        self.rows: list[Stream | None] = [None] * size
        self.is_busy = torch.zeros(size, dtype=torch.int64, device=device)  # 1 where a stream is
        self.prefills: list[Prefill] = []
        self.prefill_credit = 0.0  # seconds of prefill that long prompts may take beside streams
        self.pause_at = math.inf  # time.perf_counter() at which prefilling pauses for a step
        self.steps = self.row_steps = 0  # decode steps, and busy rows summed over them

    def must_pause(self) -> bool:
        """Whether prefilling must wait, because streams want their next tokens."""
        return time.perf_counter() >= self.pause_at

    @property
    def idle(self) -> bool:
        """Whether nothing is decoded or prefilled: a server may wait for the next prompt."""
        return not self.prefills and not any(self.rows)


@torch.no_grad()
def generate_batch(model: Transformer, prompts: Iterable[Sequence[int] | Prompt | None],
                   batch_size: int = 8, n_sink: int | None = None, window: int | None = None,
                   max_new_tokens: int | Sequence[int] = 64, *, sampling: Sampling | None = None,
                   stop_ids: Sequence[int] | None = None,
                   batch: Batch | None = None) -> Iterator[tuple[Stream, int | None]]:
    """Continue every prompt, B at a time: yields (stream, token id) as the tokens come, a stop id
    too, and (stream, None) after a stream's last one. `stream.index` is its number,
    `stream.cancel()` ends it early, and `stream.error` says, at its end, what fault ended it.

    A prompt is taken from the iterable when its prefill begins; None says that there is none now.
    A Prompt has its own settings; plain ids have these: sampling (default: greedy), the stop_ids
    that end an answer (None: the EOS ids; (): none), and max_new_tokens, for all prompts or a
    number for each. If the sampling has a seed, prompt n has seed + n; otherwise each prompt has a
    random one. Streams are numbered as their prefills begin, the samples of a prompt one after the
    other. In float32 an answer does not depend on what runs beside it. A given batch has its own
    sizes. Raises ValueError for an unusable prompt, which ends all streams: a server calls
    generate.check_ids before."""
    batch = batch or Batch(model, batch_size, n_sink, window)
    batch.reset(model.config.vocab_size)
    streams = streams_of(model, prompts, max_new_tokens, sampling or Sampling(), stop_ids)
    more = True
    while more or not batch.idle:
        if any(batch.rows):
            began = time.perf_counter()
            yield from decode_step(model, batch)
            now = time.perf_counter()
            batch.prefill_credit = min(batch.prefill_credit + now - began, 0.1)
            if not batch.tokens.is_cuda:  # which the host does not see at work
                batch.pause_at = now + PAUSE * (now - began)
        if not any(batch.rows):
            batch.pause_at = math.inf
        # One chunk between two steps, and one for each idle row, until the streams must go on.
        for _ in range(min(1 + batch.rows.count(None), batch.n_chunks)):
            more = more and start_prefill(model, batch, streams)
            prefill_one_chunk(batch)
            yield from fill_rows(batch)
            if batch.must_pause():
                break


# ------------------------------------------------------------------------------ prompts


def streams_of(model: Transformer, prompts: Iterable[Sequence[int] | Prompt | None],
               max_new_tokens: int | Sequence[int], sampling: Sampling,
               stop_ids: Sequence[int] | None) -> Iterator[list[Stream]]:
    """The streams of each prompt, one a sample; an empty list where there is no prompt now. The
    settings are for plain ids, as in generate_batch."""
    index = n = 0
    for prompt in prompts:
        if prompt is None:
            yield []
            continue
        if not isinstance(prompt, Prompt):
            limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[n]
            seed = None if sampling.seed is None else sampling.seed + n
            prompt = Prompt(prompt, replace(sampling, seed=seed), limit, stop_ids)
        check_ids(model, prompt.ids)
        seed = new_seed() if prompt.sampling.seed is None else prompt.sampling.seed
        ends = model.config.eos_ids if prompt.stop_ids is None else prompt.stop_ids
        if prompt.sampling.grammar:
            prompt.sampling.grammar.check_fits(model.config.vocab_size, ends)
        each = [replace(prompt, sampling=replace(prompt.sampling, seed=seed + i), stop_ids=ends)
                for i in range(prompt.samples)]
        shared = []
        yield [Stream(index + i, i, one, one.max_new_tokens, time.perf_counter(),
                      length=len(one.all_ids()), prompt_logprobs=shared)
               for i, one in enumerate(each)]
        index, n = index + prompt.samples, n + 1


# ------------------------------------------------------------------------------ prefill


def start_prefill(model: Transformer, batch: Batch, waiting: Iterator[list[Stream]]) -> bool:
    """Take the next prompt if a staging row is free. False once there are no more."""
    used = [prefill.cache for prefill in batch.prefills]
    free = [cache for cache in batch.staging if cache not in used]
    if not free:
        return True
    streams = next(waiting, None)
    if streams:
        chunks = prompt_chunks(model, free[0], streams[0], batch.must_pause)
        batch.prefills.append(Prefill(free[0], streams, chunks, len(streams[0].prompt.ids)))
    return streams is not None


def prompt_chunks(model: Transformer, cache: KVCache, stream: Stream,
                  must_pause: Callable[[], bool]) -> Iterator[Tensor | None]:
    """Restore the prompt's prefix, then prefill its ids, as generate.prefill_chunks does; save the
    staging row when it holds exactly the ids that are shared."""
    ids, hooks, n = list(stream.prompt.ids), stream.prompt.hooks, stream.prompt.prompt_logprobs
    if n is not None:
        yield from scored_chunks(model, cache, ids, n, stream.prompt_logprobs, must_pause)
        return
    if hooks.restore_prefix:
        hooks.restore_prefix(cache)
    if hooks.n_shared:
        for _ in prefill_chunks(model, cache, ids[:hooks.n_shared], must_pause):
            yield None
        hooks.save_shared(cache)
    yield from prefill_chunks(model, cache, ids[hooks.n_shared:], must_pause)


@torch.no_grad()
def scored_chunks(model: Transformer, cache: KVCache, ids: list[int], n: int, found: list,
                  must_pause: Callable[[], bool]) -> Iterator[Tensor | None]:
    """`generate.prefill_chunks`, and append to found the log-probability of each id but the first,
    and {id: log-probability} of the n likeliest in its place. The logits of one chunk are held at a
    time. Nothing is compiled for this: the chunks run eagerly."""
    for start in range(0, len(ids), cache.max_chunk):
        end = start + cache.max_chunk
        chunk, wanted = ids[start:end], ids[start + 1:end + 1]
        tokens = torch.tensor([chunk], device=cache.length.device)
        for logits in model.step_in_parts(tokens, cache, None, must_pause):  # (1, T, V)
            if logits is None:
                yield None
        targets = torch.tensor(wanted, dtype=torch.int64, device=logits.device)[:, None]
        for rows, ids_of_rows in zip(logits[0].split(SCORED), targets.split(SCORED)):
            pair = log_probabilities(rows[:len(ids_of_rows)], ids_of_rows, n)  # (t, 1 + n) each
            for (own, *others), (_, *likeliest) in zip(*(x.tolist() for x in pair)):
                found.append((own, dict(zip(likeliest, others, strict=True))))
        yield logits[:, -1:] if start + len(chunk) == len(ids) else None


def prefill_one_chunk(batch: Batch) -> None:
    """Prefill the next chunk of one prompt; prompts take turns. While streams decode, long prompts
    get no more time than the steps do."""
    must_wait = any(batch.rows) and batch.prefill_credit <= 0  # long prompts only
    prefill = next((prefill for prefill in batch.prefills if prefill.logits is None
                    and not (must_wait and prefill.prompt_tokens_left > LONG_PROMPT)), None)
    if prefill is None:
        return
    began = time.perf_counter()
    prefill.logits = next(prefill.chunks)
    if prefill.logits is not None and prefill.logits.is_cuda:
        torch.cuda.synchronize(prefill.logits.device)
    for stream in prefill.streams:
        stream.prefilled = time.perf_counter()
    if prefill.prompt_tokens_left > LONG_PROMPT:
        batch.prefill_credit -= time.perf_counter() - began
    if prefill.cache.length.is_cuda:
        prefill.prompt_tokens_left -= prefill.cache.max_chunk
    else:  # it may have paused in a chunk
        prefill.prompt_tokens_left = prefill.streams[0].length - int(prefill.cache.length)
    batch.prefills.remove(prefill)
    batch.prefills.append(prefill)


def fill_rows(batch: Batch) -> Iterator[tuple[Stream, None]]:
    """Copy prefilled prompts to idle rows, and draw their first tokens. Yields (stream, None) for
    streams that were cancelled before, and for prompts that are only read."""
    for prefill in list(batch.prefills):
        for stream in list(prefill.streams):
            only_read = not stream.prompt.max_new_tokens and prefill.logits is not None
            if stream.cancelled or only_read:
                yield stream, None
            elif prefill.logits is not None and None in batch.rows:
                start_row(batch, batch.rows.index(None), stream, prefill)
            else:
                continue
            prefill.streams.remove(stream)
            length = stream.length
        if not prefill.streams:
            prefill.cache.clear_row(0, length + prefill.cache.max_chunk)  # the padding, too
            batch.prefills.remove(prefill)


def start_row(batch: Batch, row: int, stream: Stream, prefill: Prefill) -> None:
    """Copy a prefilled prompt to a stream's row, and draw its first token."""
    batch.cache.copy_row(row, prefill.cache, n_tokens=stream.length)
    prompt, batch.rows[row], batch.is_busy[row] = stream.prompt, stream, 1
    batch.sampler.begin(row, prompt.sampling, prompt.all_ids(), prompt.stop_ids)
    batch.tokens[row:row + 1] = batch.sampler.sample(prefill.logits, slice(row, row + 1))
    compute_logprobs(batch, [] if prompt.logprobs is None else [row], prefill.logits)


# ------------------------------------------------------------------------------ decode


def decode_step(model: Transformer, batch: Batch) -> Iterator[tuple[Stream, int | None]]:
    """Draw the next token of every row, and yield the latest ones.

    As in generate.decode, a GPU is at the next step while the host reads the latest tokens. Idle
    rows take part, always at position 0. Their tokens are never read, nor the last one that is
    drawn in a row whose stream ends here."""
    read = copy_to_host(batch.tokens)
    logprobs = {row: [copy_to_host(x) for x in pair] for row, pair in batch.logprobs.items()}
    busy = len(batch.rows) - batch.rows.count(None)
    if busy < len(batch.rows):
        batch.cache.length.mul_(batch.is_busy)
    if busy == 1 and not batch.tokens.is_cuda:
        logits = decode_one_row(model, batch)
    else:
        logits = model(batch.tokens, batch.cache)
        batch.tokens = batch.sampler.sample(logits)  # (B, 1)
    batch.steps, batch.row_steps = batch.steps + 1, batch.row_steps + busy
    for row, (values, tokens) in logprobs.items():
        (own, *others), (_, *likeliest) = values(), tokens()
        batch.rows[row].logprobs.append((own, dict(zip(likeliest, others, strict=True))))
    compute_logprobs(batch, list(logprobs), logits)
    yield from yield_tokens(batch, read())


def decode_one_row(model: Transformer, batch: Batch) -> Tensor:
    """Draw the next token of the only busy row, in the shape (1, 1). That is much less work for a
    CPU; a GPU reads the weights once for all rows anyway. Returns the logits (1, 1, V)."""
    row = next(row for row, stream in enumerate(batch.rows) if stream)
    cache, some = batch.cache.row(row), slice(row, row + 1)
    logits = model(batch.tokens[some], cache)
    batch.cache.overhang[row] = cache.overhang[0]
    batch.tokens = batch.tokens.clone()  # the latest ones are still to be read
    batch.tokens[some] = batch.sampler.sample(logits, some)
    return logits


def compute_logprobs(batch: Batch, rows: list[int], logits: Tensor) -> None:
    """Compute the log-probabilities of the rows' latest tokens, which were drawn from the logits:
    (B, 1, V), or (1, 1, V) of one row."""
    for row in rows:
        raw, n = logits[row if len(logits) > 1 else 0], batch.rows[row].prompt.logprobs
        token = batch.tokens[row:row + 1].clamp(min=0)
        batch.logprobs[row] = log_probabilities(raw, token, n)


def yield_tokens(batch: Batch, ids: list[int]) -> Iterator[tuple[Stream, int | None]]:
    """Yield the latest token of every busy row. The row of a stream that ends becomes idle."""
    for row, (stream, token_id) in enumerate(zip(batch.rows, ids, strict=True)):
        if stream is None:
            continue
        drawn = token_id != UNDRAWN
        if not drawn or token_id in stream.prompt.stop_ids:
            stream.new_tokens_left = 0
        stream.new_tokens_left = max(0, stream.new_tokens_left - 1)
        stream.length += 1
        if drawn:
            yield stream, token_id
        if not stream.new_tokens_left:
            if token_id in stream.prompt.stop_ids:  # which a grammar's fault lets through alone
                stream.error = batch.sampler.error(row)
            elif not drawn:
                stream.error = NOT_FINITE
            yield stream, None
            batch.sampler.end(row)
            batch.cache.clear_row(row, stream.length)
            batch.rows[row], batch.is_busy[row] = None, 0
            batch.logprobs.pop(row, None)
