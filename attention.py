"""softmax(q k^T / sqrt(D)) v over the sink+window cache.

A query has been rotated twice (kv_cache.py), for the sinks and for the ring. Where all of it is one
kernel, only one of the two fits in; but their scores differ at the sinks alone, and a kernel takes
numbers to add to the scores. So it is given the ring's query, and what the sinks' adds to that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, at) -> Tensor:
    """q_sink and q_recent are one query (B, T, heads, D), rotated for the sinks and for the ring; k
    and v (B, kv_heads, S + R, D); at is the model's Step. -> (B, T, heads, D)"""
    if k.is_cuda:
        return attend_all(q_sink, q_recent, k, v, at.mask, at.n_sink)
    return torch.ops.gpt_stream.attend_held(q_sink, q_recent, k, v, at.mask, at.positions,
                                            at.n_sink, at.window)


def grouped(q: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, heads, D) -> (B, kv_heads, T * G, D): queries that share a key-value head are rows of
    one product, so the cache is read once and never repeated."""
    B, T, _, D = q.shape
    return q.reshape(B, T, n_kv_heads, -1, D).transpose(1, 2).reshape(B, n_kv_heads, -1, D)


def ungrouped(y: Tensor, T: int) -> Tensor:
    """The other way round."""
    B, n_kv_heads, _, D = y.shape
    return y.view(B, n_kv_heads, T, -1, D).transpose(1, 2).reshape(B, T, -1, D)


def attend_all(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
               n_sink: int) -> Tensor:
    """Over all slots, as it is written down; mask (B, T, S + R). Shapes never change."""
    B, T, n_heads, D = q_recent.shape
    q_sink, q_recent = (grouped(q * (1 / math.sqrt(D)), k.shape[1]) for q in (q_sink, q_recent))
    # All slots, then the sinks again: a matmul over a part of k would first copy that part.
    scores = q_recent @ k.transpose(2, 3)
    if n_sink:
        sink_scores = q_sink @ k[:, :, :n_sink].transpose(2, 3)
        scores = torch.cat([sink_scores, scores[..., n_sink:]], dim=-1)
    scores = scores.view(B, k.shape[1], T, -1, k.shape[2]).float()
    weights = (scores + mask[:, None, :, None]).softmax(dim=-1).type_as(v)
    return ungrouped(weights.flatten(2, 3) @ v, T)


# One operator to the compiler: how much is held shows in none of its shapes, so nothing is compiled
# for another length, and a short conversation does not pay for a long window.
torch.library.define("gpt_stream::attend_held", "(Tensor q_sink, Tensor q_recent, Tensor k, "
                     "Tensor v, Tensor mask, Tensor positions, int n_sink, int window) -> Tensor")


@torch.library.register_fake("gpt_stream::attend_held")
def _(q_sink, q_recent, k, v, mask, positions, n_sink, window):
    return torch.empty_like(q_recent, memory_format=torch.contiguous_format)


@torch.library.impl("gpt_stream::attend_held", "cpu")
def attend_held(q_sink: Tensor, q_recent: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                positions: Tensor, n_sink: int, window: int) -> Tensor:
    """The same over the slots that hold something, in PyTorch's flash attention for CPUs."""
    B, T, n_heads, D = q_recent.shape
    n_kv_heads, newest = k.shape[1], max(positions[:, -1].tolist())
    k, v = k[:, :, :newest + 1], v[:, :, :newest + 1]  # or all, when the ring is full
    slid = newest >= n_sink + window
    if B == T == 1 and not slid:  # all that is held is seen, at its true distance
        return flash(q_recent.view(1, n_kv_heads, -1, D), k, v)[0].view(1, 1, n_heads, D)
    q, held = grouped(q_recent, n_kv_heads), k.shape[2]
    bias = mask[:, None, :, None, :held].expand(B, n_kv_heads if slid else 1, T,
                                                n_heads // n_kv_heads, held).flatten(2, 3)
    if slid and n_sink:
        turned = grouped(q_sink.float() - q_recent.float(), n_kv_heads) * (1 / math.sqrt(D))
        bias = bias.contiguous()
        bias[..., :n_sink] += turned @ k[:, :, :n_sink].transpose(2, 3).float()
    return ungrouped(flash(q, k, v, attn_mask=bias)[0], T)
