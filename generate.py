"""Generate text from a Llama-family checkpoint, as fast as the memory bus allows, without end.

    python generate.py --compile
    python generate.py --checkpoint DIR --prompt "Once upon a time" --max-new-tokens 5000

Read from the top: load, sample, prefill, decode, and last the command line. Every model call has
one of three shapes, a token or a chunk of one of two sizes, so nothing is ever compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from convert_hf import DTYPES, read_config, read_weights
from kv_cache import KVCache
from model import ModelConfig, Transformer, rope_frequencies
from tokenizer import Tokenizer

SMALL_CHUNK, LARGE_CHUNK = 32, 256  # tokens of a prefill step; the small one is for short turns
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny"
DEFAULT_PROMPT = "It was a dark and stormy night, and"
MAX_DEFAULT_WINDOW = 4096  # sinks and window together, where nothing is asked for


# ------------------------------------------------------------------------------ load


def load(checkpoint: str | Path, device: str | None = None, dtype: torch.dtype | None = None,
         quantize: str | None = None, compile: bool = False) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer from our folder or a Hugging Face one.

    device None is the GPU if there is one; dtype None is the checkpoint's own. On a CPU, in the
    checkpoint's dtype, the weights stay memory-mapped. Raises ValueError naming what is wrong."""
    if quantize:
        raise ValueError(f"quantize {quantize!r} is not supported yet")
    device, folder = check_device(device), Path(checkpoint)
    raw, config = read_config(folder)
    tokenizer = Tokenizer(folder)
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: tensor.to(device, dtype) for name, tensor in read_weights(folder, raw, config)}
    if config.tied_embeddings:
        weights["output.weight"] = weights["embed.weight"]
    model.load_state_dict(weights, assign=True)
    model.frequencies = rope_frequencies(config, device)
    model.requires_grad_(False).eval()
    if compile:
        compile_step(model, device)
    return model, tokenizer


def check_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown; it is cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this PyTorch sees "
                         f"{torch.cuda.device_count()} CUDA devices")
    return device


def compile_step(model: Transformer, device: torch.device) -> None:
    """Compile the model's graph: with CUDA graphs on a GPU, with C++ on a CPU."""
    torch._dynamo.config.recompile_limit = 64  # a graph a shape, for each of several models
    if device.type == "cuda":
        torch._inductor.config.coordinate_descent_tuning = True
        graph = torch.compile(model.step, fullgraph=True, dynamic=False, mode="reduce-overhead")
        # The graph's own output is overwritten by its next replay.
        model.step = lambda *inputs: graph(*inputs).clone()
        return
    if not any(shutil.which(c) for c in (os.environ.get("CXX") or "g++", "clang++")):
        raise ValueError("compiling for a CPU needs a C++ compiler, and neither g++ nor clang++ was "
                         "found; install one, or name it in the environment variable CXX")
    model.step = torch.compile(model.step, fullgraph=True, dynamic=False)


def make_cache(model: Transformer, n_sink: int = 4, window: int | None = None,
               batch_size: int = 1) -> KVCache:
    """A cache for a loaded model. window None is all of the trained context that the sinks leave,
    at most MAX_DEFAULT_WINDOW. Raises ValueError naming a size that cannot be."""
    if window is None:
        window = default_window(model.config, n_sink)
    return KVCache(model.config, batch_size, n_sink, window, LARGE_CHUNK,
                   model.embed.weight.dtype, model.embed.weight.device)


def default_window(config: ModelConfig, n_sink: int) -> int:
    window = min(config.max_seq_len, MAX_DEFAULT_WINDOW) - n_sink
    return min(window, config.sliding_window or window)


# ------------------------------------------------------------------------------ sample


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None,
                  top_p: float | None = None) -> Tensor:
    """(..., V) float32 probabilities that a token is drawn with: temperature, then exactly the
    top_k most likely, then the fewest of those whose mass reaches top_p."""
    # The largest logit goes to 0 first: a tiny temperature then overflows only to -inf.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if not top_k and (top_p is None or top_p >= 1):
        return logits.softmax(-1)
    likely, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probs = likely.softmax(-1)
    if top_p is not None:
        mass_before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(mass_before >= top_p, 0)
        probs[..., 0] = likely.softmax(-1)[..., 0]  # rounding may not lose the likeliest
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, ids, probs)


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Token ids (...) int64 for logits (..., V); the likeliest at temperature 0.

    argmax(p / e) with e ~ Exp(1) draws from p, and unlike multinomial never waits for the GPU."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = probabilities(logits, temperature, top_k, top_p)
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(-1)


# ------------------------------------------------------------------------------ prefill and decode


@torch.no_grad()
def prefill(model: Transformer, cache: KVCache, prompt_ids: list[int]) -> Tensor:
    """Write a prompt into a cache of one row; logits (1, 1, V) after its last token.

    Any length is cut into chunks of two fixed sizes. The last one is padded, and the padding
    un-written. Raises ValueError for an empty prompt or an id outside the vocabulary."""
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.config.vocab_size:
        raise ValueError(f"the prompt has token ids outside 0 to {model.config.vocab_size - 1}")
    large, small = min(LARGE_CHUNK, cache.max_chunk), min(SMALL_CHUNK, cache.max_chunk)
    done = 0
    while done < len(prompt_ids):
        # A padded large chunk costs more than the small ones that would do, up to half of it.
        size = large if len(prompt_ids) - done > large // 2 else small
        chunk = prompt_ids[done:done + size]
        tokens = torch.zeros(1, size, dtype=torch.int64)
        tokens[0, :len(chunk)] = torch.tensor(chunk)
        last = torch.tensor([len(chunk) - 1])
        logits = model(tokens.to(cache.length.device), cache, last.to(cache.length.device))
        if len(chunk) < size:
            cache.rollback(size - len(chunk))
        done += size
    return logits


@torch.no_grad()
def decode(model: Transformer, cache: KVCache, logits: Tensor, max_new_tokens: int,
           ignore_eos: bool = False, **sampling) -> Iterator[int]:
    """Yield token ids that continue `logits` (1, 1, V), up to an EOS id, which is yielded too.

    When a token is yielded, it is in the cache or queued for it: the host reads each token while
    the GPU is at the next step already, and whoever stops here, at any token, loses none."""
    token = sample(logits, **sampling)  # (1, 1)
    for _ in range(max_new_tokens):
        following = sample(model(token, cache), **sampling)
        token_id = token.item()
        yield token_id
        if token_id in model.config.eos_ids and not ignore_eos:
            return
        token = following


def generate(model: Transformer, cache: KVCache, prompt_ids: list[int], max_new_tokens: int = 64,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             generator: torch.Generator | None = None, ignore_eos: bool = False) -> Iterator[int]:
    """Yield the token ids that follow prompt_ids, which follow what the cache (one row) holds.

    At any yield the cache holds everything up to the token yielded, so a conversation goes on by
    calling this again with the next turn's ids only. Raises ValueError for an unusable prompt."""
    logits = prefill(model, cache, prompt_ids)
    yield from decode(model, cache, logits, max_new_tokens, ignore_eos, temperature=temperature,
                      top_k=top_k, top_p=top_p, generator=generator)


def warm(model: Transformer, cache: KVCache, **sampling) -> float:
    """Run every graph that generating needs, so that none is compiled later; seconds it took.
    CUDA graphs are recorded on the second call of a shape and replayed from the third."""
    start = time.perf_counter()
    for _ in range(3 if cache.length.is_cuda else 1):
        for _ in generate(model, cache, [0] * (LARGE_CHUNK + 1), 1, **sampling):
            cache.reset()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------ one answer


def stop_at(stops: list[str]) -> Callable[[str], tuple[str, bool]]:
    """A filter for streamed text. It takes the next piece and returns what can be shown, and
    whether a stop text was reached. What may yet become a stop text is held back; "" as the next
    piece releases it."""
    held = ""

    def add(piece: str) -> tuple[str, bool]:
        nonlocal held
        text = held + piece
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            held = ""
            return text[:min(found)], True
        keep = 0
        if piece:
            keep = max((n for stop in stops for n in range(1, len(stop)) if
                        text.endswith(stop[:n])), default=0)
        held = text[len(text) - keep:]
        return text[:len(text) - keep], False

    return add


def answer(model: Transformer, cache: KVCache, tokenizer: Tokenizer, prompt_ids: list[int],
           options: dict, show: Callable[[str], None]) -> dict:
    """Continue the cache with prompt_ids and what the model says, showing text as it comes.

    options are those of `read_options`. Returns the figures that --json prints (DESIGN: README,
    "Output"); Ctrl-C ends the answer, and keeps what was said, as finish_reason interrupt."""
    ids, text, reason = [], "", "length"
    detokenize, stop = tokenizer.stream(), stop_at(options["stop"])
    with hold_interrupt() as interrupted:
        start = time.perf_counter()
        logits = prefill(model, cache, prompt_ids)
        if logits.is_cuda:
            torch.cuda.synchronize()
        prefilled = first = last = time.perf_counter()
        for token_id in decode(model, cache, logits, options["max_new_tokens"],
                               options["ignore_eos"], **options["sampling"]):
            last = time.perf_counter()
            first = first if ids else last
            ids.append(token_id)
            piece, stopped = stop(detokenize(token_id))
            text += piece
            show(piece)
            if stopped or interrupted:
                reason = "stop" if stopped else "interrupt"
                break
    if reason != "stop":
        for rest in (detokenize(None), ""):
            piece, stopped = stop(rest)
            text += piece
            show(piece)
        if ids[-1] in model.config.eos_ids and not options["ignore_eos"]:
            reason = "eos"
    seen = int(cache.length)
    return dict(
        prompt_tokens=len(prompt_ids), new_tokens=len(ids), text=text, token_ids=ids,
        ttft_s=first - start, prefill_tok_s=len(prompt_ids) / (prefilled - start),
        decode_tok_s=(len(ids) - 1) / (last - first) if len(ids) > 1 else None,
        compile_s=options["compile_s"], evicted=max(0, seen - cache.n_sink - cache.window),
        finish_reason=reason, seed=options["seed"], weight_bytes=weight_bytes(model),
        cache_bytes=cache.nbytes())


@contextlib.contextmanager
def hold_interrupt():
    """Collect Ctrl-C instead of raising it: half a step would leave the cache's length and its
    slots apart. A second one is raised as usual."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def weight_bytes(model: Transformer) -> int:
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


# ------------------------------------------------------------------------------ command line


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""

    def read(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            above = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{above}")
        return value

    read.__name__ = kind.__name__
    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every program takes."""
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR",
        help="our folder or a Hugging Face one; default: the embedded one")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N")
    add("--compile", action="store_true", help="compile the model for this machine first")
    add("--temperature", type=number(float, 0), default=0.8, metavar="T", help="0 is greedy")
    add("--top-k", type=number(int, 1), metavar="K")
    add("--top-p", type=number(float, 0, 1), default=0.95, metavar="P")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="default: random, reported")
    add("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens never evicted; default 4")
    add("--window", type=number(int, 1), metavar="W",
        help="latest tokens seen; default: what the sinks leave of the trained context")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--json", action="store_true", help="one JSON object a generation on stdout")


@contextlib.contextmanager
def user_errors(parser: argparse.ArgumentParser):
    """End the program with one line and status 2 for what the user gave."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        sys.exit(2)


def check_text(flag: str, text: str) -> str:
    """The text of an argument. Raises ValueError when it is empty or not UTF-8."""
    if not text:
        raise ValueError(f"{flag} is empty; give it some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} is not UTF-8 text") from None
    return text


def prepare(args, n_sink: int | None = None) -> tuple[Transformer, Tokenizer]:
    for stop in args.stop:
        check_text("--stop", stop)
    say(f"loading {args.checkpoint}")
    return load(args.checkpoint, args.device, DTYPES.get(args.dtype), compile=args.compile)


def read_options(args, model: Transformer, cache: KVCache) -> dict:
    """How to answer, from the command line; compiles what is needed."""
    seed = secrets.randbits(32) if args.seed is None else args.seed
    generator = torch.Generator(cache.length.device).manual_seed(seed)
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                    generator=generator)
    compile_s = 0.0
    if args.compile:
        say("compiling")
        compile_s = warm(model, cache, **{**sampling, "generator": None})
    return dict(max_new_tokens=args.max_new_tokens, ignore_eos=args.ignore_eos, stop=args.stop,
                sampling=sampling, seed=seed, compile_s=compile_s)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show_text(piece: str) -> None:
    print(piece, end="", flush=True)


def figures(record: dict) -> str:
    """A record of `answer` for people."""
    speed = f"{record['decode_tok_s']:.1f}" if record["decode_tok_s"] else "-"
    return (f"{record['prompt_tokens']} prompt + {record['new_tokens']} new tokens "
            f"({record['finish_reason']}), first after {record['ttft_s']:.3f} s, "
            f"decode {speed} tok/s, evicted {record['evicted']}, "
            f"cache {record['cache_bytes'] / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT")
    add_arguments(parser)
    args = parser.parse_args()
    with user_errors(parser):
        prompt = check_text("--prompt", args.prompt)
        model, tokenizer = prepare(args)
        cache = make_cache(model, 4 if args.sink is None else args.sink, args.window)
        options = read_options(args, model, cache)
        prompt_ids = tokenizer.encode(prompt)
    if args.json:
        record = answer(model, cache, tokenizer, prompt_ids, options, lambda piece: None)
        print(json.dumps(record))
    else:
        say(prompt)
        record = answer(model, cache, tokenizer, prompt_ids, options, show_text)
        print()
    say(f"{figures(record)}, compiled in {record['compile_s']:.1f} s, seed {record['seed']}")


if __name__ == "__main__":
    main()
