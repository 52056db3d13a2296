"""softmax(q k^T / sqrt(D)) v: over a sink+window cache, or over a sequence by itself.

Over a cache a query has been rotated twice (kv_cache.py): for the sinks, and for the ring. A GPU
computes that over all slots, in shapes that never change. On a CPU what is not held is not read: an
operator whose shapes do not show how much that is, so nothing is compiled for another length.

G query heads share one key-value head; D is the size of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, at) -> Tensor:
    """q_sink and q_recent are one query (B, T, heads, D), rotated for the sinks and for the ring; k
    and v (B, kv_heads, S + R, D); at is the model's Step. -> (B, T, heads, D)"""
    if k.is_cuda:
        return attend_all(q_sink, q_recent, k, v, at.mask, at.n_sink)
    return torch.ops.gpt_stream.attend_held(q_sink, q_recent, k, v, at.mask, at.positions,
                                            at.n_sink, at.window)


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
    return q.reshape(B, T, n_kv_heads, -1, D).transpose(1, 2).reshape(B, n_kv_heads, -1, D)


def ungrouped(y: Tensor, T: int) -> Tensor:
    """(B, kv_heads, T * G, D) -> (B, T, heads, D)"""
    B, n_kv_heads, _, D = y.shape
    y = y.reshape(B, n_kv_heads, T, -1, D).transpose(1, 2).reshape(B, T, -1, D)
    return y.contiguous()


def attend_all(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
               n_sink: int) -> Tensor:
    """Over all the slots that are given, n, as it is written down; mask (B, T * G, n)."""
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

FEW = 1024  # slots; to more of them one token attends sooner as it is written down

torch.library.define("gpt_stream::attend_held", "(Tensor q_sink, Tensor q_recent, Tensor k, "
                     "Tensor v, Tensor mask, Tensor positions, int n_sink, int window) -> Tensor")
flash = torch._scaled_dot_product_flash_attention_for_cpu  # -> (y, logsumexp of the scores)


@torch.library.register_fake("gpt_stream::attend_held")
def _(q_sink, q_recent, k, v, mask, positions, n_sink, window):
    return torch.empty_like(q_recent, memory_format=torch.contiguous_format)


@torch.library.impl("gpt_stream::attend_held", "cpu")
def _(q_sink, q_recent, k, v, mask, positions, n_sink, window):
    """attend_all over the slots that hold something; positions (B, T) are the queries'.

    Until the window slides, sinks are seen at their true distances, and one query does for all.
    From then on the sinks are attended to apart, and both parts are added up in proportion to the
    sums of their exponentials, as flash attention adds up its blocks (Dao et al., 2022)."""
    (B, T), n_kv_heads, newest = positions.shape, k.shape[1], max(positions[:, -1].tolist())
    slid = newest >= n_sink + window
    sinks_apart, held = n_sink if slid else 0, min(newest + 1, k.shape[2])
    if T == 1 and held > FEW:
        return attend_all(q_sink, q_recent, k[:, :, :held], v[:, :, :held], mask[..., :held],
                          sinks_apart)
    keys, values = k[:, :, sinks_apart:held], v[:, :, sinks_apart:held]
    q = grouped(q_recent, n_kv_heads).contiguous()  # which the kernel takes for granted
    if B == T == 1 and not slid:  # all that is held is seen
        return flash(q, keys, values)[0].reshape(q_recent.shape)
    seen = mask[:, None, :, sinks_apart:held]
    y, total = flash(q, keys, values, attn_mask=seen)
    if sinks_apart:
        if min(positions[:, 0].tolist()) < n_sink:  # to a row that sees nothing, the kernel gives 0
            total = total.masked_fill(seen.amax(-1) < 0, -math.inf)
        sinks = flash(grouped(q_sink, n_kv_heads).contiguous(), k[:, :, :n_sink], v[:, :, :n_sink],
                      attn_mask=mask[:, None, :, :n_sink])
        y = add_up(y, total, *sinks)
    return ungrouped(y, T)


def add_up(a: Tensor, total_a: Tensor, b: Tensor, total_b: Tensor) -> Tensor:
    """Two parts of one attention (B, kv_heads, T * G, D), each with the logsumexp of its scores:
    b's share of the whole is exp(total_b) / (exp(total_a) + exp(total_b))."""
    share = torch.sigmoid(total_b - total_a)[..., None]
    return a.to(share.dtype).lerp(b.to(share.dtype), share).type_as(a)
