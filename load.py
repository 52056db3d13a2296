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
from formats.adapters import Lora, digest, merge, read_adapter
from formats.checkpoint import Checkpoint, check_not_ours_quantized, stack, stored_tensors
from formats.config import Layer, hf_parts, layer_name, model_layers
from formats.folder import in_dtype, open_checkpoint
from formats.hub import find, find_adapter
from kv_cache import KVCache
from linear import PACKED_BYTES, Int4Linear, Linear, check_types
from model import ModelConfig, Transformer, rope_frequencies
from quantize import asked_quantization, empty_model, kind_of_tensor, store
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
        source, asked = open_checkpoint(folder), asked_quantization(quantize, group_size)
        if asked:
            check_not_ours_quantized(source)
        if adapters and source.quantization:
            raise ValueError(f"{folder}: is stored quantized; an adapter needs the original, which "
                             "--quantize quantizes after merging")
        lora = [read_adapter(at, source.config) for at in adapter_folders]
        tokenizer = Tokenizer(folder)
        model = build(source, asked, lora, dtype, device, tp.n_ranks() if parallel else 1)
        if compile:
            compile_model(model, compile_prefill)
        elif device.type == "cpu":
            pack(model, compile=False)
    return model, tokenizer


def build(source: Checkpoint, asked: dict | None, lora: list[Lora], dtype: torch.dtype | None,
          device: torch.device, n: int) -> Transformer:
    """The model of a checkpoint, or this rank's part of it, of n, on its device. asked is the
    quantization asked for, and None keeps the stored one."""
    config, quantization = source.config, asked or source.quantization
    group = (quantization or {}).get("group_size")
    model = empty_model(config if n == 1 else tp.share(config, n, group), quantization)
    weights = read_weights(source, asked, lora, dtype, n, device)
    dtype = dtype or default_dtype(weights)
    check_int4(weights, dtype, device)
    for name, tensor in weights.items():
        weights[name] = in_dtype(name, tensor, dtype)
    share_tied(weights, config, n)
    settings = settings_of(config), dtype, quantization, *map(digest, lora)
    model.fingerprint = fingerprint(settings, weights)
    finish(model, weights, device)
    return model


def read_weights(source: Checkpoint, asked: dict | None, lora: list[Lora],
                 dtype: torch.dtype | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's part, of n, of every stored tensor: adapters are merged in, and then it is
    quantized as asked for."""
    config, weights = source.config, {}
    layers, parts = model_layers(config), hf_parts(config)
    for name, blocks in stored_tensors(source, asked):
        if lora:
            blocks = merge(blocks, parts[name], lora, torch.float32 if asked else dtype)
        kind = kind_of_tensor(name, layers, asked) if blocks[0].is_floating_point() else None
        layer = layers.get(layer_name(name, layers))
        weights.update(own_part(name, layer, blocks, config, kind, n, device))
    return weights


def own_part(name: str, layer: Layer | None, blocks: list[Tensor], config: ModelConfig,
             kind: dict | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's part, of n, of one tensor, stored as that kind."""
    if n == 1:
        return store(name, stack(blocks).to(device), kind)
    if kind and layer.sharded == "columns":  # a row's scale needs the whole row
        parts = store(name, stack(blocks).to(device), kind)
        return {part: tp.shard(part, layer, [tensor], config, n) for part, tensor in parts.items()}
    return store(name, tp.shard(name, layer, blocks, config, n).to(device), kind)


def share_tied(weights: dict[str, Tensor], config: ModelConfig, n: int) -> None:
    """Give layers that share another's weight this rank's part of it."""
    for name, layer in model_layers(config).items():
        if layer.tied_to is None:
            continue
        for part in [part for part in weights if part.startswith(layer.tied_to + ".")]:
            own = name + part.removeprefix(layer.tied_to)
            whole = weights[part]
            weights[own] = whole if n == 1 else tp.shard(own, layer, [whole], config, n)


def check_int4(weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError where the device has no int4 in this dtype."""
    if device.type == "cuda" and has_int4(weights) and dtype != torch.bfloat16:
        raise ValueError(f"int4 on a GPU computes in bf16, not {dtype}; give --dtype bf16")


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
