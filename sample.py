"""From logits to the probabilities that a token is drawn with; draw.py draws it. Everything is done
in float32, in this order, which is Hugging Face's (vLLM takes min-p before top-k and top-p):
penalties, temperature, top-k, top-p, min-p.

A new sampler is a field of Sampling, its range, and a step of `probabilities`. Nothing here waits
for a GPU, or has a shape that depends on what a tensor there holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grammar import Grammar

COLDEST = 1e-30  # the lowest temperature that float32 divides by without overflowing
ANY = -math.inf, math.inf
RANGES = {"temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1),
          "repetition_penalty": (1e-3, math.inf), "presence_penalty": ANY, "frequency_penalty": ANY}
PENALTIES = "repetition_penalty", "presence_penalty", "frequency_penalty"  # the others: limits


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. The defaults are greedy, with everything else off; None stands for a
    default, too."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random one
    # draw.RowSampler obeys the following.
    grammar: Grammar | None = None  # what the answer may say
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    min_tokens: int = 0  # the answer's first tokens, among which no stop id is drawn

    def __post_init__(self):
        """Raises ValueError naming the setting, its value and what would be right."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                value = getattr(type(self), name)
                object.__setattr__(self, name, value)
            check_range(name, value, low, high)
        if self.top_k != int(self.top_k):
            raise ValueError(f"top_k {self.top_k} must be a whole number")
        object.__setattr__(self, "top_k", int(self.top_k))
        check_range("min_tokens", self.min_tokens, 0, math.inf)

    @property
    def penalizes(self) -> bool:
        return any(getattr(self, name) != getattr(type(self), name) for name in PENALTIES)

    def limits(self) -> dict[str, float]:
        """What `probabilities` takes, by name: the temperature, and of the other limits those that
        are not off. Penalties change the logits before that."""
        limits = {"temperature": self.temperature}
        for name in RANGES:
            value = getattr(self, name)
            if name not in PENALTIES and value != getattr(type(self), name):
                limits[name] = value
        return limits


def either_sampling(sampling: Sampling | None, loose: dict[str, float | None]) -> Sampling:
    """The Sampling that is given, or else one made of loose settings, of which None is not given.
    Raises ValueError, naming both, where both are given."""
    given = {name: value for name, value in loose.items() if value is not None}
    if sampling is not None and given:
        name, value = next(iter(given.items()))
        raise ValueError(f"sampling and {name} exclude each other; {name}={value} belongs into the "
                         "Sampling")
    return sampling or Sampling(**given)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless a setting is a finite number from low to high."""
    if not max(low, -1e308) <= value <= min(high, 1e308):
        bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
        of = " of " * bool(bounds)
        raise ValueError(f"{name} {value} must be a finite number{of}{' and '.join(bounds)}")


# ------------------------------------------------------------------------------ distributions


def probabilities(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None = None,
                  top_p: float | Tensor | None = None,
                  min_p: float | Tensor | None = None) -> Tensor:
    """(..., V) float32 probabilities that a token is drawn with, of logits (..., V) and numbers, or
    of logits (B, V) and tensors (B,), a setting for each row: temperature, which is not 0, then
    exactly the top_k most likely, then the fewest of those whose mass reaches top_p, and of those
    the ones at least min_p times as likely as the likeliest. None (and 0, 1, 0) is off."""
    scores = scale(logits, temperature)
    # Numbers that are off become None. (Of tensors, only the device knows.)
    top_k = None if not isinstance(top_k, Tensor) and top_k == 0 else top_k
    top_p = None if not isinstance(top_p, Tensor) and top_p == 1 else top_p
    min_p = None if not isinstance(min_p, Tensor) and min_p == 0 else min_p
    if top_k is None and top_p is None:
        kept, ids = scores.softmax(-1), None
    else:
        likely, ids, total = most_likely(scores, top_k, top_p)
        kept = within(likely, total, per_row(top_k, scores), per_row(top_p, scores))
    if min_p is not None:
        kept = kept.masked_fill(kept < per_row(min_p, kept) * kept.amax(-1, keepdim=True), 0)
    if ids is None and min_p is None:
        return kept
    kept = kept / kept.sum(-1, keepdim=True)
    return kept if ids is None else torch.zeros_like(scores).scatter_(-1, ids, kept)


def per_row(setting: float | Tensor | None, logits: Tensor) -> float | Tensor | None:
    """A setting, viewed so that it broadcasts with logits (B, ..., V)."""
    if not isinstance(setting, Tensor):
        return setting
    return setting.view(-1, *[1] * (logits.ndim - 1))


def scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """The logits over the temperature, as float32; temperature 0 in a tensor counts as 1.

    The largest logit is made 0 first, so that with a tiny temperature the others become -inf."""
    logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = per_row(torch.where(temperature == 0, 1, temperature), logits)
    temperature = torch.as_tensor(temperature).clamp(min=COLDEST)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def most_likely(scores: Tensor, top_k: int | Tensor | None,
                top_p: float | Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The likeliest tokens in order (scores, ids), both (..., n), at least those that top_k and
    top_p can keep, and the logarithm of the mass of all tokens, or None where n is enough for it.

    A CPU finds the first thousand much faster than it sorts all, and they are nearly always enough.
    A GPU sorts fast, and the host would have to wait to see whether fewer are enough."""
    size = scores.shape[-1]
    if isinstance(top_k, int) and top_k:
        return *scores.topk(min(top_k, size)), None
    if on_cpu(scores) and top_k is None:
        likely, ids = scores.topk(min(1024, size))
        total = scores.logsumexp(-1, keepdim=True)
        if ((likely - total).exp().sum(-1, keepdim=True) >= per_row(top_p, scores)).all():
            return likely, ids, total
    return *scores.sort(descending=True), None


def within(likely: Tensor, total: Tensor | None, top_k: int | Tensor | None,
           top_p: float | Tensor | None) -> Tensor:
    """(..., n) probabilities of the likeliest tokens, in order; 0 where top_k or top_p drop one."""
    if top_k is not None:
        rank = torch.arange(likely.shape[-1], device=likely.device)
        limit = torch.where(top_k > 0, top_k, len(rank)) if isinstance(top_k, Tensor) else top_k
        likely = likely.masked_fill(rank >= limit, -math.inf)
    probs = likely.softmax(-1) if total is None else (likely - total).exp()
    if top_p is None:
        return probs
    if isinstance(top_p, Tensor):  # 1 is all, though the sum may round above it
        top_p = torch.where(top_p < 1, top_p, math.inf)
    mass_before = probs.cumsum(-1) - probs
    mass_before[..., 0] = -1  # the likeliest always stays
    return probs.masked_fill(mass_before >= top_p, 0)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """(..., V) float32: what draw.sample draws from; all on the likeliest token at temperature 0.
    With logits of which nothing can be drawn, it has NaN."""
    if sampling.temperature == 0:
        largest, ids = logits.max(-1, keepdim=True)
        mass = torch.where(largest.isfinite(), 1.0, math.nan)
        return torch.zeros_like(logits).scatter_(-1, ids, mass)
    return probabilities(logits, **sampling.limits())


def on_cpu(logits: Tensor) -> bool:
    """Whether the host can look at values without waiting for a device."""
    return logits.device.type == "cpu"


def penalize(logits: Tensor, seen: Tensor, counts: Tensor | None = None,
             repetition: float | Tensor = 1.0, presence: float | Tensor = 0.0,
             frequency: float | Tensor = 0.0) -> Tensor:
    """Logits (B, V) that make it less likely to say again what was said, in float32.

    seen (B, V) says which tokens are in the prompt or the answer: their positive logits are divided
    by the repetition penalty, their negative ones multiplied by it (Keskar et al., 2019). counts
    (B, V) says how often a token is in the answer: as OpenAI defines it, each time costs the
    frequency penalty, and the first one also the presence penalty."""
    logits = logits.float()
    repetition, presence, frequency = (per_row(x, logits) for x in (
        repetition, presence, frequency))
    again = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen.bool(), again, logits)
    return logits if counts is None else logits - frequency * counts - presence * (counts > 0)


def seen_in(ids: list[int], vocab_size: int, device="cpu") -> Tensor:
    """(1, V) bool: which tokens are among the ids."""
    seen = torch.zeros(1, vocab_size, dtype=torch.bool)
    seen[0, ids] = True
    return seen.to(device, non_blocking=True)


def log_probabilities(logits: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, 1 + n) in logits (B, V), without any sampling: of ids (B, 1), and of
    the n likeliest tokens. And which tokens those are, (B, 1 + n)."""
    log_probs = logits.float().log_softmax(-1)
    ids = torch.cat([ids, log_probs.topk(n).indices], dim=-1)
    return log_probs.gather(-1, ids), ids
