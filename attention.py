"""softmax(q k^T / sqrt(D)) v: over a sink+window cache, or over a sequence by itself.

Over a cache, a query is rotated twice (kv_cache.py): once for the sinks and once for the ring. A
GPU attends to all slots, in shapes that never change. A CPU reads only the n slots that hold
something: in a compiled graph, one token loops over them with n as a dynamic size; everything else
calls the operator `attend_held`.

Shapes: B rows, T tokens, S sinks, R ring slots, G query heads that share one key-value head, D the
size of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linear import materialize


def attend(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, at) -> Tensor:
    """Attention over a cache -> (B, T, heads, D). q_sink and q_recent (B, T, heads, D) float32 are
    one query, rotated for the sinks and for the ring; k and v are (B, kv_heads, S + R, D); `at` is
    the model's Step, of which the mask, n_sink and window are used."""
    one_compiled = q_recent.shape[1] == 1 and torch.compiler.is_compiling()
    if one_compiled and not k.is_cuda:
        return attend_in_sums(q_sink, q_recent, k, v, at.mask, at.n_sink)
    q_sink, q_recent = q_sink.type_as(k), q_recent.type_as(k)
    if k.is_cuda:
        return (attend_gpu_sums if one_compiled else attend_all)(
            q_sink, q_recent, k, v, at.mask, at.n_sink)
    return torch.ops.gpt_stream.attend_held(q_sink, q_recent, k, v, at.mask, at.n_sink, at.window)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention without a cache: each token sees itself and all tokens before it, or what a mask
    (T, T), to add to the scores, leaves of these.
    q (B, T, heads, D), k and v (B, T, kv_heads, D) -> (B, T, heads, D)"""
    if not q.is_cuda:  # PyTorch's flash attention for CPUs has no grouped queries
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = mask if mask is None else mask.type_as(q)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.is_cuda)
    return y.transpose(1, 2)


def grouped(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, heads, D) -> (B, kv_heads, T * G, D). Queries that share a key-value head become rows
    of one product, so keys and values are read once and never repeated."""
    B, T, _, D = q.shape
    if T == 1:
        return q.reshape(B, n_kv_heads, -1, D)
    return q.reshape(B, T, n_kv_heads, -1, D).transpose(1, 2).reshape(B, n_kv_heads, -1, D)


def ungrouped(y: Tensor, T: int) -> Tensor:
    """(B, kv_heads, T * G, D) -> (B, T, heads, D)"""
    B, n_kv_heads, _, D = y.shape
    y = y.reshape(B, n_kv_heads, T, -1, D).transpose(1, 2).reshape(B, T, -1, D)
    return y.contiguous()


def attend_all(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
               n_sink: int) -> Tensor:
    """Attention over all n slots of k and v (B, kv_heads, n, D), with a mask (B, T * G, n) to add
    to the scores -> (B, T, heads, D)"""
    T, scale = q_recent.shape[1], 1 / math.sqrt(q_recent.shape[-1])
    # Scores of all slots, then of the sinks again: a matmul over the ring would first copy it.
    scores = products(grouped(q_recent * scale, k.shape[1]), k)  # (B, kv_heads, T * G, n)
    if n_sink:
        sink_scores = products(grouped(q_sink * scale, k.shape[1]), k[:, :, :n_sink])
        scores = torch.cat([sink_scores, scores[..., n_sink:]], dim=-1)
    weights = (scores.float() + mask[:, None]).softmax(dim=-1).type_as(v)
    return ungrouped(weights @ v, T)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T (B, kv_heads, rows, n). On a CPU it is computed as (k q^T)^T, which reads k in its
    order in memory and is faster for one token."""
    return q @ k.transpose(2, 3) if k.is_cuda else (k @ q.transpose(2, 3)).transpose(2, 3)


def attend_gpu_sums(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                    n_sink: int) -> Tensor:
    """attend_all of one token (T = 1), written for inductor on a GPU: four kernels of its own,
    which read what they need of q, and none of a library's, which would pad or copy first.

    The queries and the softmax are written to memory, or they would be computed again for every
    key and every element of a value."""
    (B, n_kv_heads, n, D), dtype = k.shape, v.dtype
    q_sink, q_recent = (materialize(q.reshape(B, n_kv_heads, -1, 1, D)).float()
                        for q in (q_sink, q_recent))  # (B, kv_heads, G, 1, D)
    is_sink = (torch.arange(n, device=k.device) < n_sink)[:, None]
    scores = (torch.where(is_sink, q_sink, q_recent) * k[:, :, None].float()).sum(-1)
    scores = scores / math.sqrt(D) + mask[:, None]  # (B, kv_heads, G, n)
    weights = materialize(scores.softmax(-1))
    return (weights[..., None] * v[:, :, None].float()).sum(-2).reshape(B, 1, -1, D).to(dtype)


# ------------------------------------------------------------------------------ on a CPU


def attend_in_sums(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                   n_sink: int) -> Tensor:
    """attend_all of one token (T = 1) over the first n slots, n the size of the mask, written for
    inductor. It makes loops of it with n as a dynamic size, which are faster than calling the
    operator below."""
    (B, n_kv_heads, _, D), n, dtype = k.shape, mask.shape[-1], v.dtype
    # A slice would make two graphs of one: the compiler would check whether n is every slot.
    k = k.as_strided((B, n_kv_heads, n, D), k.stride())[:, :, None].float()
    v = v.as_strided((B, n_kv_heads, n, D), v.stride())[:, :, None].float()
    q_sink = materialize(q_sink).view(B, n_kv_heads, -1, 1, D)  # (B, kv_heads, G, 1, D)
    q_recent = materialize(q_recent).view(B, n_kv_heads, -1, 1, D)
    is_sink = (torch.arange(n) < n_sink)[:, None]
    scores = (torch.where(is_sink, q_sink, q_recent) * k).sum(-1) / math.sqrt(D) + mask[:, None]
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # (B, kv_heads, G, n)
    y = (weights[..., None] * v).sum(-2) / weights.sum(-1, keepdim=True)  # (B, kv_heads, G, D)
    return y.reshape(B, 1, -1, D).to(dtype)


FLASH_SLOTS = 1024  # over more slots, attend_all is faster for one token than the flash kernel

torch.library.define("gpt_stream::attend_held", "(Tensor q_sink, Tensor q_recent, Tensor k, "
                     "Tensor v, Tensor mask, int n_sink, int window) -> Tensor")
flash = torch._scaled_dot_product_flash_attention_for_cpu  # -> (y, logsumexp of the scores)


@torch.library.register_fake("gpt_stream::attend_held")
def attend_held_fake(q_sink, q_recent, k, v, mask, n_sink, window):
    return torch.empty_like(q_recent, memory_format=torch.contiguous_format)


@torch.library.impl("gpt_stream::attend_held", "cpu")
def attend_held_cpu(q_sink, q_recent, k, v, mask, n_sink, window):
    """attend_all over the first n slots, n the size of the mask: all that hold something.

    Until the window slides, sinks are at their true distances and q_recent is right for all slots.
    From then on the sinks are attended to by themselves, and the two parts are added in proportion
    to the sums of their exponentials, as flash attention adds its blocks (Dao et al., 2022)."""
    T, n_kv_heads, n = q_recent.shape[1], k.shape[1], mask.shape[-1]
    sinks_apart = n_sink if n >= n_sink + window else 0
    if T == 1 and n > FLASH_SLOTS:
        return attend_all(q_sink, q_recent, k[:, :, :n], v[:, :, :n], mask, sinks_apart)
    keys, values = k[:, :, sinks_apart:n], v[:, :, sinks_apart:n]
    seen = mask[:, None, :, sinks_apart:]
    q = grouped(q_recent, n_kv_heads).contiguous()  # the kernel does not check this
    y, total = flash(q, keys, values, attn_mask=seen)
    if sinks_apart:
        sinks_seen = mask[:, None, :, :n_sink]
        y_sinks, total_sinks = flash(grouped(q_sink, n_kv_heads).contiguous(), k[:, :, :n_sink],
                                     v[:, :, :n_sink], attn_mask=sinks_seen)
        # For a query that sees no slot of a part, the kernel returns 0 and a total of 0, where
        # -inf is right. The first S queries see no ring slot, and a KVCache subclass with another
        # rule (`visible`) may hide all sinks.
        total = total.masked_fill(seen.amax(-1) < 0, -math.inf)
        total_sinks = total_sinks.masked_fill(sinks_seen.amax(-1) < 0, -math.inf)
        y = add_up(y, total, y_sinks, total_sinks)
    return ungrouped(y, T)


def add_up(a: Tensor, total_a: Tensor, b: Tensor, total_b: Tensor) -> Tensor:
    """The sum of two parts of one attention (B, kv_heads, T * G, D), each with the logsumexp of its
    scores (B, kv_heads, T * G): b's weight is exp(total_b) / (exp(total_a) + exp(total_b))."""
    share = torch.sigmoid(total_b - total_a)[..., None]
    return a.to(share.dtype).lerp(b.to(share.dtype), share).type_as(a)
