"""y = x W^T + b with W in floating point, int8 or int4, laid out as the device reads it fastest.

A model that decodes one token at a time is as fast as its weights are read from memory. On a GPU
the libraries and the compiler see to that; most of this file is for CPUs.

Shapes: x (..., K), W (N, K), y (..., N). A group is group_size columns of a row of W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smaller weights stay in rows: to read one takes less time than to call oneDNN does.
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

# oneDNN's matmul with a weight in its own layout. It has a name of ours because inductor (2.11 to
# 2.13) accepts the original with constant weights only.
define("gpt_stream::packed_linear", "(Tensor x, Tensor packed, int n) -> Tensor")


@implement("gpt_stream::packed_linear", "default")
def packed_linear_default(x, packed, n):
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.library.register_fake("gpt_stream::packed_linear")
def packed_linear_fake(x, packed, n):
    return x.new_empty(*x.shape[:-1], n)


# PyTorch's CPU kernels. They have names of ours because inductor (2.11 to 2.13) fails on the
# originals, for an input that is not in memory and for a group size in a nested compile region.
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


def materialize(x: Tensor) -> Tensor:
    """x itself. Inductor writes it to memory here and does not compute it again at every use."""
    return x.as_strided(x.shape, x.stride())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. For a chunk of a prompt, in a graph compiled for a CPU, it is W x^T: for x W^T the
    library would first copy W into another layout."""
    tokens = x.numel() // x.shape[-1]
    if not torch.compiler.is_compiling() or not 12 <= tokens <= 512:
        return F.linear(x, weight, bias)
    y = (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def gpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear on a GPU. Where inductor writes the product itself, it would compute x again for
    every few rows of W, unless x is in memory."""
    return F.linear(materialize(x), weight, bias)


def int8_gpu_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T on a GPU, with W in int8. A cast to x's dtype is exact, and inductor fuses it with the
    product (load.gpu_options): W is read as it is stored, and no copy of it is written."""
    return (gpu_linear(x, weight.to(x.dtype)) * scale).type_as(x)


def is_single_token(x: Tensor) -> bool:
    """Whether x is one token, in a graph compiled for a CPU."""
    return x.numel() == x.shape[-1] and not x.is_cuda and torch.compiler.is_compiling()


def matvec(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, 1, K) times W (N, K) transposed -> (1, 1, N) float32. Inductor makes one pass over W
    of it, a product and a sum, which is faster than a library's matmul of one row.

    Several parts of W are read side by side and each row is summed in pieces, since that keeps
    more of the memory busy. Inductor's sum is also slower over more than 4096 terms."""
    K = weight.shape[1]
    # The fewest pieces, at least two, that are equal and have at most 4096 terms.
    pieces = next(n for n in range(min(2, K), K + 1) if K % n == 0 and K // n <= 4096)
    # In memory, or inductor would fuse what computes x and compute it again for every row of W.
    x = materialize(x.reshape(-1).float())  # (K,)
    n_parts = max(1, 4 // weight.itemsize)  # four of int8, two of bf16: the fastest where measured
    sums = [(part.float() * x).view(-1, pieces, K // pieces).sum(-1)
            for part in weight.chunk(n_parts)]  # (N / n_parts, pieces) each
    return torch.cat(sums).sum(-1)[None, None]


# ------------------------------------------------------------------------------ modules


class Linear(nn.Linear):
    """y = x W^T + b with W in floating point."""

    packed = False  # whether `weight` is in oneDNN's layout

    def pack(self) -> None:
        """Put W into oneDNN's own layout, where PyTorch has oneDNN and it supports the dtype. It
        then reads W at the memory's speed, for one token and for several."""
        dtype = self.weight.dtype
        if self.packed or not torch.backends.mkldnn.is_available():
            return
        if dtype == torch.float32 or (
                dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, None)
            self.weight, self.packed = nn.Parameter(packed, requires_grad=False), True

    def unpack(self) -> None:
        """Put W into rows again."""
        if self.packed:
            self.weight, self.packed = nn.Parameter(self.weight.to_dense(), False), False

    def __getstate__(self) -> dict:
        """The state of a copy, with W in rows: a tensor in oneDNN's layout cannot be copied."""
        if not self.packed:
            return self.__dict__
        rows = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return {**self.__dict__, "packed": False, "_parameters": {**self._parameters,
                                                                  "weight": rows}}

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            y = torch.ops.gpt_stream.packed_linear(x, self.weight, self.out_features)
        elif is_single_token(x):
            y = matvec(x, self.weight).type_as(x)
        elif x.is_cuda:
            return gpu_linear(x, self.weight, self.bias)
        else:
            return linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """The inputs x (..., K) in the order of W's stored columns; None leaves them as they are."""
    return x if order is None else x.index_select(-1, order)


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8, and a scale for each row."""

    def __init__(self, K: int, N: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() // x.shape[-1] <= 16  # tokens; for more, it is faster to dequantize W first
        if is_single_token(x):
            y = (matvec(x, self.weight) * self.scale).type_as(x)
        elif x.is_cuda:
            y = int8_gpu_linear(x, self.weight, self.scale)
        elif few:
            y = torch.ops.gpt_stream.int8_matmul(x.flatten(0, -2).contiguous(), self.weight,
                                                 self.scale.type_as(x))
            y = y.unflatten(0, x.shape[:-1])
        else:  # 1024 dequantized rows at a time stay in a CPU's caches until they are used
            parts = self.weight.split(1024)
            y = torch.cat([linear(x, part.float().type_as(x)) for part in parts], dim=-1)
            y = (y * self.scale).type_as(x)
        return y if self.bias is None else y + self.bias


class GroupedInt8Linear(nn.Module):
    """y = x W^T + b with W in int8, and a scale and a zero for each group of columns, a format of
    published checkpoints. `order` is the order of the columns, where it is not the inputs'."""

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.int16))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = reorder(x, self.order)
        if is_single_token(x):
            groups = self.scale.shape[1]
            row = materialize(x.reshape(-1).float())
            sums = (self.weight.float() * row).view(len(self.weight), groups, -1).sum(-1)  # (N, G)
            sums = sums - self.zero.float() * row.view(groups, -1).sum(-1)
            y = (sums * self.scale).sum(-1)[None, None].type_as(x)
        else:  # 1024 rows at a time, as in Int8Linear
            size = len(self.weight) if x.is_cuda else 1024
            parts = zip(*(t.split(size) for t in (self.weight, self.scale, self.zero)))
            y = torch.cat([linear(x, self.dequantize(*part).type_as(x)) for part in parts], dim=-1)
        return y if self.bias is None else y + self.bias

    def dequantize(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Rows of W in float32, for these rows of the three tensors."""
        groups = weight.float().unflatten(1, (scale.shape[1], -1))
        return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


class Int8Embedding(nn.Module):
    """An embedding in int8, with a scale for each token."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(vocab_size, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * self.scale[tokens][..., None]


class Int4Linear(nn.Module):
    """y = x W^T + b with W in int4, and a scale and a zero for each group of columns. The tensors
    are as they are stored, two nibbles a byte, until `pack`."""

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.uint8))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def pack(self, dtype: torch.dtype) -> None:
        """Put the stored tensors into the layout of the device's kernel, which computes
        (nibble - 8) * scale + zero in the given dtype."""
        zero = (8 - self.zero / 16) * self.scale
        both = torch.stack([self.scale, zero], dim=-1).transpose(0, 1)  # (K / g, N, 2)
        self.register_buffer("scales_and_zeros", both.to(dtype).contiguous())
        if self.weight.is_cuda:  # its kernel expects the even column in the high four bits
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


class ConcatLinear(nn.ModuleList):
    """Layers of one input whose outputs are concatenated: q, k and v that were quantized in
    different ways, or whose columns are in different orders."""

    def __init__(self, parts: list[nn.Module], bias: int | None):
        super().__init__(parts)
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self], dim=-1)
        return y if self.bias is None else y + self.bias


def quantized(name: str, plain: nn.Module, kind: dict | list | None, rows: list[int]) -> nn.Module:
    """The empty quantized layer that replaces a plain one. kind is its quantization, a dict of
    "mode", "group_size" and "order"; None leaves the layer in floating point. A list has one kind
    for each layer that it stacks (q, k, v), and `rows` says how many rows each has. Raises
    ValueError naming the layer and a size that its kind does not allow."""
    if isinstance(plain, nn.Embedding):
        return Int8Embedding(plain.num_embeddings, plain.embedding_dim)
    N, K, bias = plain.out_features, plain.in_features, plain.bias is not None
    if isinstance(kind, list):
        parts = [quantized(f"{name}.{i}", Linear(K, n, bias=False), part, [n])
                 for i, (part, n) in enumerate(zip(kind, rows))]
        return ConcatLinear(parts, N if bias else None)
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
    """Raises ValueError naming a tensor whose dtype is not the model's, or an order of columns that
    is no permutation. Any floating-point dtype will do for another."""
    for name, empty in model.state_dict().items():
        if (tensor := weights.get(name)) is None:
            continue  # tied, so stored under another name
        # Integers must have the model's very dtype, but zeros are stored in two widths.
        exact = not empty.is_floating_point() and not name.endswith(".zero")
        if tensor.is_floating_point() != empty.is_floating_point() or (
                exact and tensor.dtype != empty.dtype):
            raise ValueError(f"tensor {name} holds {tensor.dtype}; it must be {empty.dtype}")
        if name.endswith(".order") and not torch.equal(
                tensor.sort().values.cpu(), torch.arange(len(tensor), dtype=tensor.dtype)):
            raise ValueError(f"tensor {name} is no order of {len(tensor)} columns")
