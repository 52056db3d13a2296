"""From a checkpoint's name to a model that runs: find, read, merge adapters, slice, quantize,
place, compile."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tp
from formats.adapters import digest, merge, read_adapter
from formats.config import hf_parts
from formats.folder import read_config, stack
from formats.hub import find, find_adapter
from formats.published import open_weights, read_quantization
from kv_cache import KVCache
from linear import PACKED_BYTES, Int4Linear, Linear, check_types
from model import ModelConfig, Transformer, rope_frequencies
from quantize import empty_model, quantization_of, store
from threads import at_most, most_threads
from tokenizer import Tokenizer

log = logging.getLogger("gpt_stream")


def load(checkpoint: str | Path, device: str | None = None, dtype: torch.dtype | None = None,
         quantize: str | None = None, compile: bool = False, group_size: int = 32,
         parallel: bool = True, compile_prefill: bool = False,
         adapters: Sequence[str | Path] = ()) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint, by its name (hub.py).

    device None is the GPU if there is one; dtype None is the checkpoint's own; quantize is "int8",
    "int4" (in groups of group_size) or None. Under torchrun each process takes its slice of the
    model (tp.py), or if not parallel, the whole. LoRA adapters, by their names, are merged into it.
    On a CPU, unquantized weights in the checkpoint's dtype stay memory-mapped, but for those that
    are laid out anew (pack). Raises ValueError naming what is wrong."""
    if compile_prefill and not compile:
        raise ValueError("--compile-prefill goes with --compile")
    device = check_device(tp.join(device))
    folder, quantize = find(checkpoint, quantize, group_size)
    adapter_folders = [find_adapter(name) for name in adapters]
    with tp.together():
        raw, config = read_config(folder)
        theirs = None if quantize else read_quantization(folder, raw, config)
        quantization = theirs or quantization_of(raw, quantize, group_size, folder)
        if adapter_folders and (raw.get("quantization_config") or quantization and not quantize):
            raise ValueError(f"{folder}: is stored quantized; an adapter needs the original, which "
                             "--quantize quantizes after merging")
        lora = [read_adapter(at, config) for at in adapter_folders]
        tokenizer = Tokenizer(folder)
        n = tp.n_ranks() if parallel else 1
        local = config if n == 1 else tp.share(config, n, (quantization or {}).get("group_size"))
        model = empty_model(local, quantization)
        parts, weights = hf_parts(config), {}
        for name, blocks in open_weights(folder, raw, config, None if quantize else quantization):
            if lora:
                blocks = merge(blocks, parts[name], lora, torch.float32 if quantize else dtype)
            weights.update(own_parts(name, blocks, config, n, quantization if quantize else None,
                                     device))
        dtype = dtype or default_dtype(weights)
        if device.type == "cuda" and has_int4(weights) and dtype != torch.bfloat16:
            raise ValueError(f"int4 on a GPU computes in bf16, not {dtype}; give --dtype bf16")
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not name.endswith(".scale"):
                weights[name] = tensor.to(dtype)
        if config.tied_embeddings:
            for part in [name for name in weights if name.startswith("embed.")]:
                name = part.replace("embed", "output")
                weights[name] = tp.own_slice(name, [weights[part]], config, n)
        settings = settings_of(config), dtype, quantization, *map(digest, lora)
        model.fingerprint = fingerprint(settings, weights)
        finish(model, weights, device)
        del weights  # compiling lays them out anew
        if compile:
            compile_model(model, compile_prefill)
        elif device.type == "cpu":
            pack(model, compile=False)
    return model, tokenizer


def has_int4(weights: dict[str, Tensor]) -> bool:
    return any(name.endswith(".weight") and tensor.dtype == torch.uint8
               for name, tensor in weights.items())


def default_dtype(weights: dict[str, Tensor]) -> torch.dtype:
    """A file may mix dtypes: the embedding's counts, or if it is quantized, the last norm's. int4
    computes in bf16 rather than fp16: on a GPU there is nothing else."""
    embed = weights["embed.weight"]
    dtype = (embed if embed.is_floating_point() else weights["norm.weight"]).dtype
    if dtype == torch.float16 and has_int4(weights):
        log.info("the checkpoint is in fp16; int4 computes in bf16 (--dtype says otherwise)")
        return torch.bfloat16
    return dtype


def own_parts(name: str, blocks: list[Tensor], config: ModelConfig, n: int, wanted: dict | None,
              device: torch.device) -> dict[str, Tensor]:
    """This rank's part, of n, of a stored tensor: as it is, or quantized as is wanted."""
    if n == 1:
        tensor = stack(blocks).to(device)
        return store(name, tensor, wanted) if wanted else {name: tensor}
    if wanted and tp.is_cut_by_columns(name):  # after quantizing: a row's scale needs the whole row
        parts = store(name, stack(blocks).to(device), wanted)
        return {part: tp.own_slice(part, [tensor], config, n) for part, tensor in parts.items()}
    tensor = tp.own_slice(name, blocks, config, n).to(device)
    return store(name, tensor, wanted) if wanted else {name: tensor}


def settings_of(config: ModelConfig) -> dict:
    """What a config says beyond the defaults: a field that is new changes no other model's
    fingerprint."""
    return {field.name: value for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default}


def fingerprint(settings: tuple, weights: dict[str, Tensor]) -> str:
    """Tells models apart, fine-tunes too: a sha256 over the settings and the first row of every
    weight, which touches little of a memory-mapped file. Scales are left out: where quantizing
    computed them, a GPU rounds the last bit another way than a CPU."""
    known = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(weights.items()):
        if not name.endswith(".scale"):
            row = tensor.reshape(-1, tensor.shape[-1])[0].contiguous().cpu()
            known.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return known.hexdigest()[:16]


# ------------------------------------------------------------------------------ ready to run


def finish(model: Transformer, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty model its weights, ready to run."""
    check_types(model, weights)
    model.load_state_dict(weights, assign=True)
    model.tie()
    model.frequencies = rope_frequencies(model.config, device)
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack(model.norm.weight.dtype)


def pack(model: Transformer, compile: bool) -> None:
    """Lay weights out as a CPU reads them fastest: through its library, or if the model is about to
    be compiled, in rows where a graph's own loop reads them as fast (linear.py)."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.unpack()
    model.tie()
    for module in model.modules():
        if isinstance(module, Linear):
            large = module.weight.nbytes >= PACKED_BYTES
            shared = module.weight is model.embed.weight  # in a graph, one tensor serves both
            if large and not shared if compile else module.weight.dtype == torch.bfloat16:
                module.pack()


def weight_bytes(model: Transformer) -> int:
    """Of this process; a tensor that two modules share counts once."""
    tensors = model.state_dict(keep_vars=True).values()
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def check_device(name: str | None) -> torch.device:
    """The device of this name; None is the GPU if there is one. Raises ValueError naming it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown; it is cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this PyTorch sees "
                         f"{torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and device.index is None:  # the present one
        return torch.device("cuda", torch.cuda.current_device())
    return device


def compile_model(model: Transformer, prefill: bool = False) -> None:
    """Run the model's steps as graphs from now on: CUDA graphs on a GPU, C++ on a CPU. Chunks of a
    prompt, of which the logits of one position are asked for, are two graphs more, compiled if
    `prefill`. Each is compiled when it is first needed (generate.warm). Layers must not be replaced
    afterwards: a graph does not look whether they are the same. Raises ValueError without a C++
    compiler."""
    on_gpu = model.norm.weight.is_cuda
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not on_gpu and not shutil.which(compiler):
        raise ValueError(f"compiling for a CPU needs a C++ compiler, and {compiler!r} was not "
                         "found; install it, or name another in the environment variable CXX")
    if not on_gpu:
        pack(model, compile=True)
    model.compiled = CompiledStep(on_gpu, prefill)


class CompiledStep:
    """Transformer.step of one model as graphs, one for each kind of call."""

    def __init__(self, on_gpu: bool, prefill: bool):
        self.on_gpu, self.prefill = on_gpu, prefill
        # By kind of call: the graph, and on how many threads it may run. A graph is right for as
        # many as it was compiled for, and fewer.
        self.graphs: dict[tuple, tuple[Callable, int]] = {}

    def __call__(self, model: Transformer, tokens: Tensor, cache: KVCache | None,
                 in_use: Tensor | None, last: Tensor | None) -> Tensor:
        if last is not None and not self.prefill:
            return model.step(tokens, cache, in_use, last)
        kind = (tokens.shape, last is None,
                cache and (cache.batch_size, cache.n_sink, cache.window, cache.ring))
        if kind not in self.graphs:
            self.graphs[kind] = compile_graph(self.on_gpu), most_threads()
            torch.set_num_threads(self.graphs[kind][1])
        graph, n_threads = self.graphs[kind]
        if self.on_gpu:  # the next replay of a CUDA graph overwrites what this one returns
            return graph(model, tokens, cache, in_use, last).clone()
        if in_use is not None:  # one graph for any number of slots
            torch._dynamo.decorators.mark_unbacked(in_use, 0)
        with at_most(n_threads):
            return graph(model, tokens, cache, in_use, last)


def compile_graph(on_gpu: bool) -> Callable:
    """Transformer.step, to be compiled at its first call. Dynamo keeps graphs with the code object
    that they were made from, and their guards do not tell models apart (needed_guards): so each
    graph has a copy of it to itself, and no two models ever share one."""
    step = Transformer.step
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={
        "guard_filter_fn": needed_guards,
        "triton.cudagraphs": on_gpu, "coordinate_descent_tuning": on_gpu,
        # The graph's own checks of its kernels' shapes, in Python, take a tenth of a small step.
        "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False})


def needed_guards(guards: list) -> list[bool]:
    """Which of dynamo's guards are kept, which a graph checks before every step: those of what can
    change. Weights do not (their guards take 0.7 ms for 22 layers), and for fewer threads the graph
    is the same (CompiledStep)."""
    return [kept and guard.guard_type != "GLOBAL_STATE" for kept, guard in
            zip(torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards), guards, strict=True)]
