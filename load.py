"""From a checkpoint's name to a model that runs: find, read, merge adapters, slice, quantize,
place, compile."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tp
from convert_hf import DTYPES, hf_parts, open_file, read_config, stack
from hub import ADAPTER, find, find_adapter
from kv_cache import KVCache
from linear import (
    PACKED_BYTES,
    Int4Linear,
    Linear,
    at_most,
    check_types,
    most_threads,
)
from model import OBJECT, ModelConfig, Transformer, check_keys, rope_frequencies
from published import open_weights, read_quantization
from quantize import empty_model, quantization_of, store, stored_shapes
from tokenizer import Tokenizer, read_json

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


def load_arguments(args) -> dict:
    """What `load` takes of a command line, but for the checkpoint's name."""
    return dict(device=args.device, dtype=DTYPES.get(args.dtype), quantize=args.quantize,
                group_size=args.group_size, adapters=args.adapter)


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


# ------------------------------------------------------------------------------ adapters


# Settings of peft's under which a weight is not W + s B A, or not the layers' alone.
NOT_PLAIN = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save",
             "trainable_token_indices", "target_parameters", "layer_replication",
             "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
             "monteclora_config")
# A LoRA adapter (Hu et al., 2021): A (r, K), B (N, r) and s, by Hugging Face's name of the weight.
Lora = dict[str, tuple[Tensor, Tensor, float]]


def read_adapter(folder: Path, config: ModelConfig) -> Lora:
    """A LoRA adapter as peft saves it. Raises ValueError naming the setting or the tensor that is
    not supported, or is not of this model."""
    settings, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    check_settings(folder / "adapter_config.json", settings)
    tensors = open_file(path)
    layers, shapes = {}, stored_shapes(empty_model(config))
    for name in tensors:
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
        if not found:
            raise ValueError(f"{path}: tensor {name} is not supported: an adapter may have lora_A "
                             "and lora_B of linear layers")
        layers.setdefault(found[1], name.removesuffix("A.weight").removesuffix("B.weight"))
    sizes = {part: (rows, shapes[name][-1]) for name, parts in hf_parts(config).items()
             for part, rows in parts.items() if len(shapes[name]) == 2 and name != "embed.weight"}
    adapter = {}
    for layer, stem in layers.items():
        if layer + ".weight" not in sizes:
            raise ValueError(f"{path}: tensor {stem}A.weight is of another model: this one has no "
                             f"linear layer {layer}")
        N, K = sizes[layer + ".weight"]
        r, s = rank_and_scale(folder / "adapter_config.json", settings, layer)
        for kind, shape in (("A", (r, K)), ("B", (N, r))):
            tensor = tensors.get(f"{stem}{kind}.weight")
            if tensor is None:
                raise ValueError(f"{path}: tensor {stem}{kind}.weight is missing")
            if tuple(tensor.shape) != shape or not tensor.isfinite().all():
                raise ValueError(f"{path}: tensor {stem}{kind}.weight has shape "
                                 f"{tuple(tensor.shape)} or values that are not finite; of this "
                                 f"model and the adapter's rank it is {shape}")
        adapter[layer + ".weight"] = (tensors[stem + "A.weight"], tensors[stem + "B.weight"], s)
    if not adapter:
        raise ValueError(f"{path}: no tensors in it")
    return adapter


def check_settings(path: Path, settings: dict) -> None:
    for file in ADAPTER:
        if not (path.parent / file).exists():
            raise ValueError(f"{path.parent}: no {file}, which a LoRA adapter has")
    try:
        check_keys(settings, {"r": (int, 1, 2**20), "lora_alpha": (float, -1e9, 1e9),
                              **dict.fromkeys(("rank_pattern", "alpha_pattern"), OBJECT)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    odd = [key for key in NOT_PLAIN if settings.get(key)]
    if settings.get("peft_type") != "LORA":
        odd = ["peft_type"]
    elif settings.get("bias", "none") != "none":
        odd = ["bias"]
    elif settings.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
        odd = ["init_lora_weights"]  # PiSSA and others change the base model's weights, too
    if odd:
        raise ValueError(f"{path}: {odd[0]} {settings.get(odd[0])!r} is not supported; plain LoRA "
                         "is, of linear layers")


def rank_and_scale(path: Path, settings: dict, layer: str) -> tuple[int, float]:
    """r and s of a layer: alpha / r or, with rslora, alpha / sqrt(r) (Kalajdzievski, 2023). Keys of
    rank_pattern and alpha_pattern are ends of a layer's name, as regular expressions."""
    def of(patterns, default):
        return next((value for key, value in (settings.get(patterns) or {}).items()
                     if re.match(rf"(.*\.)?({key})$", layer)), default)
    try:
        r = of("rank_pattern", settings.get("r", 8))
        alpha = of("alpha_pattern", settings.get("lora_alpha", 8))
        return r, alpha / (r ** 0.5 if settings.get("use_rslora") else r)
    except (re.error, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: no rank or scale for {layer}: {error}") from None


def merge(blocks: list[Tensor], parts: dict[str, int], adapters: list[Lora],
          dtype: torch.dtype | None) -> list[Tensor]:
    """The blocks of rows of one of our tensors, those that an adapter names merged: computed in
    float32, and returned in dtype, or if it is None in their own. parts are the blocks' names."""
    if not any(part in adapter for part in parts for adapter in adapters):
        return blocks
    if len(blocks) != len(parts):  # one of our folders, where they are stacked
        blocks = blocks[0].split(list(parts.values()))
    merged = []
    for part, block in zip(parts, blocks):
        weight = block.float()
        for A, B, s in [adapter[part] for adapter in adapters if part in adapter]:
            weight = weight + s * (B.float() @ A.float())
        merged.append(weight.to(dtype or block.dtype))
    return merged


def digest(adapter: Lora) -> str:
    """A hash of an adapter's tensors: not every one changes the first rows that `fingerprint` sees.
    """
    known = hashlib.sha256()
    for name, (A, B, s) in sorted(adapter.items()):
        known.update(f"{name} {s}".encode())
        for tensor in (A, B):
            known.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
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
