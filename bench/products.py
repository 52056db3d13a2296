"""How long each product of linear.TABLE takes on this machine, and the rows that would be fastest.

A machine whose instructions the table does not know runs what the table has for others: for each
kind of weight every layout and every function of it are timed, on a large and on a small matrix.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch

import linear
from bench.models import random_model
from load import pack
from model import ModelConfig
from terminal import say

# Kind of weight: dtype of x, and the quantization.
KINDS = {"bf16": (torch.bfloat16, None), "fp16": (torch.float16, None),
         "fp32": (torch.float32, None), "int8": (torch.bfloat16, {"mode": "int8"}),
         "grouped_int8": (torch.bfloat16, {"mode": "int8", "group_size": 32}),
         "int4": (torch.bfloat16, {"mode": "int4", "group_size": 32})}
SIZES = {"large": (8192, 2048), "small": (1536, 576)}  # (N, K)
TOKENS = (1, 6, 12, 128)  # one of each of the table's columns
CALLS = 9  # timed calls a figure

# What makes a machine with more instructions run as one with AVX2, where a process starts with it.
EMULATED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2", "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3"}


def emulate() -> None:
    """Start this command anew without AVX-512, unless it runs so. Its graphs get a cache of their
    own. Raises ValueError where PyTorch compiles for the machine at hand only."""
    if all(os.environ.get(name) == value for name, value in EMULATED.items()):
        return
    if not hasattr(torch._inductor.config.cpp, "march"):
        raise ValueError(f"--emulate needs a newer PyTorch than {torch.__version__}")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/inductor"))
    environment = {**os.environ, **EMULATED, "TORCHINDUCTOR_CACHE_DIR": f"{cache}-avx2"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def layer_of(kind: str, size: str, processor: str, compiled: bool) -> torch.nn.Module:
    """A layer of this kind and size, laid out as on this processor."""
    (N, K), (dtype, quantization) = SIZES[size], KINDS[kind]
    config = ModelConfig(dim=K, n_layers=1, n_heads=K // 64, n_kv_heads=1, head_dim=64,
                         ffn_dim=N // 2, vocab_size=64, max_seq_len=64)
    with mock.patch.dict(os.environ, GPT_STREAM_CPU=processor):
        model = random_model(config, torch.device("cpu"), dtype, quantization)
        pack(model, compiled)
    return model.layers[0].feed_forward.gate_up


@torch.no_grad()
def milliseconds(layer: torch.nn.Module, tokens: int, processor: str, graph: bool) -> float:
    """Of the product that the table has for this processor, the median."""
    x = torch.randn(1, tokens, layer.in_features, dtype=layer.dtype)
    with mock.patch.dict(os.environ, GPT_STREAM_CPU=processor):
        torch._dynamo.reset()
        call = torch.compile(layer.forward, dynamic=False, fullgraph=True) if graph else layer
        times = []
        for _ in range(CALLS + 2):  # the first ones compile and warm caches
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def measure(kind: str, size: str) -> Iterator[tuple[str, int, str, float]]:
    """(layout, column, function, ms) for everything that the table has for this kind on a CPU."""
    done = set()
    for processor in linear.CPUS.split():
        for compiled in (False, True):
            layer = layer_of(kind, size, processor, compiled)
            layer.in_features, layer.dtype = SIZES[size][1], KINDS[kind][0]
            for column, function in enumerate(linear.ROW[kind, processor, layer.layout][1]):
                key = layer.layout, column, function.__name__
                if key not in done:
                    done.add(key)
                    yield *key, milliseconds(layer, TOKENS[column % 4], processor, column < 4)


def bench_products(args) -> None:
    """Print every time, and for each kind the row that is fastest here."""
    say(f"{linear.cpu_kind()}{', emulated' if args.emulate else ''}, "
        f"{torch.get_num_threads()} threads, ms")
    for kind in args.products or KINDS:
        for size in SIZES:
            fastest: dict[str, list] = {}  # by layout, for each column (ms, function)
            for layout, column, name, ms in measure(kind, size):
                mode = "graph" if column < 4 else "eager"
                print(f"{kind:12} {size:6} {TOKENS[column % 4]:4} tokens  {mode}  {layout:8} "
                      f"{name:20} {ms:9.3f}", flush=True)
                row = fastest.setdefault(layout, [(float("inf"), "")] * 8)
                row[column] = min(row[column], (ms, name))
            for layout, row in fastest.items():
                names = ", ".join(name for _, name in row)
                print(f'("{kind}", "{linear.cpu_kind()}", {layout}, {size}): ({names}),')
