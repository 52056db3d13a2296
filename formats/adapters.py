"""LoRA adapters (Hu et al., 2021) as peft saves them, merged into a model's weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from formats.checkpoint import Checkpoint
from formats.config import OBJECT, check_float, hf_parts, model_layers
from formats.files import check_keys, read_json
from formats.folder import open_file
from model import ModelConfig

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Settings of peft with which a weight is not W + s B A, or other weights change, too.
NOT_PLAIN = ("use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices",
             "target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora",
             "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
# A LoRA adapter: A (r, K), B (N, r) and s of each changed weight, by Hugging Face's name of it.
Lora = dict[str, tuple[Tensor, Tensor, float]]


def read_adapter(folder: Path, base: Checkpoint) -> Lora:
    """The LoRA adapter in a folder of peft, for a base model. Raises ValueError naming a setting or
    a tensor that is not supported, or that does not fit this model."""
    settings, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    check_adapter_settings(folder / "adapter_config.json", settings)
    tensors, shapes = open_file(path), linear_shapes(base.config)
    copied = take_copies(path, tensors, base)
    for module in settings.get("modules_to_save") or ():
        if not any(layer.endswith(str(module)) for layer in copied):
            raise ValueError(f"{folder / 'adapter_config.json'}: modules_to_save {module!r} is not "
                             "supported, and the adapter has no copy of the model's own")
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


def take_copies(path: Path, tensors: dict[str, Tensor], base: Checkpoint) -> list[str]:
    """Take out of an adapter's tensors those of the model itself, and return their layers' names.
    peft saves the output projection's or the embedding's beside LoRA of it, and modules_to_save.
    Raises ValueError naming one that differs from the model's: it would replace that one."""
    copied = []
    for name in list(tensors):
        found = re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)?\.(weight|bias)", name)
        own = found and base_tensor(base, f"{found[1]}.{found[2]}")
        if own is None:
            continue
        if not torch.equal(own.to(tensors[name].dtype), tensors[name]):
            raise ValueError(f"{path}: tensor {name} is not supported, since it differs from the "
                             "model's; only LoRA is merged: merge this with peft, and load that")
        copied.append(found[1])
        del tensors[name]
    return copied


def base_tensor(base: Checkpoint, name: str) -> Tensor | None:
    """The model's tensor of this Hugging Face name; None if it has none."""
    if name == "lm_head.weight" and base.config.tied_embeddings:
        name = "model.embed_tokens.weight"
    for ours, parts in hf_parts(base.config).items():
        if name in parts:
            return as_parts(base.blocks[ours], parts)[list(parts).index(name)]
    return None


def as_parts(blocks: list[Tensor], parts: dict[str, tuple[int, ...]]) -> Sequence[Tensor]:
    """One of our tensors as blocks of Hugging Face's parts, which a folder of ours stacks."""
    if len(blocks) == len(parts):
        return blocks
    return blocks[0].split([shape[0] for shape in parts.values()])


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape (N, K) of every linear layer, by Hugging Face's names."""
    return {part: (rows, layer.columns) for layer in model_layers(config).values()
            for part, rows in layer.parts.items() if not layer.is_table}


def read_factor(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple) -> Tensor:
    """An adapter's A or B of one layer. Raises ValueError when it is missing, misshapen or not
    finite."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{path}: tensor {name} is missing")
    try:
        check_float(name, tensor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
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
                              "modules_to_save": (list, None, None),
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
    merged = []
    for part, block in zip(parts, as_parts(blocks, parts)):
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
