"""int8 and int4 weight-only quantization.

    python quantize.py --checkpoint DIR --mode int8|int4 [--group-size 32|64|128] --out DIR

The file is the same for every device and any number of processes: rows in order, nothing packed for
a kernel. Beside each weight (N, K) of a matrix multiplication lie its scales, in float32:

    int8   weight int8 (N, K), scale (N,)                              w = weight * scale
    int4   weight uint8 (N, K / 2), two columns a byte, the even one in the low four bits,
           scale (N, K / g) and zero uint8 (N, K / g), in sixteenths of a nibble, for g columns
           each                                               w = (nibble - zero / 16) * scale

GPTQ and AWQ use these formulas too, with whole zeros. Embedding and output projection are int8 in
both modes: see the README for what int4 would save there, and cost. The rest (norms, biases) stays
as it is. Kernels want other layouts of int4: `pack` makes them after loading.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import say, user_errors
from convert_hf import progress, read_config, read_weights, stack, write_checkpoint
from model import ModelConfig, Transformer, is_row, linear, row_times_matrix

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

    Of a few scales that cut off more and more of a group's extremes, each group takes the one with
    the least squared error: one far weight should not coarsen all the others."""
    groups = weight.float().unflatten(1, (-1, group_size))  # (N, K / g, g)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny
    full = ((high - low) / 15).clamp(min=tiny)
    sixteenths = (-low / full * 16).round().clamp(0, 255)[..., None]
    zero = sixteenths / 16

    def nearest(scale):  # (N, K / g, 1) -> the steps from zero, (N, K / g, g)
        return (groups / scale + zero).round().clamp(0, 15) - zero

    def fit(steps):  # the scale with the least squared error for these steps
        squares = steps.square().sum(-1, keepdim=True)
        return ((groups * steps).sum(-1, keepdim=True) / squares.clamp(min=tiny)).clamp(min=tiny)

    candidates = [fit(nearest(share * full[..., None])) for share in SHARES]
    errors = [(nearest(scale) * scale - groups).square().sum(-1) for scale in candidates]
    best = torch.stack(errors, -1).argmin(-1, keepdim=True)  # (N, K / g, 1)
    scale = torch.cat(candidates, -1).gather(-1, best)
    nibbles = (nearest(scale) + zero).flatten(1).to(torch.uint8)
    return {"weight": nibbles[:, ::2] | nibbles[:, 1::2] << 4, "scale": scale[..., 0],
            "zero": sixteenths[..., 0].to(torch.uint8)}


def dequantize(parts: dict[str, Tensor]) -> Tensor:
    """The float32 weight (N, K) that the stored tensors of a layer stand for."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype == torch.int8:
        return weight.float() * scale[:, None]
    nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)
    groups = nibbles.unflatten(1, (scale.shape[1], -1)).float()
    return ((groups - parts["zero"][..., None] / 16) * scale[..., None]).flatten(1)


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

# PyTorch's CPU kernels under names of our own: what inductor (2.11 to 2.13) does with the originals
# fails for an input that is not in memory yet, and for a group size in a nested compile region.
define, implement = torch.library.define, torch.library.impl
define("gpt_stream::int8_matmul", "(Tensor x, Tensor weight, Tensor scale) -> Tensor")
define("gpt_stream::int4_matmul",
       "(Tensor x, Tensor weight, int group_size, Tensor scales_and_zeros) -> Tensor")
implement("gpt_stream::int8_matmul", "cpu")(torch._weight_int8pack_mm)
implement("gpt_stream::int4_matmul", "cpu")(torch._weight_int4pack_mm_for_cpu)


@torch.library.register_fake("gpt_stream::int8_matmul")
def _(x, weight, scale):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("gpt_stream::int4_matmul")
def _(x, weight, group_size, scales_and_zeros):
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8."""

    def __init__(self, K: int, N: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() // x.shape[-1] <= 16  # tokens; from there on unpacking first is faster
        if is_row(x):
            y = (row_times_matrix(x, self.weight) * self.scale).type_as(x)
        elif few and not x.is_cuda:
            y = torch.ops.gpt_stream.int8_matmul(x.flatten(0, -2).contiguous(), self.weight,
                                                 self.scale.type_as(x))
            y = y.unflatten(0, x.shape[:-1])
        else:  # 1024 rows at a time stay in a CPU's caches between unpacking and use
            parts = [self.weight] if x.is_cuda else self.weight.split(1024)
            y = torch.cat([linear(x, part.float().type_as(x)) for part in parts], dim=-1)
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

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the stored tensors out for the device's kernel, which computes
        (nibble - 8) * scale + zero in the given dtype."""
        zero = (8 - self.zero / 16) * self.scale
        both = torch.stack([self.scale, zero], dim=-1).transpose(0, 1)  # (K / g, N, 2)
        self.register_buffer("scales_and_zeros", both.to(dtype).contiguous())
        if self.weight.is_cuda:  # wants the even column in the high four bits
            swapped = self.weight << 4 | self.weight >> 4
            self.weight = torch._convert_weight_to_int4pack(swapped, 8)
        else:
            nibbles = torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(1)
            self.weight = torch._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
        del self.scale, self.zero

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch._weight_int4pack_mm if x.is_cuda else torch.ops.gpt_stream.int4_matmul
        rows = x.flatten(0, -2).contiguous()
        y = kernel(rows, self.weight, self.group_size, self.scales_and_zeros)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


# ------------------------------------------------------------------------------ models


def empty_model(config: ModelConfig, quantization: dict | None = None) -> Transformer:
    """A Transformer on the meta device whose tensors are named and shaped as they are stored.
    quantization is {"mode": ..., "group_size": ...} of a config.json, or None. Raises ValueError
    when a group size does not divide a layer's inputs."""
    with torch.device("meta"):
        model = Transformer(config)
        if quantization is None:
            return model
        mode, group_size = quantization.get("mode"), quantization.get("group_size")
        if mode not in MODES or mode == "int4" and group_size not in GROUP_SIZES:
            raise ValueError(f"quantization {quantization} is unknown; it is int8, or int4 with "
                             f"group_size {', '.join(map(str, GROUP_SIZES))}")
        for name, plain in list(model.layers.named_modules()):
            if not isinstance(plain, nn.Linear):
                continue
            N, K, bias = plain.out_features, plain.in_features, plain.bias is not None
            if mode == "int4" and K % group_size:
                raise ValueError(
                    f"group size {group_size} does not divide the {K} inputs of layers.{name}; "
                    f"of {GROUP_SIZES} {[g for g in GROUP_SIZES if K % g == 0] or 'none'} would")
            if mode == "int4" and N % 16:
                raise ValueError(f"int4 needs outputs in 16s; layers.{name} has {N}; use int8")
            quantized = (Int8Linear(K, N, bias) if mode == "int8"
                         else Int4Linear(K, N, bias, group_size))
            parent, _, child = name.rpartition(".")
            setattr(model.layers.get_submodule(parent), child, quantized)
        model.embed = Int8Embedding(config.vocab_size, config.dim)
        model.output = Int8Linear(config.dim, model.output.out_features, bias=False)
    return model


def stored_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this model stores, by name."""
    tied = "output." if model.config.tied_embeddings else None
    return {name: tuple(t.shape) for name, t in model.state_dict().items()
            if tied is None or not name.startswith(tied)}


# ------------------------------------------------------------------------------ command line


def quantize_checkpoint(source: Path, out: Path, mode: str, group_size: int, show=None) -> None:
    """Write the checkpoint at `source`, quantized, to the new folder `out`, whole or not at all.
    Raises ValueError naming the file, the tensor or the size."""
    raw, config = read_config(source)
    quantization = quantization_of(raw, mode, group_size, source)
    shapes = stored_shapes(empty_model(config, quantization))  # refuses what cannot be
    plain = stored_shapes(empty_model(config))

    def weights():
        for name, blocks in read_weights(source, raw, config, plain):
            yield from store(name, stack(blocks), shapes, quantization).items()

    new = {**raw, "gpt_stream": {"format": 1, "quantization": quantization}}
    write_checkpoint(out, source, new, weights(), len(shapes), show)


def quantization_of(raw: dict, mode: str | None, group_size: int, source: Path) -> dict | None:
    """What a checkpoint's config.json says, or what is asked for: {"mode", "group_size"} or None.
    Raises ValueError where both do."""
    stored = (raw.get("gpt_stream") or {}).get("quantization")
    if stored and mode:
        raise ValueError(f"{source}: is quantized already ({stored.get('mode')}); "
                         "quantize the original instead")
    if stored or not mode:
        return stored
    return {"mode": mode, **({"group_size": group_size} if mode == "int4" else {})}


def store(name: str, tensor: Tensor, shapes: dict, quantization: dict) -> dict[str, Tensor]:
    """The tensors that a float tensor is stored as."""
    if name.removesuffix("weight") + "scale" not in shapes:
        return {name: tensor}
    return quantize_weight(name, tensor, quantization["mode"], quantization.get("group_size", 0))


def main():
    parser = argparse.ArgumentParser(description="Quantize a checkpoint's weights.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR",
                        help="our folder or a Hugging Face one")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=32,
                        help="columns that share a scale, for int4; default 32")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    with user_errors(parser):
        quantize_checkpoint(args.checkpoint, args.out, args.mode, args.group_size,
                            progress("quantizing"))
    say(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
