"""The prefix cache: KV caches of finished answers, in host memory, found by their conversation.

A key is a chain of hashes over the model, the client, the chat template's arguments (tools are one
of these), and all that every message says. So a request that begins with a conversation of the same
client finds it, and no other request does.
(--keep-gb and the metrics call these conversations kept.)
"""

from __future__ import annotations

import hashlib
import json
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
    # Of an answer: the text that was sent, and the length of the decoded text after each token.
    answer_text: str = ""
    text_lengths: Sequence[int] = ()

    def without_last(self, n: int) -> CachedPrefix | None:
        """The same without the last n ids; None where the ring cannot roll back that far."""
        if n >= len(self.ids) or self.overhang + n > self.max_chunk:
            return None
        return replace(self, ids=self.ids[:len(self.ids) - n], overhang=self.overhang + n)

    def cut_after(self, text: str) -> CachedPrefix | None:
        """The same up to where the answer had this text, whose client may have taken the blanks in
        front away; None where no token ended there."""
        lengths, answer = [0, *self.text_lengths], self.answer_text
        start = 0 if answer.startswith(text) else len(answer) - len(answer.lstrip())
        end = start + len(text)
        if answer[start:end] != text or end not in lengths:
            return None
        kept = lengths.index(end)
        cut = self.without_last(len(lengths) - 1 - kept)
        return cut and replace(cut, answer_text=answer[:end], text_lengths=self.text_lengths[:kept])

    def as_stripped(self) -> dict[str, CachedPrefix]:
        """What goes on from the answer, by its text as clients may strip it of blanks. Those behind
        it are cut off with their tokens, and those in front stay: the model did say them."""
        text, found = self.answer_text, {}
        for stripped in {text.strip(), text.lstrip(), text.rstrip()} - {text, ""}:
            prefix = self if text.endswith(stripped) else self.cut_after(stripped)
            if prefix:
                found[stripped] = prefix
        return found

    def nbytes(self) -> int:
        # Python's integers take 28 bytes each, and 8 in the list.
        numbers = len(self.ids) + len(self.text_lengths)
        return sum(tensor.nbytes for tensor in (*self.k, *self.v)) + 36 * numbers


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
        key = message_key(key, message)
        keys.append(key)
    return keys


def message_key(key: str, message: dict) -> str:
    """The key after one more message: its role and content, its name, and calls or what a result is
    of."""
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    key = extend_key(key, message["role"], message["content"])
    return extend_key(key, "more", json.dumps(more, sort_keys=True)) if more else key


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
        # Other keys of an entry: its own key, and what they find, which shares the entry's tensors.
        self.aliases: dict[str, tuple[str, CachedPrefix]] = {}
        self.lock = threading.Lock()

    def find_longest(self, keys: list[str]) -> tuple[int, CachedPrefix] | tuple[None, None]:
        """The longest prefix that is cached, of prefix_keys: its index in the keys, and it."""
        with self.lock:
            for at in range(len(keys) - 1, -1, -1):
                key, alias = keys[at], self.aliases.get(keys[at])
                if key in self.entries:
                    self.entries.move_to_end(key)
                    return at, self.entries[key]
                if alias:
                    self.entries.move_to_end(alias[0])
                    return at, alias[1]
        return None, None

    def add(self, key: str, prefix: CachedPrefix, parent_key: str | None = None,
            aliases: dict[str, CachedPrefix] | None = None) -> None:
        """Cache a prefix, if it fits at all, and what is found under its other keys. Its parent,
        which it goes on from, is evicted next."""
        with self.lock:
            parent_key, _ = self.aliases.get(parent_key, (parent_key, None))
            if prefix.nbytes() > self.max_bytes:
                return
            if old := self.entries.pop(key, None):
                self.nbytes -= old.nbytes()
                self._drop_aliases()
            self.entries[key] = prefix
            self.nbytes += prefix.nbytes()
            for alias, stripped in (aliases or {}).items():
                self.aliases[alias] = key, stripped
            if parent_key in self.entries:
                self.entries.move_to_end(parent_key, last=False)
            self._evict()

    def _evict(self) -> None:
        """Drop prefixes until the others fit."""
        while self.nbytes > self.max_bytes:
            _, evicted = self.entries.popitem(last=False)
            self.nbytes -= evicted.nbytes()
            self._drop_aliases()

    def _drop_aliases(self) -> None:
        """Forget the other keys of entries that are gone."""
        self.aliases = {alias: pair for alias, pair in self.aliases.items()
                        if pair[0] in self.entries}
