"""int8 and int4 weight-only quantization.

    python quantize.py --checkpoint smollm2 --quantize int4 --out checkpoints/smollm2-int4

A file is the same for every device and any number of processes: rows in order, nothing packed for a
kernel. Each weight (N, K) of a matrix multiplication has its scales beside it, in float32:

    int8   weight int8 (N, K), scale (N,)                              w = weight * scale
    int4   weight uint8 (N, K / 2), two columns a byte, the even one in the low four bits,
           scale (N, K / g) and zero uint8 (N, K / g), in sixteenths of a nibble, for g columns
           each                                               w = (nibble - zero / 16) * scale

Embedding and output projection are int8 in both modes, since int4 costs most there. Norms and
biases stay as they are. The layouts that int4 kernels need are made after loading
(layers.Int4Linear.pack).

Published models (formats/published.py) keep their integers, so their folders may mix kinds and have

    int8   also with scale (N, K / g) and zero int16 (N, K / g)        w = (weight - zero) * scale
    int4   zero int16 if one of them is 16 whole steps
    order  int32 (K,) if the columns are in another order: column i is the input order[i]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from formats.config import Layer, layer_name, model_layers
from layers import GROUP_SIZES, MODES, quantized
from linear import pack_nibbles, unpack_nibbles
from model import ModelConfig, Transformer

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, for the scale to cover


# ------------------------------------------------------------------------------ the arithmetic


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """weight (N, K) as {"weight", "scale"}: symmetric, with a scale for each row."""
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    levels = weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return {"weight": levels.round().clamp(-127, 127).to(torch.int8), "scale": scale}


def quantize_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """weight (N, K) as {"weight", "scale", "zero"}: a scale and a zero for each group of columns.

    A group tries scales that cover less and less of its range, and takes the one with the least
    squared error, so that one outlier does not make all others coarser."""
    groups = weight.float().unflatten(1, (-1, group_size))  # (N, K / g, g)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny
    full = ((high - low) / 15).clamp(min=tiny)
    sixteenths = (-low / full * 16).round().clamp(0, 255)[..., None]
    zero = sixteenths / 16

    candidates, errors = [], []
    for share in SHARES:
        scale = best_scale(groups, nearest_levels(groups, share * full[..., None], zero))
        candidates.append(scale)  # (N, K / g, 1)
        errors.append((nearest_levels(groups, scale, zero) * scale - groups).square().sum(-1))
    best = torch.stack(errors, -1).argmin(-1, keepdim=True)  # (N, K / g, 1)
    scale = torch.cat(candidates, -1).gather(-1, best)
    nibbles = (nearest_levels(groups, scale, zero) + zero).flatten(1).to(torch.uint8)
    return {"weight": pack_nibbles(nibbles), "scale": scale[..., 0],
            "zero": sixteenths[..., 0].to(torch.uint8)}


def nearest_levels(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nibbles nearest to groups / scale + zero, less zero: (N, K / g, g), like groups. scale
    and zero are (N, K / g, 1)."""
    return (groups / scale + zero).round().clamp(0, 15) - zero


def best_scale(groups: Tensor, levels: Tensor) -> Tensor:
    """The scale (N, K / g, 1) for which levels * scale has the least squared error to groups."""
    tiny = torch.finfo(torch.float32).tiny
    squares = levels.square().sum(-1, keepdim=True)
    return ((groups * levels).sum(-1, keepdim=True) / squares.clamp(min=tiny)).clamp(min=tiny)


def dequantize(parts: dict[str, Tensor]) -> Tensor:
    """The weight (N, K) that a layer's stored tensors stand for, in float32. A weight in floating
    point is returned as it is."""
    weight, scale = parts["weight"], parts.get("scale")
    if scale is None:
        return weight
    if scale.ndim == 1:
        return weight.float() * scale[:, None]
    zero = parts["zero"].float()[..., None]
    if weight.dtype == torch.uint8:
        weight, zero = unpack_nibbles(weight), zero / 16
    groups = weight.unflatten(1, (scale.shape[1], -1)).float()
    columns = ((groups - zero) * scale[..., None]).flatten(1)
    return columns[:, parts["order"].argsort()] if "order" in parts else columns


def quantize_weight(weight: Tensor, kind: dict) -> dict[str, Tensor]:
    """The stored tensors of a float weight (N, K). kind is {"mode": "int8"}, or {"mode": "int4",
    "group_size": g}. Raises ValueError when it has NaN or infinite values."""
    if not weight.isfinite().all():
        raise ValueError("has NaN or infinite values and cannot be quantized")
    pieces = [quantize_int8(rows) if kind["mode"] == "int8" else
              quantize_int4(rows, kind["group_size"])
              for rows in weight.split(256)]  # 256 rows at a time fit a CPU's caches
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


def store(name: str, tensor: Tensor, kind: dict | None) -> dict[str, Tensor]:
    """The tensors that a float tensor is stored as, by name. kind None stores it as it is. Raises
    ValueError naming it when it cannot be quantized."""
    if kind is None:
        return {name: tensor}
    try:
        parts = quantize_weight(tensor, kind)
    except ValueError as error:
        raise ValueError(f"tensor {name} {error}") from None
    return {name.removesuffix("weight") + part: stored for part, stored in parts.items()}


# ------------------------------------------------------------------------------ models


def empty_model(config: ModelConfig, quantization: dict | None = None) -> Transformer:
    """A Transformer on the meta device, whose tensors have the names and shapes of stored ones.
    quantization is a config.json's (kind_of), or None. Raises ValueError when a group size does not
    divide a layer's inputs."""
    with torch.device("meta"):
        model = Transformer(config)
        for name, layer in model_layers(config).items():
            if kind := kind_of(name, layer, quantization):
                plain = model.get_submodule(name)
                rows = list(layer.parts.values())
                model.set_submodule(name, quantized(name, plain, kind, rows))
    return model


def kind_of(name: str, layer: Layer, quantization: dict | None) -> dict | list | None:
    """The kind of one layer: a dict {"mode", "group_size", "order"}, None (floating point), or a
    list of one for each part that it stacks (q, k, v).

    quantization is the model's: None, a kind for all layers ({"mode": "int8"} or {"mode": "int4",
    "group_size": g}), or a dict whose "layers" has a kind for each layer's name."""
    if quantization is None:
        return None
    if "layers" in quantization:
        return quantization["layers"].get(name)
    return quantization if layer.int4 else {"mode": "int8"}


def kind_of_tensor(tensor: str, layers: dict[str, Layer],
                   quantization: dict | None) -> dict | list | None:
    """The kind of the layer that a tensor is the weight of. None for any other tensor, since only
    weights are quantized."""
    name = layer_name(tensor, layers)
    if name is None or not tensor.endswith(".weight"):
        return None
    return kind_of(name, layers[name], quantization)


def stored_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a folder of ours stores for this model, by name."""
    layers = model_layers(model.config)
    shapes = {}
    for tensor, value in model.state_dict().items():
        name = layer_name(tensor, layers)
        if name is None or layers[name].tied_to is None:
            shapes[tensor] = tuple(value.shape)
    return shapes


# ------------------------------------------------------------------------------ command line


def asked_quantization(mode: str | None, group_size: int) -> dict | None:
    """The quantization (kind_of) that a command line asks for: {"mode", "group_size"}, or None."""
    if mode is None:
        return None
    return {"mode": mode, "group_size": group_size} if mode == "int4" else {"mode": mode}


def main():
    """The same as convert_hf.py --quantize. This file comes before those that read checkpoints, so
    only its command imports them."""
    from cli import plain_parser
    from convert_hf import convert
    from formats.hub import find
    from terminal import progress, user_errors, wrote
    parser = plain_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="NAME",
                        help="a folder, smollm2, or org/model[@revision] on the Hugging Face Hub")
    parser.add_argument("--quantize", "--mode", choices=MODES, required=True, dest="mode",
                        help="quantize the weights")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=32,
                        help="columns of a weight that share an int4 scale")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    with user_errors(parser):
        args = parser.parse_args()
        if args.checkpoint.endswith(".gguf"):  # convert_hf.py keeps the integers of some
            raise ValueError(f"{args.checkpoint}: use convert_hf.py --quantize {args.mode}")
        source, _ = find(args.checkpoint)
        quantization = asked_quantization(args.mode, args.group_size)
        with progress("quantizing", "tensors") as advance:
            convert(source, args.out, None, quantization, advance)
        wrote(args.out)


if __name__ == "__main__":
    main()
