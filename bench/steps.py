"""Single steps: decode and prefill against the machine's limits and beside a peer."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable

import torch

from bench import peers
from bench.apart import apart
from bench.clocks import compile_all, decode_at, median_step, peak_bytes, rounds, seconds
from bench.models import open_model, peer_settings, random_model, sizes
from generate import generate, make_cache, prefill, warm, weight_bytes
from kv_cache import KVCache
from load import compile_model
from model import Transformer
from speculate import Speculation
from terminal import say


def prefill_anew(model: Transformer, cache: KVCache, length: int) -> None:
    cache.reset()
    prefill(model, cache, [7] * length)[0, 0, 0].item()


@torch.no_grad()
def recompute(model: Transformer, cache: KVCache) -> None:
    """Decode a token by computing the whole window anew, without a cache."""
    tokens = torch.full((1, cache.n_sink + cache.window), 7, device=cache.length.device)
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    model(tokens, last=last)[0, 0].argmax().item()


def bandwidth(buffers: list[torch.Tensor]) -> float:
    """GB/s, the best of three: of reading on a CPU, of reading and writing a copy on a GPU."""
    def move_once():
        if buffers[0].is_cuda:
            buffers[1].copy_(buffers[0])
            torch.cuda.synchronize(buffers[0].device)
        else:
            buffers[0].sum()
    return sum(b.nbytes for b in buffers) / min(seconds(move_once) for _ in range(3)) / 1e9


def matmul_rate(a: torch.Tensor) -> float:
    """TFLOP/s of a square matmul in the model's dtype."""
    return 2 * len(a) ** 3 / seconds(lambda: (a @ a)[0, 0].item()) / 1e12


def speculators(model: Transformer, cache: KVCache, size: int) -> dict[str, Callable[[], float]]:
    """Seconds a token of three generations: plain; with a draft that always agrees and a fixed
    number of proposals; and with a draft that never agrees and as many proposals as pay. The
    model's layers after its second are silenced, so that its first two layers are the draft that
    always agrees."""
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
        compile_model(draft)
        warm(model, cache, Speculation(draft, its, fixed))

    def speculating(draft, fixed):
        its.reset()
        return seconds_a_token(model, cache, Speculation(draft, its, fixed))

    return {"plain": lambda: seconds_a_token(model, cache),
            "agreeing": lambda: speculating(agreeing, size),
            "contrary": lambda: speculating(contrary, None)}


def seconds_a_token(model: Transformer, cache: KVCache, speculation=None, length=120) -> float:
    """Seconds a token of a greedy generation, after its first."""
    cache.reset()
    stream = generate(model, cache, [7] * 32, length + 1, speculation=speculation)
    next(stream)
    return seconds(lambda: list(stream)) / length


def measure(args, model: Transformer, cache: KVCache) -> dict[str, list[float]]:
    """Run everything in turns -> {name: a value a round}, in seconds, but for the two limits."""
    device, size = cache.length.device, cache.n_sink + cache.window
    buffers = [torch.zeros(1 << 28, device=device) for _ in range(2 if cache.length.is_cuda else 1)]
    square = torch.ones(2048, 2048, device=device, dtype=model.norm.weight.dtype)
    runs = {"decode": lambda: decode_at(model, cache, size),
            "decode_10_windows": lambda: decode_at(model, cache, 10 * size)}
    if args.recompute:
        recompute(model, cache)  # compiles it
        runs["recompute"] = functools.partial(seconds, recompute, model, cache)
    if cache.batch_size == 1:
        runs["prefill_128"] = functools.partial(seconds, prefill_anew, model, cache, 128)
        if size >= 256:
            runs["prefill_2048"] = functools.partial(seconds, prefill_anew, model, cache, 2048)
    for name, compiled in (("eager", False), ("compiled", True)) if args.peer else ():
        say(f"preparing transformers {name}")
        their_prefill, their_step = peers.prefill_and_step(*peer_settings(args), compiled)
        runs[f"transformers_{name}_decode"] = functools.partial(median_step, their_step)
        if not compiled:
            runs["transformers_prefill_128"] = functools.partial(seconds, their_prefill)
    if args.speculate:
        say("preparing drafts")
        runs.update(speculators(model, cache, args.speculate))
    values = {name: [] for name in ("bandwidth", "matmul", *runs)}
    for _ in rounds():
        for name, run in runs.items():
            before = bandwidth(buffers)
            values[name].append(run())
            if name == "decode":
                values["bandwidth"].append(max(before, bandwidth(buffers)))
        values["matmul"].append(matmul_rate(square))
    return values


def bytes_a_step(model: Transformer, cache: KVCache) -> int:
    """The bytes that a step has to read. An embedding table of its own counts nothing, since only
    a row of it is read."""
    shared = model.config.tied_embeddings and not getattr(model.output, "packed", False)
    table = 0 if shared else model.embed.weight.nbytes
    return weight_bytes(model) - table + cache.nbytes()


def report(model: Transformer, cache: KVCache, values: dict[str, list[float]]) -> dict:
    """The figures: medians, and ratios round by round."""
    middle = {name: statistics.median(measured) for name, measured in values.items()}

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(values[name], values[other]))

    B, weights, read = cache.batch_size, weight_bytes(model), bytes_a_step(model, cache)
    shares = [read / t / 1e9 / limit for t, limit in zip(values["decode"], values["bandwidth"])]
    out = dict(
        decode_tok_s=B / middle["decode"], decode_GB_s=read / middle["decode"] / 1e9,
        decode_tok_s_spread=[B / max(values["decode"]), B / min(values["decode"])],
        bandwidth_GB_s=middle["bandwidth"], share_of_bandwidth=statistics.median(shares),
        matmul_TFLOP_s=middle["matmul"], weight_bytes=weights, cache_bytes=cache.nbytes(),
        decode_after_10_windows=ratio("decode_10_windows", "decode"))
    if "recompute" in values:
        out["recompute_tok_s"] = 1 / middle["recompute"]
        out["over_recompute"] = ratio("recompute", "decode")
    if "plain" in values:
        for name in ("agreeing", "contrary"):
            out[f"speculation_{name}_over_plain"] = ratio("plain", name)
    for length in (128, 2048):
        if f"prefill_{length}" in values:
            out[f"prefill_{length}_tok_s"] = length / middle[f"prefill_{length}"]
    if "prefill_128" in values:
        out["ttft_128_s"] = middle["prefill_128"] + middle["decode"]
    for name in values:
        if name.startswith("transformers"):
            ours, tokens = ("prefill_128", 128) if "prefill" in name else ("decode", 1)
            out[name + "_tok_s"] = tokens / middle[name]
            out["over_" + name] = ratio(name, ours)
    return out


def compiling(args) -> Callable[[], float]:
    """A function that compiles a model of its own, for a process of its own; seconds."""
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
