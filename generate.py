"""Generate text from a Llama-family checkpoint, without end and in constant memory.

    python generate.py --compile
    python generate.py --checkpoint smollm2 --prompt "Once upon a time" --max-new-tokens 5000

Read it from the top: a cache, prefill, decode, an answer, and last the command line; load.py makes
the model. Every compiled call of it is a token or a chunk of one of a few sizes, so nothing is
compiled again however long a prompt or an answer is.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cli import (
    add_generation,
    check_text,
    figures,
    grammar_arguments,
    load_arguments,
    make_grammar,
    make_parser,
    sampling_of,
    speculation_arguments,
)
from draw import RowSampler, check_drawn, copy_to_host, new_seed, sample
from kv_cache import KVCache
from load import load, weight_bytes
from model import ModelConfig, Transformer
from sample import Sampling, either_sampling
from speculate import Speculation, known_ids, load_draft, speculate
from terminal import hold_interrupt, received_signals, say, say_compiling, show, user_errors
from tokenizer import GeneratedText, Tokenizer
from tp import broadcast_ids

SMALL_CHUNK, LARGE_CHUNK = 32, 128  # tokens of a prefill step; the small one is for short turns
DEFAULT_PROMPT = "It was a dark and stormy night, and"
MAX_DEFAULT_WINDOW = 4096  # sinks and window together, where no window is given


def make_cache(model: Transformer, n_sink: int | None = None, window: int | None = None,
               batch_size: int = 1) -> KVCache:
    """A cache that fits a model. By default it has 4 sinks, and as window what the sinks leave of
    the trained context, or of MAX_DEFAULT_WINDOW. Raises ValueError naming a size that cannot be.
    """
    config, n_sink = model.config, 4 if n_sink is None else n_sink
    if window is None:
        window = default_window(config, n_sink)
    weight = model.norm.weight
    return KVCache(config, batch_size, n_sink, window, LARGE_CHUNK, weight.dtype, weight.device)


def default_window(config: ModelConfig, n_sink: int) -> int:
    context = min(config.max_seq_len, MAX_DEFAULT_WINDOW)
    if (window := context - n_sink) < 1:
        raise ValueError(f"{n_sink} sinks leave no window in {context} tokens, the default in all; "
                         "a model with a longer context takes an explicit window")
    return min(window, config.common_window or window)


# ------------------------------------------------------------------------------ prefill and decode


def prefill(model: Transformer, cache: KVCache, prompt_ids: list[int],
            speculation: Speculation | None = None) -> Tensor:
    """Write a prompt into a cache of one row. Returns the logits (1, 1, V) after its last token.

    Raises ValueError for an empty prompt or an id outside the vocabulary."""
    *_, logits = prefill_chunks(model, cache, prompt_ids)
    if speculation is not None:
        speculation.history.extend(prompt_ids)
        if speculation.draft and speculation.size:
            *read, last = speculation.unread + prompt_ids
            speculation.unread = [last]
            if read:
                prefill(speculation.draft, speculation.cache, known_ids(speculation.draft, read))
    return logits


@torch.no_grad()
def prefill_chunks(model: Transformer, cache: KVCache, prompt_ids: list[int],
                   must_pause: Callable[[], bool] | None = None) -> Iterator[Tensor | None]:
    """`prefill`, a chunk at a time: yields None after each chunk, after the last one the logits
    (1, 1, V). A chunk that is not compiled also yields None between layers, where it must pause.

    A prompt of any length is cut into chunks. In compiled prefill they have two fixed sizes, and
    the last one is padded, and the padding is rolled back."""
    check_ids(model, prompt_ids)
    large, small = min(LARGE_CHUNK, cache.max_chunk), min(SMALL_CHUNK, cache.max_chunk)
    padded = model.compiled is not None and model.compiled.prefill
    done = 0
    while done < len(prompt_ids):
        chunk = prompt_ids[done:done + large]
        size = len(chunk)
        if padded:  # a large chunk is faster than small ones if more than half of it is used
            size = large if len(chunk) > large // 2 else small
            chunk = chunk[:size]
        tokens = torch.zeros(1, size, dtype=torch.int64)
        tokens[0, :len(chunk)] = torch.tensor(chunk)
        last = torch.tensor([len(chunk) - 1])
        tokens, last = tokens.to(cache.length.device), last.to(cache.length.device)
        if must_pause and not padded:
            for logits in model.step_in_parts(tokens, cache, last, must_pause):
                if logits is None:
                    yield None
        else:
            logits = model(tokens, cache, last)
        if len(chunk) < size:
            cache.rollback(size - len(chunk))
        done += size
        yield logits if done >= len(prompt_ids) else None


def check_ids(model: Transformer, prompt_ids: list[int]) -> None:
    """Raises ValueError for an empty prompt, and for one with ids outside the vocabulary."""
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.config.vocab_size:
        raise ValueError(f"the prompt has token ids outside 0 to {model.config.vocab_size - 1}")


@torch.no_grad()
def decode(model: Transformer, cache: KVCache, token: Tensor, max_new_tokens: int,
           stop_ids: Container[int], draw: Callable[[Tensor], Tensor] = sample) -> Iterator[int]:
    """Yield `token` (1, 1), sampled but not in the cache yet, and the ids that continue it, up to
    one of stop_ids, which is yielded too. draw makes the next token (1, 1) of logits (1, 1, V).

    A token that is yielded is in the cache, or queued for it: the host reads it while a GPU
    computes the next step. So the caller may stop at any token, and the cache holds just those that
    were yielded. Raises ValueError where no token can be drawn."""
    for _ in range(max_new_tokens):
        read = copy_to_host(token)
        following = draw(model(token, cache))
        [token_id] = read()
        yield check_drawn(token_id)
        if token_id in stop_ids:
            return
        token = following


def generate(model: Transformer, cache: KVCache, prompt_ids: list[int], max_new_tokens: int = 64, *,
             sampling: Sampling | None = None, stop_ids: Collection[int] | None = None,
             speculation: Speculation | None = None, temperature: float | None = None,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float | None = None, seed: int | None = None) -> Iterator[int]:
    """An iterator over the token ids that continue what the cache (one row) holds and prompt_ids.

    It ends with one of stop_ids (None: the model's EOS ids; (): none), or after max_new_tokens. A
    Sampling, or else its settings one by one, says how tokens are drawn; the default is greedy.
    Penalties are for the tokens of prompt_ids and of the answer. A seed that is needed and not
    given comes from PyTorch's default generator. A grammar that cannot go on ends the answer with a
    ValueError.

    At any yield the cache holds everything up to the token yielded (with speculation: once the
    iterator is closed). So a conversation goes on with another call, with the ids of the next turn
    only. Raises ValueError at the call, not at the first id, for an unusable prompt, cache or
    setting; the cache is written to from the first id on."""
    loose = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                 repetition_penalty=repetition_penalty, seed=seed)
    sampling = either_sampling(sampling, loose)
    for what, asked in (("a penalty", sampling.penalizes), ("a grammar", sampling.grammar),
                        ("a logit_bias", sampling.logit_bias),
                        ("a number of min_tokens", sampling.min_tokens)):
        if speculation is not None and asked:
            raise ValueError(f"{what} works without speculation")
    if cache.batch_size != 1:
        raise ValueError(f"generate takes a cache of one row, and this one has {cache.batch_size}; "
                         "streams.generate_batch continues many")
    cache.check_fits(model.config, model.norm.weight)
    check_ids(model, prompt_ids)
    stop_ids = model.config.eos_ids if stop_ids is None else tuple(stop_ids)
    if sampling.grammar:
        sampling.grammar.check_fits(model.config.vocab_size, stop_ids)
    if sampling.temperature and sampling.seed is None:
        sampling = replace(sampling, seed=new_seed())
    return prefill_and_continue(model, cache, prompt_ids, max_new_tokens, stop_ids, sampling,
                                speculation)


def prefill_and_continue(model: Transformer, cache: KVCache, prompt_ids: list[int],
                         max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling,
                         speculation: Speculation | None) -> Iterator[int]:
    """Prefill the prompt and yield what follows it."""
    logits = prefill(model, cache, prompt_ids, speculation)
    yield from continue_from(model, cache, logits, prompt_ids, max_new_tokens, stop_ids, sampling,
                             speculation)


def continue_from(model: Transformer, cache: KVCache, logits: Tensor, prompt_ids: list[int],
                  max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling,
                  speculation: Speculation | None = None) -> Iterator[int]:
    """Yield the ids that follow a prefill, whose logits (1, 1, V) are given: by speculation while
    that pays, then token by token."""
    row = RowSampler(1, model.config.vocab_size, logits.device)
    row.begin(0, sampling, prompt_ids, stop_ids)
    token = row.sample(logits)  # (1, 1)
    if speculation is not None:
        token, max_new_tokens = yield from speculate(model, cache, token, max_new_tokens, stop_ids,
                                                     speculation, sampling)
    token_id = None
    for token_id in decode(model, cache, token, max_new_tokens, stop_ids, row.sample):
        yield token_id
    if token_id in stop_ids and row.error(0):  # a fault lets nothing else through
        raise ValueError(f"the grammar could not go on: {row.error(0)}")


@torch.no_grad()
def warm(model: Transformer, cache: KVCache, speculation: Speculation | None = None,
         sampling: Sampling | None = None) -> float:
    """Run every graph that generating needs, so that none is compiled later. Returns the seconds it
    took. CUDA graphs are recorded on the second call of a shape and replayed from the third."""
    start = time.perf_counter()
    for _ in range(3 if cache.length.is_cuda else 1):
        cache.reset()
        logits = prefill(model, cache, [0] * (LARGE_CHUNK + 1))  # both chunks
        how = replace(sampling or Sampling(), grammar=None)  # a mask is not compiled
        list(continue_from(model, cache, logits, [0], 1, (), how))
        for size in speculation.sizes if speculation else ():
            model(torch.zeros(1, size + 1, dtype=torch.int64, device=cache.length.device), cache)
        if speculation and speculation.draft:
            warm(speculation.draft, speculation.cache)
            pair = torch.zeros(1, 2, dtype=torch.int64, device=cache.length.device)
            speculation.draft(pair, speculation.cache)
    cache.reset()
    if speculation:
        speculation.reset()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------ one answer


@dataclass
class Prefilled:
    """A prompt after its prefill. An answer continues it, and further answers a deep copy."""

    prompt_ids: list[int]
    cache: KVCache  # ends with the prompt
    logits: Tensor  # (1, 1, V) after its last token
    began: float  # time.perf_counter()
    ended: float
    interrupted: bool = False  # by Ctrl-C, which ends the answer at its first token

    def copy_into(self, cache: KVCache) -> Prefilled:
        """The same prompt in another cache of the same sizes, by copying it."""
        cache.copy_row(0, self.cache)
        now = time.perf_counter()
        return replace(self, cache=cache, began=now, ended=now)


def timed_prefill(model: Transformer, cache: KVCache, prompt_ids: list[int],
                  speculation: Speculation | None = None) -> Prefilled:
    """`prefill` with its times, once the device has done it. Ctrl-C does not interrupt it, but ends
    the answer that follows."""
    prompt_ids, began = broadcast_ids(prompt_ids), time.perf_counter()
    with hold_interrupt() as interrupted:
        logits = prefill(model, cache, prompt_ids, speculation)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
    return Prefilled(prompt_ids, cache, logits, began, time.perf_counter(), bool(interrupted))


def discard(text: str) -> None:
    """Does not show a piece of an answer, as with --json."""


def chat_stop_ids(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer of a chat: the model's EOS ids, and those that only the
    tokenizer and the chat template know as ends of a turn."""
    return {*model.config.eos_ids, *tokenizer.turn_end_ids}


class Transcript:
    """What one stream says, shown as it comes, with the times that --json prints."""

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, stop: Sequence[str] = (),
                 emit: Callable[[str], None] = discard, marks: dict[int, str] | None = None):
        """stop are texts that end the answer; emit shows each piece of it. marks are as in
        GeneratedText."""
        self.prompt_tokens, self.emit = prompt_tokens, emit
        self.said, self.interrupted = GeneratedText(tokenizer, stop, marks), False
        # When the prefill began and ended, and when the first and the latest token came
        self.start = self.prefilled = self.first = self.last = time.perf_counter()

    def add(self, token_id: int) -> bool:
        """Take the next token. True when it completes a stop text."""
        self.last = time.perf_counter()
        if not self.said.ids:
            self.first = self.last
        self.emit(self.said.add(token_id))
        return self.said.stopped

    def record(self, model: Transformer, caches: Sequence[KVCache], length: int,
               stop_ids: Container[int], seed: int) -> dict:
        """Show the text that was held back, and return what --json prints. length is the stream's
        in the first of the caches, which are those that served it."""
        self.emit(self.said.flush())
        new_tokens, seen = len(self.said.ids), caches[0].n_sink + caches[0].window
        prefill_s, decode_s = self.prefilled - self.start, self.last - self.first
        return dict(
            prompt_tokens=self.prompt_tokens, new_tokens=new_tokens, text=self.said.text,
            token_ids=self.said.ids, ttft_s=self.first - self.start,
            prefill_tok_s=self.prompt_tokens / prefill_s if prefill_s else None,
            decode_tok_s=(new_tokens - 1) / decode_s if new_tokens > 1 else None,
            evicted=max(0, length - seen), finish_reason=self.finish_reason(stop_ids), seed=seed,
            weight_bytes=weight_bytes(model), cache_bytes=sum(cache.nbytes() for cache in caches))

    def finish_reason(self, stop_ids: Container[int]) -> str:
        if self.said.stopped:
            return "stop"
        if self.interrupted:
            return "interrupt"
        return "eos" if self.said.ids[-1] in stop_ids else "length"


def answer(model: Transformer, tokenizer: Tokenizer, prompt: Prefilled, max_new_tokens: int,
           sampling: Sampling, *, stop: Sequence[str] = (), stop_ids: Collection[int] | None = None,
           emit: Callable[[str], None] = discard, marks: dict[int, str] | None = None,
           speculation: Speculation | None = None) -> dict:
    """Answer a prompt and show the answer as it comes. Returns what --json prints.

    The Sampling needs a seed. stop are texts, stop_ids tokens that end the answer (None: the EOS
    ids). marks are as in GeneratedText. Ctrl-C ends it too, as finish_reason "interrupt", and the
    cache keeps what was said."""
    stop_ids = model.config.eos_ids if stop_ids is None else stop_ids
    before = speculation and speculation.figures()
    transcript = Transcript(tokenizer, len(prompt.prompt_ids), stop, emit, marks)
    transcript.start, transcript.prefilled = prompt.began, prompt.ended
    with hold_interrupt() as interrupted:
        for token_id in continue_from(model, prompt.cache, prompt.logits, prompt.prompt_ids,
                                      max_new_tokens, stop_ids, sampling, speculation):
            if transcript.add(token_id):
                break
            if interrupted or prompt.interrupted:
                transcript.interrupted = True
                break
    record = transcript.record(model, [prompt.cache], int(prompt.cache.length), stop_ids,
                               sampling.seed)
    if speculation:
        # The first token is yielded with the others of the first round, so the rate counts from
        # the end of the prefill.
        took = transcript.last - transcript.prefilled
        rate = (record["new_tokens"] - 1) / took
        record["decode_tok_s"] = rate or None
        record.update({name: n - before[name] for name, n in speculation.figures().items()})
    return record


# ------------------------------------------------------------------------------ command line


def open_model(checkpoint: str, **load_options) -> tuple[Transformer, Tokenizer]:
    """Load a checkpoint and say so; load_options are what load.load takes."""
    say(f"loading {checkpoint}")
    return load(checkpoint, **load_options)


def open_speculation(model: Transformer, cache: KVCache, tokenizer: Tokenizer, *,
                     draft: str | None = None, lookup: bool = False, size: int | None = None,
                     **load_options) -> Speculation | None:
    """Speculation with a draft or by lookup, or None where neither is wanted. size is the number of
    proposals a round (None: as many as pay); load_options are what load.load takes. Raises
    ValueError where size or draft do not fit the model."""
    if not (draft or lookup):
        return None
    if size and size >= cache.max_chunk:
        raise ValueError(f"--speculate {size} is too many; at most {cache.max_chunk - 1}")
    if lookup:
        return Speculation(fixed=size)
    draft_model = load_draft(draft, model, tokenizer, **load_options)
    return Speculation(draft_model, make_cache(draft_model), size)


def get_ready(model: Transformer, cache: KVCache, sampling: Sampling,
              speculation: Speculation | None = None) -> tuple[float, Sampling]:
    """Compile the graphs of a model that runs as graphs, and draw a seed where none is given.
    Returns the seconds that compiling took, and the Sampling with its seed."""
    compile_s = 0.0
    if model.compiled:
        say_compiling()
        compile_s = warm(model, cache, speculation, sampling)
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(32))
    return compile_s, sampling


def main():
    parser = add_generation(make_parser(__doc__), samples=True)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT",
                        help="what to go on from")
    with user_errors(parser):
        args = parser.parse_args()
        speculating, asked = speculation_arguments(args), grammar_arguments(args)
        text = check_text("--prompt", args.prompt)
        stop = [check_text("--stop", stop_text) for stop_text in args.stop]
        model, tokenizer = open_model(args.checkpoint, compile=args.compile,
                                      compile_prefill=args.compile_prefill, **load_arguments(args))
        grammar = make_grammar(*asked, tokenizer, model.config.vocab_size, model.config.eos_ids)
        cache = make_cache(model, args.sink, args.window)
        speculation = open_speculation(model, cache, tokenizer, **speculating)
        how = replace(sampling_of(args, model.suggested), grammar=grammar)
        compile_s, how = get_ready(model, cache, how, speculation)
        say(text)
        with hold_interrupt() as interrupted:
            prompt = timed_prefill(model, cache, tokenizer.encode(text), speculation)
            kept = copy.deepcopy(prompt) if args.samples > 1 else None
        prompt.interrupted = prompt.interrupted or bool(interrupted)
        for index in range(args.samples):
            if index:
                prompt = kept.copy_into(cache)
            seed = how.seed + index
            record = answer(model, tokenizer, prompt, args.max_new_tokens, replace(how, seed=seed),
                            stop=stop, stop_ids=() if args.ignore_eos else None,
                            emit=discard if args.json else show, speculation=speculation)
            which = {"index": index} if args.samples > 1 else {}
            record = {**which, **record, "compile_s": compile_s}
            show((json.dumps(record) if args.json else "") + "\n")
            say(f"{figures(record)}, compiled in {compile_s:.1f} s, seed {seed}")
            if received_signals or record["finish_reason"] == "interrupt":
                break


if __name__ == "__main__":
    main()
