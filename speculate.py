"""Speculative decoding (Leviathan et al., 2023; Chen et al., 2023) on endless caches.

A cheap proposer guesses K tokens, and the model reads them all in one call, for about the price of
one token. Token d_i, proposed with probability q_i, is accepted when u < p_i(d_i) / q_i(d_i) for a
uniform u in [0, 1), p_i being the model's own distribution there; the first that is not is replaced
by a draw from max(p - q, 0), normalized. What comes out has exactly the model's distribution.

The proposer is a smaller model with its own cache, or a lookup: what followed the last occurrence
of the latest few tokens. Rejected tokens are rolled back, in both caches.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kv_cache import KVCache
from model import Transformer
from sample import Sampling, distribution, draw, sample
from tp import in_step

log = logging.getLogger("gpt_stream")
SIZES = (2, 5)  # proposals a round that are tried where none is asked for, and 0 when neither pays
LOOKED_AT = 1 << 14  # latest tokens that a lookup searches
TRIAL = 32  # proposals between two changes of size


@dataclass
class Speculation:
    """Who proposes, how many, and how it went."""

    draft: Transformer | None = None  # None: look the proposals up in the history
    cache: KVCache | None = None  # the draft's own
    fixed: int | None = None  # proposals a round; None: as many as pay
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    def __post_init__(self):
        self.begin([])

    def begin(self, unread: list[int]) -> None:
        """Start anew on a conversation of which the draft's cache holds all but `unread`."""
        self.unread = unread  # the last token, once there is one
        self.history = array("q")  # for lookups
        self.size = self.fixed or SIZES[-1]  # proposals a round at present; 0: stopped
        self.trial = [0, 0]  # proposed and accepted lately

    def reset(self) -> None:
        """Forget the conversation."""
        self.begin([])
        if self.cache:
            self.cache.reset()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.fixed,) if self.fixed else SIZES

    def count(self, proposed: int, accepted: int) -> None:
        """Note a round, and adapt: after every TRIAL proposals, 5 a round where three in five were
        accepted, 2 where one in three was, and else none any more."""
        self.rounds, self.proposed = self.rounds + 1, self.proposed + proposed
        self.accepted += accepted
        self.trial = [self.trial[0] + proposed, self.trial[1] + accepted]
        if self.fixed or self.trial[0] < TRIAL:
            return
        share, (small, large) = self.trial[1] / self.trial[0], SIZES
        self.size = large if share >= 0.6 else small if share >= 0.33 else 0
        self.trial = [0, 0]
        if not self.size:
            log.info("speculation stopped: %s of %s proposals accepted", self.accepted,
                     self.proposed)


def propose(speculation: Speculation, token: Tensor, size: int, vocab_size: int,
            temperature: float, generator=None, **limits) -> tuple[Tensor, Tensor] | None:
    """Proposals (1, K) that follow token (1, 1), and the distributions (K, V) they were drawn from;
    None where a lookup finds nothing."""
    if speculation.draft is None:
        found = look_up(speculation.history, size)
        if found is None:
            return None
        proposals = torch.tensor([found], device=token.device)
        return proposals, F.one_hot(proposals[0], vocab_size).float()
    # The draft reads the last token but one only now: so it never reads a proposal that nothing
    # follows, and its cache is always one token behind the model's.
    reads = torch.cat([torch.tensor([speculation.unread], device=token.device), token], dim=1)
    tokens, distributions = [], []
    for _ in range(size):
        logits = speculation.draft(reads, speculation.cache)[:, -1]  # (1, V)
        distributions.append(distribution(logits, temperature, **limits))
        reads = draw(distributions[-1], temperature, generator)[None]
        tokens.append(reads)
    return in_step(torch.cat(tokens, dim=1)), torch.cat(distributions)


def look_up(history: array, size: int) -> list[int] | None:
    """The `size` tokens after the last earlier occurrence of the latest three tokens, or two."""
    recent = history[-LOOKED_AT:]
    width, raw = recent.itemsize, recent.tobytes()
    for n in (3, 2):
        latest = recent[-n:].tobytes()
        at = raw.rfind(latest, 0, len(raw) - width)
        while at > 0 and at % width:  # bytes that match across two tokens
            at = raw.rfind(latest, 0, at + len(latest) - 1)
        if len(recent) > n and at >= 0 and at % width == 0:
            start = at // width + n
            period = recent[start:]  # where it ends early, it goes on as it began
            return [period[i % len(period)] for i in range(size)]
    return None


def verify(p: Tensor, q: Tensor, proposals: Tensor, temperature: float,
           generator=None) -> tuple[Tensor, Tensor]:
    """How many of the proposals (K,) are accepted, and the token that follows those, each (1,).

    p (K + 1, V) is the model's distribution at each of them and after the last, q (K, V) the
    proposer's. Nothing waits for the device here."""
    size = len(proposals)
    index = proposals[:, None]
    u = torch.rand(size, 1, device=p.device, generator=generator)
    accepts = u * q.gather(1, index) < p[:size].gather(1, index)  # never where p is 0
    n = accepts[:, 0].long().cumprod(0).sum(0, keepdim=True)
    q = torch.cat([q, torch.zeros_like(p[:1])])  # after the last proposal the draw is from p itself
    residual = (p[n] - q[n]).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[n])
    return n, draw(residual, temperature, generator)


def forget(cache: KVCache, speculation: Speculation, n: int) -> None:
    """Un-write the last n tokens, in the draft's cache too."""
    cache.rollback(n)
    if speculation.draft:
        speculation.cache.rollback(n)


@torch.no_grad()
def speculate(model: Transformer, cache: KVCache, token: Tensor, max_new_tokens: int,
              ignore_eos: bool, speculation: Speculation, sampling: Sampling) -> Iterator[int]:
    """Yield `token` (1, 1), sampled but not in a cache yet, and what follows it, as long as
    speculating pays. Returns what is left to do without: (token, how many more). Once this is
    closed, at whichever yield, the cache holds everything up to the token yielded, and no more; the
    draft's all but that token."""
    eos_ids = () if ignore_eos else model.config.eos_ids
    generator = torch.Generator(token.device).manual_seed(sampling.seed or 0)
    temperature = sampling.temperature
    limits = dict(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    while max_new_tokens > 0 and (size := speculation.size):
        token_id = token.item()
        speculation.history.append(token_id)
        proposed = propose(speculation, token, size, model.config.vocab_size, temperature,
                           generator, **limits)
        if proposed is None:
            following = sample(model(token, cache), temperature, generator=generator, **limits)
            run, token = [token_id], following
        else:
            proposals, q = proposed
            logits = model(torch.cat([token, proposals], dim=1), cache)[0]  # (K + 1, V)
            p = distribution(logits, temperature, **limits)
            n, following = verify(p, q, proposals[0], temperature, generator)
            decided = in_step(torch.cat([n, following, proposals[0]]))
            following = decided[1:2]
            n, _, *ids = decided.tolist()  # the host decides once a round
            forget(cache, speculation, size - n)
            speculation.count(size, n)
            run, token = [token_id, *ids[:n]], following[None]
        wanted = min(len(run), max_new_tokens)
        wanted = next((i for i, t in enumerate(run[:wanted], 1) if t in eos_ids), wanted)
        yielded = 0
        try:
            for token_id in run[:wanted]:
                yielded += 1
                yield token_id
        finally:
            forget(cache, speculation, len(run) - yielded)
            speculation.unread = [run[yielded - 1]]
            speculation.history.extend(run[1:yielded])
            if len(speculation.history) > 2 * LOOKED_AT:
                del speculation.history[:-LOOKED_AT]
        max_new_tokens = 0 if run[wanted - 1] in eos_ids else max_new_tokens - wanted
    return token, max_new_tokens
