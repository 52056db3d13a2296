"""Speed and memory against the machine's measured limits, and against peers, in one run.

    python bench.py --shape 1.1b [--peer transformers]           steps: decode and prefill
    python bench.py --shape 1.1b --window 508 --turns mt_bench.jsonl [--peer streaming]
    python bench.py --shape 1.1b --streams 64 [--batch 8] [--peer transformers]

Reading every weight once a token, a step can take no less than bytes / bandwidth. Shared machines
drift, so whatever is compared is measured in turns, round after round; what is printed of steps is
the median of the rounds, and a ratio is the median of each round's own. The two others say the
turns of a file as one endless conversation, and generate from many prompts by continuous batching.
A --shape has random weights, made on the device: speed does not depend on their values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import peers
from batch import Batch, generate_batch
from chat import from_file
from cli import make_parser, number, read_prompts, say, user_errors
from convert_hf import DTYPES
from generate import generate, load, make_cache, prefill, warm, weight_bytes
from kv_cache import KVCache
from load import check_device, compile_step, finish
from model import ModelConfig, Transformer
from quantize import empty_model, quantization_of
from speculate import Speculation
from tokenizer import Tokenizer

SHAPES = {  # dim, layers, heads, KV heads, ffn, vocabulary, context, tied
    "135m": (576, 30, 9, 3, 1536, 49152, 8192, True),  # SmolLM2
    "1.1b": (2048, 22, 32, 4, 5632, 32000, 2048, False),  # TinyLlama
    "7b": (4096, 32, 32, 32, 11008, 32000, 4096, False),  # Llama 2
    "8b": (4096, 32, 32, 8, 14336, 128256, 131072, False),  # Llama 3.1
}
STEPS, ROUNDS = 16, 9  # decode steps a round; rounds a figure


def shape_config(shape: str) -> dict:
    dim, layers, heads, kv_heads, ffn, vocab, context, tied = SHAPES[shape]
    return dict(architectures=["LlamaForCausalLM"], hidden_size=dim, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
                vocab_size=vocab, max_position_embeddings=context, tie_word_embeddings=tied)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype,
                 quantization: dict | None = None) -> Transformer:
    """As load makes it, with random weights."""
    model = empty_model(config, quantization)
    weights = {}
    for name, stored in model.state_dict().items():
        if stored.dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if stored.dtype == torch.int8 else (0, 256)
            weights[name] = torch.randint(low, high, stored.shape, device=device,
                                          dtype=stored.dtype)
        elif name.endswith(".scale"):
            weights[name] = torch.full(stored.shape, 3e-4, device=device)
        else:
            weights[name] = torch.empty(stored.shape, dtype=dtype, device=device)
            weights[name].fill_(1) if stored.ndim == 1 else weights[name].normal_(std=0.02)
        if config.tied_embeddings and name.startswith("output."):
            weights[name] = weights[name.replace("output", "embed")]
    finish(model, weights, device)
    return model


def open_model(args) -> Transformer:
    """The model, not yet compiled."""
    dtype = DTYPES.get(args.dtype)
    if not args.shape:
        return load(args.checkpoint, args.device, dtype, args.quantize,
                    group_size=args.group_size)[0]
    return random_model(ModelConfig.from_hf(shape_config(args.shape)), check_device(args.device),
                        dtype or torch.bfloat16,
                        quantization_of({}, args.quantize, args.group_size, args.shape))


def peer_settings(args) -> tuple:
    """What peers.py makes a model of: settings, dtype, device."""
    config = shape_config(args.shape) if args.shape else None
    return config, DTYPES[args.dtype or "bf16"], check_device(args.device)


def compile_all(model: Transformer, *caches: KVCache) -> float:
    """Compile and run every graph once; seconds."""
    def run():
        compile_step(model, model.norm.weight.device)
        for cache in caches:
            warm(model, cache) if cache.batch_size == 1 else step(model, cache)
    return seconds(run)


def sizes(cache: KVCache) -> dict:
    return dict(sink=cache.n_sink, window=cache.window, batch=cache.batch_size)


# ------------------------------------------------------------------------------ clocks


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_step(run: Callable[[], object]) -> float:
    return statistics.median(seconds(run) for _ in range(STEPS))


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had, since `forget_peak` where that works."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss begins with the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """What loading and compiling took would hide how much memory running takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def apart(make: Callable[..., Callable], *args) -> Iterator[Callable]:
    """The function that make(*args) returns, in a process of its own, to be called from here. It
    is ready, and the process at rest, when the block begins."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, make, args))
    process.start()
    there.close()  # only the process has it now, so its end is seen here

    def answer():
        try:
            result = here.recv()
        except (EOFError, ConnectionError):
            raise ValueError("a process was lost, see above") from None
        if isinstance(result, Exception):
            raise result
        return result

    try:
        answer()
        yield lambda *given: here.send(given) or answer()
    finally:
        here.close()
        process.join()


def serve(pipe, make: Callable[..., Callable], args: tuple) -> None:
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):  # nobody asks any more
        try:
            function = make(*args)
            pipe.send(None)
            while True:
                pipe.send(function(*pipe.recv()))
        except (ValueError, torch.OutOfMemoryError) as error:
            pipe.send(error)


def beside(args, make: Callable[..., Callable], *peer_args):
    """The peer, if one is asked for, apart: the memory that it takes is then only its own, and
    importing transformers does not make ours compile again (it registers pytree nodes, which
    every graph has a guard on)."""
    if not args.peer:
        return contextlib.nullcontext()
    say(f"preparing {args.peer}")
    return apart(make, *peer_args)


# ------------------------------------------------------------------------------ steps


@torch.no_grad()
def step(model: Transformer, cache: KVCache) -> None:
    """One token for every row, greedy and read by the host, as in the decode loop."""
    logits = model(torch.zeros_like(cache.length)[:, None], cache)
    logits.argmax(-1).tolist()


def decode_at(model: Transformer, cache: KVCache, position: int) -> float:
    cache.length.fill_(position)
    return median_step(lambda: step(model, cache))


def prefill_anew(model: Transformer, cache: KVCache, length: int) -> None:
    cache.reset()
    prefill(model, cache, [7] * length)[0, 0, 0].item()


@torch.no_grad()
def recompute(model: Transformer, cache: KVCache) -> None:
    """A token when the whole window is computed anew for it, with no cache at all."""
    tokens = torch.full((1, cache.n_sink + cache.window), 7, device=cache.length.device)
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    model(tokens, last=last)[0, 0].argmax().item()


def bandwidth(buffers: list[torch.Tensor]) -> float:
    """GB/s: reading on a CPU, the best of three; reading and writing a copy on a GPU."""
    def run():
        if buffers[0].is_cuda:
            buffers[1].copy_(buffers[0])
            torch.cuda.synchronize()
        else:
            buffers[0].sum()
    return sum(b.nbytes for b in buffers) / min(seconds(run) for _ in range(3)) / 1e9


def matmul_rate(a: torch.Tensor) -> float:
    """TFLOP/s of a square matmul in the model's dtype."""
    return 2 * len(a) ** 3 / seconds(lambda: (a @ a)[0, 0].item()) / 1e12


def speculators(model: Transformer, cache: KVCache, size: int) -> dict[str, Callable[[], float]]:
    """Seconds a token of three generations: plain; with a draft that always agrees; and, as many
    proposals as pay, with one that never does. The model's layers after the second are silenced,
    so that those two alone say what it says."""
    two = dataclasses.replace(model.config, n_layers=2)
    for block in model.layers[2:]:
        block.attention_norm.weight.zero_()
        block.ffn_norm.weight.zero_()
    drafts = [random_model(two, cache.length.device, model.norm.weight.dtype) for _ in range(2)]
    agreeing, contrary = drafts
    agreeing.embed, agreeing.norm, agreeing.output = model.embed, model.norm, model.output
    agreeing.layers = model.layers[:2]
    contrary.output.weight.neg_()
    its = make_cache(contrary, cache.n_sink, cache.window)
    for draft, fixed in ((agreeing, size), (contrary, None)):
        compile_step(draft, cache.length.device)
        warm(model, cache, Speculation(draft, its, fixed))

    def speculating(draft, fixed):
        its.reset()
        return seconds_a_token(model, cache, Speculation(draft, its, fixed))

    return {"plain": lambda: seconds_a_token(model, cache),
            "agreeing": lambda: speculating(agreeing, size),
            "contrary": lambda: speculating(contrary, None)}


def seconds_a_token(model: Transformer, cache: KVCache, speculation=None, length=120) -> float:
    """Of a greedy generation, after its first token."""
    cache.reset()
    stream = generate(model, cache, [7] * 32, length + 1, speculation=speculation)
    next(stream)
    return seconds(lambda: list(stream)) / length


def measure(args, model: Transformer, cache: KVCache) -> dict[str, list[float]]:
    """Run everything in turns; {name: the rounds' values}, seconds but for the two limits."""
    device, size = cache.length.device, cache.n_sink + cache.window
    buffers = [torch.zeros(1 << 28, device=device) for _ in range(2 if cache.length.is_cuda else 1)]
    square = torch.ones(2048, 2048, device=device, dtype=model.norm.weight.dtype)
    runs = {"decode": lambda: decode_at(model, cache, size),
            "decode_10_windows": lambda: decode_at(model, cache, 10 * size)}
    if args.recompute:
        recompute(model, cache)  # compiles it
        runs["recompute"] = lambda: seconds(lambda: recompute(model, cache))
    if cache.batch_size == 1:
        runs["prefill_128"] = lambda: seconds(lambda: prefill_anew(model, cache, 128))
        if size >= 256:
            runs["prefill_2048"] = lambda: seconds(lambda: prefill_anew(model, cache, 2048))
    for name, compiled in (("eager", False), ("compiled", True)) if args.peer else ():
        say(f"preparing transformers {name}")
        their_prefill, their_step = peers.prefill_and_step(*peer_settings(args), compiled)
        runs[f"transformers_{name}_decode"] = functools.partial(median_step, their_step)
        if not compiled:
            runs["transformers_prefill_128"] = functools.partial(seconds, their_prefill)
    if args.speculate:
        say("preparing drafts")
        runs.update(speculators(model, cache, args.speculate))
    rounds = {name: [] for name in ("bandwidth", "matmul", *runs)}
    for n in range(ROUNDS):
        say(f"round {n + 1} of {ROUNDS}")
        for name, run in runs.items():
            before = bandwidth(buffers)
            rounds[name].append(run())
            if name == "decode":
                rounds["bandwidth"].append(max(before, bandwidth(buffers)))
        rounds["matmul"].append(matmul_rate(square))
    return rounds


def report(model: Transformer, cache: KVCache, rounds: dict[str, list[float]]) -> dict:
    """The figures: medians, and ratios round by round."""
    middle = {name: statistics.median(values) for name, values in rounds.items()}

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rounds[name], rounds[other]))

    B, weights = cache.batch_size, weight_bytes(model)
    table = 0 if model.config.tied_embeddings else model.embed.weight.nbytes
    read = weights - table + cache.nbytes()  # of the embedding table a step reads one row
    shares = [read / t / 1e9 / limit for t, limit in zip(rounds["decode"], rounds["bandwidth"])]
    out = dict(
        decode_tok_s=B / middle["decode"], decode_GB_s=read / middle["decode"] / 1e9,
        decode_tok_s_spread=[B / max(rounds["decode"]), B / min(rounds["decode"])],
        bandwidth_GB_s=middle["bandwidth"], share_of_bandwidth=statistics.median(shares),
        matmul_TFLOP_s=middle["matmul"], weight_bytes=weights, cache_bytes=cache.nbytes(),
        decode_after_10_windows=ratio("decode_10_windows", "decode"))
    if "recompute" in rounds:
        out["recompute_tok_s"] = 1 / middle["recompute"]
        out["over_recompute"] = ratio("recompute", "decode")
    if "plain" in rounds:
        for name in ("agreeing", "contrary"):
            out[f"speculation_{name}_over_plain"] = ratio("plain", name)
    for length in (128, 2048):
        if f"prefill_{length}" in rounds:
            out[f"prefill_{length}_tok_s"] = length / middle[f"prefill_{length}"]
    if "prefill_128" in rounds:
        out["ttft_128_s"] = middle["prefill_128"] + middle["decode"]
    for name in rounds:
        if name.startswith("transformers"):
            ours, tokens = ("prefill_128", 128) if "prefill" in name else ("decode", 1)
            out[name + "_tok_s"] = tokens / middle[name]
            out["over_" + name] = ratio(name, ours)
    return out


def compiling(args) -> Callable[[], float]:
    model = open_model(args)
    cache = make_cache(model, args.sink, args.window, args.batch)
    return lambda: compile_all(model, cache)


def bench_steps(args, model: Transformer) -> dict:
    cache = make_cache(model, args.sink, args.window, args.batch)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        say("compiling from nothing, in another process")
        with apart(compiling, args) as compile_there:
            cold = compile_there()
        say("compiling again, from the compile cache")
        compile_warm_s = compile_all(model, cache)
        peak = peak_bytes(cache.length.device)
        figures = report(model, cache, measure(args, model, cache))
    return dict(**sizes(cache), compile_cold_s=cold, compile_warm_s=compile_warm_s,
                peak_bytes=peak, **figures)


# ------------------------------------------------------------------------------ turns


def turn_prompts(args) -> list[list[int]]:
    """The ids that each turn of a conversation adds, the same whatever the answers were."""
    tokenizer = Tokenizer(args.checkpoint)  # with a shape, the embedded one
    turns = from_file(read_prompts(args.turns), args.limit or 20)
    return [tokenizer.encode(text, bos=n == 0) if raw
            else tokenizer.next_turn(text) if n else tokenizer.first_turn(text)
            for n, (text, raw) in enumerate(turns)]


def timed_turn(stream: Iterator[int], device: torch.device) -> dict:
    """Listen to an answer."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in stream]
    return dict(new_tokens=len(times), ttft_s=times[0], seconds=times[-1],
                peak_bytes=peak_bytes(device))


def streaming_talker(args, n_sink: int, window: int) -> Callable[[list[int]], dict]:
    """The peer in a conversation."""
    config, dtype, device = peer_settings(args)
    model = peers.streaming_model(config, dtype, device)

    def say_turn(past: list, prompt_ids: list[int], max_new_tokens: int) -> dict:
        stream = peers.streaming_turn(model, past, prompt_ids, max_new_tokens, n_sink, window)
        record = timed_turn(stream, device)
        return dict(record, cache_bytes=sum(k.nbytes + v.nbytes for k, v in past))

    say_turn(peers.streaming_past(model), [7] * 32, 3)  # the first steps of a process are slow
    past = peers.streaming_past(model)
    forget_peak(device)
    return lambda prompt_ids: say_turn(past, prompt_ids, args.max_new_tokens)


def conversation(records: list[dict]) -> dict:
    """The figures of all turns: decoding is what comes after each first token."""
    waits = sorted(r["ttft_s"] for r in records)
    total, tokens = sum(r["seconds"] for r in records), sum(r["new_tokens"] for r in records)
    out = dict(tok_s=tokens / total, decode_tok_s=(tokens - len(records)) / (total - sum(waits)),
               ttft_p50_s=statistics.median(waits),
               ttft_p99_s=waits[math.ceil(0.99 * len(waits)) - 1])
    for name in ("cache_bytes", "peak_bytes"):
        out.update({f"{name}_first_turn": records[0][name], f"{name}_last_turn": records[-1][name]})
    return out


def bench_turns(args, model: Transformer) -> dict:
    prompts, cache = turn_prompts(args), make_cache(model, args.sink, args.window)
    say("compiling")
    compile_s = compile_all(model, cache)

    def our_turn(prompt_ids: list[int]) -> dict:
        stream = generate(model, cache, prompt_ids, args.max_new_tokens, ignore_eos=True)
        return dict(timed_turn(stream, cache.length.device), cache_bytes=cache.nbytes())

    with beside(args, streaming_talker, args, cache.n_sink, cache.window) as peer:
        talkers = {"": our_turn, **({"streaming_": peer} if peer else {})}
        records = {name: [] for name in talkers}
        forget_peak(cache.length.device)
        for n, prompt_ids in enumerate(prompts):
            for name, talker in talkers.items():
                records[name].append(talker(prompt_ids))
            speeds = (f"{r[-1]['new_tokens'] / r[-1]['seconds']:.1f}" for r in records.values())
            say(f"turn {n + 1} of {len(prompts)}: {' and '.join(speeds)} tok/s")
    out = dict(**sizes(cache), compile_s=compile_s, turns=len(prompts),
               prompt_tokens=sum(map(len, prompts)), new_tokens=len(prompts) * args.max_new_tokens)
    for name in talkers:
        out.update({name + figure: v for figure, v in conversation(records[name]).items()})
    for figure in ("tok_s", "decode_tok_s") if args.peer else ():
        out[f"{figure}_over_streaming"] = out[figure] / out[f"streaming_{figure}"]
    return out


# ------------------------------------------------------------------------------ streams


def synthetic(n: int, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 10 to 400 tokens, and how many new ones each of them wants, 10 to 200."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(vocab_size) for _ in range(numbers.randint(10, 400))]
               for _ in range(n)]
    return prompts, [numbers.randint(10, 200) for _ in range(n)]


def listen(events: Iterator[tuple[int, int | None]], n: int) -> None:
    """Take what generate_batch yields until n more streams have ended."""
    for _, token_id in events:
        n -= token_id is None
        if not n:
            return


def bench_streams(args, model: Transformer) -> dict:
    prompts, wanted = synthetic(args.streams, model.config.vocab_size)
    batch = Batch(model, args.batch, args.sink, args.window)
    say("compiling")
    compile_s = compile_all(model, batch.staging, batch.cache)
    list(generate_batch(model, [[0]], max_new_tokens=3, ignore_eos=True, batch=batch))
    batch.steps = batch.busy = 0
    events = generate_batch(model, prompts, max_new_tokens=wanted, ignore_eos=True, batch=batch)
    ours, theirs = [], []
    with beside(args, peers.static_batches, *peer_settings(args)) as peer:
        for first in range(0, len(prompts), args.batch):  # in turns: as many end here as there
            some = slice(first, first + args.batch)
            ours.append(seconds(lambda: listen(events, len(prompts[some]))))
            if peer:
                theirs.append(seconds(lambda: peer(prompts[some], max(wanted[some]))))
            say(f"{len(prompts[:some.stop])} of {len(prompts)} streams")
    size, rounds = batch.cache.n_sink + batch.cache.window, []
    for n in range(ROUNDS):
        say(f"round {n + 1} of {ROUNDS}")
        rounds.append([decode_at(model, cache, size) for cache in (batch.staging, batch.cache)])
    out = dict(**sizes(batch.cache), compile_s=compile_s, streams=len(prompts),
               prompt_tokens=sum(map(len, prompts)), new_tokens=sum(wanted),
               tok_s=sum(wanted) / sum(ours), steps=batch.steps,
               rows_busy=batch.busy / (batch.steps * args.batch),
               single_step_s=statistics.median(one for one, _ in rounds),
               batch_step_s=statistics.median(many for _, many in rounds),
               batch_over_single=statistics.median(args.batch * a / b for a, b in rounds))
    if theirs:
        out["transformers_static_tok_s"] = sum(wanted) / sum(theirs)
        out["over_transformers_static"] = sum(theirs) / sum(ours)
    return out


# ------------------------------------------------------------------------------ command line


def check(args) -> None:
    """Refuse flags that do not go together."""
    steps, rows = not (args.turns or args.streams), args.batch or 1
    for given, together, rule in (
            (args.turns, not args.streams, "--turns and --streams exclude each other"),
            (args.limit, args.turns, "--limit goes with --turns"),
            (args.max_new_tokens, args.turns, "--max-new-tokens goes with --turns"),
            (args.turns, rows == 1, "--turns goes with one row"),
            (args.speculate, steps and args.shape and rows == 1 and not args.quantize,
             "--speculate goes with --shape, one row and no --quantize"),
            (args.recompute, steps and rows == 1, "--recompute goes with one row"),
            (args.peer, args.shape and (args.streams or rows == 1),
             "--peer goes with --shape and one row, or with --shape and --streams"),
            (args.peer == "streaming", args.turns, "--peer streaming goes with --turns"),
            (args.peer == "transformers", not args.turns,
             "--peer transformers does not go with --turns; --peer streaming does")):
        if given and not together:
            raise ValueError(rule)
    args.batch = args.batch or (8 if args.streams else 1)
    args.max_new_tokens = args.max_new_tokens or 128


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--sink", type=number(int, 0), metavar="S", help="default 4")
    add("--shape", choices=SHAPES, help="random weights instead of a checkpoint")
    add("--batch", type=number(int, 1), metavar="B", help="default 1, with --streams 8")
    add("--peer", choices=["transformers", "streaming"], help="time it too, in turns with ours")
    add("--recompute", action="store_true", help="time the sliding window with recomputation too")
    add("--speculate", type=number(int, 1), metavar="K",
        help="time speculation at its best (K proposals, all accepted) and worst")
    add("--turns", metavar="FILE", help="time an endless conversation of a prompts file's turns")
    add("--limit", type=number(int, 1), metavar="N", help="first N turns only; default 20")
    add("--max-new-tokens", type=number(int, 2), metavar="M", help="tokens a turn; default 128")
    add("--streams", type=number(int, 1), metavar="N",
        help="time continuous batching of N synthetic prompts")
    args = parser.parse_args()
    with user_errors(parser):
        check(args)
        start = time.perf_counter()
        model = open_model(args)
        load_s = time.perf_counter() - start
        bench = bench_turns if args.turns else bench_streams if args.streams else bench_steps
        figures = bench(args, model)
    weight = model.norm.weight
    figures = dict(model=args.shape or str(args.checkpoint), device=str(weight.device),
                   torch=torch.__version__, threads=torch.get_num_threads(),
                   dtype=str(weight.dtype), quantize=args.quantize,
                   load_s=None if args.shape else load_s, **figures)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
