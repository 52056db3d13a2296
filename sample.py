"""From logits to a token: temperature, top-k, top-p. Everything is done in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tp import in_step


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None,
                  top_p: float | None = None) -> Tensor:
    """(..., V) float32 probabilities that a token is drawn with: temperature, then exactly the
    top_k most likely, then the fewest of those whose mass reaches top_p."""
    # The largest logit goes to 0 first: a tiny temperature then overflows only to -inf.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        likely, ids = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter_(-1, ids, likely)
    probs = logits.softmax(-1)
    if top_p is None or top_p >= 1:
        return probs
    likely, ids = most_likely(probs, top_p)  # (..., n), the largest first
    mass_before = likely.cumsum(-1) - likely
    mass_before[..., 0] = -1  # the likeliest always stays
    kept = likely.masked_fill(mass_before >= top_p, 0)
    return torch.zeros_like(probs).scatter_(-1, ids, kept / kept.sum(-1, keepdim=True))


def most_likely(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, (values, ids), at least those that reach the mass.

    A CPU takes 8 ms to sort 128k of them and 0.5 for the first thousand, which nearly always do.
    A GPU sorts fast, and looking whether they do would make the host wait for it."""
    if probs.device.type == "cpu":
        few = probs.topk(min(1024, probs.shape[-1]))
        if (few.values.sum(-1) >= mass).all():
            return few.values, few.indices
    return probs.sort(descending=True)


def distribution(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None) -> Tensor:
    """(..., V) float32: what `sample` draws from; all on the likeliest token at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return probabilities(logits, temperature, top_k, top_p)


def draw(weights: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) int64 drawn in proportion to weights (..., V); at temperature 0 the likeliest.

    argmax(p / e) with e ~ Exp(1) draws from p, and unlike multinomial never waits for the GPU."""
    if temperature == 0:
        return weights.argmax(-1)
    noise = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / noise).argmax(-1)


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Token ids (...) int64 for logits (..., V); the likeliest at temperature 0."""
    if temperature > 0:
        logits = probabilities(logits, temperature, top_k, top_p)
    return in_step(draw(logits, temperature, generator))
