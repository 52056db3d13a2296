"""From a checkpoint's name to a model that runs: find, read, slice, quantize, place, compile."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

import tp
from convert_hf import read_config, read_weights, stack
from hub import find
from linear import Int4Linear, Linear
from model import ModelConfig, Transformer, rope_frequencies
from quantize import empty_model, quantization_of, store, stored_shapes
from tokenizer import Tokenizer


def load(checkpoint: str | Path, device: str | None = None, dtype: torch.dtype | None = None,
         quantize: str | None = None, compile: bool = False, group_size: int = 32,
         parallel: bool = True, compile_prefill: bool = False) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint, by its name (hub.py).

    device None is the GPU if there is one; dtype None is the checkpoint's own; quantize is "int8",
    "int4" (in groups of group_size) or None. Under torchrun each process takes its slice of the
    model (tp.py), or if not parallel, the whole. On a CPU, in the checkpoint's dtype, unquantized
    weights stay memory-mapped until they are compiled. Raises ValueError naming what is wrong."""
    device = check_device(tp.start(device))
    folder, quantize = find(checkpoint, quantize, group_size)
    with tp.together():
        raw, config = read_config(folder)
        quantization = quantization_of(raw, quantize, group_size, folder)
        tokenizer = Tokenizer(folder)
        n = tp.n_ranks() if parallel else 1
        local = config if n == 1 else tp.share(config, n, (quantization or {}).get("group_size"))
        model = empty_model(local, quantization)
        # What is quantized here is stored in floating point.
        shapes = stored_shapes(empty_model(config, None if quantize else quantization))
        weights = {}
        for name, blocks in read_weights(folder, raw, config, shapes):
            weights.update(own_parts(name, blocks, config, n, quantization if quantize else None,
                                     device))
        # A file may mix dtypes: the embedding's counts, or if it is quantized, the last norm's.
        dtype = dtype or weights["norm.weight" if quantization else "embed.weight"].dtype
        if (quantization or {}).get("mode") == "int4" and device.type == "cuda" and (
                dtype != torch.bfloat16):
            raise ValueError(f"int4 on a GPU computes in bf16, not {dtype}; give --dtype bf16")
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not name.endswith(".scale"):
                weights[name] = tensor.to(dtype)
        if config.tied_embeddings:
            for part in [name for name in weights if name.startswith("embed.")]:
                name = part.replace("embed", "output")
                weights[name] = tp.own_slice(name, [weights[part]], config, n)
        model.fingerprint = fingerprint(config, dtype, quantization, weights)
        finish(model, weights, device)
        del weights  # compiling lays them out anew
        if compile:
            compile_step(model, device, compile_prefill)
    return model, tokenizer


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


def fingerprint(config: ModelConfig, dtype: torch.dtype, quantization: dict | None,
                weights: dict[str, Tensor]) -> str:
    """Tells models apart, fine-tunes too: a sha256 over the settings and the first row of every
    weight, which touches little of a memory-mapped file. Scales are left out: where quantizing
    computed them, a GPU rounds the last bit another way than a CPU."""
    digest = hashlib.sha256(repr((config, dtype, quantization)).encode())
    for name, tensor in sorted(weights.items()):
        if not name.endswith(".scale"):
            row = tensor.reshape(-1, tensor.shape[-1])[0].contiguous().cpu()
            digest.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def finish(model: Transformer, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty model its weights, ready to run."""
    model.load_state_dict(weights, assign=True)
    if model.config.tied_embeddings and model.config.n_ranks == 1:
        model.output.weight = model.embed.weight
    model.frequencies = rope_frequencies(model.config, device)
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack(model.norm.weight.dtype)


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
    if device.type == "cuda":  # plain "cuda" is the present one, which set_device wants by number
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def compile_step(model: Transformer, device: torch.device, prefill: bool = False) -> None:
    """Compile the model's graph: with CUDA graphs on a GPU, with C++ on a CPU. Chunks of a prompt,
    of which the logits of one position are asked for, are two graphs more, compiled if `prefill`:
    that reads SmolLM2's 128 tokens in 52 ms instead of 66 on two cores."""
    on_gpu = device.type == "cuda"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not on_gpu and not shutil.which(compiler):
        raise ValueError(f"compiling for a CPU needs a C++ compiler, and {compiler!r} was not "
                         "found; install it, or name another in the environment variable CXX")
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of step and cache; 8 if unset
    for module in model.modules():
        # Weights in rows serve the embedding too, and a GPU.
        if isinstance(module, Linear) and not on_gpu and module.weight is not model.embed.weight:
            module.pack()
    # Weights never change, so checking them before every step (0.7 ms for 22 layers) is left out.
    # Graphs are kept with the code they were made from: a copy for each model keeps them apart.
    code = Transformer.step.__code__.replace()
    step = types.MethodType(types.FunctionType(code, Transformer.step.__globals__), model)
    graph = torch.compile(step, fullgraph=True, dynamic=False, options={
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "triton.cudagraphs": on_gpu, "coordinate_descent_tuning": on_gpu})
    eager = model.step

    def run(tokens, cache, in_use, last):
        if last is not None and not prefill:
            return eager(tokens, cache, in_use, last)
        if in_use is not None and not on_gpu:
            torch._dynamo.decorators.mark_unbacked(in_use, 0)  # one graph for any number of slots
        logits = graph(tokens, cache, in_use, last)
        return logits.clone() if on_gpu else logits  # a CUDA graph's next replay overwrites it

    model.step = run
