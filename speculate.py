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
import math
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draw import UNDRAWN, check_drawn, draw_from_weights, sample
from kv_cache import KVCache
from load import load
from model import Transformer
from sample import Sampling, distribution
from tokenizer import Tokenizer
from tp import broadcast_tokens

log = logging.getLogger("gpt_stream")
SIZES = (2, 5)  # proposals a round that are tried where no number is given; 0 when neither pays
LOOKUP_TOKENS = 1 << 14  # a lookup searches this many of the latest tokens
TRIAL = 32  # proposals after which the size may change
# Tokenizers that read this alike are taken for the same one.
PROBE = ("Does it read \u00e9t\u00e9, 12:30 and\n two lines alike?\n\n\tdef f(x): return x['y']"
         " != 2.5 # \u042f\u0437\u044b\u043a \u4e2d\u6587 \u0639\u0631\u0628 \U0001f642")


@dataclass
class Speculation:
    """A proposer, how many tokens it proposes a round, and how many were accepted."""

    draft: Transformer | None = None  # None: look the proposals up in the history
    cache: KVCache | None = None  # the draft's own
    fixed: int | None = None  # proposals a round; None: as many as pay
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    def __post_init__(self):
        self.restart([])

    def restart(self, unread: list[int]) -> None:
        """Begin on a conversation of which the draft's cache holds all tokens but `unread`."""
        self.unread = unread  # the last token, once there is one
        self.history = array("q")  # for lookups
        self.size = self.fixed or SIZES[-1]  # proposals a round at present; 0: stopped
        self.trial = [0, 0]  # proposed and accepted lately

    def reset(self) -> None:
        """Forget the conversation."""
        self.restart([])
        if self.cache:
            self.cache.reset()

    def figures(self) -> dict[str, int]:
        return dict(rounds=self.rounds, proposed=self.proposed, accepted=self.accepted)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.fixed,) if self.fixed else SIZES

    def record_round(self, proposed: int, accepted: int) -> None:
        """Count a round. After every TRIAL proposals, adapt the size: 5 where three in five were
        accepted, 2 where one in three was, else 0, and speculation has stopped."""
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


def load_draft(checkpoint: str, model: Transformer, tokenizer: Tokenizer,
               **load_options) -> Transformer:
    """A draft for a model, whole on every rank; load_options are what load.load takes. Its
    vocabulary may be padded to another size. Raises ValueError naming one with another
    tokenizer."""
    draft, its_tokenizer = load(checkpoint, parallel=False, **load_options)
    if its_tokenizer.encode(PROBE) != tokenizer.encode(PROBE):
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
    # The draft's cache is one token behind the model's, so the draft reads that token first. It
    # never reads its own last proposal.
    reads = torch.cat([torch.tensor([speculation.unread], device=token.device), token], dim=1)
    reads = reads.clamp(max=speculation.draft.config.vocab_size - 1)  # as `known_ids` does
    tokens, distributions = [], []
    for _ in range(size):
        logits = speculation.draft(reads, speculation.cache)[:, -1]
        logits = over_vocabulary(logits, vocab_size)  # (1, V)
        distributions.append(distribution(logits, sampling))
        reads = draw_from_weights(distributions[-1], sampling, generator)[None]
        tokens.append(reads)
    return broadcast_tokens(torch.cat(tokens, dim=1)), torch.cat(distributions)


def over_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """A draft's logits over the model's vocabulary (..., V): what it has beyond that is cut off,
    and what it lacks is never proposed."""
    extra = vocab_size - logits.shape[-1]
    return F.pad(logits, (0, extra), value=-math.inf) if extra else logits


def known_ids(draft: Transformer, ids: list[int]) -> list[int]:
    """Ids as a draft reads them: one beyond its vocabulary is read as its last one. That may spoil
    proposals, and nothing else."""
    return [min(token_id, draft.config.vocab_size - 1) for token_id in ids]


def look_up(history: array, size: int) -> list[int] | None:
    """The `size` tokens after the last earlier occurrence of the latest three tokens, or two."""
    recent = history[-LOOKUP_TOKENS:]
    width, raw = recent.itemsize, recent.tobytes()
    for n in (3, 2):
        latest = recent[-n:].tobytes()
        at = raw.rfind(latest, 0, len(raw) - width)
        while at > 0 and at % width:  # the bytes match across a token's border
            at = raw.rfind(latest, 0, at + len(latest) - 1)
        if len(recent) > n and at >= 0 and at % width == 0:
            start = at // width + n
            period = recent[start:]  # repeated if it is shorter than size
            return [period[i % len(period)] for i in range(size)]
    return None


def verify(p: Tensor, q: Tensor, proposals: Tensor, sampling: Sampling,
           generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The number of proposals (K,) that are accepted, and the token that follows those, each (1,).

    p (K + 1, V) is the model's distribution at each proposal and after the last, q (K, V) the
    proposer's. Either has NaN where no token can be drawn: a proposal there is not accepted, and
    what follows is UNDRAWN only if it is the model that has them. Nothing here waits for the
    device."""
    size = len(proposals)
    index = proposals.clamp(min=0)[:, None]
    u = torch.rand(size, 1, device=p.device, generator=generator)
    accepts = u * q.gather(1, index) < p[:size].gather(1, index)  # never where p is 0, or with NaN
    n = accepts[:, 0].long().cumprod(0).sum(0, keepdim=True)
    q = torch.cat([q, torch.zeros_like(p[:1])])  # after the last proposal, draw from p itself
    residual = (p[n] - q[n]).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[n])
    return n, draw_from_weights(residual, sampling, generator)


def rollback_both(cache: KVCache, speculation: Speculation, n: int) -> None:
    """Roll back the last n tokens in the model's cache, and in the draft's if there is one."""
    cache.rollback(n)
    if speculation.draft:
        speculation.cache.rollback(n)


def speculate_one_round(model: Transformer, cache: KVCache, token: Tensor, speculation: Speculation,
                        sampling: Sampling,
                        generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Propose and verify once. Returns the ids that the round wrote to the cache, `token` (1, 1)
    and the accepted proposals, and the token (1, 1) that follows them. Raises ValueError where
    `token` could not be drawn."""
    size, token_id = speculation.size, check_drawn(token.item())
    speculation.history.append(token_id)
    proposed = propose(speculation, token, size, model.config.vocab_size, sampling, generator)
    if proposed is None:
        return [token_id], sample(model(token, cache), sampling, generator)
    proposals, q = proposed  # (1, K) and (K, V)
    logits = model(torch.cat([token, proposals], dim=1), cache)[0]  # (K + 1, V)
    p = distribution(logits, sampling)
    n, following = verify(p, q, proposals[0], sampling, generator)
    decided = broadcast_tokens(torch.cat([n, following, proposals[0]]))  # (2 + K,)
    following = decided[1:2]
    n, _, *ids = decided.tolist()  # the only time in a round that the host waits for the device
    rollback_both(cache, speculation, size - n)
    speculation.record_round(size, n)
    if UNDRAWN in ids:
        log.warning("speculation stopped: the draft's logits are NaN or infinite")
        speculation.size = 0
    return [token_id, *ids[:n]], following[None]


@torch.no_grad()
def speculate(model: Transformer, cache: KVCache, token: Tensor, max_new_tokens: int,
              stop_ids: Container[int], speculation: Speculation,
              sampling: Sampling) -> Iterator[int]:
    """Yield `token` (1, 1), sampled but not in a cache yet, and what follows it, for as long as
    speculating pays. Returns (token, how many more) for decoding the rest without speculation.

    Once this generator is closed, at whichever yield, the cache holds everything up to the token
    yielded and no more, and the draft's cache all but that token."""
    generator = torch.Generator(token.device).manual_seed(sampling.seed or 0)
    while max_new_tokens > 0 and speculation.size:
        ids, token = speculate_one_round(model, cache, token, speculation, sampling, generator)
        wanted = min(len(ids), max_new_tokens)
        wanted = next((n for n, i in enumerate(ids[:wanted], 1) if i in stop_ids), wanted)
        yielded = 0
        try:
            for token_id in ids[:wanted]:
                yielded += 1
                yield token_id
        finally:
            rollback_both(cache, speculation, len(ids) - yielded)
            speculation.unread = [ids[yielded - 1]]
            speculation.history.extend(ids[1:yielded])
            if len(speculation.history) > 2 * LOOKUP_TOKENS:
                del speculation.history[:-LOOKUP_TOKENS]
        max_new_tokens = 0 if ids[wanted - 1] in stop_ids else max_new_tokens - wanted
    return token, max_new_tokens
