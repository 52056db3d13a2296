"""The layers that store W and compute y = x W^T + b, in floating point, int8 or int4, each laid out
as its device reads it fastest (`pack`). linear.py computes the product.

Shapes: x (..., K), W (N, K), y (..., N). A group is group_size columns of a row of W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linear import (
    KINDS,
    LANES,
    ONEDNN,
    PACKED,
    ROWS,
    WORDS,
    layout_of,
    product,
    to_lanes,
    unpack_nibbles,
)

MODES, GROUP_SIZES = ("int8", "int4"), (32, 64, 128)


class Linear(nn.Linear):
    """y = x W^T + b with W in floating point."""

    layout = ROWS  # of `weight`

    def pack(self, compiled: bool, shared: bool = False) -> None:
        """Lay W out as a CPU reads it fastest. `shared` says that it is another layer's, too."""
        layout = layout_of(KINDS[self.weight.dtype], self.weight, compiled, shared)
        if layout == ONEDNN != self.layout and torch.backends.mkldnn.is_available():
            try:
                packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, None)
            except RuntimeError:  # oneDNN has no such product here: the table is another machine's
                return
            self.weight, self.layout = nn.Parameter(packed, requires_grad=False), ONEDNN

    def unpack(self) -> None:
        """Put W into rows again."""
        if self.layout == ONEDNN:
            self.weight, self.layout = nn.Parameter(self.weight.to_dense(), False), ROWS

    def __getstate__(self) -> dict:
        """The state of a copy, with W in rows: a tensor in oneDNN's layout cannot be copied."""
        if self.layout == ROWS:
            return self.__dict__
        rows = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return {**self.__dict__, "layout": ROWS, "_parameters": {**self._parameters,
                                                                 "weight": rows}}

    def forward(self, x: Tensor) -> Tensor:
        function = product(KINDS[x.dtype], self.layout, x)
        y = function(x, self.weight)
        return y if self.bias is None else y + self.bias


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """The inputs x (..., K) in the order of W's stored columns; None leaves them as they are."""
    return x if order is None else x.index_select(-1, order)


def put_in_lanes(layer: nn.Module, integers: Tensor, zero: Tensor) -> None:
    """Lay a layer's W out for lane_sums. integers are unsigned, (N, bytes of a row), and zero is
    theirs. The highest bit of each word is inverted, so the last integer's is a sign."""
    words = integers.view(torch.int32).unflatten(1, (zero.shape[1], -1)) ^ -2**31  # (N, G, m)
    layer.weight = to_lanes(words).view(torch.float32)
    layer.scale, layer.zero, layer.layout = to_lanes(layer.scale), to_lanes(zero.float()), LANES


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8, and a scale for each row."""

    layout = ROWS  # of `weight`

    def __init__(self, K: int, N: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def pack(self, compiled: bool) -> None:
        """View W as a CPU reads it fastest. The bytes stay what and where they are."""
        whole = self.weight.shape[1] % 4 == 0 and self.weight.storage_offset() % 4 == 0
        if layout_of("int8", self.weight, compiled) == WORDS != self.layout and whole:
            self.weight, self.layout = self.weight.view(torch.float32), WORDS

    def unpack(self) -> None:
        """View W as int8 again."""
        self.weight, self.layout = self.weight.view(torch.int8), ROWS

    def forward(self, x: Tensor) -> Tensor:
        y = product("int8", self.layout, x)(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class GroupedInt8Linear(nn.Module):
    """y = x W^T + b with W in int8, and a scale and a zero for each group of columns, a format of
    published checkpoints. `order` is the order of the columns, where it is not the inputs'."""

    layout = ROWS  # of `weight`

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.int16))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def pack(self, compiled: bool) -> None:
        """Lay W out as a CPU reads it fastest."""
        layout = layout_of("grouped_int8", self.weight, compiled)
        if layout == LANES != self.layout and len(self.weight) % 16 == 0:
            put_in_lanes(self, self.weight ^ -128, self.zero + 128)

    def forward(self, x: Tensor) -> Tensor:
        x = reorder(x, self.order)
        y = product("grouped_int8", self.layout, x)(x, self.weight, self.scale, self.zero)
        return y if self.bias is None else y + self.bias


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

    layout = ROWS  # of `weight`

    def __init__(self, K: int, N: int, bias: bool, group_size: int, order: bool = False):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(N, K // group_size))
        self.register_buffer("zero", torch.empty(N, K // group_size, dtype=torch.uint8))
        self.register_buffer("order", torch.empty(K, dtype=torch.int32) if order else None)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def pack(self, dtype: torch.dtype, compiled: bool = False) -> None:
        """Lay W out as the device reads it fastest: in lanes, or for the device's kernel, which
        computes (nibble - 8) * scale + zero in the given dtype. A layer that is laid out stays so.
        """
        if self.layout != ROWS:
            return
        self.layout = layout_of("int4", self.weight, compiled)
        if self.layout == LANES:
            put_in_lanes(self, self.weight, self.zero / 16)
            return
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
        x, function = reorder(x, self.order), product("int4", self.layout, x)
        if self.layout == PACKED:
            y = function(x, self.weight, self.group_size, self.scales_and_zeros)
        else:
            y = function(x, self.weight, self.scale, self.zero)
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
