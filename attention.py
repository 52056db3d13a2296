"""softmax(q k^T / sqrt(D)) v: over a sink+window cache, or over a sequence by itself.

Over a cache a query has been rotated twice (kv_cache.py): for the sinks, and for the ring. A GPU
computes that over all slots, in shapes that never change. On a CPU what is not held is not read: a
token's graph loops up to a number that is not compiled in, and a chunk's calls an operator.

G query heads share one key-value head; D is the size of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linear import in_memory


def attend(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, at) -> Tensor:
    """q_sink and q_recent are one query (B, T, heads, D), rotated for the sinks and for the ring; k
    and v (B, kv_heads, S + R, D); at is the model's Step, of which the mask, n_sink and window
    count here. -> (B, T, heads, D)"""
    if k.is_cuda:
        return attend_all(q_sink, q_recent, k, v, at.mask, at.n_sink)
    if q_recent.shape[1] == 1 and torch.compiler.is_compiling():
        return attend_in_sums(q_sink, q_recent, k, v, at.mask, at.n_sink)
    return torch.ops.gpt_stream.attend_held(q_sink, q_recent, k, v, at.mask, at.n_sink, at.window)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without a cache: each token sees itself and those before it. q (B, T, heads, D), k and v
    (B, T, kv_heads, D) -> (B, T, heads, D)"""
    if not q.is_cuda:  # PyTorch's flash attention for CPUs knows no groups
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.is_cuda)
    return y.transpose(1, 2)


def grouped(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, heads, D) -> (B, kv_heads, T * G, D): queries that share a key-value head are rows of
    one product, so the cache is read once and never repeated."""
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
    """softmax(q k^T / sqrt(D)) v over the n slots that are given; mask (B, T * G, n)."""
    T, scale = q_recent.shape[1], 1 / math.sqrt(q_recent.shape[-1])
    # All slots, then the sinks again: a matmul over a part of k would first copy that part.
    scores = products(grouped(q_recent * scale, k.shape[1]), k)
    if n_sink:
        sink_scores = products(grouped(q_sink * scale, k.shape[1]), k[:, :, :n_sink])
        scores = torch.cat([sink_scores, scores[..., n_sink:]], dim=-1)
    weights = (scores.float() + mask[:, None]).softmax(dim=-1).type_as(v)
    return ungrouped(weights @ v, T)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T (B, kv_heads, rows, n). On a CPU (k q^T)^T, which reads k as it lies: for one token,
    3 heads and 4,223 slots in 92 us instead of 318."""
    return q @ k.transpose(2, 3) if k.is_cuda else (k @ q.transpose(2, 3)).transpose(2, 3)


# ------------------------------------------------------------------------------ on a CPU


def attend_in_sums(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                   n_sink: int) -> Tensor:
    """attend_all of one token (T = 1) over the n slots that the mask is about, for inductor: it
    writes loops up to whatever n is, in 7 us where the operator below takes 49 (32 slots), and in
    26 of 49 (508)."""
    (B, n_kv_heads, _, D), n, dtype = k.shape, mask.shape[-1], v.dtype
    # Of a slice, the compiler would note whether n is all of them: two graphs instead of one.
    k = k.as_strided((B, n_kv_heads, n, D), k.stride())[:, :, None].float()
    v = v.as_strided((B, n_kv_heads, n, D), v.stride())[:, :, None].float()
    q_sink = in_memory(q_sink.float().view(B, n_kv_heads, -1, 1, D))  # (B, kv_heads, G, 1, D)
    q_recent = in_memory(q_recent.float().view(B, n_kv_heads, -1, 1, D))
    is_sink = (torch.arange(n) < n_sink)[:, None]
    scores = (torch.where(is_sink, q_sink, q_recent) * k).sum(-1) / math.sqrt(D) + mask[:, None]
    weights = scores.softmax(-1)  # (B, kv_heads, G, n)
    return (weights[..., None] * v).sum(-2).reshape(B, 1, -1, D).to(dtype)


FEW = 1024  # slots; for one token over more of them attend_all is faster than the flash kernel

torch.library.define("gpt_stream::attend_held", "(Tensor q_sink, Tensor q_recent, Tensor k, "
                     "Tensor v, Tensor mask, int n_sink, int window) -> Tensor")
flash = torch._scaled_dot_product_flash_attention_for_cpu  # -> (y, logsumexp of the scores)


@torch.library.register_fake("gpt_stream::attend_held")
def attend_held_fake(q_sink, q_recent, k, v, mask, n_sink, window):
    return torch.empty_like(q_recent, memory_format=torch.contiguous_format)


@torch.library.impl("gpt_stream::attend_held", "cpu")
def attend_held_cpu(q_sink, q_recent, k, v, mask, n_sink, window):
    """attend_all over the slots that the mask is about, which are all that are in use.

    Until the window slides, sinks are seen at their true distances, and one query does for all.
    From then on the sinks are attended to apart, and both parts are added up in proportion to the
    sums of their exponentials, as flash attention adds up its blocks (Dao et al., 2022)."""
    T, n_kv_heads, n = q_recent.shape[1], k.shape[1], mask.shape[-1]
    sinks_apart = n_sink if n >= n_sink + window else 0
    if T == 1 and n > FEW:
        return attend_all(q_sink, q_recent, k[:, :, :n], v[:, :, :n], mask, sinks_apart)
    keys, values = k[:, :, sinks_apart:n], v[:, :, sinks_apart:n]
    seen = mask[:, None, :, sinks_apart:]
    q = grouped(q_recent, n_kv_heads).contiguous()  # which the kernel takes for granted
    y, total = flash(q, keys, values, attn_mask=seen)
    if sinks_apart:
        sinks_seen = mask[:, None, :, :n_sink]
        y_sinks, total_sinks = flash(grouped(q_sink, n_kv_heads).contiguous(), k[:, :, :n_sink],
                                     v[:, :, :n_sink], attn_mask=sinks_seen)
        # To a query that sees nothing of a part (a first sink of the ring, or what another rule in
        # KVCache.visible hides) the kernel gives 0 and a total of 0.
        total = total.masked_fill(seen.amax(-1) < 0, -math.inf)
        total_sinks = total_sinks.masked_fill(sinks_seen.amax(-1) < 0, -math.inf)
        y = add_up(y, total, y_sinks, total_sinks)
    return ungrouped(y, T)


def add_up(a: Tensor, total_a: Tensor, b: Tensor, total_b: Tensor) -> Tensor:
    """Two parts of one attention (B, kv_heads, T * G, D), each with the logsumexp of its scores:
    b's share of the whole is exp(total_b) / (exp(total_a) + exp(total_b))."""
    share = torch.sigmoid(total_b - total_a)[..., None]
    return a.to(share.dtype).lerp(b.to(share.dtype), share).type_as(a)
