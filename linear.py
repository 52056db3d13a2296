"""y = x W^T + b, with W in floating point, int8 or int4, as each device reads it fastest.

One token at a time, a model is as fast as its weights are read, so this is what there is to be fast
at. A GPU's libraries and compiler do it by themselves; most of this file is about CPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In a graph smaller weights stay in rows: reading one for a token takes no longer than calling a
# library does (a model of 135M decodes in 8.0 to 9.9 ms a token with rows, 10.4 to 11.5 packed).
PACKED_BYTES = 1 << 22
MODES, GROUP_SIZES = ("int8", "int4"), (32, 64, 128)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Integers from 0 to 15 (N, K) uint8 as (N, K / 2): the even column in the low four bits."""
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(N, K / 2) uint8 as (N, K): what pack_nibbles packed."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


# ------------------------------------------------------------------------------ kernels

define, implement = torch.library.define, torch.library.impl

# oneDNN's matmul with a weight in its own layout, under a name of ours: inductor (2.11 to 2.13)
# takes the original with constant weights only.
define("gpt_stream::packed_linear", "(Tensor x, Tensor packed, int n) -> Tensor")


@implement("gpt_stream::packed_linear", "default")
def packed_linear_default(x, packed, n):
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.library.register_fake("gpt_stream::packed_linear")
def packed_linear_fake(x, packed, n):
    return x.new_empty(*x.shape[:-1], n)


# PyTorch's CPU kernels under names of our own: what inductor (2.11 to 2.13) does with the originals
# fails for an input that is not in memory yet, and for a group size in a nested compile region.
define("gpt_stream::int8_matmul", "(Tensor x, Tensor weight, Tensor scale) -> Tensor")
define("gpt_stream::int4_matmul",
       "(Tensor x, Tensor weight, int group_size, Tensor scales_and_zeros) -> Tensor")
implement("gpt_stream::int8_matmul", "cpu")(torch._weight_int8pack_mm)
implement("gpt_stream::int4_matmul", "cpu")(torch._weight_int4pack_mm_for_cpu)


@torch.library.register_fake("gpt_stream::int8_matmul")
def int8_matmul_fake(x, weight, scale):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("gpt_stream::int4_matmul")
def int4_matmul_fake(x, weight, group_size, scales_and_zeros):
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


def in_memory(x: Tensor) -> Tensor:
    """x itself; inductor stores it here instead of computing it again wherever it is used."""
    return x.as_strided(x.shape, x.stride())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. In a graph compiled for a CPU, for a chunk of a prompt, W times x transposed: the
    library then need not lay W out anew (32 tokens: 2.3 ms instead of 3.7)."""
    tokens = x.numel() // x.shape[-1]
    if x.is_cuda or not torch.compiler.is_compiling() or not 12 <= tokens <= 512:
        return F.linear(x, weight, bias)
    y = (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def is_row(x: Tensor) -> bool:
    """Whether this is one token in a graph compiled for a CPU."""
    return x.numel() == x.shape[-1] and not x.is_cuda and torch.compiler.is_compiling()


def row_times_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, 1, K) times weight (N, K) transposed, -> (1, 1, N) float32, for inductor: it makes one
    pass over W of a product and a sum, twice as fast as the library's matmul of one row.

    x has to be in memory, and in float32, or what computes it would be fused in and computed again
    for every row. Reading several parts of W side by side and adding rows up in pieces keeps more
    of the memory busy: 0.95 of its speed instead of 0.85 (over 4096 terms inductor's sum is slower,
    too). How many was measured: four parts of int8, two of bf16."""
    K = weight.shape[1]
    pieces = next(n for n in range(min(2, K), K + 1) if K % n == 0 and K // n <= 4096)
    x = in_memory(x.reshape(-1).float())
    sums = [(part.float() * x).view(-1, pieces, K // pieces).sum(-1)
            for part in weight.chunk(max(1, 4 // weight.itemsize))]
    return torch.cat(sums).sum(-1)[None, None]


# ------------------------------------------------------------------------------ modules


class Linear(nn.Linear):
    """y = x W^T + b."""

    packed = False

    def pack(self) -> None:
        """Lay W out as oneDNN likes it, where there is oneDNN. It then reads W at the speed of the
        memory for one token and, what a layout in rows does not allow, for eight."""
        dtype = self.weight.dtype
        if self.packed or not torch.backends.mkldnn.is_available():
            return
        if dtype == torch.float32 or (
                dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, None)
            self.weight, self.packed = nn.Parameter(packed, requires_grad=False), True

    def unpack(self) -> None:
        """Lay W out in rows again."""
        if self.packed:
            self.weight, self.packed = nn.Parameter(self.weight.to_dense(), False), False

    def __getstate__(self) -> dict:
        """What a copy takes: W in rows. Layouts of oneDNN's cannot be copied, or trained."""
        if not self.packed:
            return self.__dict__
        rows = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return {**self.__dict__, "packed": False, "_parameters": {**self._parameters,
                                                                  "weight": rows}}

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            y = torch.ops.gpt_stream.packed_linear(x, self.weight, self.out_features)
        elif is_row(x):
            y = row_times_matrix(x, self.weight).type_as(x)
        else:
            return linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """The inputs x (..., K) in the order in which a weight's groups of columns are stored."""
    return x if order is None else x.index_select(-1, order)


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


class GroupedInt8Linear(nn.Module):
    """y = x W^T + b with W in int8, in groups of columns with a scale and a zero each, as others
    publish it."""

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.int16))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = reorder(x, self.order)
        if is_row(x):
            groups = self.scale.shape[1]
            row = in_memory(x.reshape(-1).float())
            sums = (self.weight.float() * row).view(len(self.weight), groups, -1).sum(-1)  # (N, G)
            sums = sums - self.zero.float() * row.view(groups, -1).sum(-1)
            y = (sums * self.scale).sum(-1)[None, None].type_as(x)
        else:  # 1024 rows at a time, as above
            size = len(self.weight) if x.is_cuda else 1024
            parts = zip(*(t.split(size) for t in (self.weight, self.scale, self.zero)))
            y = torch.cat([linear(x, self.unpack(*part).type_as(x)) for part in parts], dim=-1)
        return y if self.bias is None else y + self.bias

    def unpack(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        groups = weight.float().unflatten(1, (scale.shape[1], -1))
        return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


class Int8Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * self.scale[tokens][..., None]


class Int4Linear(nn.Module):
    """y = x W^T + b with W in int4, as it is stored until `pack` lays it out for the device."""

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.uint8))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the stored tensors out for the device's kernel, which computes
        (nibble - 8) * scale + zero in the given dtype."""
        zero = (8 - self.zero / 16) * self.scale
        both = torch.stack([self.scale, zero], dim=-1).transpose(0, 1)  # (K / g, N, 2)
        self.register_buffer("scales_and_zeros", both.to(dtype).contiguous())
        if self.weight.is_cuda:  # wants the even column in the high four bits
            swapped = self.weight << 4 | self.weight >> 4
            K = 2 * self.weight.shape[1]
            tiles = next(tiles for tiles in (8, 4, 2) if K % (16 * tiles) == 0)
            self.weight = torch._convert_weight_to_int4pack(swapped, tiles)
        else:
            nibbles = unpack_nibbles(self.weight).int()
            self.weight = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        del self.scale, self.zero

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch._weight_int4pack_mm if x.is_cuda else torch.ops.gpt_stream.int4_matmul
        rows = reorder(x, self.order).flatten(0, -2).contiguous()
        y = kernel(rows, self.weight, self.group_size, self.scales_and_zeros)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class SideBySide(nn.ModuleList):
    """Layers of one input whose outputs are one: q, k and v that were quantized in different ways,
    or in different orders."""

    def __init__(self, parts: list[nn.Module], bias: int | None):
        super().__init__(parts)
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self], dim=-1)
        return y if self.bias is None else y + self.bias


def quantized(name: str, plain: nn.Module, kind: dict | list | None, rows: list[int]) -> nn.Module:
    """What stands in a plain layer's place: kind is {"mode", "group_size", "order"}, or a list of
    one for each of the layers that it stacks, which have these numbers of rows; None leaves it.
    Raises ValueError naming the layer and a size that cannot be."""
    if isinstance(plain, nn.Embedding):
        return Int8Embedding(plain.num_embeddings, plain.embedding_dim)
    N, K, bias = plain.out_features, plain.in_features, plain.bias is not None
    if isinstance(kind, list):
        parts = [quantized(f"{name}.{i}", Linear(K, n, bias=False), part, [n])
                 for i, (part, n) in enumerate(zip(kind, rows))]
        return SideBySide(parts, N if bias else None)
    if kind is None:
        return plain
    kind = kind if isinstance(kind, dict) else {"mode": kind}
    mode, group_size, order = kind.get("mode"), kind.get("group_size"), kind.get("order", False)
    if mode not in MODES or isinstance(group_size, float) or group_size not in (
            GROUP_SIZES if mode == "int4" else (None, *GROUP_SIZES)):
        raise ValueError(f"quantization {kind} is unknown; it is int8, or int4 with group_size "
                         f"{', '.join(map(str, GROUP_SIZES))}")
    if group_size and K % group_size:
        raise ValueError(
            f"group size {group_size} does not divide the {K} inputs of {name}; "
            f"of {GROUP_SIZES} {[g for g in GROUP_SIZES if K % g == 0] or 'none'} would")
    if mode == "int8":
        return (GroupedInt8Linear(K, N, bias, group_size, order) if group_size
                else Int8Linear(K, N, bias))
    if N % 16:
        raise ValueError(f"int4 needs outputs in 16s; {name} has {N}; use int8")
    return Int4Linear(K, N, bias, group_size, order)


def check_types(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError naming a tensor that holds another kind of numbers than the model's, or an
    order of columns that is none."""
    for name, empty in model.state_dict().items():
        if (tensor := weights.get(name)) is None:
            continue  # tied
        whole = not empty.is_floating_point() and not name.endswith(".zero")  # of two widths
        if tensor.is_floating_point() != empty.is_floating_point() or (
                whole and tensor.dtype != empty.dtype):
            raise ValueError(f"tensor {name} holds {tensor.dtype}; it must be {empty.dtype}")
        if name.endswith(".order") and not torch.equal(
                tensor.sort().values.cpu(), torch.arange(len(tensor), dtype=tensor.dtype)):
            raise ValueError(f"tensor {name} is no order of {len(tensor)} columns")
