"""The prefix cache: KV caches of finished answers, in host memory, found by their conversation.

A key is a chain of hashes over the model, the client, the chat template's arguments, and every
message's role and content. So a
request that begins with a conversation of the same client finds it, and no other request does.
(--keep-gb and the metrics call these conversations kept.)
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
class CachedPrefix:
    """A copy of a row: enough to go on from there in any row of a cache with the same sizes."""

    k: list[Tensor]  # of each layer (n_kv_heads, slots that hold something, head_dim)
    v: list[Tensor]
    ids: list[int]  # all tokens of prompts and answers, for penalties; the last is an answer's last
    overhang: int
    max_chunk: int  # the cache's, which says how far back it can roll
    # Of an answer that was cancelled or ended by a stop text: the text that was sent, and the
    # length of the decoded text after each of its tokens.
    answer_text: str = ""
    text_lengths: Sequence[int] = ()

    def without_last(self, n: int) -> CachedPrefix | None:
        """The same without the last n ids; None where the ring cannot roll back that far."""
        if n >= len(self.ids) or self.overhang + n > self.max_chunk:
            return None
        return replace(self, ids=self.ids[:len(self.ids) - n], overhang=self.overhang + n)

    def cut_after(self, text: str) -> CachedPrefix | None:
        """The same up to where the answer had this text; None where no token ended there."""
        lengths = [0, *self.text_lengths]
        if not self.answer_text.startswith(text) or len(text) not in lengths:
            return None
        return self.without_last(len(lengths) - 1 - lengths.index(len(text)))

    def nbytes(self) -> int:
        # Python's integers take 28 bytes each, and 8 in the list.
        return sum(tensor.nbytes for tensor in (*self.k, *self.v)) + 36 * len(self.ids)


def copy_from_row(cache: KVCache, row: int, ids: list[int]) -> CachedPrefix:
    """A copy, in host memory, of a row that holds these ids."""
    used = [min(len(ids), geometry.n_used) for geometry in cache.of_layer]
    k, v = ([layer[row, :, :n].to("cpu", copy=True) for layer, n in zip(layers, used)]
            for layers in (cache.k, cache.v))
    return CachedPrefix(k, v, ids, cache.overhang[row], cache.max_chunk)


def copy_to_row(prefix: CachedPrefix, cache: KVCache, row: int = 0) -> None:
    """Make a row what it was when it was copied."""
    for layer, held in zip((*cache.k, *cache.v), (*prefix.k, *prefix.v), strict=True):
        layer[row, :, :held.shape[1]] = held
    cache.length[row] = len(prefix.ids)
    cache.overhang[row] = prefix.overhang


# ------------------------------------------------------------------------------ keys


def prefix_keys(start: str, messages: list[dict]) -> list[str]:
    """A key for each prefix of a conversation: its first message, its first two, and so on."""
    keys, key = [], start
    for message in messages:
        key = extend_key(key, message["role"], message["content"])
        keys.append(key)
    return keys


def extend_key(key: str, role: str, content: str) -> str:
    """The key after one more message. Lengths come first, so no two messages read as one."""
    text = f"{key} {role} {len(content)} {content}"
    return hashlib.sha256(text.encode()).hexdigest()


def cancelled_key(key: str) -> str:
    """Where a cancelled answer to the conversation of this key is cached."""
    return extend_key(key, "cancelled", "")


# ------------------------------------------------------------------------------ the cache


class PrefixCache:
    """Cached prefixes of at most max_bytes together. The least recently used is evicted first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.nbytes = max_bytes, 0
        self.entries: OrderedDict[str, CachedPrefix] = OrderedDict()  # the next to evict first
        self.lock = threading.Lock()

    def find_longest(self, keys: list[str]) -> tuple[int, CachedPrefix] | tuple[None, None]:
        """The longest prefix that is cached, of prefix_keys: its index in the keys, and it."""
        with self.lock:
            for at in range(len(keys) - 1, -1, -1):
                if keys[at] in self.entries:
                    self.entries.move_to_end(keys[at])
                    return at, self.entries[keys[at]]
        return None, None

    def add(self, key: str, prefix: CachedPrefix, parent_key: str | None = None) -> None:
        """Cache a prefix, if it fits at all. Its parent, which it goes on from, is evicted next."""
        with self.lock:
            if prefix.nbytes() > self.max_bytes:
                return
            if old := self.entries.pop(key, None):
                self.nbytes -= old.nbytes()
            self.entries[key] = prefix
            self.nbytes += prefix.nbytes()
            if parent_key in self.entries:
                self.entries.move_to_end(parent_key, last=False)
            self._evict()

    def _evict(self) -> None:
        """Drop prefixes until the others fit."""
        while self.nbytes > self.max_bytes:
            _, evicted = self.entries.popitem(last=False)
            self.nbytes -= evicted.nbytes()
