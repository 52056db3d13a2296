"""LoRA adapters (Hu et al., 2021) as peft saves them, merged into a model's weights."""

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
# Settings of peft with which a weight is not W + s B A, or other weights change, too.
NOT_PLAIN = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save",
             "trainable_token_indices", "target_parameters", "layer_replication",
             "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
             "monteclora_config")
# A LoRA adapter: A (r, K), B (N, r) and s of each changed weight, by Hugging Face's name of it.
Lora = dict[str, tuple[Tensor, Tensor, float]]


def read_adapter(folder: Path, config: ModelConfig) -> Lora:
    """The LoRA adapter in a folder of peft. Raises ValueError naming a setting or a tensor that is
    not supported, or that does not fit this model."""
    settings, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    check_adapter_settings(folder / "adapter_config.json", settings)
    tensors, shapes = open_file(path), linear_shapes(config)
    adapter = {}
    for layer, prefix in adapted_layers(path, tensors).items():
        if layer not in shapes:
            raise ValueError(f"{path}: tensor {prefix}A.weight is of another model: this one has "
                             f"no linear layer {layer}")
        N, K = shapes[layer]
        r, s = rank_and_scale(folder / "adapter_config.json", settings, layer)
        A = read_factor(path, tensors, f"{prefix}A.weight", (r, K))
        B = read_factor(path, tensors, f"{prefix}B.weight", (N, r))
        adapter[layer + ".weight"] = A, B, s
    if not adapter:
        raise ValueError(f"{path}: no tensors in it")
    return adapter


def adapted_layers(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Hugging Face's name of each layer that an adapter changes, and the prefix of its two tensors'
    names, without "A.weight" or "B.weight". Raises ValueError naming any other tensor."""
    layers = {}
    for name in tensors:
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
        if not found:
            raise ValueError(f"{path}: tensor {name} is not supported: an adapter may have lora_A "
                             "and lora_B of linear layers")
        layers.setdefault(found[1], name.removesuffix("A.weight").removesuffix("B.weight"))
    return layers


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape (N, K) of every linear layer with a weight of its own, by Hugging Face's names."""
    return {part: (rows, layer.columns) for layer in model_layers(config).values()
            for part, rows in layer.parts.items() if not layer.is_table and layer.tied_to is None}


def read_factor(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple) -> Tensor:
    """An adapter's A or B of one layer. Raises ValueError when it is missing, misshapen or not
    finite."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{path}: tensor {name} is missing")
    if tuple(tensor.shape) != shape or not tensor.isfinite().all():
        raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)} or values that "
                         f"are not finite; of this model and the adapter's rank it is {shape}")
    return tensor


def check_adapter_settings(path: Path, settings: dict) -> None:
    """Raises ValueError unless this is plain LoRA of linear layers."""
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
        odd = ["init_lora_weights"]  # PiSSA and others also change the base model
    if odd:
        raise ValueError(f"{path}: {odd[0]} {settings.get(odd[0])!r} is not supported; plain LoRA "
                         "is, of linear layers")


def rank_and_scale(path: Path, settings: dict, layer: str) -> tuple[int, float]:
    """r and s of a layer. s is alpha / r or, with rslora, alpha / sqrt(r) (Kalajdzievski, 2023).
    rank_pattern and alpha_pattern give some layers other values. Raises ValueError for a broken
    pattern or value."""
    try:
        r = first_match(settings.get("rank_pattern"), layer, settings.get("r", 8))
        alpha = first_match(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8))
        return r, alpha / (r ** 0.5 if settings.get("use_rslora") else r)
    except (re.error, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: no rank or scale for {layer}: {error}") from None


def first_match(patterns: dict | None, layer: str, default: float) -> float:
    """The value of the first pattern, a regular expression, that an end of the layer's name
    matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def merge_adapters(blocks: list[Tensor], parts: dict[str, tuple[int, ...]], adapters: list[Lora],
                   dtype: torch.dtype | None) -> list[Tensor]:
    """One of our tensors, as blocks of rows, with the adapters that change it merged in. The sum is
    computed in float32 and returned in dtype, or in the block's own if that is None. parts are the
    blocks' Hugging Face names and shapes."""
    if not any(part in adapter for part in parts for adapter in adapters):
        return blocks
    if len(blocks) != len(parts):  # of a folder of ours, where they are stacked
        blocks = blocks[0].split([shape[0] for shape in parts.values()])
    merged = []
    for part, block in zip(parts, blocks):
        weight = block.float()
        for A, B, s in [adapter[part] for adapter in adapters if part in adapter]:
            weight = weight + s * (B.float() @ A.float())
        merged.append(weight.to(dtype or block.dtype))
    return merged


def adapter_hash(adapter: Lora) -> str:
    """A hash of all of an adapter's tensors. load.fingerprint sees the first row of a weight only,
    which an adapter may leave as it is."""
    known = hashlib.sha256()
    for name, (A, B, s) in sorted(adapter.items()):
        known.update(f"{name} {s}".encode())
        for tensor in (A, B):
            known.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return known.hexdigest()[:16]
