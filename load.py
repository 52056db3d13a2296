"""From a checkpoint's name to a model that runs: find, read, merge adapters, shard, quantize,
lay out, compile."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tp
from formats.adapters import Lora, adapter_hash, merge_adapters, read_adapter
from formats.checkpoint import (
    Checkpoint,
    check_not_ours_quantized,
    stack,
    stored_tensors,
    untied,
)
from formats.config import (
    FLOATS,
    Layer,
    hf_parts,
    layer_name,
    model_layers,
    suggested_sampling,
)
from formats.folder import in_dtype, open_checkpoint
from formats.hub import find, find_adapter
from kv_cache import KVCache
from layers import GroupedInt8Linear, Int4Linear, Int8Linear, Linear, check_types
from linear import ROWS, WORDS
from model import ModelConfig, Transformer, all_frequencies
from quantize import asked_quantization, empty_model, kind_of_tensor, store
from threads import at_most, most_threads
from tokenizer import Tokenizer

log = logging.getLogger("gpt_stream")
# Whether compiling for a GPU searches for the fastest blocks, which takes most of its time.
TUNE = os.environ.get("GPT_STREAM_TUNE", "1") != "0"
# What linear.lane_sums sums over a row is one long expression. With its default limits inductor
# would write that to memory first, and then sum it.
CPU_OPTIONS = {"realize_acc_reads_threshold": 32, "realize_opcount_threshold": 120}


def load(checkpoint: str | Path, device: str | None = None, dtype: torch.dtype | None = None,
         quantize: str | None = None, compile: bool = False, group_size: int = 32,
         parallel: bool = True, compile_prefill: bool = False,
         adapters: Sequence[str | Path] = ()) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint, by its name (formats/hub.py).

    device None is the GPU if there is one. dtype None is the checkpoint's own. quantize is "int8",
    "int4" (in groups of group_size) or None. Under torchrun each process takes its shard of the
    model (tp.py), or with parallel=False all of it. LoRA adapters, by their names, are merged in.
    On a CPU, unquantized weights in the checkpoint's dtype stay memory-mapped unless `pack` lays
    them out anew. Raises ValueError naming what is wrong."""
    if compile_prefill and not compile:
        raise ValueError("--compile-prefill goes with --compile")
    device = check_device(tp.join(device))
    folder, quantize = find(checkpoint, quantize, group_size)
    adapter_folders = [find_adapter(name) for name in adapters]
    with tp.raise_on_all_ranks():
        source, asked = open_checkpoint(folder), asked_quantization(quantize, group_size)
        if asked:
            check_not_ours_quantized(source)
        if adapters and source.quantization:
            raise ValueError(f"{folder}: is stored quantized; an adapter needs the original, which "
                             "--quantize quantizes after merging")
        lora = [read_adapter(path, source) for path in adapter_folders]
        if source.config.tied_embeddings and any("lm_head.weight" in one for one in lora):
            source = untied(source)  # LoRA of the output projection leaves the embedding as it is
        tokenizer = Tokenizer(folder)
        suggested = suggested_sampling(folder / "generation_config.json")
        model = build_model(source, asked, lora, dtype, device, tp.n_ranks() if parallel else 1)
        model.suggested = suggested
        if compile:
            compile_model(model, compile_prefill)
        elif device.type == "cpu":
            pack(model, compile=False)
    return model, tokenizer


def build_model(source: Checkpoint, asked: dict | None, lora: list[Lora], dtype: torch.dtype | None,
                device: torch.device, n: int) -> Transformer:
    """A checkpoint's model on its device, or this rank's shard of n. asked is the quantization
    asked for; None keeps the stored one."""
    config, quantization = source.config, asked or source.quantization
    group = (quantization or {}).get("group_size")
    model = empty_model(config if n == 1 else tp.shard_config(config, n, group), quantization)
    weights = read_weights(source, asked, lora, dtype, n, device)
    dtype = dtype or default_dtype(weights, source.raw)
    check_int4(weights, dtype, device)
    for name, tensor in weights.items():
        weights[name] = in_dtype(name, tensor, dtype)
    share_tied(weights, config, n)
    settings = changed_settings(config), dtype, quantization, *map(adapter_hash, lora)
    model.fingerprint = fingerprint(settings, weights)
    finish(model, weights, device)
    return model


def read_weights(source: Checkpoint, asked: dict | None, lora: list[Lora],
                 dtype: torch.dtype | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's shard, of n, of every stored tensor. Adapters are merged in first, then weights
    are quantized as asked for."""
    config, weights = source.config, {}
    layers, parts = model_layers(config), hf_parts(config)
    for name, blocks in stored_tensors(source, asked):
        if lora:
            blocks = merge_adapters(blocks, parts[name], lora, torch.float32 if asked else dtype)
        kind = kind_of_tensor(name, layers, asked) if blocks[0].is_floating_point() else None
        layer = layers.get(layer_name(name, layers))
        weights.update(store_shard(name, layer, blocks, config, kind, n, device))
    return weights


def store_shard(name: str, layer: Layer | None, blocks: list[Tensor], config: ModelConfig,
                kind: dict | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's shard, of n, of one tensor, quantized to this kind if there is one."""
    if n == 1:
        return store(name, stack(blocks).to(device), kind)
    if kind and layer.sharded == "inputs":  # a row's scale needs the whole row
        parts = store(name, stack(blocks).to(device), kind)
        return {part: tp.shard(part, layer, [tensor], config, n) for part, tensor in parts.items()}
    return store(name, tp.shard(name, layer, blocks, config, n).to(device), kind)


def share_tied(weights: dict[str, Tensor], config: ModelConfig, n: int) -> None:
    """Give each tied layer this rank's shard of the weight that it shares."""
    for name, layer in model_layers(config).items():
        if layer.tied_to is None:
            continue
        for part in [part for part in weights if part.startswith(layer.tied_to + ".")]:
            own = name + part.removeprefix(layer.tied_to)
            whole = weights[part]
            weights[own] = whole if n == 1 else tp.shard(own, layer, [whole], config, n)


def check_int4(weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError if the device has no int4 kernel for this dtype."""
    if device.type == "cuda" and has_int4(weights) and dtype != torch.bfloat16:
        raise ValueError(f"int4 on a GPU computes in bf16, not {dtype}; give --dtype bf16")


def has_int4(weights: dict[str, Tensor]) -> bool:
    return any(name.endswith(".weight") and tensor.dtype == torch.uint8
               for name, tensor in weights.items())


def default_dtype(weights: dict[str, Tensor], raw: dict) -> torch.dtype:
    """The dtype that a model computes in unless one is given. As in transformers 5 it is the one
    that config.json (raw) names, as dtype or under the older name torch_dtype; else that of the
    embedding, or of the final norm if the embedding is quantized. float64 becomes float32. For
    int4 fp16 becomes bf16, the only one that a GPU's kernel has."""
    embed = weights["embed.weight"]
    dtype = (embed if embed.is_floating_point() else weights["norm.weight"]).dtype
    named = raw.get("dtype") or raw.get("torch_dtype")
    dtype = {str(known).removeprefix("torch."): known for known in FLOATS}.get(str(named), dtype)
    if dtype == torch.float16 and has_int4(weights):
        log.info("the checkpoint is in fp16; int4 computes in bf16 (--dtype says otherwise)")
        return torch.bfloat16
    if dtype == torch.float64:
        log.info("the checkpoint is in float64; this computes in fp32")
        return torch.float32
    return dtype


def changed_settings(config: ModelConfig) -> dict:
    """The fields of a config that differ from their defaults. With these alone, a new field does
    not change the fingerprints of models that do not use it."""
    return {field.name: value for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default}


def fingerprint(settings: tuple, weights: dict[str, Tensor]) -> str:
    """A hash that tells models apart, fine-tunes too: sha256 of the settings and of the first row
    of every weight, since reading all of a memory-mapped file would be slow. Scales are left out
    because a GPU and a CPU may round their last bit differently when they quantize."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(weights.items()):
        if not name.endswith(".scale"):
            row = tensor.reshape(-1, tensor.shape[-1])[0].contiguous().cpu()
            digest.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------ ready to run


def finish(model: Transformer, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty model its weights and make it ready to run."""
    check_types(model, weights)
    model.load_state_dict(weights, assign=True)
    model.tie()
    model.frequencies = all_frequencies(model.config, device)
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, Int4Linear) and device.type == "cuda":
            module.pack(model.norm.weight.dtype)


def pack(model: Transformer, compile: bool) -> None:
    """Lay weights out as a CPU reads them fastest, in a model that is about to be compiled or in an
    eager one (linear.TABLE)."""
    for module in model.modules():
        if isinstance(module, Linear | Int8Linear):
            module.unpack()
    model.tie()
    # glibc returns a large block to the system when it is freed, and the next one has new pages,
    # which the system zeroes first. "Large" means larger than any block freed before, up to 32 MB:
    # after this one it keeps the memory of the steps' tensors.
    torch.empty(31 << 20, dtype=torch.uint8)
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(compile, shared=module.weight is model.embed.weight)
        elif isinstance(module, Int4Linear):
            module.pack(model.norm.weight.dtype, compile)
        elif isinstance(module, Int8Linear | GroupedInt8Linear):
            module.pack(compile)


def weight_bytes(model: Transformer) -> int:
    """The bytes of this process's weights. A tied layer's weight counts once, unless it is laid out
    anew."""
    layers = model_layers(model.config)
    in_place = ROWS, WORDS
    tied = [name for name, layer in layers.items() if layer.tied_to
            and getattr(model.get_submodule(name), "layout", ROWS) in in_place]
    return sum(tensor.nbytes for name, tensor in model.state_dict(keep_vars=True).items()
               if layer_name(name, layers) not in tied)


def check_device(name: str | None) -> torch.device:
    """The device of this name; None is the GPU if there is one. Raises ValueError naming one that
    is unknown or missing."""
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
    if device.type == "cuda" and device.index is None:  # the current one
        return torch.device("cuda", torch.cuda.current_device())
    return device


def compile_model(model: Transformer, prefill: bool = False) -> None:
    """Run the model's steps as graphs from here on: CUDA graphs on a GPU, C++ on a CPU.

    With `prefill`, so are the chunks of a prompt, which are calls with `last`. A graph is compiled
    when it is first needed (generate.warm). Layers must not be replaced afterwards, since a graph
    does not check whether they are the same. Raises ValueError without a C++ compiler."""
    on_gpu = model.norm.weight.is_cuda
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not on_gpu and not shutil.which(compiler):
        raise ValueError(f"compiling for a CPU needs a C++ compiler, and {compiler!r} was not "
                         "found; install it, or name another in the environment variable CXX")
    if not on_gpu:
        pack(model, compile=True)
    model.compiled = CompiledStep(on_gpu, prefill)


class CompiledStep:
    """Transformer.step of one model, as one graph for each kind of call."""

    def __init__(self, on_gpu: bool, prefill: bool):
        self.on_gpu, self.prefill = on_gpu, prefill
        # By kind of call: the graph, and the number of threads that it was compiled for. It may run
        # on fewer, but not on more.
        self.graphs: dict[tuple, tuple[Callable, int]] = {}

    def __call__(self, model: Transformer, tokens: Tensor, cache: KVCache | None,
                 in_use: list[Tensor] | None, last: Tensor | None) -> Tensor:
        if last is not None and not self.prefill:
            return model.step(tokens, cache, in_use, last)
        kind = (tokens.shape, last is None,
                cache and (cache.batch_size, cache.n_sink, cache.window, cache.max_chunk))
        if kind in self.graphs:
            return self.run(kind, model, tokens, cache, in_use, last)
        if self.on_gpu and cache is not None:
            cache.check_static()
        options = gpu_options(model, *tokens.shape) if self.on_gpu else CPU_OPTIONS
        self.graphs[kind] = compile_graph(options), most_threads()
        torch.set_num_threads(self.graphs[kind][1])
        start = time.perf_counter()
        logits = self.run(kind, model, tokens, cache, in_use, last)
        log.info("graph %d compiled in %.0f s", len(self.graphs), time.perf_counter() - start)
        return logits

    def run(self, kind: tuple, model: Transformer, tokens: Tensor, cache: KVCache | None,
            in_use: list[Tensor] | None, last: Tensor | None) -> Tensor:
        graph, n_threads = self.graphs[kind]
        if self.on_gpu:  # the next replay of a CUDA graph overwrites its output
            return graph(model, tokens, cache, in_use, last).clone()
        for slots in in_use or ():  # one graph for any number of slots
            torch._dynamo.decorators.mark_unbacked(slots, 0)
        with at_most(n_threads):
            return graph(model, tokens, cache, in_use, last)


def gpu_options(model: Transformer, n_rows: int, n_tokens: int) -> dict[str, bool]:
    """How inductor compiles a step of n_tokens in each of n_rows for a GPU.

    One token's products are inductor's own sums, and it searches for the fastest sizes of their
    blocks. The products of several are cuBLAS', but for int8 weights: of those a library would need
    a copy in the model's dtype at every step. So inductor writes these, too, and they read the
    weights as they are stored. Not so where a row reads several tokens: attention has products
    then, too, and inductor (2.13) makes a kernel of these that does not compile."""
    int8 = any(isinstance(module, Int8Linear | GroupedInt8Linear) for module in model.modules())
    one = n_rows == n_tokens == 1
    return {"triton.cudagraphs": True, "coordinate_descent_tuning": one and TUNE,
            "triton.native_matmul": int8 and n_rows > 1 and n_tokens == 1}


def compile_graph(options: dict[str, bool]) -> Callable:
    """Transformer.step, to be compiled at its first call. Dynamo stores graphs by code object, and
    their guards do not tell models apart (needed_guards). So each graph gets a code object of its
    own, and no two models ever share a graph."""
    step = Transformer.step
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={
        "guard_filter_fn": needed_guards, **options,
        # These checks of shapes run in Python before every kernel and slow small steps down.
        "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False})


def needed_guards(guards: list) -> list[bool]:
    """Which of dynamo's guards to keep. A graph checks them before every step, so those of what
    never changes are dropped: the weights', the table of products', and the number of threads,
    which CompiledStep looks after."""
    kept = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [keep and guard.guard_type != "GLOBAL_STATE" and "__import_linear" not in guard.name
            for keep, guard in zip(kept, guards, strict=True)]
