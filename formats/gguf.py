"""GGUF files, llama.cpp's format, converted to checkpoint folders of ours.

A file holds metadata (the sizes, the tokenizer, the chat template), a list of tensors, and the
tensors, most of them in blocks of a few bits that the package `gguf` dequantizes. Blocks of Q4_0
need no dequantizing: 32 columns of four bits and a scale are exactly a group of our int4, so
`--quantize int4 --group-size 32` keeps their values.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats.checkpoint import Checkpoint, Encoded
from formats.config import ARCHITECTURES as MODEL_TYPES
from formats.config import check_tensors, config_from_hf, hf_parts
from formats.files import import_optional, write_json
from formats.folder import write_converted
from formats.gguf_file import GGUFTensor, read_gguf
from formats.gguf_tokenizer import write_tokenizer
from linear import pack_nibbles
from model import ModelConfig, rope_frequencies
from tokenizer import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM",
                 "gemma3": "Gemma3ForCausalLM"}  # Mistral's files say llama
SIZES = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count",
         "num_attention_heads": "attention.head_count", "intermediate_size": "feed_forward_length",
         "max_position_embeddings": "context_length"}
NOT_COMPUTED = ("expert_count", "attention.scale", "attention.temperature_scale", "logit_scale",
                "residual_scale", "embedding_scale")
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # as a generation_config.json names them
NAMES = {"model.embed_tokens": "token_embd", "model.layers": "blk", "model.norm": "output_norm",
         "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
         "self_attn.": "attn_", "mlp.": "ffn_", "_proj": ""}  # replaced from the first to the last
FOUR_NORMS = {"post_attention_layernorm": "post_attention_norm",  # where a block has so many
              "pre_feedforward_layernorm": "ffn_norm",
              "post_feedforward_layernorm": "post_ffw_norm"}
# Contexts before llama3's scaling, to try in turn: Llama 3's own, then others.
ORIGINALS = [8192, *(2**n for n in range(5, 21))]
INT4_OF_Q4_0 = {"mode": "int4", "group_size": 32}
ROWS = 4096  # dequantized at a time: in float32 an embedding can be larger than the file


# ------------------------------------------------------------------------------ configuration


def read_settings(metadata: dict, tensors: dict[str, GGUFTensor]) -> tuple[dict, ModelConfig]:
    """The metadata as a Hugging Face config.json, and what it means. Raises ValueError naming a key
    that is missing, wrong, or not supported."""
    name = check_architecture(metadata)
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    rope = {"rope_type": "default", "rope_theta": read_number(
        metadata, f"{name}.rope.freq_base", float, 10000.0)}
    raw = {
        "architectures": [ARCHITECTURES[name]], "model_type": MODEL_TYPES[ARCHITECTURES[name]],
        **read_sizes(metadata, name, tensors),
        "rms_norm_eps": read_number(metadata, f"{name}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "rope_parameters": rope,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({metadata[key] for end in ("eos", "eot", "eom")
                                if (key := f"tokenizer.ggml.{end}_token_id") in metadata})}
    if metadata.get(key := f"{name}.attention.sliding_window"):
        raw.update(sliding_window=read_number(metadata, key, int), use_sliding_window=True,
                   max_window_layers=0)
        if name == "llama":  # it is Mistral's: a Llama has none
            raw.update(architectures=["MistralForCausalLM"], model_type="mistral")
    if name == "gemma3":
        raw.update(read_gemma3(metadata, raw))
    rope.update(read_scaling(metadata, name, tensors, config_from_hf(raw)))
    return raw, config_from_hf(raw)


def read_gemma3(metadata: dict, raw: dict) -> dict:
    """What else a config.json of Gemma 3 has. A file does not say how queries are scaled, nor which
    layers slide: as in llama.cpp, the largest model (62 layers) scales them otherwise, and of six
    layers five slide, where there is a window."""
    largest = raw["num_hidden_layers"] == 62
    every = read_number(metadata, "gemma3.attention.sliding_window_pattern", int, 6)
    types = ["sliding_attention" if (i + 1) % every and "sliding_window" in raw else
             "full_attention" for i in range(raw["num_hidden_layers"])]
    return {
        "hidden_activation": "gelu_pytorch_tanh", "layer_types": types,
        "query_pre_attn_scalar": (raw["hidden_size"] // raw["num_attention_heads"] if largest
                                  else raw["head_dim"]),
        "rope_parameters": {
            "full_attention": raw["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": read_number(
                metadata, "gemma3.rope.freq_base_swa", float, 10000.0)}}}


def read_sizes(metadata: dict, name: str, tensors: dict[str, GGUFTensor]) -> dict[str, int]:
    """The sizes of a config.json. Raises ValueError naming the key of a wrong one."""
    sizes = {ours: read_number(metadata, f"{name}.{key}", int) for ours, key in SIZES.items()}
    heads, dim, layers = (sizes[key] for key in (
        "num_attention_heads", "hidden_size", "num_hidden_layers"))
    # A wrong number would make the empty model huge.
    if f"blk.{layers - 1}.attn_norm.weight" not in tensors:
        raise ValueError(f"{name}.block_count is {layers}; the file has no tensors of the last one")
    kv_heads = read_number(metadata, f"{name}.attention.head_count_kv", int, heads)
    head_dim = read_number(metadata, f"{name}.attention.key_length", int, dim // heads)
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if (value := metadata.get(key, head_dim)) != head_dim:
            raise ValueError(f"{key} is {value}; only heads of one size ({head_dim}), rotated "
                             "whole, are supported")
    return {**sizes, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "vocab_size": tensors["token_embd.weight"].shape[0]}


def check_architecture(metadata: dict) -> str:
    """The architecture's name in the metadata. Raises ValueError naming what is not supported."""
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"file {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of "
                         "a split model; merge them first: llama-gguf-split --merge FIRST OUT")
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported; known: "
                         f"{', '.join(ARCHITECTURES)}")
    for key in (*NOT_COMPUTED, "attn_logit_softcapping", "final_logit_softcapping"):
        if value := metadata.get(f"{name}.{key}"):
            raise ValueError(f"{name}.{key} is {value}; only models without it are supported")
    return name


def read_number(metadata: dict, key: str, kind: type, default: float | None = None) -> float:
    """A positive number of the metadata. Raises ValueError naming the key and what it is instead.
    """
    value = metadata.get(key, default)
    if type(value) is not kind or not 0 < value < math.inf:
        raise ValueError(f"{key} is {str(value)[:40]}; it must be a positive {kind.__name__}")
    return value


def read_scaling(metadata: dict, name: str, tensors: dict[str, GGUFTensor],
                 plain: ModelConfig) -> dict:
    """The rope_parameters of a config.json that scale rotary positions, {} without a scaling. plain
    is the config without it. Raises ValueError naming a scaling that is not supported."""
    kind = metadata.get(f"{name}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{name}.rope.scaling.type {kind!r} is not supported; known: none, linear")
    factor = (metadata.get(f"{name}.rope.scaling.factor")
              or metadata.get(f"{name}.rope.scale_linear") or 1.0)  # an older key
    linear = kind == "linear" and factor != 1
    if "rope_freqs.weight" not in tensors:
        return {"rope_type": "linear", "factor": factor} if linear else {}
    divisors = to_float32(tensors["rope_freqs.weight"]).double()
    if linear or divisors.shape != (plain.head_dim // 2,):
        raise ValueError(f"tensor rope_freqs.weight of shape {tuple(divisors.shape)}, with "
                         f"{name}.rope.scaling.factor {factor}, is not supported; llama3's has "
                         f"shape ({plain.head_dim // 2},) and no factor beside it")
    original = metadata.get(f"{name}.rope.scaling.original_context_length")
    return infer_llama3(divisors, plain, [original] if original else ORIGINALS)


def infer_llama3(divisors: Tensor, plain: ModelConfig, originals: list[int]) -> dict:
    """The llama3 scaling that divides the frequencies by these divisors (D / 2,): a GGUF file
    stores the divisors and not the scaling. Raises ValueError when there is none."""
    if bool((divisors == 1).all()):
        return {}
    frequencies = rope_frequencies(plain)
    for length in originals:
        scaling = {"rope_type": "llama3", "factor": divisors.max().item(), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        found = frequencies / rope_frequencies(replace(plain, rope_scaling=scaling))
        if torch.allclose(found, divisors, rtol=1e-4, atol=0):
            return scaling
    raise ValueError("tensor rope_freqs.weight is not a llama3 scaling with the factors 1 and 4; "
                     "others (longrope, yarn) are not supported")


# ------------------------------------------------------------------------------ tensors


def read_blocks(config: ModelConfig, tensors: dict[str, GGUFTensor],
                interleaved: bool) -> dict[str, list[Encoded]]:
    """Our tensors by name, each as the blocks that it stacks. With `interleaved`, q and k have
    llama.cpp's order of rows (split_halves). Raises ValueError naming a tensor that is missing,
    misshapen, extra, or of an unknown type."""
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads} if interleaved else {}
    names = NAMES | FOUR_NORMS if config.norms == "both" else NAMES
    parts = {name: {gguf_name(part, names): shape for part, shape in each.items()}
             for name, each in hf_parts(config).items()}
    expected = {part: shape for each in parts.values() for part, shape in each.items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name != "rope_freqs.weight"}
    check_tensors(found, expected, asked_by="the metadata")
    for name in expected:
        check_type(name, tensors[name])
        layer = name.split(".")[-2]
        tensors[name] = tensors[name]._replace(
            interleaved_heads=heads.get(layer, 0),
            plus_one=config.norm_plus_one and layer.endswith("norm"))
    return {name: [as_block(part, tensors[part]) for part in each] for name, each in parts.items()}


def check_type(name: str, tensor: GGUFTensor) -> None:
    """Raises ValueError naming a tensor whose type cannot be dequantized."""
    try:
        to_float32(tensor._replace(rows=tensor.rows[:1]))
    except NotImplementedError as error:
        raise ValueError(f"tensor {name}: {error}") from None


def as_block(name: str, tensor: GGUFTensor) -> Encoded:
    """A tensor as a block of a Checkpoint. Matrices in Q4_0 are int4 already."""
    kind = INT4_OF_Q4_0 if tensor.kind.name == "Q4_0" and len(tensor.shape) > 1 else None
    return Encoded(kind, partial(decode_rows, name, tensor, kind))


def gguf_name(hf_name: str, names: dict[str, str] = NAMES) -> str:
    """The name in a GGUF file of a tensor of Hugging Face's."""
    for theirs, name in names.items():
        hf_name = hf_name.replace(theirs, name)
    return hf_name


def split_halves(tensor: GGUFTensor) -> GGUFTensor:
    """A tensor with its rows in Hugging Face's order, which rotates the first half of a head
    against the second. llama.cpp rotates neighbours, so its converter interleaves the two halves'
    rows."""
    if not tensor.interleaved_heads:
        return tensor
    order = np.arange(len(tensor.rows)).reshape(tensor.interleaved_heads, -1, 2)
    return tensor._replace(rows=tensor.rows[order.swapaxes(1, 2).ravel()])


def to_float32(tensor: GGUFTensor) -> Tensor:
    """A tensor in float32: (rows, columns), or (rows,) for a vector."""
    gguf = import_optional("gguf", "reading a GGUF file")
    weight = gguf.quants.dequantize(tensor.rows, tensor.kind)
    return torch.from_numpy(np.require(weight, requirements="W")).reshape(-1, *tensor.shape[1:])


def decode_rows(name: str, tensor: GGUFTensor, kind: dict | None) -> Iterator[dict[str, Tensor]]:
    """A tensor's rows as they are stored here, some at a time: int4 if that is the kind, else
    float32."""
    tensor = split_halves(tensor)
    for first in range(0, len(tensor.rows), ROWS):
        piece = tensor._replace(rows=tensor.rows[first:first + ROWS])
        if kind:
            yield int4_of_q4_0(name, piece)
        else:
            weight = to_float32(piece)
            yield {"weight": weight - 1 if tensor.plus_one else weight}


def int4_of_q4_0(name: str, tensor: GGUFTensor) -> dict[str, Tensor]:
    """int4 in groups of 32 from blocks of Q4_0. A block is a float16 scale, then 16 bytes: their
    low four bits are columns 0 to 15, their high four bits columns 16 to 31, with a zero of 8."""
    # (N, K / 32, 18) bytes
    blocks = torch.from_numpy(tensor.rows.reshape(len(tensor.rows), -1, 18).copy())
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    if not scale.isfinite().all():
        raise ValueError(f"tensor {name} has NaN or infinite scales")
    nibbles = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).flatten(1)  # (N, K)
    return {"weight": pack_nibbles(nibbles), "scale": scale,
            "zero": torch.full(scale.shape, 8 * 16, dtype=torch.uint8)}


# ------------------------------------------------------------------------------ the checkpoint


@contextlib.contextmanager
def open_gguf(source: Path) -> Iterator[Checkpoint]:
    """What a GGUF file holds. Its tokenizer's files are in a temporary folder while this is open.
    Raises ValueError naming the file, and in it the key or the tensor, also for damage that shows
    only when a tensor is decoded inside the `with`."""
    with tempfile.TemporaryDirectory() as made:
        try:
            yield make_checkpoint(source, Path(made))
        except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            # A damaged file raises all of these.
            raise ValueError(f"{source}: {error}") from error


def make_checkpoint(source: Path, folder: Path) -> Checkpoint:
    """A file as a Checkpoint, after writing its tokenizer's files to `folder`."""
    metadata, tensors = read_gguf(source)
    raw, config = read_settings(metadata, tensors)
    if len(metadata.get("tokenizer.ggml.tokens", [])) > config.vocab_size:
        raise ValueError(f"tokenizer.ggml.tokens are {len(metadata['tokenizer.ggml.tokens'])}; "
                         f"tensor token_embd.weight has rows for {config.vocab_size}")
    interleaved = metadata["general.architecture"] == "llama"
    blocks = read_blocks(config, tensors, interleaved)
    suggested = {name: metadata[f"general.sampling.{key}"] for key, name in SAMPLING.items()
                 if f"general.sampling.{key}" in metadata}
    try:
        if suggested:
            write_json(folder / "generation_config.json", suggested)
        write_tokenizer(folder, metadata)
    except OSError as error:  # temporary files may be on another disk, which is full
        raise OSError(f"{folder}: cannot be written: {error}") from None
    try:
        Tokenizer(folder)
    except ValueError as error:  # without the name of a folder that nobody knows
        raise ValueError(f"its tokenizer: {str(error).replace(f'{folder}/', '')}") from None
    # Vectors are in float32 in every file, so the matrices' type counts.
    kinds = Counter(t.kind.name for t in tensors.values() if len(t.shape) > 1)
    bulk = kinds.most_common(1)[0][0]
    raw["dtype"] = {"F32": "float32", "F16": "float16"}.get(bulk, "bfloat16")
    raw["gpt_stream"] = {"format": 1, "source": f"{source.name}, {bulk}"}
    return Checkpoint(folder, raw, config, None, blocks)


def convert_gguf(source: Path, out: Path, dtype: torch.dtype | None = None,
                 quantization: dict | None = None, advance=None) -> None:
    """Write the GGUF file at `source` as a folder of ours, whole or not at all.

    dtype None is the file's own, or bf16 if it is quantized. quantization None is floating point.
    Raises ValueError naming the file, and in it the key or the tensor."""
    with open_gguf(source) as checkpoint:
        dtype = dtype or getattr(torch, checkpoint.raw["dtype"])
        write_converted(checkpoint, out, dtype, quantization, advance)
