"""Generate text from a Llama-family checkpoint, as fast as the memory bus allows, without end.

    python generate.py --compile
    python generate.py --checkpoint smollm2 --prompt "Once upon a time" --max-new-tokens 5000

Read from the top: a cache, prefill, decode, an answer, and last the command line; load.py is before
all that. Every model call is a token or a chunk of one of a few sizes, so nothing is ever compiled
again.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cli import DTYPES, add_generation, check_text, figures, load_arguments, make_parser
from kv_cache import KVCache
from load import load, weight_bytes
from model import ModelConfig, Transformer
from sample import Rows, Sampling, new_seed, sample
from speculate import Speculation, speculate
from terminal import ending, hold_interrupt, say, show, user_errors
from tokenizer import Tokenizer, stop_at
from tp import agree

SMALL_CHUNK, LARGE_CHUNK = 32, 128  # tokens of a prefill step; the small one is for short turns
DEFAULT_PROMPT = "It was a dark and stormy night, and"
MAX_DEFAULT_WINDOW = 4096  # sinks and window together, where nothing is asked for


def make_cache(model: Transformer, n_sink: int | None = None, window: int | None = None,
               batch_size: int = 1) -> KVCache:
    """A cache for a loaded model. None is 4 sinks, and as window all of the trained context that
    the sinks leave, at most MAX_DEFAULT_WINDOW. Raises ValueError naming a size that cannot be."""
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
    return min(window, config.sliding_window or window)


# ------------------------------------------------------------------------------ prefill and decode


def prefill(model: Transformer, cache: KVCache, prompt_ids: list[int],
            speculation: Speculation | None = None) -> Tensor:
    """Write a prompt into a cache of one row; logits (1, 1, V) after its last token.

    Raises ValueError for an empty prompt or an id outside the vocabulary."""
    *_, logits = prefill_chunks(model, cache, prompt_ids)
    if speculation is not None:
        speculation.history.extend(prompt_ids)
        if speculation.draft and speculation.size:
            *read, last = speculation.unread + prompt_ids
            speculation.unread = [last]
            if read:
                prefill(speculation.draft, speculation.cache, read)
    return logits


@torch.no_grad()
def prefill_chunks(model: Transformer, cache: KVCache,
                   prompt_ids: list[int]) -> Iterator[Tensor | None]:
    """`prefill` in pieces: yields after every chunk, None until the last one's logits (1, 1, V).

    Any length is cut into chunks of two fixed sizes. The last one is padded, and the padding
    un-written."""
    check_ids(model, prompt_ids)
    large, small = min(LARGE_CHUNK, cache.max_chunk), min(SMALL_CHUNK, cache.max_chunk)
    done = 0
    while done < len(prompt_ids):
        # A large chunk pays, padding and all, once more than half of it is used.
        size = large if len(prompt_ids) - done > large // 2 else small
        chunk = prompt_ids[done:done + size]
        tokens = torch.zeros(1, size, dtype=torch.int64)
        tokens[0, :len(chunk)] = torch.tensor(chunk)
        last = torch.tensor([len(chunk) - 1])
        logits = model(tokens.to(cache.length.device), cache, last.to(cache.length.device))
        if len(chunk) < size:
            cache.rollback(size - len(chunk))
        done += size
        yield logits if done >= len(prompt_ids) else None


def check_ids(model: Transformer, prompt_ids: list[int]) -> None:
    """Raises ValueError unless there are any and all are in the vocabulary."""
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.config.vocab_size:
        raise ValueError(f"the prompt has token ids outside 0 to {model.config.vocab_size - 1}")


def start_reading(tokens: Tensor) -> Callable[[], list[int]]:
    """Copy tokens to the host without waiting for what is queued after this; call to get them."""
    tokens = tokens.flatten()
    if not tokens.is_cuda:
        return tokens.tolist
    host = tokens.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(tokens.device).record_event()
    return lambda: (arrived.synchronize(), host.tolist())[1]


@torch.no_grad()
def decode(model: Transformer, cache: KVCache, token: Tensor, max_new_tokens: int,
           ignore_eos: bool = False, draw: Callable[[Tensor], Tensor] = sample) -> Iterator[int]:
    """Yield `token` (1, 1), sampled but not in the cache yet, and the ids that continue it, up to
    an EOS id, which is yielded too. draw makes the next token (1, 1) of logits (1, 1, V).

    When a token is yielded, it is in the cache or queued for it: the host reads each token while
    a GPU is at the next step already, and whoever stops here, at any token, loses none."""
    for _ in range(max_new_tokens):
        read = start_reading(token)
        following = draw(model(token, cache))
        [token_id] = read()
        yield token_id
        if token_id in model.config.eos_ids and not ignore_eos:
            return
        token = following


def generate(model: Transformer, cache: KVCache, prompt_ids: list[int], max_new_tokens: int = 64,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             generator: torch.Generator | None = None, ignore_eos: bool = False,
             speculation: Speculation | None = None, min_p: float | None = None,
             repetition_penalty: float = 1.0, seed: int | None = None) -> Iterator[int]:
    """Yield the token ids that follow prompt_ids, which follow what the cache (one row) holds.
    The repetition penalty is for tokens of these prompt_ids and of the answer. Without a seed, one
    is drawn from the generator.

    At any yield the cache holds everything up to the token yielded (with speculation: once this
    generator is closed), so a conversation goes on by calling this again with the next turn's ids
    only. Raises ValueError for an unusable prompt or setting, before anything is written."""
    if speculation is not None and repetition_penalty != 1:
        raise ValueError("a repetition penalty works without speculation")
    seed = new_seed(generator) if seed is None and temperature else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    logits = prefill(model, cache, prompt_ids, speculation)
    yield from continue_from(model, cache, logits, prompt_ids, max_new_tokens, ignore_eos,
                             speculation, sampling)


def continue_from(model: Transformer, cache: KVCache, logits: Tensor, prompt_ids: list[int],
                  max_new_tokens: int, ignore_eos: bool, speculation: Speculation | None,
                  sampling: Sampling) -> Iterator[int]:
    """Yield what follows the logits (1, 1, V) of a prefill: speculating while that pays, then
    token by token."""
    row = Rows(1, model.config.vocab_size, logits.device)
    row.begin(0, sampling, prompt_ids)
    token = row.sample(logits)  # (1, 1)
    if speculation is not None:
        token, max_new_tokens = yield from speculate(model, cache, token, max_new_tokens,
                                                     ignore_eos, speculation, sampling)
    yield from decode(model, cache, token, max_new_tokens, ignore_eos, row.sample)


@torch.no_grad()
def warm(model: Transformer, cache: KVCache, speculation: Speculation | None = None,
         sampling: Sampling | None = None) -> float:
    """Run every graph that generating needs, so that none is compiled later; seconds it took.
    CUDA graphs are recorded on the second call of a shape and replayed from the third."""
    start = time.perf_counter()
    for _ in range(3 if cache.length.is_cuda else 1):
        cache.reset()
        logits = prefill(model, cache, [0] * (LARGE_CHUNK + 1))  # both chunks
        list(continue_from(model, cache, logits, [0], 1, True, None, sampling or Sampling()))
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


class Transcript:
    """What one stream says, as it comes: its ids, its text up to a stop text, and when."""

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, args,
                 emit: Callable[[str], None] = lambda text: None):
        """Starts the clock. args are a program's (cli.make_parser); emit shows the text."""
        self.prompt_tokens, self.args, self.emit = prompt_tokens, args, emit
        self.ids, self.texts, self.reason = [], [], "length"
        self.detokenize, self.stop = tokenizer.stream(), stop_at(args.stop)
        self.start = self.prefilled = self.first = self.last = time.perf_counter()

    def add(self, token_id: int) -> bool:
        """Take the next token. True when it completes a stop text."""
        self.last = time.perf_counter()
        self.first = self.first if self.ids else self.last
        self.ids.append(token_id)
        text, stopped = self.stop(self.detokenize(token_id))
        self.show(text)
        self.reason = "stop" if stopped else self.reason
        return stopped

    def show(self, text: str) -> None:
        self.texts.append(text)
        self.emit(text)

    def end(self, model: Transformer, length: int, *caches: KVCache) -> dict:
        """The figures that --json prints; length is how far the stream has come in its cache."""
        if self.reason != "stop":
            self.show(self.stop(self.detokenize(None), final=True)[0])
        ids, eos_ids = self.ids, () if self.args.ignore_eos else model.config.eos_ids
        if self.reason == "length" and ids[-1] in eos_ids:
            self.reason = "eos"
        seen = caches[0].n_sink + caches[0].window
        return dict(
            prompt_tokens=self.prompt_tokens, new_tokens=len(ids), text="".join(self.texts),
            token_ids=ids, ttft_s=self.first - self.start,
            prefill_tok_s=self.prompt_tokens / (self.prefilled - self.start),
            decode_tok_s=(len(ids) - 1) / (self.last - self.first) if len(ids) > 1 else None,
            compile_s=self.args.compile_s, evicted=max(0, length - seen),
            finish_reason=self.reason, seed=self.args.seed, weight_bytes=weight_bytes(model),
            cache_bytes=sum(cache.nbytes() for cache in caches))


def answer(model: Transformer, cache: KVCache, tokenizer: Tokenizer, prompt_ids: list[int], args,
           emit: Callable[[str], None], speculation: Speculation | None = None,
           kept: list | None = None) -> dict:
    """Continue the cache with prompt_ids and with what the model says, shown as it comes.

    args are a program's (cli.make_parser), seeded (get_ready). Returns the figures that --json
    prints. Ctrl-C ends the answer, and what was said by then is kept, as finish_reason "interrupt".
    Into an empty list `kept` go a copy of the cache after the prompt, and the logits; the next
    answer begins there."""
    prompt_ids = agree(prompt_ids)
    before = speculation and (speculation.rounds, speculation.proposed, speculation.accepted)
    with hold_interrupt() as interrupted:
        transcript, reused = Transcript(tokenizer, len(prompt_ids), args, emit), bool(kept)
        if kept:
            cache.copy_row(0, kept[0])
        logits = kept[1] if kept else prefill(model, cache, prompt_ids, speculation)
        if kept == []:
            kept += [copy.deepcopy(cache), logits.clone()]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        transcript.prefilled = time.perf_counter()
        for token_id in continue_from(model, cache, logits, prompt_ids, args.max_new_tokens,
                                      args.ignore_eos, speculation, sampling(args)):
            if transcript.add(token_id):
                break
            if interrupted:
                transcript.reason = "interrupt"
                break
    record = transcript.end(model, int(cache.length), cache)
    if reused:
        record["prefill_tok_s"] = None  # it was a copy
    if speculation:
        # The first token, known after the prefill, is told with the others of the first round.
        took = transcript.last - transcript.prefilled
        record.update(decode_tok_s=(len(transcript.ids) - 1) / took or None,
                      rounds=speculation.rounds - before[0],
                      proposed=speculation.proposed - before[1],
                      accepted=speculation.accepted - before[2])
    return record


def sampling(args) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
                    seed=args.seed)


# ------------------------------------------------------------------------------ command line


def open_model(args) -> tuple[Transformer, Tokenizer]:
    """Load what the command line asks for."""
    for text in args.stop:
        check_text("--stop", text)
    say(f"loading {args.checkpoint}")
    return load(args.checkpoint, compile=args.compile, compile_prefill=args.compile_prefill,
                **load_arguments(args))


def open_speculation(model: Transformer, cache: KVCache, tokenizer: Tokenizer,
                     args) -> Speculation | None:
    """What the command line asks for, if anything."""
    if args.draft and args.lookup:
        raise ValueError("--draft and --lookup exclude each other")
    if not (args.draft or args.lookup):
        if args.speculate:
            raise ValueError("--speculate goes with --draft or --lookup")
        return None
    for flag in ("samples", "repetition_penalty"):
        if getattr(args, flag, 1) != 1:
            raise ValueError(f"--{flag.replace('_', '-')} works without --draft and --lookup")
    if args.speculate and args.speculate >= cache.max_chunk:
        raise ValueError(f"--speculate {args.speculate} is too many; at most {cache.max_chunk - 1}")
    if args.lookup:
        return Speculation(fixed=args.speculate)
    draft, its_tokenizer = load(args.draft, args.device, DTYPES.get(args.dtype),
                                compile=args.compile, parallel=False,
                                compile_prefill=args.compile_prefill)
    text = "Does it read \u00e9t\u00e9, 12:30 and\n two lines alike?"
    if (draft.config.vocab_size != model.config.vocab_size
            or its_tokenizer.encode(text) != tokenizer.encode(text)):
        raise ValueError(f"--draft {args.draft} has another tokenizer than {args.checkpoint}; "
                         "a draft needs the same one")
    return Speculation(draft, make_cache(draft), args.speculate)


def get_ready(model: Transformer, cache: KVCache, args,
              speculation: Speculation | None = None) -> None:
    """Compile what is to be compiled, and seed. Notes both in args."""
    args.compile_s = 0.0
    if args.compile:
        say("compiling: 10 to 30 s the first time, a few from then on"
            + (", and as long again for each of two sizes of prompt" * args.compile_prefill))
        args.compile_s = warm(model, cache, speculation, sampling(args))
    args.seed = secrets.randbits(32) if args.seed is None else args.seed


def main():
    parser = add_generation(make_parser(__doc__), samples=True)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT",
                        help="what to go on from")
    with user_errors(parser):
        args = parser.parse_args()
        prompt = check_text("--prompt", args.prompt)
        model, tokenizer = open_model(args)
        cache = make_cache(model, args.sink, args.window)
        speculation = open_speculation(model, cache, tokenizer, args)
        get_ready(model, cache, args, speculation)
        say(prompt)
        ids, kept = tokenizer.encode(prompt), [] if args.samples > 1 else None
        for index in range(args.samples):
            record = answer(model, cache, tokenizer, ids, args,
                            (lambda text: None) if args.json else show, speculation, kept)
            record = record if kept is None else {"index": index, **record}
            show((json.dumps(record) if args.json else "") + "\n")
            say(f"{figures(record)}, compiled in {record['compile_s']:.1f} s, seed {args.seed}")
            if ending or record["finish_reason"] == "interrupt":
                break
            args.seed += 1


if __name__ == "__main__":
    main()
