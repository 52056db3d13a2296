"""The static sink+window cache: an endless stream in constant memory.

A query at position p sees the first S tokens (the sinks) and the W most recent others, itself
included: StreamingLLM (Xiao et al., 2023). The paper's section 3.2 numbers positions inside the
cache, so the distance that RoPE must see is

    to a recent key k:  p - k                        the true one
    to a sink j:        min(p, S + W - 1) - j        it stops growing once the cache is full

RoPE is relative, so nothing is ever rotated again: a key is stored rotated at its own position, and
the query is rotated twice, at p for the recent keys and at min(p, S + W - 1) for the sinks.

Storage is S sink slots followed by a ring of R = W + C - 1, C the most tokens that one call writes:
position p lives in slot p if p < S, else in S + (p - S) mod R. Thanks to the extra C - 1 slots, the
first query of a chunk still sees its whole window after the chunk's last key was written. They also
make `rollback` possible. A token is evicted when it is W behind the latest one: no query sees it
any more (`visible`), and R - W tokens later the ring writes over it.

Which position a ring slot holds follows from the row's length alone. Beside K, V and the lengths,
the cache keeps each row's high-water mark, the most tokens that the row has ever held: it limits
how deep a rollback may be.

Some models mix layers that saw everything in training with layers that saw a sliding window only
(Gemma 3, OLMo 3). Each of the two has a `Geometry` (S, W, R): the former the stream's, the latter
their own window, without sinks, which they never knew. The rows' lengths and high-water marks are
the same for both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """The slots of a layer: S sinks, then a ring of R for a window of W."""

    n_sink: int
    window: int
    ring: int

    @property
    def n_used(self) -> int:
        return self.n_sink + self.ring


class KVCache:
    """K and V of every layer, (B, n_kv_heads, S + R, head_dim), and each row's `length`. On a GPU
    a few slots more are allocated, which are never written and never seen."""

    def __init__(self, config, batch_size: int = 1, n_sink: int = 4, window: int = 252,
                 max_chunk: int = 256, dtype: torch.dtype = torch.float32, device="cpu"):
        """Allocates everything, once, for a ModelConfig; the sizes are in tokens. Raises ValueError
        naming a size that the model does not allow."""
        check_sizes(config, n_sink, window)
        if batch_size < 1 or max_chunk < 1:
            raise ValueError(f"batch size {batch_size} and chunk {max_chunk} must be at least 1")
        self.batch_size, self.n_sink, self.window, self.max_chunk = (
            batch_size, n_sink, window, max_chunk)
        self.kinds = config.kinds
        self.of_layer = [layer_geometry(config, kind, n_sink, window, max_chunk)
                         for kind in config.layer_kinds]
        self.geometries = list(dict.fromkeys(self.of_layer))  # those that differ: one, or two
        shapes = [(batch_size, config.n_kv_heads, allocated_slots(geometry.n_used, device),
                   config.head_dim) for geometry in self.of_layer]
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.every_slot = [torch.arange(allocated_slots(geometry.n_used, device), device=device)
                           for geometry in self.geometries]
        # The overhang of a row is its high-water mark (padding and rejected tokens counted) minus
        # its length. It is kept on the host, which knows of every write and rollback.
        self.overhang = [0] * batch_size
        self.mark_static()

    def mark_static(self) -> None:
        """CUDA graphs replay on fixed addresses: a tensor that is written in place disables them
        unless it is marked. This is what torch._dynamo.mark_static_address sets, without the import
        of the compiler, which takes a second of every start."""
        for tensor in (*self.k, *self.v, self.length, *self.every_slot):
            tensor._dynamo_static_input_type = "unguarded"

    def check_static(self) -> None:
        """Raises RuntimeError unless every tensor is marked: a compiled step would write K and V to
        copies, and say nothing."""
        for tensor in (*self.k, *self.v, self.length, *self.every_slot):
            if not hasattr(tensor, "_dynamo_static_input_type"):
                raise RuntimeError("a cache's tensor is not marked as static; KVCache.mark_static "
                                   "marks those of a cache that was not made by KVCache")

    def __setstate__(self, state: dict) -> None:
        """Mark the tensors of a copy too."""
        self.__dict__.update(state)
        self.mark_static()

    # A call of the model uses these methods, in this order. The first two are not compiled.

    def check_fits(self, config, weight: Tensor) -> None:
        """Raises ValueError unless this cache fits a model with that config, whose weights have the
        dtype and the device of `weight`."""
        k = self.k[0]
        for what, ours, theirs in (
                ("dtype", k.dtype, weight.dtype), ("device", k.device, weight.device),
                ("shape (layers, key-value heads, head size)",
                 (len(self.k), k.shape[1], k.shape[3]),
                 (config.n_layers, config.n_kv_heads, config.head_dim)),
                ("kinds of layers", self.kinds, config.kinds)):
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

    def in_use(self, n_tokens: int) -> list[Tensor]:
        """For each of `geometries` (n,) int64: the slots to attend to once n_tokens more are
        written. On a CPU these are the slots that hold something by then. On a GPU they are all
        slots: to read the lengths, the host would wait for the device."""
        if self.length.is_cuda:
            return self.every_slot
        n = int(self.length.max()) + n_tokens
        return [every[:n] for every in self.every_slot]

    # These are the arithmetic of the slots of one geometry.

    def sink_positions(self, geometry: Geometry, positions: Tensor) -> Tensor:
        """(B, T) int64: the position at which the sinks see each query."""
        return positions.clamp(max=geometry.n_sink + geometry.window - 1)

    def slots(self, geometry: Geometry, positions: Tensor) -> Tensor:
        """(B, T) int64: the slot of each position."""
        ring_slot = geometry.n_sink + (positions - geometry.n_sink) % geometry.ring
        return torch.where(positions < geometry.n_sink, positions, ring_slot)

    def held(self, geometry: Geometry, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, n) int64: the position that each of the slots (n,) holds, when these positions (B, T)
        are the last that were written. A ring slot for which it is below S is empty."""
        newest = positions[:, -1:]  # (B, 1)
        # Slot r holds the largest k <= newest with slot(k) = r.
        return torch.where(slot < geometry.n_sink, slot, newest - (newest - slot) % geometry.ring)

    def visible(self, geometry: Geometry, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, T, n) bool: which of the slots (n,) a query at each position sees, when these
        positions are the last that were written. For another attention rule, override this alone.
        """
        held = self.held(geometry, positions, slot)[:, None]  # (B, 1, n)
        query = positions[:, :, None]  # (B, T, 1)
        recent = (held >= geometry.n_sink) & (held > query - geometry.window)
        return ((slot < geometry.n_sink) | recent) & (held <= query)

    def mask(self, geometry: Geometry, positions: Tensor, slot: Tensor) -> Tensor:
        """(B, T, n) float32 to add to the scores: 0 where `visible`, -inf elsewhere."""
        seen = self.visible(geometry, positions, slot)
        if allocated_slots(geometry.n_used, self.length.device) > geometry.n_used:
            seen = seen & (slot < geometry.n_used)
        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)

    # Callers use these methods between calls of the model.

    def rollback(self, n: int | list[int]) -> None:
        """Forget the last n tokens of every row (a list: of each row).

        Padding of a chunk and rejected speculation are both undone so. The slots still hold the
        forgotten keys, which `held` takes for keys R positions earlier. Those are outside every
        window as long as the overhang is at most max_chunk. Raises ValueError, changing nothing,
        for more tokens than that allows or than a row holds."""
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
        """Forget everything. The slots keep their bytes; with a length of 0 none of them counts."""
        self.length.zero_()
        self.overhang = [0] * self.batch_size

    def copy_row(self, row: int, other: KVCache, other_row: int = 0,
                 n_tokens: int | None = None) -> None:
        """Make this row a copy of a row of another cache with the same sizes. When n_tokens, the
        number that the other row holds, is given, only the slots below it are copied. No other row
        is touched and nothing is compiled. Raises ValueError when the sizes differ."""
        sizes, other_sizes = ((c.n_sink, c.window, c.max_chunk) for c in (self, other))
        if sizes != other_sizes:
            raise ValueError(f"caches of different sizes (sink, window, chunk): {sizes} and "
                             f"{other_sizes}")
        for to, source in zip((*self.k, *self.v), (*other.k, *other.v), strict=True):
            to[row, :, :n_tokens] = source[other_row, :, :n_tokens]
        self.length[row] = other.length[other_row]
        self.overhang[row] = other.overhang[other_row]

    def clear_row(self, row: int, n_tokens: int | None = None) -> None:
        """Forget a row and zero its slots: those below n_tokens, the number that it holds, or all
        when that is not given."""
        for layer in (*self.k, *self.v):
            layer[row, :, :n_tokens] = 0
        self.length[row] = 0
        self.overhang[row] = 0

    def row(self, row: int) -> KVCache:
        """A cache of this row alone, on a CPU. It shares this cache's memory, but has its own
        `overhang`. On a GPU a view's writes would be lost (check_static)."""
        if self.length.is_cuda:
            raise ValueError("a row of a cache on a GPU is no cache of its own; step all rows")
        one = object.__new__(type(self))
        k, v = ([layer[row:row + 1] for layer in layers] for layers in (self.k, self.v))
        one.__dict__.update(self.__dict__, batch_size=1, length=self.length[row:row + 1], k=k, v=v,
                            overhang=[self.overhang[row]])
        return one

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))


def layer_geometry(config, kind: str, n_sink: int, window: int, max_chunk: int) -> Geometry:
    """The geometry of a layer of this kind (ModelConfig.layer_kinds), in a stream of n_sink sinks
    and this window."""
    if kind == "sliding":
        n_sink, window = 0, min(config.sliding_window, n_sink + window)
    return Geometry(n_sink, window, window + max_chunk - 1)


def allocated_slots(n: int, device) -> int:
    """The slots to allocate where n are used. A GPU attends to all of them, and does so best where
    rows of scores begin at aligned addresses."""
    return -(-n // 64) * 64 if torch.device(device).type == "cuda" else n


def write(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """Store new (B, T, n_kv_heads, head_dim) in a layer's K or V, at the slots (B, T)."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    cache[rows, :, slots] = new.to(cache.dtype)


def check_sizes(config, n_sink: int, window: int) -> None:
    """Raises ValueError unless n_sink + window fits the context that the model was trained on, and
    window its sliding window."""
    if n_sink < 0:
        raise ValueError(f"sink {n_sink} is negative")
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    if n_sink + window > config.max_seq_len:
        raise ValueError(f"sink {n_sink} + window {window} = {n_sink + window} tokens is above the "
                         f"model's trained context of {config.max_seq_len}")
    if config.common_window and window > config.common_window:
        raise ValueError(f"window {window} is above the model's sliding window of "
                         f"{config.common_window}")
