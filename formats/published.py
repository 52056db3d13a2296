"""Published quantized models: GPTQ, AWQ and compressed-tensors folders.

All of them store integers, with a scale and a zero for each group of an output's inputs:

    w = (integer - zero) * scale

int4 and int8 mean the same here (quantize.py), so every stored integer keeps its value. The formats
differ in how they pack `bits` (4 or 8) into words of int32, for K inputs, N outputs and G groups:

    gptq                qweight (K bits / 32, N), qzeros (G, N bits / 32), scales (G, N), and
                        g_idx (K,), the group of each input. With activation order the groups are
                        mixed; they are sorted here. The stored zeros are one less than the zeros
                        (checkpoint_format gptq, where a zero may be 16), or equal (gptq_v2)
    awq                 qweight (K, N / 8), qzeros (G, N / 8), scales (G, N), the eight outputs of a
                        word in the order 0 2 4 6 1 3 5 7
    compressed-tensors  weight_packed (N, K bits / 32), weight_scale (N, G), weight_zero_point
                        (N bits / 32, G) unless symmetric, weight_g_idx (K,); or weight int8 (N, K)

GPTQ: Frantar et al., 2022. AWQ: Lin et al., 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from formats.checkpoint import Encoded
from formats.config import check_floats, hf_parts, model_layers
from layers import GROUP_SIZES
from linear import pack_nibbles
from model import ModelConfig

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale",
            "weight_shape", "weight_zero_point", "weight_g_idx", "weight")
INSTEAD = "use the unquantized checkpoint, with --quantize int8 or int4"


class Scheme(NamedTuple):
    """How a folder stores its layers, or some of them."""

    method: str  # gptq, awq, pack (compressed-tensors' pack-quantized) or int8 (its int-quantized)
    bits: int
    group_size: int  # -1: all inputs are one group
    symmetric: bool = False  # compressed-tensors: without zeros
    ordered: bool = False  # with a g_idx
    less_one: str = ""  # GPTQ takes one off "each" zero, GPTQModel off whole "words", with borrows


class PublishedLayer(NamedTuple):
    """A quantized layer without its integers, which are unpacked when they are needed."""

    prefix: str  # of its tensors' names
    scheme: Scheme
    K: int
    kind: dict  # that it is decoded to (quantize.kind_of)
    scale: Tensor  # (N, G) float32
    zero: Tensor  # (N, G) int16, for unsigned integers
    order: Tensor | None  # (K,) int32, the inputs group after group; None: they are in order


# ------------------------------------------------------------------------------ configuration


def read_schemes(raw: dict) -> list[Scheme]:
    """The schemes of a folder's layers, from its quantization_config. Raises ValueError naming what
    is not supported and what would be."""
    readers = {"gptq": gptq_schemes, "awq": awq_schemes, "compressed-tensors": compressed_schemes}
    try:
        settings = raw["quantization_config"]
        method = settings.get("quant_method", "unknown")
        if method not in readers:
            raise Unsupported(f"quant_method {method!r}")
        if not (schemes := readers[method](settings)):
            raise Unsupported("an empty config_groups")
        for scheme in schemes:
            known_bits = (4,) if scheme.method == "awq" else (4, 8)
            if type(scheme.bits) is not int or scheme.bits not in known_bits:
                raise Unsupported(f"{method} with {scheme.bits} bits")
            size = scheme.group_size
            if type(size) is not int or size < 1 and size != -1:
                raise Unsupported(f"group_size {size!r}")
    except Unsupported as what:
        raise ValueError(f"quantization_config: {what} is not supported (integers of 4 "
                         f"and 8 bits by {', '.join(readers)} are); {INSTEAD}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"quantization_config is damaged: {error!r}") from None
    return schemes


class Unsupported(Exception):
    """Something in a quantization_config that is not supported."""


def gptq_schemes(settings: dict) -> list[Scheme]:
    layout = settings.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise Unsupported(f"checkpoint_format {'marlin' if layout == 'gptq' else layout!r}")
    if settings.get("pack_dtype", "int32") != "int32":
        raise Unsupported(f"pack_dtype {settings['pack_dtype']!r}")
    by = str((settings.get("meta") or {}).get("quantizer"))
    less_one = "" if layout == "gptq_v2" else "words" if "gptqmodel" in by else "each"
    # "dynamic" gives layers whose names match a pattern their own settings. "-:" before a pattern
    # says that these layers are not quantized.
    every = [settings]
    for pattern, own in (settings.get("dynamic") or {}).items():
        if not pattern.startswith("-"):
            every.append({**settings, **own})
    return [Scheme("gptq", each["bits"], each["group_size"], ordered=bool(each.get("desc_act")),
                   less_one=less_one) for each in every]


def awq_schemes(settings: dict) -> list[Scheme]:
    version = str(settings.get("version", settings.get("checkpoint_format", "gemm"))).lower()
    if version != "gemm":
        raise Unsupported(f"awq's version {version!r}")
    bits = settings.get("bits", settings.get("w_bit"))  # the latter is an older spelling
    group_size = settings.get("group_size", settings.get("q_group_size"))
    return [Scheme("awq", bits, group_size)]


def compressed_schemes(settings: dict) -> list[Scheme]:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = settings.get(key)
        if value and not (key == "sparsity_config" and value.get("format") == "dense"):
            raise Unsupported(key)
    schemes = []
    for group in settings["config_groups"].values():
        weights, layout = group["weights"], group.get("format") or settings["format"]
        if group.get("input_activations") or group.get("output_activations"):
            raise Unsupported(f"quantized activations ({layout})")
        if weights.get("type", "int") != "int":
            raise Unsupported(f"{weights['type']} of {weights['num_bits']} bits ({layout})")
        strategy = weights["strategy"]
        packed = layout == "pack-quantized"
        if not packed and not (layout in ("int-quantized", "naive-quantized")
                               and weights["num_bits"] == 8):
            raise Unsupported(f"format {layout!r} with {weights['num_bits']} bits")
        if strategy not in ("group", "channel"):
            raise Unsupported(f"strategy {strategy!r}")
        schemes.append(Scheme("pack" if packed else "int8", weights["num_bits"],
                              weights["group_size"] if strategy == "group" else -1,
                              symmetric=weights.get("symmetric", True),
                              ordered=weights.get("actorder") == "group"))
    return schemes


# ------------------------------------------------------------------------------ layers


def expected_shapes(scheme: Scheme, N: int, K: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors, by the last part of their names."""
    G = 1 if scheme.group_size == -1 else K // scheme.group_size
    n_words, k_words = (-(-count * scheme.bits // 32) for count in (N, K))  # of N, K integers
    shapes = {
        "gptq": {"qweight": (k_words, N), "qzeros": (G, n_words), "scales": (G, N)},
        "awq": {"qweight": (K, n_words), "qzeros": (G, n_words), "scales": (G, N)},
        "pack": {"weight_packed": (N, k_words), "weight_scale": (N, G),
                 "weight_zero_point": (n_words, G)},
        "int8": {"weight": (N, K), "weight_scale": (N, G), "weight_zero_point": (N, G)},
    }[scheme.method]
    if scheme.symmetric:
        shapes.pop("weight_zero_point")
    if scheme.ordered:
        shapes["g_idx" if scheme.method == "gptq" else "weight_g_idx"] = (K,)
    return shapes


def scheme_error(tensors: dict[str, Tensor], prefix: str, N: int, K: int,
                 scheme: Scheme) -> str | None:
    """Why a layer's tensors are not of this scheme; None if they are."""
    if scheme.group_size > 0 and K % scheme.group_size:
        return f"group size {scheme.group_size} does not divide the {K} inputs of {prefix[:-1]}"
    for name, shape in expected_shapes(scheme, N, K).items():
        if (tensor := tensors.get(prefix + name)) is None:
            return f"tensor {prefix}{name} is missing"
        dtypes = ((torch.float16, torch.bfloat16, torch.float32) if "scale" in name
                  else (torch.int8,) if scheme.method == "int8" else (torch.int32,))
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            return (f"tensor {prefix}{name} is {tuple(tensor.shape)} of {tensor.dtype}; the "
                    f"quantization_config asks for {shape} of {dtypes[0]}")
    zeros = tensors.get(prefix + "weight_zero_point")
    if scheme.symmetric and zeros is not None and zeros.any():
        return f"tensor {prefix}weight_zero_point is not zero; the quantization_config is symmetric"
    return None


def read_layer(tensors: dict[str, Tensor], weight: str, shape: tuple[int, int],
               schemes: list[Scheme]) -> PublishedLayer | None:
    """The quantized layer whose weight has this name and the shape (outputs, inputs). None if it is
    in floating point. Raises ValueError naming a tensor that fits none of the schemes."""
    prefix, (N, K) = weight.removesuffix("weight"), shape
    plain = tensors.get(prefix + "weight")
    if plain is not None and plain.is_floating_point():
        return None
    errors = [scheme_error(tensors, prefix, N, K, scheme) for scheme in schemes]
    if None not in errors:
        raise ValueError(errors[0])
    scheme = schemes[errors.index(None)]
    name = prefix + ("scales" if scheme.method in ("gptq", "awq") else "weight_scale")
    scale = tensors[name].float()
    if not scale.isfinite().all():
        raise ValueError(f"tensor {name} has NaN or infinite values")
    if scheme.method in ("gptq", "awq"):
        scale = scale.t().contiguous()
    zero = read_zeros(tensors, prefix, scheme, N, scale)
    order = read_order(tensors, prefix, scheme, K, scale.shape[1])
    kind = stored_kind(prefix, scheme, K, zero, order)
    return PublishedLayer(prefix, scheme, K, kind, scale, zero, order)


def stored_kind(prefix: str, scheme: Scheme, K: int, zero: Tensor, order: Tensor | None) -> dict:
    """The kind that a layer is decoded to (quantize.kind_of). A group that is larger than the
    kernels' groups becomes several with the same scale. Raises ValueError for a smaller one."""
    size = K // zero.shape[1]
    if scheme.bits == 8 and zero.shape[1] == 1 and bool((zero == 128).all()):
        return {"mode": "int8"}
    unit = next((unit for unit in reversed(GROUP_SIZES) if size % unit == 0), None)
    if unit is None:
        raise ValueError(f"{prefix[:-1]} has groups of {size} inputs; what can be read are "
                         f"{', '.join(map(str, GROUP_SIZES))} and multiples; {INSTEAD}")
    kind = {"mode": f"int{scheme.bits}", "group_size": unit}
    return kind if order is None else {**kind, "order": True}


def unpack(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in int32 words (R, W), the lowest bits first: (R, W * 32 / bits) uint8.
    """
    mask = 2 ** bits - 1
    planes = [(words >> shift & mask).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(planes, dim=-1).flatten(1)


def unpack_awq(words: Tensor) -> Tensor:
    """The nibbles in AWQ's int32 words (R, W), in the order of the outputs: (R, W * 8) uint8."""
    nibbles = unpack(words, 4).unflatten(1, (-1, 8))
    return nibbles[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def read_zeros(tensors: dict[str, Tensor], prefix: str, scheme: Scheme, N: int,
               scale: Tensor) -> Tensor:
    """A layer's zeros for unsigned integers, (N, G) int16."""
    middle = 1 << scheme.bits - 1
    if scheme.symmetric:
        return torch.full(scale.shape, middle, dtype=torch.int16)
    name = "qzeros" if scheme.method in ("gptq", "awq") else "weight_zero_point"
    stored = tensors[prefix + name]
    if scheme.method == "gptq":
        one = sum(1 << shift for shift in range(0, 32, scheme.bits))  # in each of a word's integers
        words = stored + one if scheme.less_one == "words" else stored
        return unpack(words, scheme.bits).t().to(torch.int16) + int(scheme.less_one == "each")
    if scheme.method == "awq":
        return unpack_awq(stored).t().to(torch.int16)
    if scheme.method == "pack":
        return unpack(stored.t(), scheme.bits)[:, :N].t().to(torch.int16)
    return stored.to(torch.int16) + middle


def read_order(tensors: dict[str, Tensor], prefix: str, scheme: Scheme, K: int,
               G: int) -> Tensor | None:
    """The numbers of the inputs, group after group, (K,) int32; None if they are in order already.
    Raises ValueError for groups that are out of range or of unequal sizes."""
    name = prefix + ("g_idx" if scheme.method == "gptq" else "weight_g_idx")
    groups = tensors.get(name)
    if groups is None or bool((groups == -1).all()):  # compressed-tensors' way to say no order
        return None
    if groups.shape != (K,) or bool(((groups < 0) | (groups >= G)).any()):
        raise ValueError(f"tensor {name} has to be the groups, 0 to {G - 1}, of {K} inputs")
    if bool((groups.long().bincount(minlength=G) != K // G).any()):
        raise ValueError(f"tensor {name} has groups of unequal sizes, which is not supported; "
                         f"{INSTEAD}")
    order = groups.argsort(stable=True)
    return None if bool((order.diff() == 1).all()) else order.int()


def read_integers(tensors: dict[str, Tensor], layer: PublishedLayer) -> Tensor:
    """A layer's unsigned integers, (N, K) uint8, the inputs in the layer's order."""
    prefix, scheme = layer.prefix, layer.scheme
    if scheme.method == "gptq":
        integers = unpack(tensors[prefix + "qweight"].t(), scheme.bits)
    elif scheme.method == "awq":
        integers = unpack_awq(tensors[prefix + "qweight"]).t()
    elif scheme.method == "pack":
        integers = unpack(tensors[prefix + "weight_packed"], scheme.bits)[:, :layer.K]
    else:
        integers = tensors[prefix + "weight"].view(torch.uint8) ^ 128
    return integers if layer.order is None else integers[:, layer.order]


def decode_layer(tensors: dict[str, Tensor], weight: str, shape: tuple[int, int],
                 schemes: list[Scheme]) -> Iterator[dict[str, Tensor]]:
    """Yield once the tensors that a layer is stored as here (quantize.py). The arguments are those
    of read_layer."""
    layer = read_layer(tensors, weight, shape, schemes)
    kind, integers = layer.kind, read_integers(tensors, layer)
    if kind == {"mode": "int8"}:
        yield {"weight": (integers ^ 128).view(torch.int8), "scale": layer.scale[:, 0]}
        return
    times = layer.K // layer.scale.shape[1] // kind["group_size"]
    scale, zero = (t.repeat_interleave(times, dim=1) for t in (layer.scale, layer.zero))
    if layer.scheme.bits == 8:
        ours = {"weight": (integers ^ 128).view(torch.int8), "scale": scale, "zero": zero - 128}
    else:  # int4, whose zeros are in sixteenths: a zero of 16 needs more than a byte
        dtype = torch.uint8 if bool((zero < 16).all()) else torch.int16
        ours = {"weight": pack_nibbles(integers), "scale": scale,
                "zero": (zero * 16).to(dtype)}
    if layer.order is not None:
        ours["order"] = layer.order
    yield {name: tensor.contiguous() for name, tensor in ours.items()}


# ------------------------------------------------------------------------------ folders


def read_published(raw: dict, tensors: dict[str, Tensor], config: ModelConfig
                   ) -> tuple[dict | None, dict[str, list[Tensor | Encoded]]]:
    """The quantization and the blocks of a published folder's Checkpoint. The quantization is
    {"mode": its method, "group_size": the largest, "layers": the kind of each layer}. Raises
    ValueError naming what is not supported, or a tensor that is missing, misshapen or extra."""
    schemes, layers = read_schemes(raw), model_layers(config)
    blocks, kinds, integers = {}, {}, {}
    for name, parts in hf_parts(config).items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or layer.is_table:  # a norm, a bias or the embedding
            blocks[name] = [tensors.get(part) for part in parts]
            continue
        found = {part: read_layer(tensors, part, shape, schemes) for part, shape in parts.items()}
        # Scales and zeros are read again when a layer is decoded, so that only one's are in memory.
        blocks[name] = [
            Encoded(one.kind, partial(decode_layer, tensors, part, parts[part], schemes)) if one
            else tensors[part] for part, one in found.items()]
        if any(found.values()):
            kinds[name.removesuffix(".weight")] = common_kind(list(found.values()))
        integers |= {part: one.kind for part, one in found.items() if one}
    check_others(tensors, integers, config)
    sizes = [kind["group_size"] for kind in integers.values() if "group_size" in kind]
    quantization = {"mode": raw["quantization_config"]["quant_method"], "layers": kinds,
                    **({"group_size": max(sizes)} if sizes else {})}
    return quantization, blocks


def common_kind(layers: list[PublishedLayer | None]) -> dict | list[dict | None]:
    """The kind of layers with the same input. If their kinds or orders differ, they cannot be
    stacked, and it is a list of one kind for each."""
    kinds = [layer and layer.kind for layer in layers]
    orders = [layer and layer.order for layer in layers]
    same = all(kind == kinds[0] and (order is None or torch.equal(order, orders[0]))
               for kind, order in zip(kinds, orders))
    return kinds[0] if same else kinds


def check_others(tensors: dict[str, Tensor], integers: dict[str, dict],
                 config: ModelConfig) -> None:
    """Check all tensors but those of quantized layers. Raises ValueError naming one that is
    missing, misshapen, extra or no float. integers are the kinds of the quantized layers, by the
    names of their weights."""
    expected = {part: shape for parts in hf_parts(config).values()
                for part, shape in parts.items() if part not in integers}
    others = dict(tensors)
    for part in integers:
        layer = part.removesuffix("weight")
        for suffix in SUFFIXES:
            others.pop(layer + suffix, None)
        bias = layer + "bias"
        if bias not in expected and bias in others and not others[bias].any():
            del others[bias]  # old tools gave every layer a bias of zeros
    check_floats(others, expected)
