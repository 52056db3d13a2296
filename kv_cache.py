"""The static sink+window cache: an endless stream in constant memory.

A query at position p sees the first S tokens (the sinks) and the W most recent others, itself
included: StreamingLLM (Xiao et al., 2023). The paper's section 3.2 numbers positions inside the
cache, so the distance that RoPE must see is

    to a recent key k:  p - k                        the true one
    to a sink j:        min(p, S + W - 1) - j        it stops growing once the cache is full

RoPE is relative, so nothing is ever rotated again: a key is stored rotated at its own position, and
the query is rotated twice, at p for the recent keys and at min(p, S + W - 1) for the sinks.

Storage is S sink slots followed by a ring of R = W + C - 1, C the most tokens that one call writes:
position p lives in slot p if p < S, else in S + (p - S) mod R. The extra C - 1 slots are what lets
the first query of a chunk still see its whole window after the chunk's last key was written, and
they are also what makes un-writing possible (see `rollback`). Which position a ring slot holds
follows from the row's length alone. Beside K, V and the lengths there is one thing to know: how far
each row has ever been written, which says how deep a rollback may be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class KVCache:
    """K and V of every layer, (B, n_kv_heads, S + R, head_dim), and each row's `length`."""

    def __init__(self, config, batch_size: int = 1, n_sink: int = 4, window: int = 252,
                 max_chunk: int = 256, dtype: torch.dtype = torch.float32, device="cpu"):
        """Allocates everything, once. Raises ValueError naming a size that cannot be."""
        check_sizes(config, n_sink, window)
        if batch_size < 1 or max_chunk < 1:
            raise ValueError(f"batch size {batch_size} and chunk {max_chunk} must be at least 1")
        self.batch_size, self.n_sink, self.window, self.max_chunk = (
            batch_size, n_sink, window, max_chunk)
        self.ring = window + max_chunk - 1
        shape = (batch_size, config.n_kv_heads, n_sink + self.ring, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.every_slot = torch.arange(n_sink + self.ring, device=device)
        # The high-water mark (the most tokens a row ever held, padding and rejected ones counted),
        # kept as its distance above `length`, on the host, which knows every write and rollback.
        self.overhang = [0] * batch_size
        self.mark_static()

    def mark_static(self) -> None:
        """CUDA graphs replay on fixed addresses: unmarked, tensors written in place disable them.
        """
        for tensor in (*self.k, *self.v, self.length, self.every_slot):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def __setstate__(self, state: dict) -> None:
        """A copy's tensors are static, too."""
        self.__dict__.update(state)
        self.mark_static()

    # What a call of the model asks, in this order. The first two are not traced.

    def check_fits(self, config, weight: Tensor) -> None:
        """Raises ValueError unless this is a cache for a model of that config, whose weights are
        of that tensor's dtype and device."""
        k = self.k[0]
        for what, ours, theirs in (
                ("dtype", k.dtype, weight.dtype), ("device", k.device, weight.device),
                ("shape (layers, key-value heads, head size)",
                 (len(self.k), k.shape[1], k.shape[3]),
                 (config.n_layers, config.n_kv_heads, config.head_dim))):
            if ours != theirs:
                raise ValueError(f"the cache's {what} is {ours}, the model's {theirs}; "
                                 "generate.make_cache(model) makes one that fits")

    def extend(self, batch_size: int, n_tokens: int) -> None:
        """Account for a write of n_tokens to each row, before it happens."""
        if batch_size != self.batch_size:
            raise ValueError(f"{batch_size} rows of tokens for a cache of {self.batch_size} rows")
        if not 1 <= n_tokens <= self.max_chunk:
            raise ValueError(f"{n_tokens} tokens in one call; this cache takes 1 to "
                             f"{self.max_chunk} (max_chunk)")
        self.overhang = [max(above - n_tokens, 0) for above in self.overhang]

    def positions(self, n_tokens: int) -> Tensor:
        """(B, T) int64: the positions that the next n_tokens will have."""
        return self.length[:, None] + torch.arange(n_tokens, device=self.length.device)

    def sink_positions(self, positions: Tensor) -> Tensor:
        """(B, T): where a query stands as the sinks see it."""
        return positions.clamp(max=self.n_sink + self.window - 1)

    def in_use(self, n_tokens: int) -> Tensor:
        """(n,) int64: the slots to look at once n_tokens more are written. On a CPU those that hold
        something by then; on a GPU all of them, since only it knows the lengths."""
        if self.length.is_cuda:
            return self.every_slot
        return self.every_slot[:int(self.length.max()) + n_tokens]

    def slots(self, positions: Tensor) -> Tensor:
        """(B, T): the slot of each position."""
        ring_slot = self.n_sink + (positions - self.n_sink) % self.ring
        return torch.where(positions < self.n_sink, positions, ring_slot)

    def held(self, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, n) int64: the position that each of the slots (n,) holds, these positions being the
        last that were written. Of the ring, a result below S is an empty slot."""
        newest = positions[:, -1:]  # (B, 1)
        # Slot r holds the largest k <= newest with slot(k) = r.
        return torch.where(slot < self.n_sink, slot, newest - (newest - slot) % self.ring)

    def visible(self, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, T, n) bool: which of the slots (n,) a query at each position sees, these positions
        being the last that were written. Whoever wants another rule replaces this alone."""
        held = self.held(positions, slot)[:, None]  # (B, 1, n)
        query = positions[:, :, None]  # (B, T, 1)
        recent = (held >= self.n_sink) & (held > query - self.window)
        return ((slot < self.n_sink) | recent) & (held <= query)

    def mask(self, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, T, n) float32 to add to the scores: 0 where `visible`, -inf elsewhere."""
        seen = self.visible(positions, slot)
        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)

    # What a caller asks between calls.

    def rollback(self, n: int | list[int]) -> None:
        """Forget the last n tokens of every row (a list: of each row).

        Padding that a chunk carried and rejected speculation are both this. Un-written slots still
        hold the un-written keys, which the arithmetic above takes for keys R earlier; those are
        outside every window only while the high-water mark is at most max_chunk above the length.
        Raises ValueError, changing nothing, when that or the length itself is exceeded."""
        if n == 0:
            return
        rows = [n] * self.batch_size if isinstance(n, int) else list(n)
        if len(rows) != self.batch_size or min(rows) < 0:
            raise ValueError(f"cannot roll back {n} tokens: it takes a number of them, or one for "
                             f"each of {self.batch_size} rows, and none negative")
        overhang = [above + n_row for above, n_row in zip(self.overhang, rows, strict=True)]
        if max(overhang) > self.max_chunk:
            raise ValueError(f"cannot roll back {n} tokens: at most {self.max_chunk} (max_chunk) "
                             f"may be undone, and {max(self.overhang)} already are")
        drop = torch.tensor(rows, device=self.length.device)
        if bool((self.length < drop).any()):
            raise ValueError(f"cannot roll back {n} tokens: the cache holds {self.length.tolist()}")
        self.length -= drop
        self.overhang = overhang

    def reset(self) -> None:
        """Forget everything. The slots keep their bytes: a length of 0 makes them empty."""
        self.length.zero_()
        self.overhang = [0] * self.batch_size

    def copy_row(self, row: int, other: KVCache, other_row: int = 0,
                 n_tokens: int | None = None) -> None:
        """Make this row a copy of a row of another cache with the same sizes, which holds n_tokens,
        if that is known: what is beyond them stays where it is. Nothing is compiled for it and no
        other row is touched. Raises ValueError when the sizes differ."""
        sizes, other_sizes = ((c.n_sink, c.window, c.max_chunk) for c in (self, other))
        if sizes != other_sizes:
            raise ValueError(f"caches of different sizes (sink, window, chunk): {sizes} and "
                             f"{other_sizes}")
        for to, source in zip((*self.k, *self.v), (*other.k, *other.v), strict=True):
            to[row, :, :n_tokens] = source[other_row, :, :n_tokens]
        self.length[row] = other.length[other_row]
        self.overhang[row] = other.overhang[other_row]

    def clear_row(self, row: int, n_tokens: int | None = None) -> None:
        """Forget a row, which holds n_tokens, if that is known, and overwrite what it held."""
        for layer in (*self.k, *self.v):
            layer[row, :, :n_tokens] = 0
        self.length[row] = 0
        self.overhang[row] = 0

    def row(self, row: int) -> KVCache:
        """One row by itself: what is written there is written here, but for `overhang`."""
        one = object.__new__(type(self))
        k, v = ([layer[row:row + 1] for layer in layers] for layers in (self.k, self.v))
        one.__dict__.update(self.__dict__, batch_size=1, length=self.length[row:row + 1], k=k, v=v,
                            overhang=[self.overhang[row]])
        return one

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))


def write(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """Store new (B, T, n_kv_heads, head_dim) in a layer's K or V, at the slots (B, T)."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    cache[rows, :, slots] = new.to(cache.dtype)


def check_sizes(config, n_sink: int, window: int) -> None:
    """Raises ValueError unless S sinks and a window of W fit what the model was trained on."""
    if n_sink < 0:
        raise ValueError(f"sink {n_sink} is negative")
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    if n_sink + window > config.max_seq_len:
        raise ValueError(f"sink {n_sink} + window {window} = {n_sink + window} tokens is above the "
                         f"model's trained context of {config.max_seq_len}")
    if config.sliding_window and window > config.sliding_window:
        raise ValueError(f"window {window} is above the model's sliding window of "
                         f"{config.sliding_window}")
