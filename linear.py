"""How x W^T is computed, with W in floating point, int8 or int4: one table says it (TABLE).

A model that decodes one token at a time is as fast as its weights are read from memory. On a GPU
the libraries and the compiler see to that; most of this file is for CPUs. layers.py has the modules
that store W.

Shapes: x (..., K), W (N, K), y (..., N). A group is group_size columns of a row of W.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 1 << 19  # weights turned to float32 at a time, which stay in a CPU's caches until used


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


# For a graph it is one call: inductor would only write the parts' code out, one by one.
define("gpt_stream::linear_in_parts", "(Tensor x, Tensor weight) -> Tensor")


@implement("gpt_stream::linear_in_parts", "cpu")
def linear_in_parts(x, weight):
    (N, K), x32 = weight.shape, x.flatten(0, -2).float()  # (T, K)
    T = len(x32)
    x32 = F.pad(x32, (0, 0, 0, max(0, 16 - T)))  # the library is slower for fewer than 16 columns
    n_parts = math.ceil(N * K / PART)
    size = math.ceil(N / n_parts)
    rows, y = x32.new_empty(size, K), x32.new_empty(N, len(x32))
    for part, out in zip(weight.split(size), y.split(size)):
        torch.mm(rows[:len(part)].copy_(part), x32.t(), out=out)
    return y[:, :T].type_as(x).t().unflatten(0, x.shape[:-1])


@torch.library.register_fake("gpt_stream::linear_in_parts")
def linear_in_parts_fake(x, weight):
    return x.new_empty(len(weight), x.numel() // x.shape[-1]).t().unflatten(0, x.shape[:-1])


define("gpt_stream::lanes_in_parts",
       "(Tensor x, Tensor words, Tensor scale, Tensor zero) -> Tensor")


@implement("gpt_stream::lanes_in_parts", "cpu")
def lanes_in_parts_cpu(x, words, scale, zero):
    """As lane_sums, but a part of W at a time becomes a matrix of the fields, times the scale, for
    each 16 rows, and the zeros are a product of their own. So there are few passes over W."""
    (B, m, G, lanes), K = words.shape, x.shape[-1]
    n, x32 = K // (m * G), x.reshape(-1, K).float()
    T, groups = len(x32), x32.view(-1, G, m, n)
    inputs = word_inputs(x32, n).view_as(groups).permute(0, 3, 2, 1).reshape(T, K)
    masks = torch.tensor(word_masks(32 // n), dtype=torch.int32).view(n, 1, 1, 1)
    size = math.ceil(B / math.ceil(B * lanes * K / PART))
    buffer, y = x32.new_empty(size, n, m, G, lanes), x32.new_empty(B, T, lanes)
    for w, s, out in zip(words.split(size), scale.split(size), y.split(size)):
        fields = buffer[:len(w)]
        integers = fields.view(torch.int32)
        torch.bitwise_and(w.view(torch.int32)[:, None], masks, out=integers)
        fields.copy_(integers)  # in place
        fields[:, -1] += 2.0**31  # the last field's highest value, which lanes store as a sign
        fields *= s[:, None, None]
        torch.bmm(inputs.expand(len(w), -1, -1), fields.view(-1, K, lanes), out=out)
    zeros = (scale * zero).transpose(0, 1).reshape(G, -1)  # (G, N)
    y = y.transpose(0, 1).reshape(T, -1)
    return y.addmm_(groups.sum((2, 3)), zeros, alpha=-1).type_as(x)


@torch.library.register_fake("gpt_stream::lanes_in_parts")
def lanes_in_parts_fake(x, words, scale, zero):
    return x.new_empty(x.numel() // x.shape[-1], words.shape[0] * words.shape[3])


def materialize(x: Tensor) -> Tensor:
    """x itself. Inductor writes it to memory here and does not compute it again at every use."""
    return x.as_strided(x.shape, x.stride())


# ------------------------------------------------------------------------------ products

# Each takes x (..., K) and what a layer stores, and returns x W^T (..., N) in x's dtype.


def onednn(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T with W in oneDNN's own layout, which reads it at the memory's speed, for one token and
    for several."""
    return torch.ops.gpt_stream.packed_linear(x, packed, packed.shape[0])


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W x^T, transposed: for x W^T the library would first copy W into another layout."""
    return (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])


def in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32, with a part of W at a time turned to float32, which meets x transposed. It
    is for many tokens where the library has no fast kernel of W's dtype."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return F.linear(x, weight)  # while training: the parts have no gradient
    return torch.ops.gpt_stream.linear_in_parts(x, weight)


def one_pass(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of one token, in a graph."""
    return matvec(x, weight).type_as(x)


def matvec(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of one token, in float32. Inductor makes one pass over W of it, a product and a sum,
    which is faster than a library's matmul of one row.

    Four rows are read side by side, from as many parts of W, since that keeps more of the memory
    busy. Inductor's sum is slower over more than 4096 terms, so a longer row is summed in pieces.
    """
    pieces = pieces_of(weight.shape[1])
    # In memory, or inductor would fuse what computes x and compute it again for every row of W.
    token = materialize(x.reshape(-1).float())  # (K,)
    sums = [(part.float() * token).unflatten(-1, (pieces, -1)).sum(-1) for part in weight.chunk(4)]
    return torch.cat(sums).sum(-1).view(*x.shape[:-1], -1)  # of (N, pieces)


def pieces_of(K: int) -> int:
    """The fewest pieces of K terms that are equal and have at most 4096 terms."""
    return next(n for n in range(1, K + 1) if K % n == 0 and K // n <= 4096)


def few_passes(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a few tokens, in a graph: for 32 rows of W, which stay in a core's cache, a pass for
    every four tokens, since the sums of more do not fit the registers."""
    (N, K), T = weight.shape, x.numel() // x.shape[-1]
    n_passes = math.ceil(T / 4)
    at_once = math.ceil(T / n_passes)  # tokens
    R, pieces = math.gcd(N, 32), pieces_of(K)
    tokens = F.pad(x.reshape(T, K).float(), (0, 0, 0, n_passes * at_once - T))
    tokens = materialize(tokens).view(n_passes, at_once, 1, pieces, -1)
    rows = weight.view(N // R, 1, R, pieces, -1).float()  # (N / R, 1, R, pieces, K / pieces)
    sums = [(rows * tokens[:, i]).sum(-1) for i in range(at_once)]  # (N / R, n_passes, R, pieces)
    y = torch.stack(sums).sum(-1)  # (at_once, N / R, n_passes, R)
    return y.permute(2, 0, 1, 3).reshape(-1, N)[:T].type_as(x).view(*x.shape[:-1], N)


def int8_one_pass(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of one token, in a graph."""
    return (matvec(x, weight) * scale).type_as(x)


def int8_few_passes(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of a few tokens, in a graph, as few_passes computes it."""
    return (few_passes(x.float(), weight) * scale).type_as(x)


# For AVX2, inductor's code loads floats fast and narrow integers slowly, since it copies them to
# the stack first. So a graph reads W as float32 words, which hold four int8 or eight nibbles each.


def word_fields(words: Tensor, bits: int) -> list[Tensor]:
    """The 32 / bits integers in each of the int32 `words`, as float32. A mask leaves each where it
    lies, so the j-th is 2^(bits j) times as large. They are unsigned but for the last, which has
    the word's sign."""
    return [(words & mask).float() for mask in word_masks(bits)]


def word_masks(bits: int) -> list[int]:
    """The masks of a word's fields. The last one has the word's sign."""
    return [(1 << bits) - 1 << j for j in range(0, 32 - bits, bits)] + [-1 << 32 - bits]


def word_inputs(x: Tensor, n: int) -> Tensor:
    """x (..., K) as (..., K / n, n) float32, the j-th of n as many times smaller as word_fields' is
    larger."""
    powers = torch.tensor([2.0**(-32 // n * j) for j in range(n)])
    return x.unflatten(-1, (-1, n)).float() * powers


def int8_words(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of one token, in a graph, with rows of W in words (N, K / 4). The first three int8 of a
    word become unsigned: 128 larger. Four parts of W are read side by side, as in matvec."""
    inputs = materialize(word_inputs(x.reshape(-1), 4).t().contiguous())  # (4, K / 4)
    more = materialize(128 * x.reshape(-1, 4)[:, :3].float().sum().view(1))
    sums = []
    for part in weight.chunk(4):
        fields = word_fields(part.view(torch.int32) ^ 0x808080, 8)
        terms = [field * row for field, row in zip(fields, inputs)]
        sums.append((terms[0] + terms[1] + terms[2] + terms[3]).sum(-1))
    return ((torch.cat(sums) - more) * scale).view(*x.shape[:-1], -1).type_as(x)


def int8_few_words(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of a few tokens, in a graph, as few_passes computes it, with rows of W in words as
    int8_words reads them."""
    (N, words), T = weight.shape, x.numel() // x.shape[-1]
    n_passes = math.ceil(T / 4)
    at_once = math.ceil(T / n_passes)  # tokens
    R = math.gcd(N, 32)
    tokens = F.pad(x.reshape(T, -1).float(), (0, 0, 0, n_passes * at_once - T))
    inputs = materialize(word_inputs(tokens, 4).transpose(1, 2).contiguous())  # (., 4, words)
    inputs = inputs.view(n_passes, at_once, 1, 4, words)
    more = materialize(128 * tokens.unflatten(-1, (words, 4))[..., :3].sum((1, 2)))
    rows = weight.view(torch.int32).view(N // R, 1, R, words) ^ 0x808080
    sums = []  # of each of the tokens that a pass is for: (N / R, n_passes, R)
    for i in range(at_once):
        a, b, c, d = (field * inputs[:, i, :, j] for j, field in enumerate(word_fields(rows, 8)))
        sums.append((a + b + c + d).sum(-1))
    y = torch.stack(sums).permute(2, 0, 1, 3).reshape(-1, N)[:T]
    return ((y - more[:T, None]) * scale).view(*x.shape[:-1], N).type_as(x)


def to_lanes(rows: Tensor) -> Tensor:
    """What 16 rows have for their groups side by side, as lanes of a vector: (N, G, ...) as
    (N / 16, ..., G, 16)."""
    blocks = rows.unflatten(0, (-1, 16))  # (N / 16, 16, G, ...)
    return blocks.permute(0, *range(rows.ndim, 0, -1)).contiguous()


def lane_sums(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T of a few tokens, in a graph, with W in lanes (to_lanes): y = sum of (u - zero) x, times
    the scale, over groups. Each field of a vector of words meets one number of x, and the sums
    of 16 rows grow side by side. A pass over W serves two tokens."""
    (_, m, G, _), K = words.shape, x.shape[-1]
    n, T = K // (m * G), x.numel() // K
    passes = math.ceil(T / 2)
    each = math.ceil(T / passes)
    x32 = F.pad(x.reshape(T, K).float(), (0, 0, 0, passes * each - T))
    groups = x32.view(passes, each, G, m, n)
    # What one vector of words meets lies side by side: (passes, 1, m, G, 1, each, n).
    groups = groups.permute(0, 3, 2, 1, 4)[:, None, :, :, None]
    inputs = materialize(word_inputs(groups, n).squeeze(-2).contiguous())
    totals = materialize(groups.sum(-1).contiguous())  # (passes, 1, m, G, 1, each)
    *fields, last = word_fields(words.view(torch.int32), 32 // n)
    fields = [*fields, last + 2.0**31]  # the last field is stored without its highest value
    tokens = []
    for t in range(each):
        y = -zero[:, None] * totals[..., t]  # (passes, N / 16, m, G, 16)
        for j, field in enumerate(fields):
            y = y + field * inputs[..., t, j]
        tokens.append((y * scale[:, None]).sum((2, 3)).flatten(1))  # (passes, N)
    return torch.stack(tokens, 1).flatten(0, 1)[:T].view(*x.shape[:-1], -1).type_as(x)


def lanes_in_parts(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T with W in lanes, a part of W at a time turned to float32, where the library is fast."""
    return torch.ops.gpt_stream.lanes_in_parts(x, words, scale, zero).unflatten(0, x.shape[:-1])


def int8_kernel(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T by PyTorch's int8 kernel."""
    y = torch.ops.gpt_stream.int8_matmul(x.flatten(0, -2).contiguous(), weight, scale.type_as(x))
    return y.unflatten(0, x.shape[:-1])


def int8_few(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of a few tokens, in rows or words, by PyTorch's int8 kernel, which is fast in bf16."""
    weight = weight.view(torch.int8)
    if x.dtype == torch.bfloat16:
        return int8_kernel(x, weight, scale)
    return int8_in_parts(x.float(), weight, scale).type_as(x)


def int8_in_float32(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T in float32, with rows of W in words or not."""
    return (in_parts(x.float(), weight.view(torch.int8)) * scale).type_as(x)


def int8_in_parts(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T with W turned to x's dtype first, 1024 rows at a time: they stay in the caches until
    they are used."""
    parts = weight.split(1024)
    y = torch.cat([product_of_rows(x, part.float().type_as(x)) for part in parts], dim=-1)
    return (y * scale).type_as(x)


def grouped_one_pass(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T of one token, in a graph."""
    groups = scale.shape[1]
    row = materialize(x.reshape(-1).float())
    sums = (weight.float() * row).view(len(weight), groups, -1).sum(-1)  # (N, G)
    sums = sums - zero.float() * row.view(groups, -1).sum(-1)
    return (sums * scale).sum(-1).view(*x.shape[:-1], -1).type_as(x)


def grouped_in_parts(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T with W turned to x's dtype first, in parts as in int8_in_parts."""
    parts = zip(*(t.split(1024) for t in (weight, scale, zero)))
    return torch.cat([product_of_rows(x, dequantize_groups(*part).type_as(x)) for part in parts],
                     dim=-1)


def dequantize_groups(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rows of W in float32, for these rows of the three tensors."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


def int4_in_parts(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T with W as it is stored."""
    return grouped_in_parts(x, unpack_nibbles(weight), scale, zero / 16)


def gpu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T on a GPU. Where inductor writes the product itself, it would compute x again for every
    few rows of W, unless x is in memory."""
    return F.linear(materialize(x), weight)


def gpu_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T on a GPU. W is cast to x's dtype at once, which is exact: in a graph no copy of it is
    written (load.gpu_options)."""
    return (gpu_linear(x, weight.to(x.dtype)) * scale).type_as(x)


def gpu_grouped(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x W^T on a GPU, in a graph without a copy of W, as in gpu_int8."""
    return gpu_linear(x, dequantize_groups(weight, scale, zero).to(x.dtype))


def int4_kernel(x: Tensor, weight: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """x W^T by the device's int4 kernel."""
    kernel = torch._weight_int4pack_mm if x.is_cuda else torch.ops.gpt_stream.int4_matmul
    rows = x.flatten(0, -2).contiguous()
    return kernel(rows, weight, group_size, scales_and_zeros).unflatten(0, x.shape[:-1])


def gpu_int4_chunk(x: Tensor, weight: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """x W^T of many tokens on a GPU, in a graph: W is dequantized first, in one pass. The int4
    kernel would read and dequantize it again for every 16 tokens."""
    if x.numel() // x.shape[-1] < 64:
        return int4_kernel(x, weight, group_size, scales_and_zeros)
    scale, zero = scales_and_zeros.transpose(0, 1).unsqueeze(-2).unbind(-1)  # (N, K / g, 1)
    nibbles = unpack_gpu_int4(weight).unflatten(1, (-1, group_size))  # (N, K / g, g)
    return gpu_linear(x, ((nibbles.to(x.dtype) - 8) * scale + zero).flatten(1))


def unpack_gpu_int4(packed: Tensor) -> Tensor:
    """(N, K) uint8 from the layout of a GPU's int4 kernel (N / 8, K / 16 tiles, 32, tiles / 2)
    int32: 16 columns of 8 rows are a tile, in the order in which its threads hold them."""
    n_rows, n_columns, _, pairs = packed.shape
    nibbles = torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], dim=-1)
    nibbles = nibbles.to(torch.uint8).view(n_rows, n_columns, 8, 4, pairs, 2, 4)
    # The last two: whether the column is odd, and which four bytes of the pair of tiles it is in.
    return nibbles.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * n_rows, -1)


# ------------------------------------------------------------------------------ the table

# Layouts. WORDS are rows of int8 whose dtype is float32, PACKED is the int4 kernel's, and LANES is
# of int4 and int8 in groups (to_lanes).
ROWS, ONEDNN, WORDS, LANES, PACKED = "rows", "onednn", "words", "lanes", "packed"
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CPUS, ALL = "avx2 avx512 amx generic", "eager small large"
TOKENS = (1, 8, 16)  # the most that the first three columns are for
LARGE = 1 << 22  # bytes; to read a smaller weight takes less time than to call oneDNN does

# How x W^T is computed, by kind of weight, processor and layout. The layout is that of an "eager"
# model's weights, and of a compiled one's "small" and "large" ones (a table that is shared with the
# embedding is small, since another layout would be a copy). Of the eight functions, four are for
# graphs: for 1 token, for 2 to 8, for 9 to 16, and for more; and four for the same in eager calls.
# `python -m bench --products` measures which are the fastest on a machine.
TABLE = {
    # kinds of weight, processors, layout, the weights that are laid out so
    ("bf16", "avx512 amx", ROWS, "small"):
        (one_pass, F.linear, transposed, transposed, *4 * [F.linear]),
    ("bf16", "avx512 amx", ONEDNN, "eager large"): 8 * [onednn],
    ("fp16", "avx512 amx", ROWS, ALL):
        (one_pass, F.linear, transposed, transposed, *4 * [F.linear]),
    ("bf16 fp16", "avx2", ROWS, ALL):
        (one_pass, few_passes, in_parts, in_parts, F.linear, F.linear, in_parts, in_parts),
    ("bf16 fp16", "generic", ROWS, ALL):
        (one_pass, F.linear, transposed, transposed, *4 * [F.linear]),
    ("fp32", CPUS, ROWS, "eager small"):
        (one_pass, F.linear, transposed, transposed, *4 * [F.linear]),
    ("fp32", CPUS, ONEDNN, "large"): 8 * [onednn],
    ("bf16 fp16 fp32", "cuda", ROWS, ALL): 8 * [gpu_linear],

    ("int8", "avx2", WORDS, "small large"):
        (int8_words, int8_few_words, int8_few, int8_in_float32, *3 * [int8_few], int8_in_float32),
    ("int8", "avx2", ROWS, "eager"): 2 * [*3 * [int8_few], int8_in_float32],
    ("int8", "avx512 amx generic", ROWS, ALL):
        (int8_one_pass, int8_few_passes, int8_kernel, int8_in_parts,
         *3 * [int8_kernel], int8_in_parts),
    ("int8", "cuda", ROWS, ALL): 8 * [gpu_int8],
    ("int4 grouped_int8", "avx2", LANES, "small large"):
        (*3 * [lane_sums], *5 * [lanes_in_parts]),
    ("grouped_int8", CPUS, ROWS, ALL): (grouped_one_pass, *7 * [grouped_in_parts]),
    ("grouped_int8", "cuda", ROWS, ALL): 8 * [gpu_grouped],
    ("int4", CPUS, ROWS, ""): 8 * [int4_in_parts],
    ("int4", CPUS, PACKED, ALL): 8 * [int4_kernel],
    ("int4", "cuda", PACKED, ALL): (*3 * [int4_kernel], gpu_int4_chunk, *4 * [int4_kernel]),
}
ROW = {(kind, processor, layout): (uses.split(), functions)
       for (kinds, processors, layout, uses), functions in TABLE.items()
       for kind in kinds.split() for processor in processors.split()}


def cpu_kind() -> str:
    """The instruction set that counts on this machine: "avx2", "avx512", "amx" or "generic". The
    environment variable GPT_STREAM_CPU says another. Nothing else asks about the processor."""
    if asked := os.environ.get("GPT_STREAM_CPU"):
        if asked not in CPUS.split():
            raise ValueError(f"GPT_STREAM_CPU is {asked!r}; it is one of {', '.join(CPUS.split())}")
        return asked
    return found_kind()


# What torch.compiler.assume_constant_result sets. To call it imports the compiler, for a second of
# every start, compiled or not.
cpu_kind._dynamo_marked_constant = True


@functools.cache  # to ask takes longer than a small product
def found_kind() -> str:
    """cpu_kind, where the environment says nothing."""
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512":
        return "amx" if torch.cpu._is_amx_tile_supported() else "avx512"
    return "avx2" if found == "AVX2" else "generic"


def layout_of(kind: str, weight: Tensor, compiled: bool, shared: bool = False) -> str:
    """The layout of a weight in a model that is about to be compiled, or in an eager one."""
    use = "eager" if not compiled else "large" if weight.nbytes >= LARGE and not shared else "small"
    processor = "cuda" if weight.is_cuda else cpu_kind()
    return next(layout for (k, p, layout), (uses, _) in ROW.items()
                if (k, p) == (kind, processor) and use in uses)


def product(kind: str, layout: str, x: Tensor) -> Callable:
    """The table's function for x (..., K)."""
    tokens = x.numel() // x.shape[-1]
    column = sum(tokens > most for most in TOKENS)
    _, functions = ROW[kind, "cuda" if x.is_cuda else cpu_kind(), layout]
    return functions[column if torch.compiler.is_compiling() else column + 4]


def product_of_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with W in floating point, in rows."""
    return product(KINDS[weight.dtype], ROWS, x)(x, weight)
