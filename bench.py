"""Speed and memory against the machine's measured limits, and against a peer, in one run.

    python bench.py --shape 1.1b
    python bench.py --shape 1.1b --peer transformers

Reading every weight once a token, a step can take no less than bytes / bandwidth. Shared machines
drift, so the limits and every figure are measured in turns, round after round; what is printed is
the median of the rounds, and the share of the limit is the median of each round's own share.
A --shape has random weights, made on the device: speed does not depend on their values.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from cli import make_parser, number, say, user_errors
from convert_hf import DTYPES
from generate import LARGE_CHUNK, generate, load, make_cache, prefill, warm, weight_bytes
from load import check_device, compile_step, finish
from kv_cache import KVCache
from model import ModelConfig, Transformer
from quantize import empty_model, quantization_of
from speculate import Speculation

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


def open_model(args) -> tuple[Transformer, KVCache, float]:
    """The model, not yet compiled, its cache, and the seconds that loading took."""
    start = time.perf_counter()
    dtype = DTYPES.get(args.dtype)
    if args.shape:
        config = ModelConfig.from_hf(shape_config(args.shape))
        model = random_model(config, check_device(args.device), dtype or torch.bfloat16,
                             quantization_of({}, args.quantize, args.group_size, args.shape))
    else:
        model, _ = load(args.checkpoint, args.device, dtype, args.quantize,
                        group_size=args.group_size)
    seconds = time.perf_counter() - start
    single = make_cache(model, args.sink, args.window)
    if args.batch == 1:
        return model, single, seconds
    weight = model.norm.weight
    return model, KVCache(model.config, args.batch, single.n_sink, single.window, LARGE_CHUNK,
                          weight.dtype, weight.device), seconds


def compile_all(model: Transformer, cache: KVCache) -> float:
    """Compile and run every graph once; seconds."""
    start = time.perf_counter()
    compile_step(model, cache.length.device)
    if cache.batch_size == 1:
        warm(model, cache)
    else:
        step(model, cache)
    return time.perf_counter() - start


def compile_cold(args, results) -> None:
    """In a process of its own, with an empty compile cache."""
    model, cache, _ = open_model(args)
    results.put(compile_all(model, cache))


# ------------------------------------------------------------------------------ what is timed


@torch.no_grad()
def step(model: Transformer, cache: KVCache) -> None:
    """One token for every row, greedy and read by the host, as in the decode loop."""
    logits = model(torch.zeros_like(cache.length)[:, None], cache)
    logits.argmax(-1).tolist()


def median_step(run: Callable[[], None]) -> float:
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def recompute(model: Transformer, cache: KVCache) -> float:
    """Seconds of a token when the whole window is computed anew for it, with no cache at all."""
    tokens = torch.full((1, cache.n_sink + cache.window), 7, device=cache.length.device)
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    start = time.perf_counter()
    model(tokens, last=last)[0, 0].argmax().item()
    return time.perf_counter() - start


def decode_at(model: Transformer, cache: KVCache, position: int) -> float:
    cache.length.fill_(position)
    return median_step(lambda: step(model, cache))


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
    start = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - start) / length


def timed_prefill(model: Transformer, cache: KVCache, length: int) -> float:
    cache.reset()
    start = time.perf_counter()
    prefill(model, cache, [7] * length)[0, 0, 0].item()
    return time.perf_counter() - start


def bandwidth(buffers: list[torch.Tensor]) -> float:
    """GB/s: reading on a CPU, the best of three; reading and writing a copy on a GPU."""
    best, source = 0.0, buffers[0]
    for _ in range(3):
        start = time.perf_counter()
        if source.is_cuda:
            buffers[1].copy_(source)
            torch.cuda.synchronize()
        else:
            source.sum()
        best = max(best, sum(b.nbytes for b in buffers) / (time.perf_counter() - start) / 1e9)
    return best


def matmul_rate(a: torch.Tensor) -> float:
    """TFLOP/s of a square matmul in the model's dtype."""
    start = time.perf_counter()
    (a @ a)[0, 0].item()
    return 2 * len(a) ** 3 / (time.perf_counter() - start) / 1e12


def peer_transformers(args, config: dict, device, compiled: bool) -> tuple[Callable, Callable]:
    """(seconds of a 128-token prefill, seconds of a step) of transformers on the same shape."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--peer needs transformers: pip install transformers") from None
    settings = {k: v for k, v in config.items() if k != "architectures"}
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**settings), dtype=DTYPES[args.dtype or "bf16"]).eval()
    cache = (transformers.StaticCache(config=model.config, max_cache_len=512) if compiled
             else transformers.DynamicCache(config=model.config))
    mode = "reduce-overhead" if device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode) if compiled else model.forward
    state = {"position": 128}

    @torch.no_grad()
    def time_prefill() -> float:
        tokens = torch.full((1, 128), 7, device=device)
        start = time.perf_counter()
        model(tokens, use_cache=True, logits_to_keep=1).logits[0, 0, 0].item()
        return time.perf_counter() - start

    @torch.no_grad()
    def one_step() -> None:
        position = torch.tensor([state["position"]], device=device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        forward(token, past_key_values=cache, use_cache=True, cache_position=position,
                position_ids=position[None]).logits[0, -1].argmax().item()
        state["position"] = 128 + (state["position"] - 127) % 256

    if not compiled:
        with torch.no_grad():
            model(torch.full((1, 128), 7, device=device), past_key_values=cache, use_cache=True)
    for _ in range(3):
        one_step()
    return time_prefill, lambda: median_step(one_step)


# ------------------------------------------------------------------------------ in turns


def measure(args, model: Transformer, cache: KVCache, config: dict | None) -> dict:
    """Run everything in turns; {name: the rounds' values}, seconds but for the two limits."""
    device, single = cache.length.device, cache.batch_size == 1
    buffers = [torch.zeros(1 << 28, device=device) for _ in range(2 if cache.length.is_cuda else 1)]
    square = torch.ones(2048, 2048, device=device, dtype=model.norm.weight.dtype)
    size = cache.n_sink + cache.window
    runs = {"decode": lambda: decode_at(model, cache, size),
            "decode_10_windows": lambda: decode_at(model, cache, 10 * size)}
    if args.recompute:
        recompute(model, cache)  # compiles it
        runs["recompute"] = lambda: recompute(model, cache)
    if single:
        runs["prefill_128"] = lambda: timed_prefill(model, cache, 128)
        if cache.n_sink + cache.window >= 256:
            runs["prefill_2048"] = lambda: timed_prefill(model, cache, 2048)
    if args.peer:
        for name, compiled in (("eager", False), ("compiled", True)):
            say(f"preparing transformers {name}")
            time_prefill, time_step = peer_transformers(args, config, device, compiled)
            runs[f"transformers_{name}_decode"] = time_step
            if not compiled:
                runs["transformers_prefill_128"] = time_prefill
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


def report(model: Transformer, cache: KVCache, rounds: dict) -> dict:
    """The figures: medians, and ratios round by round."""
    def middle(name):
        return statistics.median(rounds[name])

    weights = weight_bytes(model)
    table = 0 if model.config.tied_embeddings else model.embed.weight.nbytes
    read = weights - table + cache.nbytes()  # of the embedding table a step reads one row
    shares = [read / seconds / 1e9 / limit
              for seconds, limit in zip(rounds["decode"], rounds["bandwidth"])]
    out = dict(
        decode_tok_s=cache.batch_size / middle("decode"), decode_GB_s=read / middle("decode") / 1e9,
        decode_tok_s_spread=[cache.batch_size / max(rounds["decode"]),
                             cache.batch_size / min(rounds["decode"])],
        bandwidth_GB_s=middle("bandwidth"), share_of_bandwidth=statistics.median(shares),
        matmul_TFLOP_s=middle("matmul"), weight_bytes=weights, cache_bytes=cache.nbytes())
    out["decode_after_10_windows"] = statistics.median(
        late / early for early, late in zip(rounds["decode"], rounds["decode_10_windows"]))
    if "recompute" in rounds:
        out["recompute_tok_s"] = 1 / middle("recompute")
        out["over_recompute"] = statistics.median(
            slow / fast for fast, slow in zip(rounds["decode"], rounds["recompute"]))
    for name in ("agreeing", "contrary"):
        if name in rounds:
            out[f"speculation_{name}_over_plain"] = statistics.median(
                plain / it for plain, it in zip(rounds["plain"], rounds[name]))
    for length in (128, 2048):
        if f"prefill_{length}" in rounds:
            out[f"prefill_{length}_tok_s"] = length / middle(f"prefill_{length}")
    if "prefill_128" in rounds:
        out["ttft_128_s"] = middle("prefill_128") + middle("decode")
    for name, theirs in rounds.items():
        if name.startswith("transformers"):
            ours = rounds["prefill_128" if "prefill" in name else "decode"]
            out[name + "_tok_s"] = (128 if "prefill" in name else 1) / statistics.median(theirs)
            out["over_" + name] = statistics.median(t / o for t, o in zip(theirs, ours))
    return out


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--sink", type=number(int, 0), metavar="S", help="default 4")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of a checkpoint")
    parser.add_argument("--batch", type=number(int, 1), default=1, metavar="B")
    parser.add_argument("--peer", choices=["transformers"], help="time it too, in turns with ours")
    parser.add_argument("--recompute", action="store_true",
                        help="time the sliding window with recomputation too")
    parser.add_argument("--speculate", type=number(int, 1), metavar="K",
                        help="time speculation at its best (K proposals, all accepted) and worst")
    args = parser.parse_args()
    with user_errors(parser):
        if args.speculate and (not args.shape or args.batch > 1 or args.quantize):
            raise ValueError("--speculate goes with --shape, one row and no --quantize")
        if args.recompute and args.batch > 1:
            raise ValueError("--recompute goes with one row")
        if args.peer and (not args.shape or args.batch > 1):
            raise ValueError("--peer goes with --shape and one row")
        model, cache, load_s = open_model(args)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            say("compiling from nothing, in another process")
            spawn = multiprocessing.get_context("spawn")
            results = spawn.Queue()
            process = spawn.Process(target=compile_cold, args=(args, results))
            process.start()
            process.join()
            if process.exitcode:
                raise ValueError("the compiling process failed, see above")
            cold = results.get()
            say("compiling again, from the compile cache")
            compile_warm_s = compile_all(model, cache)
            peak = (torch.cuda.max_memory_allocated() if cache.length.is_cuda
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            config = shape_config(args.shape) if args.shape else None
            figures = report(model, cache, measure(args, model, cache, config))
    figures = dict(model=args.shape or str(args.checkpoint), device=str(cache.length.device),
                   torch=torch.__version__, threads=torch.get_num_threads(),
                   dtype=str(model.norm.weight.dtype), quantize=args.quantize, sink=cache.n_sink,
                   window=cache.window, batch=args.batch, load_s=None if args.shape else load_s,
                   compile_cold_s=cold, compile_warm_s=compile_warm_s, peak_bytes=peak, **figures)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
