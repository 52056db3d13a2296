"""From logits to a token. Everything is done in float32, and in this order, which is Hugging Face's
(vLLM takes min-p before top-k and top-p): penalties, temperature, top-k, top-p, min-p.

What a row draws depends on its own logits, settings and key alone, and its n-th token's key on its
seed and n: so a seed says the same in every program, whatever runs beside it. Nothing here waits
for a GPU, or has a shape that depends on what a tensor there holds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from operator import neg

import torch
import torch.nn.functional as F
from torch import Tensor

from tp import in_step

BLOCK = 64  # tokens that are passed over together before any is looked at
COLDEST = 1e-30  # as temperature: below, float32 would overflow
ANY = -math.inf, math.inf
RANGES = {"temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1),
          "repetition_penalty": (1e-3, math.inf), "presence_penalty": ANY, "frequency_penalty": ANY}


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn, checked. The defaults are greedy, and everything else off; None is
    the default too."""

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
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, value := getattr(Sampling, name))
            check_range(name, value, low, high)
        if self.top_k != int(self.top_k):
            raise ValueError(f"top_k {self.top_k} must be a whole number")

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless a setting is a finite number from low to high."""
    if not max(low, -1e308) <= value <= min(high, 1e308):
        raise ValueError(f"{name} {value} must be a finite number of at least {low}"
                         + f" and at most {high}" * (high < math.inf))


# ------------------------------------------------------------------------------ distributions


def probabilities(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None = None,
                  top_p: float | Tensor | None = None,
                  min_p: float | Tensor | None = None) -> Tensor:
    """(..., V) float32 probabilities that a token is drawn with, of logits (..., V) and numbers, or
    of logits (B, V) and tensors (B,), a setting for each row: temperature, which is not 0, then
    exactly the top_k most likely, then the fewest of those whose mass reaches top_p, and of those
    the ones at least min_p times as likely as the likeliest. None (and 0, 1, 0) is off."""
    scores = scale(logits, temperature)
    top_k, top_p, min_p = (None if not isinstance(x, Tensor) and x == off else x
                           for x, off in ((top_k, 0), (top_p, 1), (min_p, 0)))
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
    temperature = torch.as_tensor(temperature).clamp(min=COLDEST)
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
    it, each of counts (B, V), in the answer, costs the frequency penalty, and any at all the
    presence penalty."""
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
    """Logarithms of the probabilities of ids (B, 1) in logits (B, V) as they are, and then of the n
    likeliest, (B, 1 + n), and which tokens those are, (B, 1 + n)."""
    log_probs = logits.float().log_softmax(-1)
    ids = torch.cat([ids, log_probs.topk(n).indices], dim=-1)
    return log_probs.gather(-1, ids), ids


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
    """The number in [0, 1) of each key (float64), and others for a draw that is repeated."""
    number = mix(keys + 0x9E3779B9 * again & 0xFFFFFFFF)
    return (number.double() if isinstance(number, Tensor) else number) / 2**32


def new_seed(generator: torch.Generator | None = None) -> int:
    return torch.randint(2**62, (), generator=generator,
                         device=generator.device if generator else "cpu").item()


def random_keys(n: int, device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(2**32, (n,), device=device, generator=generator)


def block_heights(weights: Tensor) -> Tensor:
    """(..., V / BLOCK) float64: the mass of weights (..., V) up to the end of each block."""
    size = math.gcd(weights.shape[-1], BLOCK)
    return weights.unflatten(-1, (-1, size)).sum(-1).cumsum(-1, dtype=torch.float64)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Ids (B,) drawn in proportion to weights (B, V): the first token at which the mass passes the
    share u (B,) of it. Never one of weight 0.

    Whole blocks are passed over first, so that only one block a row needs more than a sum."""
    heights = block_heights(weights)
    blocks = weights.view(*heights.shape, -1)
    target = u[:, None] * heights[:, -1:]
    block = torch.searchsorted(heights, target, right=True).clamp_(max=heights.shape[-1] - 1)
    target -= F.pad(heights, (1, 0)).gather(-1, block)
    rows = torch.arange(len(weights), device=weights.device)
    heights = blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # (B, BLOCK)
    target = target.minimum(heights[:, -1:] * (1 - 1e-12))  # the two sums differ in their last bits
    inner = torch.searchsorted(heights, target, right=True).clamp_(max=heights.shape[-1] - 1)
    return (block * blocks.shape[-1] + inner)[:, 0]


def inverse_cdf_one(weights: Tensor, heights: Tensor, u: float) -> int:
    """`inverse_cdf` of one row (V,), whose block_heights these are, on a CPU."""
    target, blocks = u * heights[-1].item(), weights.view(len(heights), -1)
    block = min(torch.searchsorted(heights, target, right=True).item(), len(blocks) - 1)
    target -= heights[block - 1].item() if block else 0
    mass = list(accumulate(blocks[block].tolist()))
    inner = bisect_right(mass, min(target, mass[-1] * (1 - 1e-12)), hi=len(mass) - 1)
    return block * len(mass) + inner


def draw(weights: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) int64 drawn in proportion to weights (..., V); at temperature 0 the likeliest.
    Unlike multinomial it never waits for the GPU."""
    if temperature == 0:
        return weights.argmax(-1)
    flat = weights.reshape(-1, weights.shape[-1])
    keys = random_keys(len(flat), weights.device, generator)
    return inverse_cdf(flat, uniform(keys)).view(weights.shape[:-1])


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None,
           min_p: float | None = None) -> Tensor:
    """Token ids (...) int64 for logits (..., V); the likeliest at temperature 0."""
    rows = logits.reshape(-1, logits.shape[-1])
    if temperature == 0:
        ids = rows.argmax(-1)
    else:
        settings = temperature, top_k, top_p, min_p
        keys = random_keys(len(rows), rows.device, generator)
        if on_cpu(rows):
            ids = choose_on_cpu(rows, *([setting] * len(rows) for setting in settings),
                                keys.tolist())
        else:
            ids = choose_on_gpu(rows, *settings, keys)
    return in_step(ids).view(logits.shape[:-1])


def on_cpu(logits: Tensor) -> bool:
    """Where looking at values costs nothing."""
    return logits.device.type == "cpu"


def choose_on_gpu(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None,
                  top_p: float | Tensor | None, min_p: float | Tensor | None,
                  keys: Tensor) -> Tensor:
    """Ids (B,) of rows (B, V), whatever is in the tensors."""
    ids = inverse_cdf(probabilities(logits, temperature, top_k, top_p, min_p), uniform(keys))
    if not isinstance(temperature, Tensor):
        return ids
    return torch.where(temperature == 0, logits.argmax(-1), ids)


def choose_on_cpu(logits: Tensor, *settings: list) -> Tensor:
    """The same, of settings in the same order, a list of each row's, sorting as little as can be:
    greedy rows take the likeliest, rows with top-k look at no more than that many, and others sort
    nothing.

    After a step of the model the first call of every operator costs 15 to 30 us, since its code has
    left the processor's caches: so few kinds of them are used, and plain numbers."""
    n_rows, size = logits.shape
    rows = [(temperature, k if k and k < size else 0, 1 if top_p is None else top_p, min_p or 0,
             key) for temperature, k, top_p, min_p, key in zip(*settings, strict=True)]
    ids = [0] * n_rows
    for row, (temperature, k, top_p, min_p, key) in enumerate(rows):
        if not temperature:
            ids[row] = logits[row].argmax().item()
        elif k:
            likely, at = top(logits[row], k)
            ids[row] = at[draw_in_order(likely.tolist(), temperature, top_p, min_p,
                                        uniform(key))].item()
    many = [row for row, (temperature, k, *_) in enumerate(rows) if temperature and not k]
    if many:
        probs = logits if len(many) == n_rows else logits[many]  # (n, V)
        temperatures = [[max(rows[row][0], COLDEST)] for row in many]
        same = all(one == temperatures[0] for one in temperatures)
        probs = (probs / (temperatures[0][0] if same else torch.tensor(temperatures))).softmax(-1)
        heights = block_heights(probs)
        for at, row in enumerate(many):
            ids[row] = draw_by_rejection(probs[at], heights[at], *rows[row][2:])
    return torch.tensor(ids)


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` of (V,) with less to sort: the k likeliest are in the k blocks with the
    largest maxima."""
    size = math.gcd(len(logits), BLOCK)
    if k * size >= len(logits):
        return logits.topk(k)
    blocks = logits.view(-1, size)
    of = blocks.amax(-1).topk(k, sorted=False).indices
    likely, at = blocks[of].view(-1).topk(k)
    return likely, of[at // size] * size + at % size


def draw_in_order(likely: list[float], temperature: float, top_p: float, min_p: float,
                  u: float) -> int:
    """Which of the likeliest logits, the likeliest first, is drawn."""
    weights = [math.exp((logit - likely[0]) / temperature) for logit in likely]
    mass = list(accumulate(weights))
    n = bisect_left(mass, top_p * mass[-1]) if top_p < 1 else len(mass) - 1  # the last one kept
    n = max(0, min(n, bisect_right(weights, -min_p, key=neg) - 1))
    return bisect_right(mass, u * mass[n], hi=n)


def draw_by_rejection(probs: Tensor, heights: Tensor, top_p: float, min_p: float, key: int) -> int:
    """Draw from probabilities (V,) until a token is one that top-p and min-p keep.

    What comes out has the distribution that sorting would give: in the order of likelihood (of
    equals, of ids), a token is kept when less than top_p comes before it, and after one that is not
    kept, none is. So the next draw is from those before it. One draw in twenty is repeated at
    top-p 0.95, and three passes over the vocabulary cost a hundredth of sorting it."""
    token = inverse_cdf_one(probs, heights, uniform(key))
    least = min_p * probs.max().item() if min_p else 0
    again = 0
    while top_p < 1 or least:
        p = probs[token].item()
        # With its equals, and a few that are less by a rounding: what comes before is not more.
        if p >= least and (
                top_p >= 1 or F.threshold(probs, p * (1 - 2e-7), 0).sum().item() - p < top_p):
            break
        before = F.threshold(probs, p, 0)
        before[:token] += p * (probs[:token] == p)
        mass = before.sum().item()
        dropped = p < least or top_p < 1 and mass >= top_p  # not where p is NaN
        if not dropped or not mass:  # the likeliest always stays
            break
        again += 1
        token = inverse_cdf_one(before, block_heights(before), uniform(key, again))
    return token


# ------------------------------------------------------------------------------ rows


class Rows:
    """The Sampling of each of B rows, and what the rows have said.

    A row is begun when its prompt is read, and ended to be greedy and cheap. The host knows all of
    it, and computes what some row asks for; a GPU finds it in tensors, too."""

    def __init__(self, n_rows: int, vocab_size: int, device="cpu"):
        self.asked = [Sampling()] * n_rows
        self.keys, self.drawn = [0] * n_rows, [0] * n_rows  # the seeds' keys; tokens drawn so far
        self.on_gpu = {}  # all of these as tensors (B,), by name
        # In the prompt or the answer (B, V), and how often in the answer: from the first penalty on
        self.seen = self.counts = None
        self.vocab_size, self.device = vocab_size, device

    def begin(self, row: int, sampling: Sampling, prompt_ids: list[int]) -> None:
        """Draw as asked for in a row from now on, whose prompt this is. A seed has to be given
        unless the row is greedy."""
        self.asked[row], self.on_gpu = sampling, {}
        self.keys[row], self.drawn[row] = seed_key(sampling.seed or 0), 0
        if not sampling.penalizes:
            return
        if self.seen is None:
            shape = len(self.asked), self.vocab_size
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(shape, device=self.device)
        self.counts[row] = 0
        self.seen[row] = seen_in(prompt_ids, self.vocab_size, self.device)[0]

    def end(self, row: int) -> None:
        self.asked[row], self.on_gpu = Sampling(), {}

    def tensors(self) -> dict[str, Tensor]:
        """What is asked for, for a GPU; copied there when a row has begun or ended."""
        if not self.on_gpu:
            columns = [[getattr(one, name) for one in self.asked] for name in RANGES]
            table = torch.tensor([*columns, self.keys, self.drawn], dtype=torch.float64)
            table = table.to(self.device, non_blocking=True)  # which does not wait for a GPU
            self.on_gpu = {
                name: column.long() if name in ("top_k", "key", "drawn") else column.float()
                for name, column in zip((*RANGES, "key", "drawn"), table, strict=True)}
        return self.on_gpu

    def sample(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """The next token (B, 1) of the rows, or of some, whose logits (B, 1, V) these are."""
        asked, logits = self.asked[rows], logits[:, -1].float()
        penalized = [row for row, one in enumerate(asked) if one.penalizes]
        if penalized:
            logits = self.penalize(logits, rows, penalized)
        if not any(one.temperature for one in asked):
            ids = logits.argmax(-1)
        elif on_cpu(logits):
            keys = [mix(key ^ n) for key, n in zip(self.keys[rows], self.drawn[rows], strict=True)]
            ids = choose_on_cpu(logits, *([getattr(one, name) for one in asked] for name in (
                "temperature", "top_k", "top_p", "min_p")), keys)
        else:
            on = {name: column[rows] for name, column in self.tensors().items()}
            limits = [on[name] if any(getattr(one, name) != getattr(Sampling, name)
                                      for one in asked) else None
                      for name in ("top_k", "top_p", "min_p")]
            ids = choose_on_gpu(logits, on["temperature"], *limits, mix(on["key"] ^ on["drawn"]))
        ids = in_step(ids)[:, None]
        self.drawn[rows] = [n + 1 for n in self.drawn[rows]]
        if self.on_gpu:
            self.on_gpu["drawn"][rows].add_(1)
        if penalized:
            self.seen[rows].scatter_(-1, ids, True)
            self.counts[rows].scatter_add_(-1, ids, torch.ones_like(ids).float())
        return ids

    def penalize(self, logits: Tensor, rows: slice, penalized: list[int]) -> Tensor:
        """The logits (B, V) of the rows, of which some ask for it. A CPU looks which tokens were
        seen, and computes those only."""
        seen, counts = self.seen[rows], self.counts[rows]
        names = "repetition_penalty", "presence_penalty", "frequency_penalty"
        if not on_cpu(logits):
            return penalize(logits, seen, counts, *(self.tensors()[name][rows] for name in names))
        logits = logits.clone()
        for row in penalized:
            at = seen[row].nonzero()[:, 0]
            logits[row, at] = penalize(logits[row, at], seen[row, at], counts[row, at],
                                       *(getattr(self.asked[rows][row], name) for name in names))
        return logits
