"""Models as people publish them: GPTQ, AWQ and compressed-tensors folders, read as they are.

All of them store integers, and a scale and a zero for each group of inputs of an output:

    w = (integer - zero) * scale

which is what int4 and int8 are here (quantize.py), so every stored integer stays what it is. What
differs is where the bits lie, K inputs and N outputs, G groups, `bits` 4 or 8, in words of int32:

    gptq                qweight (K bits / 32, N), qzeros (G, N bits / 32), scales (G, N), and
                        g_idx (K,), the group of every input: in activation order they are mixed,
                        and the inputs are put in the order of their groups here. The zeros are
                        stored less one (checkpoint_format gptq: a zero of 16 can be), or whole
                        (gptq_v2)
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
from formats.config import check_tensors, hf_parts, model_layers
from linear import GROUP_SIZES, pack_nibbles
from model import ModelConfig

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds
TENSORS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape",
           "weight_zero_point", "weight_g_idx", "weight")
INSTEAD = "use the unquantized checkpoint, with --quantize int8 or int4"


class Way(NamedTuple):
    """One way in which a folder's layers are stored."""

    method: str  # gptq, awq, pack (compressed-tensors' pack-quantized) or int8 (its int-quantized)
    bits: int
    group_size: int  # -1: all inputs are one group
    symmetric: bool = False  # compressed-tensors: there are no zeros then
    ordered: bool = False  # there is a g_idx
    less_one: str = ""  # GPTQ takes one off "each" zero, GPTQModel off their "words", with borrows


class Layer(NamedTuple):
    """A layer as it was published, all but its integers."""

    prefix: str  # of its tensors' names
    way: Way
    K: int
    kind: dict  # what it is here, for quantize.empty_model
    scale: Tensor  # (N, G) float32
    zero: Tensor  # (N, G) int16
    order: Tensor | None  # (K,) int32, where the inputs have to be put in another order


# ------------------------------------------------------------------------------ configuration


def read_ways(raw: dict) -> list[Way]:
    """The ways in which a folder's layers may be stored, from its quantization_config. Raises
    ValueError naming what is not supported, and what would do."""
    readers = {"gptq": gptq_ways, "awq": awq_ways, "compressed-tensors": compressed_ways}
    try:
        theirs = raw["quantization_config"]
        method = theirs.get("quant_method", "unknown")
        if method not in readers:
            raise Unsupported(f"quant_method {method!r}")
        if not (ways := readers[method](theirs)):
            raise Unsupported("an empty config_groups")
        for way in ways:
            if type(way.bits) is not int or way.bits not in ((4,) if way.method == "awq" else
                                                             (4, 8)):
                raise Unsupported(f"{method} with {way.bits} bits")
            if type(way.group_size) is not int or way.group_size < 1 and way.group_size != -1:
                raise Unsupported(f"group_size {way.group_size!r}")
    except Unsupported as what:
        raise ValueError(f"quantization_config: {what} is not supported (integers of 4 "
                         f"and 8 bits by {', '.join(readers)} are); {INSTEAD}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"quantization_config is damaged: {error!r}") from None
    return ways


class Unsupported(Exception):
    """What a quantization_config asks for and this does not read."""


def gptq_ways(theirs: dict) -> list[Way]:
    layout = theirs.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2") or theirs.get("is_marlin_format"):
        raise Unsupported(f"checkpoint_format {'marlin' if layout == 'gptq' else layout!r}")
    if theirs.get("pack_dtype", "int32") != "int32":
        raise Unsupported(f"pack_dtype {theirs['pack_dtype']!r}")
    by = str((theirs.get("meta") or {}).get("quantizer"))
    less_one = "" if layout == "gptq_v2" else "words" if "gptqmodel" in by else "each"
    # "dynamic" maps patterns of names to settings of their own, or with "-:" leaves layers as
    # they were.
    settings = [theirs] + [{**theirs, **own} for name, own in (theirs.get("dynamic") or {}).items()
                           if not name.startswith("-")]
    return [Way("gptq", s["bits"], s["group_size"], ordered=bool(s.get("desc_act")),
                less_one=less_one) for s in settings]


def awq_ways(theirs: dict) -> list[Way]:
    version = str(theirs.get("version", theirs.get("checkpoint_format", "gemm"))).lower()
    if version != "gemm":
        raise Unsupported(f"awq's version {version!r}")
    get = theirs.get  # an older spelling has w_bit and q_group_size
    return [Way("awq", get("bits", get("w_bit")), get("group_size", get("q_group_size")))]


def compressed_ways(theirs: dict) -> list[Way]:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = theirs.get(key)
        if value and not (key == "sparsity_config" and value.get("format") == "dense"):
            raise Unsupported(key)
    ways = []
    for group in theirs["config_groups"].values():
        weights, layout = group["weights"], group.get("format") or theirs["format"]
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
        ways.append(Way("pack" if packed else "int8", weights["num_bits"],
                        weights["group_size"] if strategy == "group" else -1,
                        symmetric=weights.get("symmetric", True),
                        ordered=weights.get("actorder") == "group"))
    return ways


# ------------------------------------------------------------------------------ layers


def expected(way: Way, N: int, K: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors, by the last part of their names."""
    G = 1 if way.group_size == -1 else K // way.group_size

    def words(n):  # of n integers
        return -(-n * way.bits // 32)

    shapes = {
        "gptq": {"qweight": (words(K), N), "qzeros": (G, words(N)), "scales": (G, N)},
        "awq": {"qweight": (K, words(N)), "qzeros": (G, words(N)), "scales": (G, N)},
        "pack": {"weight_packed": (N, words(K)), "weight_scale": (N, G),
                 "weight_zero_point": (words(N), G)},
        "int8": {"weight": (N, K), "weight_scale": (N, G), "weight_zero_point": (N, G)},
    }[way.method]
    if way.symmetric:
        shapes.pop("weight_zero_point")
    if way.ordered:
        shapes["g_idx" if way.method == "gptq" else "weight_g_idx"] = (K,)
    return shapes


def misfit(tensors: dict[str, Tensor], prefix: str, N: int, K: int, way: Way) -> str | None:
    """What is wrong with the first tensor of a layer that is not as this way has it."""
    if way.group_size > 0 and K % way.group_size:
        return f"group size {way.group_size} does not divide the {K} inputs of {prefix[:-1]}"
    for name, shape in expected(way, N, K).items():
        if (tensor := tensors.get(prefix + name)) is None:
            return f"tensor {prefix}{name} is missing"
        dtypes = ((torch.float16, torch.bfloat16, torch.float32) if "scale" in name
                  else (torch.int8,) if way.method == "int8" else (torch.int32,))
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            return (f"tensor {prefix}{name} is {tuple(tensor.shape)} of {tensor.dtype}; the "
                    f"quantization_config asks for {shape} of {dtypes[0]}")
    zeros = tensors.get(prefix + "weight_zero_point")
    if way.symmetric and zeros is not None and zeros.any():
        return f"tensor {prefix}weight_zero_point is not zero; the quantization_config is symmetric"
    return None


def open_layer(tensors: dict[str, Tensor], prefix: str, N: int, K: int,
               ways: list[Way]) -> Layer | None:
    """A layer of N outputs and K inputs whose tensors' names begin with prefix, or None if it is
    stored in floating point. Raises ValueError naming a tensor that is not as it should be."""
    plain = tensors.get(prefix + "weight")
    if plain is not None and plain.is_floating_point():
        return None
    misfits = [misfit(tensors, prefix, N, K, way) for way in ways]
    if None not in misfits:
        raise ValueError(misfits[0])
    way = ways[misfits.index(None)]
    name = prefix + ("scales" if way.method in ("gptq", "awq") else "weight_scale")
    scale = tensors[name].float()
    if not scale.isfinite().all():
        raise ValueError(f"tensor {name} has NaN or infinite values")
    if way.method in ("gptq", "awq"):
        scale = scale.t().contiguous()
    zero = read_zeros(tensors, prefix, way, N, scale)
    order = read_order(tensors, prefix, way, K, scale.shape[1])
    return Layer(prefix, way, K, our_kind(prefix, way, K, zero, order), scale, zero, order)


def our_kind(prefix: str, way: Way, K: int, zero: Tensor, order: Tensor | None) -> dict:
    """What a layer is here. Groups that are larger than the kernels' are several with one scale."""
    size = K // zero.shape[1]
    if way.bits == 8 and zero.shape[1] == 1 and bool((zero == 128).all()):
        return {"mode": "int8"}
    unit = next((unit for unit in reversed(GROUP_SIZES) if size % unit == 0), None)
    if unit is None:
        raise ValueError(f"{prefix[:-1]} has groups of {size} inputs; what can be read are "
                         f"{', '.join(map(str, GROUP_SIZES))} and multiples; {INSTEAD}")
    kind = {"mode": f"int{way.bits}", "group_size": unit}
    return kind if order is None else {**kind, "order": True}


def unpack(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in int32 words (R, W), lowest bits first: uint8 (R, W * 32 / bits)."""
    mask = 2 ** bits - 1
    planes = [(words >> shift & mask).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(planes, dim=-1).flatten(1)


def unpack_awq(words: Tensor) -> Tensor:
    """unpack, with the eight nibbles of a word in their outputs' order."""
    nibbles = unpack(words, 4).unflatten(1, (-1, 8))
    return nibbles[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def read_zeros(tensors: dict[str, Tensor], prefix: str, way: Way, N: int, scale: Tensor) -> Tensor:
    """(N, G) int16, on the scale of unsigned integers."""
    middle = 1 << way.bits - 1
    if way.symmetric:
        return torch.full(scale.shape, middle, dtype=torch.int16)
    stored = tensors[prefix + ("qzeros" if way.method in ("gptq", "awq") else "weight_zero_point")]
    if way.method == "gptq":
        one = sum(1 << shift for shift in range(0, 32, way.bits))  # in every place of a word
        words = stored + one if way.less_one == "words" else stored
        return unpack(words, way.bits).t().to(torch.int16) + int(way.less_one == "each")
    if way.method == "awq":
        return unpack_awq(stored).t().to(torch.int16)
    if way.method == "pack":
        return unpack(stored.t(), way.bits)[:, :N].t().to(torch.int16)
    return stored.to(torch.int16) + middle


def read_order(tensors: dict[str, Tensor], prefix: str, way: Way, K: int, G: int) -> Tensor | None:
    """The inputs' numbers, (K,) int32, group after group; None where they stand so."""
    name = prefix + ("g_idx" if way.method == "gptq" else "weight_g_idx")
    groups = tensors.get(name)
    if groups is None or bool((groups == -1).all()):  # compressed-tensors: no order
        return None
    if groups.shape != (K,) or bool(((groups < 0) | (groups >= G)).any()):
        raise ValueError(f"tensor {name} has to be the groups, 0 to {G - 1}, of {K} inputs")
    if bool((groups.long().bincount(minlength=G) != K // G).any()):
        raise ValueError(f"tensor {name} has groups of unequal sizes, which is not supported; "
                         f"{INSTEAD}")
    order = groups.argsort(stable=True)
    return None if bool((order.diff() == 1).all()) else order.int()


def read_integers(tensors: dict[str, Tensor], layer: Layer) -> Tensor:
    """(N, K) uint8, the inputs in the layer's order."""
    prefix, way = layer.prefix, layer.way
    if way.method == "gptq":
        integers = unpack(tensors[prefix + "qweight"].t(), way.bits)
    elif way.method == "awq":
        integers = unpack_awq(tensors[prefix + "qweight"]).t()
    elif way.method == "pack":
        integers = unpack(tensors[prefix + "weight_packed"], way.bits)[:, :layer.K]
    else:
        integers = tensors[prefix + "weight"].view(torch.uint8) ^ 128
    return integers if layer.order is None else integers[:, layer.order]


def our_tensors(tensors: dict[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """What a layer is stored as here: see quantize.py."""
    kind, integers = layer.kind, read_integers(tensors, layer)
    if kind == {"mode": "int8"}:
        return {"weight": (integers ^ 128).view(torch.int8), "scale": layer.scale[:, 0]}
    times = layer.K // layer.scale.shape[1] // kind["group_size"]
    scale, zero = (t.repeat_interleave(times, dim=1) for t in (layer.scale, layer.zero))
    if layer.way.bits == 8:
        ours = {"weight": (integers ^ 128).view(torch.int8), "scale": scale, "zero": zero - 128}
    else:  # a zero of 16 does not fit into a byte in sixteenths
        dtype = torch.uint8 if bool((zero < 16).all()) else torch.int16
        ours = {"weight": pack_nibbles(integers), "scale": scale,
                "zero": (zero * 16).to(dtype)}
    if layer.order is not None:
        ours["order"] = layer.order
    return {name: tensor.contiguous() for name, tensor in ours.items()}


# ------------------------------------------------------------------------------ folders


def read_published(raw: dict, tensors: dict[str, Tensor], config: ModelConfig
                   ) -> tuple[dict | None, dict[str, list[Tensor | Encoded]]]:
    """What a Checkpoint says of a published folder: its quantization, {"mode": its method,
    "group_size": the largest, "layers": a kind for each}, and its blocks, by our names. Raises
    ValueError naming what is not supported, or a tensor that is not as it should be."""
    schemes, layers = read_ways(raw), model_layers(config)
    blocks, kinds, integers = {}, {}, {}
    for name, parts in hf_parts(config).items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or layer.is_table:  # a norm, a bias or the embedding
            blocks[name] = [tensors.get(part) for part in parts]
            continue
        found = {part: open_layer(tensors, part.removesuffix("weight"), *shape, schemes)
                 for part, shape in parts.items()}
        blocks[name] = [Encoded(one.kind, partial(decode_layer, tensors, one)) if one
                        else tensors[part] for part, one in found.items()]
        if any(found.values()):
            kinds[name.removesuffix(".weight")] = stacked_kind(list(found.values()))
        integers |= {part: one for part, one in found.items() if one}
    check_rest(tensors, integers, config)
    sizes = [one.kind["group_size"] for one in integers.values() if "group_size" in one.kind]
    quantization = {"mode": raw["quantization_config"]["quant_method"], "layers": kinds,
                    **({"group_size": max(sizes)} if sizes else {})}
    return quantization, blocks


def decode_layer(tensors: dict[str, Tensor], layer: Layer) -> Iterator[dict[str, Tensor]]:
    yield our_tensors(tensors, layer)


def stacked_kind(layers: list[Layer | None]) -> dict | list[dict | None]:
    """The kind of layers of one input that can be stacked, or a list of one for each."""
    kinds = [layer and layer.kind for layer in layers]
    orders = [layer and layer.order for layer in layers]
    same = all(kind == kinds[0] and (order is None or torch.equal(order, orders[0]))
               for kind, order in zip(kinds, orders))
    return kinds[0] if same else kinds


def check_rest(tensors: dict[str, Tensor], integers: dict[str, Layer], config: ModelConfig) -> None:
    """Raises ValueError naming a tensor in floating point that is missing or misshapen, or one that
    belongs to nothing. integers are the layers that are not in floating point, by the names that
    their weights would have."""
    expected = {part: shape for parts in hf_parts(config).values()
                for part, shape in parts.items() if part not in integers}
    rest = dict(tensors)
    for part in integers:
        layer = part.removesuffix("weight")
        for last in TENSORS:
            rest.pop(layer + last, None)
        bias = layer + "bias"
        if bias not in expected and bias in rest and not rest[bias].any():
            del rest[bias]  # old tools gave every layer one, of zeros
    check_tensors({name: tensor.shape for name, tensor in rest.items()}, expected)
