"""Drawing a token: from a seed to keys, from a key to a number in [0, 1), and from that to an id.

What a row draws depends on its own logits, settings and key alone, and its n-th token's key on its
seed and n: so a seed says the same in every program, whatever runs beside it. Nothing here waits
for a GPU, or has a shape that depends on what a tensor there holds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection
from itertools import accumulate
from operator import neg

import torch
import torch.nn.functional as F
from torch import Tensor

from grammar import Matcher, forbidden_by, new_masks
from sample import (
    COLDEST,
    PENALTIES,
    RANGES,
    Sampling,
    on_cpu,
    penalize,
    probabilities,
    seen_in,
)
from tp import broadcast_tokens

BLOCK = 64  # neighbouring tokens that are summed first, so that a draw looks into one block only
GREEDY = Sampling()
FAST = {"temperature", "top_k", "top_p", "min_p"}  # the limits that a CPU's fast draws know
UNDRAWN = -1  # for an id where no token can be drawn: a logit is NaN or inf, or all are -inf
NOT_FINITE = ("the model's logits are NaN or infinite: its numbers overflow in this dtype, or its "
              "weights are damaged; try another --dtype, such as fp32")


def check_drawn(token_id: int) -> int:
    """The id of a token that was drawn. Raises ValueError if it is UNDRAWN."""
    if token_id == UNDRAWN:
        raise ValueError(NOT_FINITE)
    return token_id


# ------------------------------------------------------------------------------ keys and numbers


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
    """The number in [0, 1) of each key, float64. `again` counts the repetitions of a draw, each of
    which has another number."""
    number = mix(keys + 0x9E3779B9 * again & 0xFFFFFFFF)
    return (number.double() if isinstance(number, Tensor) else number) / 2**32


def new_seed(generator: torch.Generator | None = None) -> int:
    return torch.randint(2**62, (), generator=generator,
                         device=generator.device if generator else "cpu").item()


def random_keys(n: int, device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(2**32, (n,), device=device, generator=generator)


def likeliest(scores: Tensor) -> Tensor:
    """Ids (...) of the largest of scores (..., V), be they logits or weights; UNDRAWN where that is
    NaN or infinite. A NaN counts as the largest of all, so the others need no look."""
    largest, ids = scores.max(-1)
    return ids.masked_fill_(~largest.isfinite(), UNDRAWN)


def block_cdf(weights: Tensor) -> Tensor:
    """(..., V / BLOCK) float64: the mass of weights (..., V) up to the end of each block."""
    size = math.gcd(weights.shape[-1], BLOCK)
    return weights.unflatten(-1, (-1, size)).sum(-1).cumsum(-1, dtype=torch.float64)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Ids (B,) drawn in proportion to weights (B, V): in each row the first token at which the
    cumulative mass exceeds the share u (B,) of all mass. A token of weight 0 is never drawn. A row
    without mass, or with a NaN, gives UNDRAWN.

    The block is found first, so that cumulative sums are needed of one block a row only."""
    cdf = block_cdf(weights)  # (B, V / BLOCK)
    blocks = weights.view(*cdf.shape, -1)  # (B, V / BLOCK, BLOCK)
    target = u[:, None] * cdf[:, -1:]  # (B, 1)
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)  # (B, 1)
    target -= F.pad(cdf, (1, 0)).gather(-1, block)  # what is left of it inside the block
    rows = torch.arange(len(weights), device=weights.device)
    inner_cdf = blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # (B, BLOCK)
    # The block's sum above and this one differ in their last bits.
    target = target.minimum(inner_cdf[:, -1:] * (1 - 1e-12))
    inner = torch.searchsorted(inner_cdf, target, right=True).clamp_(max=blocks.shape[-1] - 1)
    ids = (block * blocks.shape[-1] + inner)[:, 0]
    return ids.masked_fill_(~(cdf[:, -1] > 0), UNDRAWN)  # a NaN is not above 0


def inverse_cdf_one(weights: Tensor, cdf: Tensor, u: float) -> int:
    """`inverse_cdf` of one row (V,) on a CPU; cdf is the row's block_cdf."""
    mass, blocks = cdf[-1].item(), weights.view(len(cdf), -1)
    if not mass > 0:
        return UNDRAWN
    target = u * mass
    block = min(torch.searchsorted(cdf, target, right=True).item(), len(blocks) - 1)
    target -= cdf[block - 1].item() if block else 0
    inner_cdf = list(accumulate(blocks[block].tolist()))
    target = min(target, inner_cdf[-1] * (1 - 1e-12))
    inner = bisect_right(inner_cdf, target, hi=len(inner_cdf) - 1)
    return block * len(inner_cdf) + inner


def draw_from_weights(weights: Tensor, sampling: Sampling,
                      generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) int64 drawn in proportion to weights (..., V); at temperature 0 the likeliest.
    Unlike torch.multinomial, this never waits for the GPU."""
    if sampling.temperature == 0:
        return likeliest(weights)
    flat = weights.reshape(-1, weights.shape[-1])
    keys = random_keys(len(flat), weights.device, generator)
    return inverse_cdf(flat, uniform(keys)).view(weights.shape[:-1])


def sample(logits: Tensor, sampling: Sampling = GREEDY,
           generator: torch.Generator | None = None) -> Tensor:
    """Token ids (...) int64 for logits (..., V), or UNDRAWN; the likeliest at temperature 0. Random
    numbers come from the generator. (A seed, penalties and a grammar are for RowSampler, which
    knows the past.)"""
    rows = logits.reshape(-1, logits.shape[-1])
    if sampling.temperature == 0:
        ids = likeliest(rows)
    else:
        keys = random_keys(len(rows), rows.device, generator)
        if on_cpu(rows):
            ids = draw_on_cpu(rows, [sampling] * len(rows), keys.tolist())
        else:
            ids = draw_on_gpu(rows, sampling.limits(), uniform(keys))
    return broadcast_tokens(ids).view(logits.shape[:-1])


def draw_on_gpu(logits: Tensor, limits: dict[str, float | Tensor], u: Tensor) -> Tensor:
    """Ids (B,) of rows (B, V) for numbers u (B,) in [0, 1), by the same operations whatever the
    tensors hold. The limits are those of `probabilities`, by name: numbers, or tensors (B,)."""
    ids = inverse_cdf(probabilities(logits, **limits), u)
    if not isinstance(limits["temperature"], Tensor):
        return ids
    return torch.where(limits["temperature"] == 0, likeliest(logits), ids)


def draw_on_cpu(logits: Tensor, asked: list[Sampling], keys: list[int]) -> Tensor:
    """Ids (B,) of rows (B, V), with a Sampling and a key for each. Sorting is slow on a CPU: greedy
    rows take the likeliest token, rows with top-k sort that many, and the others sort nothing. A
    row with a limit that is not in FAST is drawn from its `probabilities`.

    After a step of the model an operator's code has left the processor's caches, and its first call
    is slow: so this calls few kinds of operators, and computes with plain numbers."""
    n_rows, size = logits.shape
    ids, unsorted = [0] * n_rows, []  # unsorted: rows that are drawn by rejection
    for row, (one, key) in enumerate(zip(asked, keys, strict=True)):
        if not one.temperature:
            ids[row] = logits[row].argmax().item()
            if not math.isfinite(logits[row, ids[row]].item()):
                ids[row] = UNDRAWN
        elif not FAST.issuperset(limits := one.limits()):
            probs = probabilities(logits[row], **limits)
            ids[row] = inverse_cdf_one(probs, block_cdf(probs), uniform(key))
        elif 0 < one.top_k < size:
            likely, at = blockwise_topk(logits[row], one.top_k)
            likely = likely.tolist()
            ids[row] = (at[draw_in_order(likely, one, uniform(key))].item()
                        if math.isfinite(likely[0]) else UNDRAWN)
        else:
            unsorted.append(row)
    if unsorted:
        probs = logits if len(unsorted) == n_rows else logits[unsorted]  # (n, V)
        temperatures = [[max(asked[row].temperature, COLDEST)] for row in unsorted]
        same = all(one == temperatures[0] for one in temperatures)
        probs = (probs / (temperatures[0][0] if same else torch.tensor(temperatures))).softmax(-1)
        cdf = block_cdf(probs)  # (n, V / BLOCK)
        for n, row in enumerate(unsorted):
            ids[row] = draw_by_rejection(probs[n], cdf[n], asked[row], keys[row])
    return torch.tensor(ids)


def blockwise_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` of logits (V,) with less to sort: the k likeliest tokens are in the k blocks
    with the largest maxima."""
    size = math.gcd(len(logits), BLOCK)
    if k * size >= len(logits):
        return logits.topk(k)
    blocks = logits.view(-1, size)
    chosen = blocks.amax(-1).topk(k, sorted=False).indices  # (k,)
    likely, at = blocks[chosen].view(-1).topk(k)
    return likely, chosen[at // size] * size + at % size


def draw_in_order(likely: list[float], sampling: Sampling, u: float) -> int:
    """The index of the logit that is drawn among the likeliest, which are in falling order."""
    weights = [math.exp((logit - likely[0]) / sampling.temperature) for logit in likely]
    mass, last = list(accumulate(weights)), len(weights) - 1  # last: the index of the last one kept
    if sampling.top_p < 1:
        last = bisect_left(mass, sampling.top_p * mass[-1])
    # The weights fall from 1, so those that min-p keeps come first.
    n_kept = bisect_right(weights, -sampling.min_p, key=neg)
    last = max(0, min(last, n_kept - 1))
    return bisect_right(mass, u * mass[last], hi=last)


def draw_by_rejection(probs: Tensor, cdf: Tensor, sampling: Sampling, key: int) -> int:
    """Draw from probabilities (V,), whose block_cdf is given, until top-p and min-p keep the token.

    The result has the distribution that sorting would give. In the order of likelihood (equal
    tokens in the order of ids) a token is kept when the mass before it is less than top_p; when one
    is dropped, so is every later one. So the next draw is from the tokens before it. Most draws are
    accepted at once, and a few passes over the vocabulary cost far less than sorting it."""
    top_p, min_p = sampling.top_p, sampling.min_p
    token = inverse_cdf_one(probs, cdf, uniform(key))
    if token == UNDRAWN:
        return token
    least = min_p * probs.max().item() if min_p else 0
    again = 0
    while top_p < 1 or least:
        p = probs[token].item()
        # A quick upper bound of the mass before the token counts its equals, and what rounding
        # makes smaller than it.
        if p >= least and (
                top_p >= 1 or F.threshold(probs, p * (1 - 2e-7), 0).sum().item() - p < top_p):
            break
        before = F.threshold(probs, p, 0)  # tokens that are likelier
        before[:token] += p * (probs[:token] == p)  # and equal ones with a lower id
        mass = before.sum().item()
        dropped = p < least or top_p < 1 and mass >= top_p
        if not dropped or not mass:  # the likeliest token is always kept
            break
        again += 1
        token = inverse_cdf_one(before, block_cdf(before), uniform(key, again))
    return token


# ------------------------------------------------------------------------------ rows


def copy_to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Start copying tokens to the host. Call what this returns to get them as a list: that waits
    for the copy, but for nothing that was queued after it."""
    tokens = tokens.flatten()
    if not tokens.is_cuda:
        return tokens.tolist
    host = tokens.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(tokens.device).record_event()

    def wait_for_copy() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait_for_copy


class RowSampler:
    """Draws the tokens of B rows, each by its own Sampling, and keeps what penalties and grammars
    need.

    A row begins when its prompt has been read; one that has ended is greedy, which costs least. The
    settings are on the host, which decides by them what is computed, and for a GPU in tensors,
    too. Where a row has a grammar, the host waits for its latest token, while a GPU is at the step
    whose logits the token's mask is for."""

    def __init__(self, n_rows: int, vocab_size: int, device="cpu"):
        self.asked = [GREEDY] * n_rows
        self.keys, self.drawn = [0] * n_rows, [0] * n_rows  # the seeds' keys; tokens drawn so far
        self.on_gpu = {}  # the settings as tensors (B,), by name; empty: outdated
        # (B, V), made for the first row with a penalty. seen: the token is in the prompt or the
        # answer; counts: how often it is in the answer.
        self.seen = self.counts = None
        # Of rows with a logit_bias or min_tokens: ids, what is added to their logits, stop ids.
        self.biases: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * n_rows
        self.vocab_size, self.device = vocab_size, device
        self.matchers: list[Matcher | None] = [None] * n_rows  # of rows with a grammar
        self.masks = None  # (B, n_bytes) on the host, made for the first of those
        self.unread = {}  # row -> (copy_to_host of tokens, which of them its matcher takes next)

    def begin(self, row: int, sampling: Sampling, prompt_ids: list[int],
              stop_ids: Collection[int] = ()) -> None:
        """Begin an answer in a row: how it is drawn, the prompt before it, and the tokens that end
        it, which a grammar needs. A row that is not greedy needs a seed."""
        self.end(row)
        if sampling.grammar:
            self.matchers[row] = sampling.grammar.matcher(stop_ids)
            if self.masks is None:
                on_gpu = torch.device(self.device).type == "cuda"
                self.masks = new_masks(len(self.asked), self.vocab_size, pin_memory=on_gpu)
        self.asked[row], self.on_gpu = sampling, {}
        self.keys[row], self.drawn[row] = seed_key(sampling.seed or 0), 0
        if sampling.logit_bias or sampling.min_tokens:
            ids = [token_id for token_id, _ in sampling.logit_bias]
            values = [value for _, value in sampling.logit_bias]
            ends = [token_id for token_id in stop_ids if token_id < self.vocab_size]
            self.biases[row] = (self.to_device(ids).long(), self.to_device(values).float(),
                                self.to_device(ends).long())
        if not sampling.penalizes:
            return
        if self.seen is None:
            shape = len(self.asked), self.vocab_size
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(shape, device=self.device)
        self.counts[row] = 0
        self.seen[row] = seen_in(prompt_ids, self.vocab_size, self.device)[0]

    def end(self, row: int) -> None:
        self.asked[row], self.on_gpu, self.biases[row] = GREEDY, {}, None
        if self.matchers[row]:
            self.matchers[row] = None
            self.unread.pop(row, None)
            self.masks[row] = 255

    def error(self, row: int) -> str:
        """Why a row's grammar could not go on, which ended its answer; none where it could."""
        return self.matchers[row].error if self.matchers[row] else ""

    def tensors(self) -> dict[str, Tensor]:
        """on_gpu, copied to the device anew when a row has begun or ended."""
        if not self.on_gpu:
            columns = [[getattr(one, name) for one in self.asked] for name in RANGES]
            table = self.to_device(columns)
            self.on_gpu = {name: column.long() if name == "top_k" else column.float()
                           for name, column in zip(RANGES, table, strict=True)}
        return self.on_gpu

    def to_device(self, numbers: list) -> Tensor:
        """Numbers as a float64 tensor on the device. The host does not wait for the copy."""
        return torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)

    def limits(self, rows: slice) -> dict[str, float | Tensor]:
        """The limits of a slice of rows, for draw_on_gpu: numbers where all rows have the same,
        which takes fewer operations, or else tensors."""
        limits = [one.limits() for one in self.asked[rows]]
        if all(other == limits[0] for other in limits):
            return limits[0]
        return {name: self.tensors()[name][rows] for one in limits for name in one}

    def sample(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """The next token (B, 1), or UNDRAWN, of all rows, or of a slice of them, for their logits
        (B, 1, V)."""
        asked, logits = self.asked[rows], logits[:, -1].float()
        if any(self.biases[rows]):
            logits = self.bias(logits, rows)
        penalized = [row for row, one in enumerate(asked) if one.penalizes]
        if penalized:
            logits = self.penalize(logits, rows, penalized)
        masked = [row for row in range(len(self.asked))[rows] if self.matchers[row]]
        if masked:
            logits = self.mask(logits, rows, masked)
        if not any(one.temperature for one in asked):
            ids = likeliest(logits)
        else:
            keys = [mix(key ^ n) for key, n in zip(self.keys[rows], self.drawn[rows], strict=True)]
            if on_cpu(logits):
                ids = draw_on_cpu(logits, asked, keys)
            else:
                u = self.to_device([uniform(key) for key in keys])
                ids = draw_on_gpu(logits, self.limits(rows), u)
        ids = broadcast_tokens(ids)[:, None]
        self.drawn[rows] = [n + 1 for n in self.drawn[rows]]
        if penalized:
            said = ids.clamp(min=0)  # of UNDRAWN, token 0: that row ends
            self.seen[rows].scatter_(-1, said, True)
            self.counts[rows].scatter_add_(-1, said, torch.ones_like(said).float())
        if masked:
            read = copy_to_host(ids)
            first = range(len(self.asked))[rows].start
            self.unread.update({row: (read, row - first) for row in masked})
        return ids

    def bias(self, logits: Tensor, rows: slice) -> Tensor:
        """The logits (B, V) of a slice of rows with their biases, and without the stop ids where
        min_tokens are not drawn yet."""
        logits = logits.clone()
        for row, drawn, one, bias in zip(logits, self.drawn[rows], self.asked[rows],
                                         self.biases[rows], strict=True):
            if bias:
                ids, values, stop_ids = bias
                row.index_add_(0, ids, values)
                if drawn < one.min_tokens:
                    row.index_fill_(0, stop_ids, -math.inf)
        return logits

    def mask(self, logits: Tensor, rows: slice, masked: list[int]) -> Tensor:
        """The logits (B, V) of a slice of rows, -inf where a grammar does not allow a token. The
        rows `masked` have one. A logit that is NaN or inf becomes NaN, so that it shows."""
        for row in masked:
            if row in self.unread:
                read, at = self.unread.pop(row)
                self.matchers[row].accept(read()[at])
            self.matchers[row].allow_next(self.masks[row])
        masks = self.masks[rows].to(logits.device, non_blocking=True)
        forbidden = forbidden_by(masks, self.vocab_size, on_cpu(logits))
        return torch.where(forbidden, logits - math.inf, logits)

    def penalize(self, logits: Tensor, rows: slice, penalized: list[int]) -> Tensor:
        """The logits (B, V) of a slice of rows with penalties, which the rows `penalized` ask for.
        A CPU computes only the tokens that were seen."""
        seen, counts = self.seen[rows], self.counts[rows]
        if not on_cpu(logits):
            penalties = [self.tensors()[name][rows] for name in PENALTIES]  # each (B,)
            return penalize(logits, seen, counts, *penalties)
        logits = logits.clone()
        for row in penalized:
            at = seen[row].nonzero()[:, 0]
            penalties = [getattr(self.asked[rows][row], name) for name in PENALTIES]
            logits[row, at] = penalize(logits[row, at], seen[row, at], counts[row, at], *penalties)
        return logits
