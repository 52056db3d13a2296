"""int8 and int4 weight-only quantization.

    python quantize.py --checkpoint DIR --mode int8|int4 [--group-size 32|64|128] --out DIR

The file is the same for every device and any number of processes: rows in order, nothing packed for
a kernel. Beside each weight (N, K) of a matrix multiplication lie its scales, in float32:

    int8   weight int8 (N, K), scale (N,)                              w = weight * scale
    int4   weight uint8 (N, K / 2), two columns a byte, the even one in the low four bits,
           scale (N, K / g) and zero uint8 (N, K / g), g columns each  w = (nibble - zero) * scale

GPTQ and AWQ use these formulas too. Embedding and output projection are int8 in both modes: see the
README for what int4 would save there, and cost. The rest (norms, biases) stays as it is. Kernels
want other layouts of int4: `pack` makes them after loading.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig, Transformer, in_memory, is_row, row_times_matrix

MODES, GROUP_SIZES = ("int8", "int4"), (32, 64, 128)
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, to choose from


# ------------------------------------------------------------------------------ the arithmetic


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric, a scale for each row: {"weight", "scale"} of weight (N, K)."""
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    steps = weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return {"weight": steps.round().clamp(-127, 127).to(torch.int8), "scale": scale}


def quantize_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Groups of columns, each with a scale and a zero: {"weight", "scale", "zero"} of (N, K).

    Of a few ranges that cut off more and more of a group's extremes, each group takes the one with
    the least squared error: one far weight should not coarsen all the others."""
    groups = weight.float().unflatten(1, (-1, group_size))  # (N, K / g, g)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    full = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / full).round().clamp(0, 15)[..., None]

    def at(share):  # the nibbles and the squared error of each group
        scale = share * full[..., None]
        steps = (groups / scale + zero).round().clamp(0, 15)
        return steps, ((steps - zero) * scale - groups).square().sum(-1)

    errors = torch.stack([at(share)[1] for share in SHARES])
    share = torch.tensor(SHARES, device=weight.device)[errors.argmin(0)]
    steps, _ = at(share[..., None])
    nibbles = steps.flatten(1).to(torch.uint8)
    return {"weight": nibbles[:, ::2] | nibbles[:, 1::2] << 4, "scale": share * full,
            "zero": zero[..., 0].to(torch.uint8)}


def dequantize(parts: dict[str, Tensor]) -> Tensor:
    """The float32 weight (N, K) that the stored tensors of a layer stand for."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype == torch.int8:
        return weight.float() * scale[:, None]
    nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)
    groups = nibbles.unflatten(1, (scale.shape[1], -1)).float()
    return ((groups - parts["zero"][..., None].float()) * scale[..., None]).flatten(1)


def quantize_weight(name: str, weight: Tensor, mode: str, group_size: int) -> dict[str, Tensor]:
    """The stored tensors of a float weight, by their full names. Raises ValueError naming it when
    it has NaN or infinite values."""
    if not weight.isfinite().all():
        raise ValueError(f"tensor {name} has NaN or infinite values and cannot be quantized")
    layer = name.removesuffix("weight")
    int8 = mode == "int8" or not layer.startswith("layers.")
    pieces = [quantize_int8(rows) if int8 else quantize_int4(rows, group_size)
              for rows in weight.split(256)]  # few rows at a time stay in a CPU's caches
    return {layer + part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


# ------------------------------------------------------------------------------ modules


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8."""

    def __init__(self, K: int, N: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if is_row(x):
            y = row_times_matrix(x, self.weight)
        else:
            y = F.linear(x, self.weight.to(x.dtype)).float()
        y = (y * self.scale).type_as(x)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * self.scale[tokens][..., None]


class Int4Linear(nn.Module):
    """y = x W^T + b with W in int4, as it is stored until `pack` lays it out for the device."""

    def __init__(self, K: int, N: int, bias: bool, group_size: int):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
