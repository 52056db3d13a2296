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
follows from the row's length alone, so there is no other state.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
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
        # The high-water mark (the most tokens a row ever held, padding and rejected ones counted),
        # kept as its distance above `length`, on the host, which knows every write and rollback.
        self.overhang = [0] * batch_size
        # CUDA graphs replay on fixed addresses: unmarked, tensors written in place disable them.
        for tensor in (*self.k, *self.v, self.length):
            torch._dynamo.mark_static_address(tensor, guard=False)

    # What a call of the model asks, in this order. Everything but `extend` is traced.

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

    def slots(self, positions: Tensor) -> Tensor:
        """(B, T): the slot of each position."""
        ring_slot = self.n_sink + (positions - self.n_sink) % self.ring
        return torch.where(positions < self.n_sink, positions, ring_slot)

    def visible(self, positions: Tensor) -> Tensor:
        """(B, T, S + R) bool: the slots that a query at each position sees, these positions being
        the last that were written."""
        S, W, R = self.n_sink, self.window, self.ring
        slot = torch.arange(S + R, device=positions.device)
        newest = positions[:, -1:]  # (B, 1)
        # Slot r holds the largest k <= newest with slot(k) = r; a result below S is an empty slot.
        held = torch.where(slot < S, slot, newest - (newest - slot) % R)[:, None]  # (B, 1, S + R)
        query = positions[:, :, None]  # (B, T, 1)
        recent = (held >= S) & (held > query - W)
        return ((slot < S) | recent) & (held <= query)

    def mask(self, positions: Tensor) -> Tensor:
        """(B, T, S + R) float32 to add to the scores: 0 where `visible`, -inf elsewhere."""
        seen = self.visible(positions)
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
        overhang = [above + n_row for above, n_row in zip(self.overhang, rows, strict=True)]
        if min(rows) < 0 or max(overhang) > self.max_chunk:
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

    def copy_row(self, row: int, other: KVCache, other_row: int = 0) -> None:
        """Make this row a copy of a row of another cache with the same sizes. Nothing is compiled
        for it and no other row is touched. Raises ValueError when the sizes differ."""
        sizes, other_sizes = ((c.n_sink, c.window, c.max_chunk) for c in (self, other))
        if sizes != other_sizes:
            raise ValueError(f"caches of different sizes (sink, window, chunk): {sizes} and "
                             f"{other_sizes}")
        for to, source in zip((*self.k, *self.v, self.length),
                              (*other.k, *other.v, other.length), strict=True):
            to[row] = source[other_row]
        self.overhang[row] = other.overhang[other_row]

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


# ------------------------------------------------------------------------------ saved sessions

SESSION = "gpt_stream_session"  # the entry of the file's header that makes it a session


def save_session(path: str | Path, caches: dict[str, tuple], **facts) -> None:
    """Write caches to one safetensors file, whole or not at all, so that `load_session` goes on
    exactly where they stand.

    caches is {"model": (model, its cache)}, with {"draft": ...} beside it under speculation; the
    models only say who they are (model.fingerprint). The facts, anything JSON, are kept beside
    them. Raises ValueError or OSError naming the file."""
    path, tensors = check_target(path), {}
    for name, (model, cache) in caches.items():
        facts[name] = {**traits(model, cache), "length": cache.length.tolist(),
                       "overhang": cache.overhang}
        tensors.update(filled(name, cache, facts[name]["length"]))
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={SESSION: json.dumps(facts)})
        os.replace(partial, path)
    except safetensors.SafetensorError as error:  # a full disk is one
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_session(path: str | Path, caches: dict[str, tuple], **expected) -> dict:
    """Put a saved session into caches like those it was saved from, in place; its facts, of which
    some are expected to be equal.

    A draft changes no token, only the speed: where the file has none that fits, its cache is left
    empty. Raises ValueError naming the file and what does not fit; nothing is changed then."""
    path = Path(path)
    facts, tensors = read_session(path)
    for what, ours in expected.items():
        if facts.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {facts.get(what)!r}; here it is {ours!r}")
    check_fit(path, facts, tensors, "model", *caches["model"])  # before anything is changed
    for name, (model, cache) in caches.items():
        try:
            check_fit(path, facts, tensors, name, model, cache)
        except ValueError:
            cache.reset()
            continue
        length = facts[name]["length"]
        for tensor_name, slots in filled(name, cache, length).items():
            slots.copy_(tensors[tensor_name])
        cache.length.copy_(torch.tensor(length))
        cache.overhang = list(facts[name]["overhang"])
    return facts


def check_target(path: str | Path) -> Path:
    """The path itself. Raises ValueError when no session can be written there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise ValueError(f"{path}: exists already and is not a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write in {path.parent}")
    return path


def read_session(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What a session's header says, and its tensors, memory-mapped."""
    if not path.is_file():
        raise ValueError(f"{path}: no such session file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(SESSION)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(header or "null")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged or not a session file: {error}") from None
    if not isinstance(facts, dict) or "model" not in facts:
        raise ValueError(f"{path}: a safetensors file, but not a saved session")
    return facts, tensors


def traits(model, cache: KVCache) -> dict:
    """What has to be equal where a session is saved and where it is loaded."""
    return {"dtype": str(cache.k[0].dtype).removeprefix("torch."),
            "model and quantization": model.fingerprint, "sink": cache.n_sink,
            "window": cache.window, "max_chunk": cache.max_chunk, "batch_size": cache.batch_size}


def filled(name: str, cache: KVCache, length: list[int]) -> dict[str, Tensor]:
    """Views of the slots that hold something when the rows have this length, as a file names them.
    What lies beyond, stale or un-written, is outside every window."""
    used = min(max(length), cache.n_sink + cache.ring)
    return {f"{name}.{kind}.{i}": layer[:, :, :used]
            for kind, layers in (("k", cache.k), ("v", cache.v)) for i, layer in enumerate(layers)}


def check_fit(path: Path, facts: dict, tensors: dict[str, Tensor], name: str, model,
              cache: KVCache) -> None:
    """Raises ValueError, naming the first difference, unless a saved cache fits this one."""
    saved = facts.get(name)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds no cache of a {name}")
    for what, ours in traits(model, cache).items():
        if saved.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {saved.get(what)}; here it is {ours}")
    for what in ("length", "overhang"):
        rows = saved.get(what)
        if not isinstance(rows, list) or len(rows) != cache.batch_size or not all(
                type(n) is int and n >= 0 for n in rows):
            raise ValueError(f"{path}: damaged: {what} is {rows}")
    for tensor_name, slots in filled(name, cache, saved["length"]).items():
        tensor = tensors.get(tensor_name)
        if tensor is None or (tensor.shape, tensor.dtype) != (slots.shape, slots.dtype):
            raise ValueError(f"{path}: damaged: {tensor_name} is missing or has another shape")
