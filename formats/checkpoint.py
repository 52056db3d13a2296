"""What a checkpoint holds, as one value, whatever its format.

formats/folder.py and formats/gguf.py make a Checkpoint; load, convert_hf and gptq use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.config import model_layers
from model import ModelConfig
from quantize import dequantize, kind_of_tensor, store


class Encoded(NamedTuple):
    """Rows of a weight in another project's format, which are decoded when they are needed."""

    kind: dict | None  # the kind that they are decoded to (quantize.kind_of); None: floating point
    decode: Callable[[], Iterator[dict[str, Tensor]]]  # our stored tensors, some rows at a time


@dataclass
class Checkpoint:
    """Everything that a folder or a file holds. Its tensors are memory-mapped, or decoded when they
    are needed."""

    folder: Path  # of the tokenizer's files
    raw: dict  # the config.json
    config: ModelConfig
    quantization: dict | None  # how the layers are stored (quantize.kind_of); None: floating point
    # Our tensors by name, each as the blocks of rows that it stacks: q, k and v are three blocks of
    # a Hugging Face folder, and one block of ours.
    blocks: dict[str, list[Tensor | Encoded]]


def check_not_ours_quantized(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a quantized folder of ours: quantizing or converting its rounded
    weights again would lose more."""
    if "gpt_stream" in checkpoint.raw and checkpoint.quantization:
        raise ValueError(f"{checkpoint.folder}: is quantized already "
                         f"({checkpoint.quantization.get('mode')}); use the original instead")


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with an output projection of its own, equal to the embedding."""
    blocks = {**checkpoint.blocks, "output.weight": checkpoint.blocks["embed.weight"]}
    config = replace(checkpoint.config, tied_embeddings=False)
    return replace(checkpoint, config=config, blocks=blocks)


def stack(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def decode(block: Tensor | Encoded) -> dict[str, Tensor]:
    """The stored tensors of a block: {"weight", "scale", ...}, or {"weight"} in floating point."""
    if isinstance(block, Tensor):
        return {"weight": block}
    pieces = list(block.decode())
    return {part: stack([piece[part] for piece in pieces]) for part in pieces[0]}


def float_pieces(block: Tensor | Encoded) -> Iterator[Tensor]:
    """A block in floating point, some rows at a time."""
    return iter([block]) if isinstance(block, Tensor) else map(dequantize, block.decode())


def to_float(block: Tensor | Encoded, dtype: torch.dtype | None = None) -> Tensor:
    """A block in floating point, (rows, columns). dtype None keeps its own; integers become
    float32."""
    return stack([piece.to(dtype or piece.dtype) for piece in float_pieces(block)])


def is_of_kind(block: Tensor | Encoded, kind: dict | None) -> bool:
    """Whether a block is integers of exactly this kind."""
    return kind is not None and isinstance(block, Encoded) and block.kind == kind


# ------------------------------------------------------------------------------ every tensor


def stored_tensors(checkpoint: Checkpoint, asked: dict | None = None,
                   dtype: torch.dtype | None = None) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor by its stored name, as the blocks of rows that it stacks. One layer at a time is
    decoded.

    Integers stay integers if their kind is the one asked for, or if none is asked for. All others
    are decoded to floating point, in dtype or else float32, and the caller quantizes them."""
    layers = model_layers(checkpoint.config)
    for name, blocks in checkpoint.blocks.items():
        kind = kind_of_tensor(name, layers, asked or checkpoint.quantization)
        if all(isinstance(block, Tensor) for block in blocks):
            yield name, blocks
        elif isinstance(kind, list):  # parts of different kinds are stored apart
            for i, block in enumerate(blocks):
                stem = name.replace("weight", f"{i}.")
                yield from ((stem + part, [tensor]) for part, tensor in decode(block).items())
        elif all(is_of_kind(block, kind) for block in blocks):
            yield from stacked_parts(name, [decode(block) for block in blocks])
        else:
            yield name, [to_float(block, dtype) for block in blocks]


def stacked_parts(name: str, blocks: list[dict[str, Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    """The stored tensors of a weight, each as the blocks of rows that it stacks."""
    for part in blocks[0]:
        # Parts are stacked only if they have the same order, so one copy of it is enough.
        holders = blocks[:1] if part == "order" else blocks
        yield name.removesuffix("weight") + part, [block[part] for block in holders]


def quantized_tensors(checkpoint: Checkpoint, asked: dict) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its stored name, quantized as asked for, some rows at a time. Integers of
    that kind stay as they are. Raises ValueError naming a tensor that cannot be quantized."""
    layers = model_layers(checkpoint.config)
    for name, blocks in checkpoint.blocks.items():
        kind = kind_of_tensor(name, layers, asked)
        pieces = [piece for block in blocks for piece in stored_pieces(name, block, kind)]
        for part in pieces[0]:
            yield part, stack([piece[part] for piece in pieces])


def stored_pieces(name: str, block: Tensor | Encoded,
                  kind: dict | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of a block stored as this kind, by their stored names, some rows at a time."""
    if is_of_kind(block, kind):
        stem = name.removesuffix("weight")
        for piece in block.decode():
            yield {stem + part: rows for part, rows in piece.items()}
    else:
        for piece in float_pieces(block):
            yield store(name, piece, kind)
