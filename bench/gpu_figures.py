"""The figures of gpu.py's table. Each function runs in a process with one model alone.

The window is full unless a figure says otherwise. What is timed is the decode loop that users get:
it queues a step before it reads the token of the step before, so that the host works while the GPU
does. A step timed by itself would not show that.
"""

from __future__ import annotations

import datetime
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.clocks import compile_all, forget_peak, peak_bytes, rounds, seconds, step
from bench.models import open_model, random_model, shape_config
from bench.steps import bytes_a_step, prefill_anew, seconds_a_token
from bench.turns import bench_turns
from cli import EMBEDDED
from draw import RowSampler, copy_to_host, sample
from formats.config import config_from_hf
from formats.folder import write_checkpoint
from generate import decode, make_cache, warm, weight_bytes
from kv_cache import KVCache
from load import compile_model, load
from model import ModelConfig, Transformer
from quantize import stored_shapes
from sample import Sampling
from speculate import Speculation

COPIED, SQUARE, REPEATS = 1 << 32, 8192, 8  # bytes of a copy; a matmul's side; runs a measurement
TOKENS, PROMPTS, ROWS = 200, (128, 2048), (8, 32, 64)
SAMPLING = Sampling(0.8, top_p=0.95, seed=1)  # the programs' default


# ------------------------------------------------------------------------------ limits


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_limits(device: torch.device) -> Callable[[], tuple[float, float]]:
    """A function that measures (GB/s that a copy reads and writes, TFLOP/s of a bf16 matmul). The
    matmul is of random numbers, since one of zeros takes less power and runs faster."""
    buffers = [torch.zeros(COPIED // 4, device=device) for _ in range(2)]
    square = torch.randn(SQUARE, SQUARE, device=device).bfloat16()

    def rate(work: float, run: Callable) -> float:
        run()
        wait(device)
        return REPEATS * work / seconds(lambda: ([run() for _ in range(REPEATS)], wait(device)))

    return lambda: (rate(2 * COPIED / 1e9, lambda: buffers[1].copy_(buffers[0])),
                    rate(2 * SQUARE ** 3 / 1e12, lambda: square @ square))


def spread(values) -> list[float]:
    return [min(values), max(values)]


def device_facts(device: torch.device) -> dict:
    facts = dict(device=str(device), torch=torch.__version__,
                 date=datetime.date.today().isoformat())
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        facts.update(device=torch.cuda.get_device_name(device), driver=driver,
                     cuda=torch.version.cuda, memory_GB=torch.cuda.mem_get_info(device)[1] / 1e9)
    return facts


# ------------------------------------------------------------------------------ decode and prefill


def open_compiled(args) -> tuple[Transformer, KVCache, float]:
    """A model whose decode step is compiled, its cache, and the seconds that compiling took."""
    model = open_model(args)
    cache = make_cache(model, args.sink, args.window)
    return model, cache, seconds(compile_decode, model, cache)


def compile_decode(model: Transformer, cache: KVCache) -> None:
    """Compile the step and run it three times: a CUDA graph is compiled, recorded, replayed."""
    compile_model(model)
    for _ in range(3):
        step(model, cache)


def decode_seconds(model: Transformer, cache: KVCache, position: int,
                   draw: Callable = sample) -> float:
    """Seconds of TOKENS tokens from a position on, after a few that are not timed."""
    cache.length.fill_(position)
    token = torch.zeros(1, 1, dtype=torch.int64, device=cache.length.device)
    stream = decode(model, cache, token, TOKENS + 4, stop_ids=(), draw=draw)
    for _ in range(4):
        next(stream)
    return seconds(lambda: (list(stream), wait(cache.length.device)))


def decode_figures(args) -> Iterator[dict]:
    model, cache, compile_s = open_compiled(args)
    full, device = cache.n_sink + cache.window, cache.length.device
    times, far, sampled, copies, products = ([] for _ in range(5))
    row = RowSampler(1, model.config.vocab_size, device)
    row.begin(0, SAMPLING, [])
    limits = make_limits(device)
    for _ in rounds(args.rounds):
        for measured, figure in zip((copies, products), limits()):
            measured.append(figure)
        times.append(decode_seconds(model, cache, full))
        far.append(decode_seconds(model, cache, 10 * full))
        sampled.append(decode_seconds(model, cache, full, row.sample))
    read = bytes_a_step(model, cache)
    yield dict(
        decode_tok_s=TOKENS / statistics.median(times),
        decode_spread=[TOKENS / t for t in spread(times)[::-1]], step_GB=read / 1e9,
        copy_GB_s=statistics.median(copies), share_of_copy=statistics.median(
            read * TOKENS / t / 1e9 / limit for t, limit in zip(times, copies)),
        after_10_windows=statistics.median(a / b for a, b in zip(times, far)),
        sampled_tok_s=TOKENS / statistics.median(sampled), weight_GB=weight_bytes(model) / 1e9,
        cache_GB=cache.nbytes() / 1e9, window=cache.window)
    del limits  # and its buffers, before the memory is counted
    forget_peak(device)
    compile_s, rate = compile_s + warm(model, cache), statistics.median(products)
    out = dict(compile_cold_s=compile_s, matmul_TFLOP_s=rate)
    for length in PROMPTS:
        took = statistics.median(seconds(prefill_anew, model, cache, length)
                                 for _ in rounds(args.rounds))
        out[f"prefill_{length}_tok_s"] = length / took
        out[f"prefill_{length}_share"] = length * flops_a_token(model.config) / took / rate / 1e12
    yield dict(out, peak_GB=peak_bytes(device) / 1e9)


def flops_a_token(config: ModelConfig) -> int:
    """Floating-point operations of a prompt's token in the layers' weights. The output projection
    does not count: a prefill computes it for one token only."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    return 2 * config.n_layers * config.dim * (attention + 3 * config.ffn_dim)


def warm_figures(args) -> Iterator[dict]:
    """Seconds to compile every graph from the compile cache that another process left."""
    model = open_model(args)
    yield dict(compile_warm_s=compile_all(model, make_cache(model, args.sink, args.window)))


def our_tokens(args) -> Callable[[], float]:
    model, cache, _ = open_compiled(args)
    return lambda: decode_seconds(model, cache, cache.n_sink + cache.window)


def turns_figures(args) -> Iterator[dict]:
    args.peer, args.limit = "streaming", args.limit or 20
    yield bench_turns(args, open_model(args))


# ------------------------------------------------------------------------------ rows, draft, files


def batch_figures(args) -> Iterator[dict]:
    model, one, _ = open_compiled(args)
    full = one.n_sink + one.window
    alone = TOKENS / decode_seconds(model, one, full)
    for n_rows in ROWS:
        cache = make_cache(model, args.sink, args.window, n_rows)
        compile_s = seconds(batch_steps, model, cache, 3)
        cache.length.fill_(full)
        took = statistics.median(seconds(batch_steps, model, cache, TOKENS // 4)
                                 for _ in rounds(args.rounds))
        tok_s = n_rows * (TOKENS // 4) / took
        yield dict(rows=n_rows, tok_s=tok_s, over_one_row=tok_s / alone, compile_s=compile_s,
                   cache_GB=cache.nbytes() / 1e9)
        del cache  # before the next one is made


@torch.no_grad()
def batch_steps(model: Transformer, cache: KVCache, n: int) -> None:
    """n steps as streams.generate_batch does them: each is queued before the last one's tokens are
    read."""
    tokens = torch.zeros_like(cache.length)[:, None]
    for _ in range(n):
        read = copy_to_host(tokens)
        tokens = sample(model(tokens, cache))
        read()
    tokens.tolist()


def draft_figures(args) -> Iterator[dict]:
    """Speculation with a draft that is always right, and with one that never is. A model whose last
    norm is zero says token 0 whatever it reads, as fast as any other model."""
    model, cache, _ = open_compiled(args)
    shape = {**shape_config("160m"), "vocab_size": model.config.vocab_size}
    draft = random_model(config_from_hf(shape), cache.length.device, model.norm.weight.dtype)
    compile_model(draft)
    its, size = make_cache(draft, args.sink, args.window), args.speculate or 5
    model.norm.weight.zero_()
    for right, fixed in ((True, size), (False, None)):
        draft.norm.weight.fill_(0 if right else 1)
        warm(model, cache, Speculation(draft, its, fixed))
        times = []
        for _ in rounds(args.rounds):
            plain = seconds_a_token(model, cache)
            its.reset()
            speculation = Speculation(draft, its, fixed)
            times.append((plain, seconds_a_token(model, cache, speculation)))
        yield dict(draft="always right" if right else "never right", proposals=fixed or "adaptive",
                   accepted=speculation.accepted, proposed=speculation.proposed,
                   tok_s=1 / statistics.median(b for _, b in times),
                   over_plain=statistics.median(a / b for a, b in times))


def load_figures(args, folder: str) -> Iterator[dict]:
    """Seconds to load a folder that was just written, so its files are still in memory."""
    model = open_model(args)
    device, size = model.norm.weight.device, weight_bytes(model)
    if shutil.disk_usage(folder).free < 1.1 * size:
        raise ValueError(f"{folder}: no room for a checkpoint of {size / 1e9:.0f} GB")
    checkpoint, names = Path(folder) / args.shape, list(stored_shapes(model))
    stored = model.state_dict()
    raw = {**shape_config(args.shape), "gpt_stream": {"format": 1}}
    write_checkpoint(checkpoint, EMBEDDED, raw,
                     ((name, stored[name].cpu()) for name in names), len(names))
    del model, stored
    for quantize in (None, "int8", "int4"):
        took = seconds(lambda q: (load(checkpoint, str(device), quantize=q), wait(device)),
                       quantize)
        yield dict(quantize=quantize, load_s=took, checkpoint_GB=size / 1e9)
    shutil.rmtree(checkpoint)
