"""Kept conversations: caches of finished answers, in host memory, found by what was said.

A key is a chain of hashes over the model, who asks, and every message's role and content, so a
request that begins with a kept conversation finds it, and no one else's.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kv_cache import KVCache


@dataclass
class Kept:
    """What a row held: enough to go on from there in any row of a cache with the same sizes."""

    k: list[Tensor]  # of each layer (n_kv_heads, slots that hold something, head_dim)
    v: list[Tensor]
    ids: list[int]  # all that was read and said, for penalties; the last is an answer's last
    overhang: int
    max_chunk: int  # the cache's, which says how far back it can go
    # Of an answer that its reader stopped: what was sent of it, and the length of its text after
    # each of its tokens.
    text: str = ""
    lengths: Sequence[int] = ()

    def without(self, n: int) -> Kept | None:
        """The same without the last n ids; None where the ring cannot go back so far."""
        if n >= len(self.ids) or self.overhang + n > self.max_chunk:
            return None
        return replace(self, ids=self.ids[:len(self.ids) - n], overhang=self.overhang + n)

    def up_to(self, text: str) -> Kept | None:
        """The same up to where the answer had this text; None where no token ended there."""
        after = [0, *self.lengths]
        if not self.text.startswith(text) or len(text) not in after:
            return None
        return self.without(len(after) - 1 - after.index(len(text)))

    def nbytes(self) -> int:
        # Python's integers take 28 bytes each, and 8 in the list.
        return sum(tensor.nbytes for tensor in (*self.k, *self.v)) + 36 * len(self.ids)


def take(cache: KVCache, row: int, ids: list[int]) -> Kept:
    """A copy of a row that holds these ids."""
    used = min(len(ids), cache.n_sink + cache.ring)
    k, v = ([layer[row, :, :used].to("cpu", copy=True) for layer in layers]
            for layers in (cache.k, cache.v))
    return Kept(k, v, ids, cache.overhang[row], cache.max_chunk)


def put(kept: Kept, cache: KVCache, row: int = 0) -> None:
    """Make a row what it was."""
    for layer, held in zip((*cache.k, *cache.v), (*kept.k, *kept.v), strict=True):
        layer[row, :, :held.shape[1]] = held
    cache.length[row] = len(kept.ids)
    cache.overhang[row] = kept.overhang


def chain(start: str, messages: list[dict]) -> list[str]:
    """A key for each beginning of a conversation: of the first message, the first two, and on."""
    keys, key = [], start
    for message in messages:
        key = extended(key, message["role"], message["content"])
        keys.append(key)
    return keys


def extended(key: str, role: str, content: str) -> str:
    """The key after one more message. Lengths come first, so no two messages read as one."""
    text = f"{key} {role} {len(content)} {content}"
    return hashlib.sha256(text.encode()).hexdigest()


class Keep:
    """Kept conversations of at most so many bytes together; those not used for longest go first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.entries: OrderedDict[str, Kept] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, keys: list[str]) -> tuple[int, Kept] | tuple[None, None]:
        """The longest beginning that is kept: (its index in keys, what is kept)."""
        with self.lock:
            for at in range(len(keys) - 1, -1, -1):
                if keys[at] in self.entries:
                    self.entries.move_to_end(keys[at])
                    return at, self.entries[keys[at]]
        return None, None

    def add(self, key: str, kept: Kept, instead_of: str | None = None) -> None:
        """Keep one more. What it goes on from is the first to go from now on."""
        with self.lock:
            if kept.nbytes() > self.max_bytes:
                return
            if old := self.entries.pop(key, None):
                self.bytes -= old.nbytes()
            self.entries[key] = kept
            self.bytes += kept.nbytes()
            if instead_of in self.entries:
                self.entries.move_to_end(instead_of, last=False)
            while self.bytes > self.max_bytes:
                _, old = self.entries.popitem(last=False)
                self.bytes -= old.nbytes()
