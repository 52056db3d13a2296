"""From logits to a token. Everything is done in float32, and in this order, which is Hugging Face's
(vLLM takes min-p before top-k and top-p): penalties, temperature, top-k, top-p, min-p.

Every setting is a number, or a tensor (B,) with one for each of B rows of logits (B, ..., V). What a
row draws depends on its own logits, settings and key alone, so a seed says the same whatever runs
beside it. Nothing here waits for a GPU or has a shape that depends on what is in a tensor there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tp import in_step

BLOCK = 64  # tokens that an inverse CDF first passes over together


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn, checked. The defaults are greedy, and what is off."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random one

    def __post_init__(self):
        """Raises ValueError naming the setting, its value and what would be right."""
        for name, low, high in (
                ("temperature", 0, math.inf), ("top_k", 0, math.inf), ("top_p", 0, 1),
                ("min_p", 0, 1), ("repetition_penalty", 1e-3, math.inf),
                ("presence_penalty", -math.inf, math.inf),
                ("frequency_penalty", -math.inf, math.inf)):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name} {value} must be a finite number of at least {low}"
                                 + f" and at most {high}" * (high < math.inf))


    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


# ------------------------------------------------------------------------------ distributions


def probabilities(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None = None,
                  top_p: float | Tensor | None = None,
                  min_p: float | Tensor | None = None) -> Tensor:
    """(..., V) float32 probabilities that a token is drawn with: temperature, which is not 0, then
    exactly the top_k most likely, then the fewest of those whose mass reaches top_p, and of those
    the ones at least min_p times as likely as the likeliest. None (and 0, 1, 0) is off."""
    scores = scale(logits, temperature)
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
    """A setting as it broadcasts with logits (B, ..., V)."""
    if not isinstance(setting, Tensor):
        return setting
    return setting.view(-1, *[1] * (logits.ndim - 1))


def scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """The logits over the temperature, as float32; temperature 0 in a tensor counts as 1.

    The largest goes to 0 first: a tiny temperature then overflows only to -inf."""
    logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = per_row(torch.where(temperature == 0, 1, temperature), logits)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def most_likely(scores: Tensor, top_k: int | Tensor | None,
                top_p: float | Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The likeliest tokens in order (scores, ids), both (..., n), at least those that top_k and
    top_p can keep, and the logarithm of the mass of all tokens, or None where n is enough for it.

    A CPU takes 8 ms to sort 128k of them and 0.5 for the first thousand, which nearly always do.
    A GPU sorts fast, and looking whether they do would make the host wait for it."""
    size = scores.shape[-1]
    if isinstance(top_k, int) and top_k:
        return *scores.topk(min(top_k, size)), None
    if scores.device.type == "cpu" and top_k is None:
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
        limit = top_k if isinstance(top_k, Tensor) else torch.tensor(top_k)
        likely = likely.masked_fill((rank >= limit) & (limit > 0), -math.inf)
    probs = likely.softmax(-1) if total is None else (likely - total).exp()
    if top_p is None:
        return probs
    mass_before = probs.cumsum(-1) - probs
    mass_before[..., 0] = -1  # the likeliest always stays
    off = torch.as_tensor(top_p, device=likely.device) >= 1
    return probs.masked_fill((mass_before >= top_p) & ~off, 0)


def distribution(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None) -> Tensor:
    """(..., V) float32: what `sample` draws from; all on the likeliest token at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return probabilities(logits, temperature, top_k, top_p, min_p)


def penalize(logits: Tensor, seen: Tensor, counts: Tensor | None = None,
             repetition: float | Tensor = 1.0, presence: float | Tensor = 0.0,
             frequency: float | Tensor = 0.0) -> Tensor:
    """Logits (B, V) that make it less likely to say again what was said, in float32.

    Where seen (B, V) is not 0, in the prompt or the answer, a positive logit is divided by the
    repetition penalty and a negative one multiplied (Keskar et al., 2019); then, as OpenAI defines
    it, each of counts (B, V), in the answer, costs the frequency penalty, and any the presence's."""
    logits = logits.float()
    repetition, presence, frequency = (per_row(x, logits) for x in (
        repetition, presence, frequency))
    again = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen.bool(), again, logits)
    return logits if counts is None else logits - frequency * counts - presence * (counts > 0)


# ------------------------------------------------------------------------------ draws


def mix(key: int | Tensor) -> int | Tensor:
    """A hash of 32 bits (Wellons' search of such functions found the constants), of a number or of
    an int64 tensor, in which no product overflows."""
    key = ((key ^ key >> 16) & 0xFFFFFFFF) * 0x21F0AAAD & 0xFFFFFFFF
    key = (key ^ key >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return key ^ key >> 15


def seed_key(seed: int) -> int:
    """The key of a seed of up to 64 bits."""
    return mix(mix(seed & 0xFFFFFFFF) ^ seed >> 32)


def uniform(keys: int | Tensor, again: int = 0) -> float | Tensor:
    """The uniform number in [0, 1) of each key (float64), and others for a draw that is repeated."""
    number = mix(keys + 0x9E3779B9 * again & 0xFFFFFFFF)
    return (number.double() if isinstance(number, Tensor) else number) / 2**32


def random_keys(n: int, device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(2**32, (n,), device=device, generator=generator)


def pick(weights: Tensor, u: Tensor) -> Tensor:
    """Ids (B,) drawn in proportion to weights (B, V) by inverse CDF: the first token at which the
    mass passes the share u (B,) of it. Never one of weight 0.

    Whole blocks are passed over first, so that all but one row of a block is only summed up."""
    blocks = weights.unflatten(-1, (-1, math.gcd(weights.shape[-1], BLOCK)))
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, V / BLOCK)
    target = u[:, None] * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[-1] - 1)
    target -= F.pad(mass, (1, 0)).gather(-1, block)
    rows = torch.arange(len(weights), device=weights.device)
    mass = blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # (B, BLOCK)
    target = target.minimum(mass[:, -1:] * (1 - 1e-12))  # the two sums differ in their last bits
    inner = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[-1] - 1)
    return (block * blocks.shape[-1] + inner)[:, 0]


def draw(weights: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) int64 drawn in proportion to weights (..., V); at temperature 0 the likeliest.
    Unlike multinomial it never waits for the GPU."""
    if temperature == 0:
        return weights.argmax(-1)
    flat = weights.reshape(-1, weights.shape[-1])
    keys = random_keys(len(flat), weights.device, generator)
    return pick(flat, uniform(keys)).view(weights.shape[:-1])


def sample(logits: Tensor, temperature: float | Tensor = 0.0, top_k: int | Tensor | None = None,
           top_p: float | Tensor | None = None, generator: torch.Generator | None = None,
           min_p: float | Tensor | None = None, keys: Tensor | None = None,
           repetition_penalty: float | Tensor = 1.0, seen: Tensor | None = None,
           overwrite: bool = False) -> Tensor:
    """Token ids (...) int64 for logits (..., V); the likeliest at temperature 0.

    The randomness is that of the keys (rows,), 32 bits each, or else of the generator. What is drawn
    is noted in seen (rows, V), bool, if it is given, the tokens that the repetition penalty is
    for."""
    rows = logits.reshape(-1, logits.shape[-1])
    if seen is not None:
        rows = penalize(rows, seen, repetition=repetition_penalty)
    if not isinstance(temperature, Tensor) and temperature == 0:
        ids = rows.argmax(-1)
    else:
        if keys is None:
            keys = random_keys(len(rows), rows.device, generator)
        choose = choose_on_cpu if rows.device.type == "cpu" else choose_on_gpu
        rows = rows.float() if overwrite or rows.dtype != torch.float32 else rows.clone()
        ids = choose(rows, temperature, top_k, top_p, min_p, keys)
    ids = in_step(ids)
    if seen is not None:
        seen.scatter_(-1, ids[:, None], True)
    return ids.view(logits.shape[:-1])


def choose_on_gpu(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None,
                  top_p: float | Tensor | None, min_p: float | Tensor | None,
                  keys: Tensor) -> Tensor:
    """`sample` of rows (B, V), whatever is in the tensors."""
    ids = pick(probabilities(logits, temperature, top_k, top_p, min_p), uniform(keys))
    return torch.where(torch.as_tensor(temperature, device=ids.device) == 0, logits.argmax(-1), ids)


def choose_on_cpu(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None,
                  top_p: float | Tensor | None, min_p: float | Tensor | None,
                  keys: Tensor) -> Tensor:
    """`sample` of rows (B, V), overwritten, where looking at values costs nothing: greedy rows take
    no more than the likeliest, rows with top-k sort that many, and all others sort nothing."""
    heat, k, p, low = (listed(setting, off, len(logits)) for setting, off in (
        (temperature, 0), (top_k, 0), (top_p, 1), (min_p, 0)))
    ids = torch.empty(len(logits), dtype=torch.int64)
    for row in range(len(logits)):
        if not heat[row]:
            ids[row] = logits[row].argmax(-1)
        elif k[row]:
            likely, at = top(logits[row], min(k[row], logits.shape[-1]))
            kept = probabilities(likely, heat[row], None, p[row], low[row])
            ids[row] = at[pick(kept[None], uniform(keys[row:row + 1]))[0]]
    many = [row for row in range(len(logits)) if heat[row] and not k[row]]
    if many:  # all rows at once: each call has its cost
        logits = logits.sub_(logits.amax(-1, keepdim=True))
        heats = torch.tensor([[heat[row] or 1] for row in range(len(logits))])
        weights = logits.div_(heats).exp_()
        drawn = pick(weights, uniform(keys)).tolist()
        for row in many:
            ids[row] = redraw(weights[row], drawn[row], p[row], low[row], keys[row])
    return ids


def listed(setting: float | Tensor | None, off: float, n: int) -> list:
    """A setting as n numbers."""
    if isinstance(setting, Tensor):
        return setting.tolist()
    return [off if setting is None else setting] * n


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` of (V,) with less to sort: the k likeliest are in the k blocks with the
    largest maxima."""
    size = math.gcd(len(logits), BLOCK)
    if k * size >= len(logits):
        return logits.topk(k)
    blocks = logits.view(-1, size)
    among = blocks.amax(-1).topk(k, sorted=False).indices
    likely, at = blocks[among].view(-1).topk(k)
    return likely, among[at // size] * size + at % size


def redraw(weights: Tensor, token: int, top_p: float, min_p: float, key: Tensor) -> int:
    """A token drawn from weights (V,), or others until one is kept by top-p and min-p.

    What comes out has the distribution that sorting would give: in the order of likelihood (of
    equals, of ids), a token is kept when less than top_p comes before it, and after one that is not
    kept, none is. So the next draw is from those before it. Two sums over the vocabulary instead of
    sorting it, and one draw in twenty is repeated at top-p 0.95."""
    if top_p >= 1 and min_p <= 0:
        return token
    enough = top_p * weights.sum().item() if top_p < 1 else math.inf
    again = 0
    while True:
        weight = weights[token].item()
        before = F.threshold(weights, weight, 0.0)  # those that are likelier; the largest is 1
        equals = weights[:token] == weight
        mass = before.sum().item() + weight * equals.count_nonzero().item()
        if not mass or not (mass >= enough or weight < min_p):  # the likeliest always stays
            return token
        before[:token] += weight * equals
        again += 1
        token = pick(before[None], uniform(key[None], again)).item()


# ------------------------------------------------------------------------------ rows


class Rows:
    """The Sampling of each of B rows as tensors (B,), and what the rows have said.

    A row is begun when its prompt is read, and ended to be greedy and cheap. What no row asks for
    is known on the host, and not computed."""

    def __init__(self, n_rows: int, vocab_size: int, device="cpu"):
        self.asked = [Sampling()] * n_rows
        self.settings = {name: torch.full((n_rows,), off, device=device) for name, off in (
            ("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0),
            ("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0))}
        self.keys = torch.zeros(n_rows, dtype=torch.int64, device=device)  # of the seeds
        self.drawn = torch.zeros_like(self.keys)  # tokens so far
        # In the prompt or the answer (B, V), and how often in the answer: from the first penalty on
        self.seen = self.counts = None
        self.vocab_size = vocab_size

    def begin(self, row: int, sampling: Sampling, prompt_ids: list[int]) -> None:
        """Draw as asked for in a row from now on, whose prompt this is. A seed has to be given
        unless the row is greedy."""
        self.asked[row] = sampling
        for name, setting in self.settings.items():
            setting[row] = getattr(sampling, name)
        self.keys[row] = seed_key(sampling.seed or 0)
        self.drawn[row] = 0
        if not sampling.penalizes:
            return
        if self.seen is None:
            shape, device = (len(self.asked), self.vocab_size), self.keys.device
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
            self.counts = torch.zeros(shape, device=device)
        self.counts[row] = 0
        self.seen[row] = False
        self.seen[row, torch.tensor(prompt_ids, device=self.keys.device)] = True

    def end(self, row: int) -> None:
        self.asked[row] = Sampling()
        self.settings["temperature"][row] = 0

    def sample(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """The next token (B, 1) of the rows, or of some, whose logits (B, 1, V) these are."""
        asked, logits = self.asked[rows], logits[:, -1]
        use = {name: setting[rows] for name, setting in self.settings.items()}
        penalized = any(one.penalizes for one in asked)
        if penalized:
            logits = penalize(logits, self.seen[rows], self.counts[rows],
                              use["repetition_penalty"], use["presence_penalty"],
                              use["frequency_penalty"])
        if not any(one.temperature for one in asked):
            ids = sample(logits)
        else:
            limits = {name: use[name] if any(getattr(one, name) != off for one in asked) else None
                      for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))}
            ids = sample(logits, use["temperature"], **limits, overwrite=True,
                         keys=mix(self.keys[rows] ^ self.drawn[rows]))
        self.drawn[rows] += 1
        if penalized:
            self.seen[rows].scatter_(-1, ids[:, None], True)
            self.counts[rows].scatter_add_(-1, ids[:, None], torch.ones_like(ids[:, None]).float())
        return ids[:, None]
