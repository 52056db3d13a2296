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
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draw import draw, sample
from kv_cache import KVCache
from load import load
from model import Transformer
from sample import Sampling, distribution
from tokenizer import Tokenizer
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

    def figures(self) -> dict[str, int]:
        return dict(rounds=self.rounds, proposed=self.proposed, accepted=self.accepted)

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


def load_draft(checkpoint: str, model: Transformer, tokenizer: Tokenizer, **how) -> Transformer:
    """A draft for a model, whole on every rank, loaded as `load` is told. Raises ValueError naming
    one with another tokenizer."""
    draft, its_tokenizer = load(checkpoint, parallel=False, **how)
    text = "Does it read \u00e9t\u00e9, 12:30 and\n two lines alike?"
    if (draft.config.vocab_size != model.config.vocab_size
            or its_tokenizer.encode(text) != tokenizer.encode(text)):
        raise ValueError(f"--draft {checkpoint} has another tokenizer than the model; "
                         "a draft needs the same one")
    return draft


def propose(speculation: Speculation, token: Tensor, size: int, vocab_size: int, sampling: Sampling,
            generator: torch.Generator | None = None) -> tuple[Tensor, Tensor] | None:
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
        distributions.append(distribution(logits, sampling))
        reads = draw(distributions[-1], sampling, generator)[None]
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


def verify(p: Tensor, q: Tensor, proposals: Tensor, sampling: Sampling,
           generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
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
    return n, draw(residual, sampling, generator)


def forget(cache: KVCache, speculation: Speculation, n: int) -> None:
    """Un-write the last n tokens, in the draft's cache too."""
    cache.rollback(n)
    if speculation.draft:
        speculation.cache.rollback(n)


def one_round(model: Transformer, cache: KVCache, token: Tensor, speculation: Speculation,
              sampling: Sampling, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Propose and verify once. The ids that the caches hold afterwards, `token` (1, 1) and the
    proposals accepted after it, and the token (1, 1) that follows them."""
    size, token_id = speculation.size, token.item()
    speculation.history.append(token_id)
    proposed = propose(speculation, token, size, model.config.vocab_size, sampling, generator)
    if proposed is None:
        return [token_id], sample(model(token, cache), sampling, generator)
    proposals, q = proposed  # (1, K) and (K, V)
    logits = model(torch.cat([token, proposals], dim=1), cache)[0]  # (K + 1, V)
    p = distribution(logits, sampling)
    n, following = verify(p, q, proposals[0], sampling, generator)
    decided = in_step(torch.cat([n, following, proposals[0]]))  # (2 + K,)
    following = decided[1:2]
    n, _, *ids = decided.tolist()  # the host decides once a round
    forget(cache, speculation, size - n)
    speculation.count(size, n)
    return [token_id, *ids[:n]], following[None]


@torch.no_grad()
def speculate(model: Transformer, cache: KVCache, token: Tensor, max_new_tokens: int,
              stop_ids: Container[int], speculation: Speculation,
              sampling: Sampling) -> Iterator[int]:
    """Yield `token` (1, 1), sampled but not in a cache yet, and what follows it, as long as
    speculating pays. Returns what is left to do without: (token, how many more). Once this is
    closed, at whichever yield, the cache holds everything up to the token yielded, and no more; the
    draft's all but that token."""
    generator = torch.Generator(token.device).manual_seed(sampling.seed or 0)
    while max_new_tokens > 0 and speculation.size:
        run, token = one_round(model, cache, token, speculation, sampling, generator)
        wanted = min(len(run), max_new_tokens)
        wanted = next((i for i, t in enumerate(run[:wanted], 1) if t in stop_ids), wanted)
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
        max_new_tokens = 0 if run[wanted - 1] in stop_ids else max_new_tokens - wanted
    return token, max_new_tokens
