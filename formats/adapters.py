"""LoRA adapters (Hu et al., 2021) as peft saves them, to be merged into a model's weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from formats.config import OBJECT, check_keys, model_layers
from formats.files import read_json
from formats.folder import open_file
from model import ModelConfig

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
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
    tensors, shapes = open_file(path), linear_shapes(config)
    adapter = {}
    for layer, stem in adapted_layers(path, tensors).items():
        if layer not in shapes:
            raise ValueError(f"{path}: tensor {stem}A.weight is of another model: this one has no "
                             f"linear layer {layer}")
        N, K = shapes[layer]
        r, s = rank_and_scale(folder / "adapter_config.json", settings, layer)
        A = read_factor(path, tensors, f"{stem}A.weight", (r, K))
        B = read_factor(path, tensors, f"{stem}B.weight", (N, r))
        adapter[layer + ".weight"] = A, B, s
    if not adapter:
        raise ValueError(f"{path}: no tensors in it")
    return adapter


def adapted_layers(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Hugging Face's name of each layer that an adapter changes, and its tensors' names up to A or
    B. Raises ValueError naming a tensor that is neither."""
    layers = {}
    for name in tensors:
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
        if not found:
            raise ValueError(f"{path}: tensor {name} is not supported: an adapter may have lora_A "
                             "and lora_B of linear layers")
        layers.setdefault(found[1], name.removesuffix("A.weight").removesuffix("B.weight"))
    return layers


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape (N, K) of every linear layer that has a weight of its own, by Hugging Face's names.
    """
    return {part: (rows, layer.columns) for layer in model_layers(config).values()
            for part, rows in layer.parts.items() if not layer.is_table and layer.tied_to is None}


def read_factor(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple) -> Tensor:
    """An adapter's A or B. Raises ValueError when it is not there or not as it should be."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{path}: tensor {name} is missing")
    if tuple(tensor.shape) != shape or not tensor.isfinite().all():
        raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)} or values that "
                         f"are not finite; of this model and the adapter's rank it is {shape}")
    return tensor


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
    try:
        r = first_match(settings.get("rank_pattern"), layer, settings.get("r", 8))
        alpha = first_match(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8))
        return r, alpha / (r ** 0.5 if settings.get("use_rslora") else r)
    except (re.error, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: no rank or scale for {layer}: {error}") from None


def first_match(patterns: dict | None, layer: str, default: float) -> float:
    """The value of the first pattern that is an end of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def merge(blocks: list[Tensor], parts: dict[str, tuple[int, ...]], adapters: list[Lora],
          dtype: torch.dtype | None) -> list[Tensor]:
    """The blocks of rows of one of our tensors, those that an adapter names merged: computed in
    float32, and returned in dtype, or if it is None in their own. parts are the blocks' names and
    shapes."""
    if not any(part in adapter for part in parts for adapter in adapters):
        return blocks
    if len(blocks) != len(parts):  # one of our folders, where they are stacked
        blocks = blocks[0].split([shape[0] for shape in parts.values()])
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
