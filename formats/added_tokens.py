"""Tokens that are added to a vocabulary: where files say them, and how they are found in a text.

They stand in several files, of which each may name tokens that the others don't: tokenizer.json,
tokenizer_config.json, added_tokens.json and special_tokens_map.json. In every function, settings
is what tokenizer_config.json holds.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from formats.chat_template import any_of
from formats.files import read_json

# The special tokens with names, in the order in which transformers adds them to a vocabulary.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")  # the later one since transformers 5


class AddedToken(NamedTuple):
    """A token that is found in a text before the text is cut into the vocabulary's pieces."""

    text: str
    id: int | None = None  # None: the files only name it
    special: bool = False  # marks something and isn't shown, unlike an added word
    single_word: bool = False  # only found where no letter or digit stands beside it
    lstrip: bool = False  # takes the whitespace in front of it
    rstrip: bool = False  # takes the whitespace after it
    normalized: bool = False  # found in the normalized text


def read_special_tokens(folder: Path, settings: dict) -> dict[str, AddedToken | None]:
    """The special tokens that have a name, such as bos_token or a model's own image_token. None is
    a name that the files say has no token; an empty text, which old files have, says nothing.

    special_tokens_map.json is older than tokenizer_config.json's added_tokens_decoder. Beside one
    it only fills what is missing; without one its tokens count, as in transformers."""
    path = folder / "special_tokens_map.json"
    older = read_json(path)
    sources = [(path, older), (folder / "tokenizer_config.json", settings)]
    if "added_tokens_decoder" not in settings:
        sources.reverse()
    named = {}
    for source, content in sources:
        for name, value in content.items():
            if value == "":
                continue
            if name in NAMES or name.endswith("_token") and isinstance(value, (str, dict)):
                named[name] = None if value is None else as_token(value, name, source)
            elif name == "extra_special_tokens" and isinstance(value, dict):
                named.update({own: as_token(token, own, source) for own, token in value.items()})
    return {name: named[name] for name in (*NAMES, *named) if name in named}


def read_extra_tokens(folder: Path, settings: dict) -> list[AddedToken]:
    """The special tokens without a name, in additional_special_tokens or extra_special_tokens."""
    extra = {}
    for source, content in ((folder / "tokenizer_config.json", settings),
                            (path := folder / "special_tokens_map.json", read_json(path))):
        for name in LISTS:
            values = content.get(name) or []
            if isinstance(values, list):  # a dict gives each token a name
                for value in values:
                    token = as_token(value, name, source)
                    extra.setdefault(token.text, token)
    return list(extra.values())


def as_token(value: str | dict, name: str, source: Path) -> AddedToken:
    """A special token, which stands in a file as its text or as {"content": text, flag: ...}."""
    fields = value if isinstance(value, dict) else {"content": value}
    if not isinstance(fields.get("content"), str):
        raise ValueError(f"{source}: {name} is {value!r:.80}; it must be a text")
    return AddedToken(fields["content"], None, True, **flags({"special": True, **fields}))


def flags(fields: dict) -> dict[str, bool]:
    """A token's flags. An absent one is false; only words, which aren't special, are found in the
    normalized text."""
    absent = {"normalized": not fields.get("special", False)}
    return {flag: bool(fields.get(flag, absent.get(flag, False)))
            for flag in ("single_word", "lstrip", "rstrip", "normalized")}


# ------------------------------------------------------------------------------ added tokens


def read_added_tokens(folder: Path, settings: dict,
                      own: Iterable[AddedToken] = ()) -> list[AddedToken]:
    """All tokens that are added to a vocabulary: those with an id in the order of their ids, then
    those that are only named. `own` are the vocabulary's own, such as tokenizer.json's.

    Where several files know a text, the first of these says the id and the flags, as in
    transformers: added_tokens_decoder, the vocabulary itself, added_tokens.json, the lists of
    names. A token in such a list is special, whatever the others say. An id in added_tokens.json
    that one of the others has, too, isn't that text's."""
    named = [token for token in read_special_tokens(folder, settings).values() if token]
    named += read_extra_tokens(folder, settings)
    special = {token.text for token in named}
    decoder = settings.get("added_tokens_decoder") or {}  # id -> {"content": text, ...}
    older = read_json(folder / "added_tokens.json")  # text -> id
    try:
        tokens = [AddedToken(str.__str__(token["content"]), int(token_id),
                             bool(token.get("special", False)), **flags(token))
                  for token_id, token in decoder.items()]
        tokens += own
        taken = {token.id for token in tokens}
        older = {int(token_id): str.__str__(text) for text, token_id in older.items()}
        tokens += [AddedToken(text, token_id, text in special, normalized=text not in special)
                   for token_id, text in older.items() if token_id not in taken]
        if not all(0 <= token.id < 2**31 for token in tokens):
            raise ValueError
        "".join(token.text for token in (*tokens, *named)).encode()  # refuses half a character
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise ValueError(f"{folder}: its added tokens are not a table of ids and texts") from None
    added = {}
    for token in [*tokens, *named]:
        if token.text:
            added.setdefault(token.text, token)
    added = [token._replace(special=token.special or text in special)
             for text, token in added.items()]
    return sorted(added, key=lambda token: math.inf if token.id is None else token.id)


# ------------------------------------------------------------------------------ finding them

# Where a part of a text stands. It decides whether a vocabulary puts a space in front of it.
START, AFTER_TOKEN, AFTER_TEXT = range(3)


class Finder:
    """Finds added tokens in a text, as transformers does: those of the text itself first, then in
    what is left those of the normalized text; the leftmost first, of these the longest."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self.tokens = {token.text: token for token in tokens}
        self.patterns = [any_of(token.text for token in self.tokens.values()
                                if token.normalized == normalized) for normalized in (False, True)]

    def encode(self, text: str, after: int, encode_part: Callable[[str, int], list[int]]
               ) -> list[int]:
        """Ids of the added tokens in a text, and of the parts between them, each of which
        encode_part(part, after) encodes."""
        ids = []
        for part in self.split(text):
            if isinstance(part, AddedToken):
                ids.append(part.id)
                after = AFTER_TOKEN
            else:
                ids += encode_part(part, after)
                after = AFTER_TEXT
        return ids

    def split(self, text: str) -> list[str | AddedToken]:
        """The added tokens in a text, and the parts between them."""
        parts = [text] if text else []
        for pattern in self.patterns:
            parts = [piece for part in parts for piece in (
                [part] if isinstance(part, AddedToken) else self._split(part, pattern))]
        return parts

    def _split(self, text: str, pattern: re.Pattern) -> list[str | AddedToken]:
        parts, begin = [], 0
        for found in pattern.finditer(text):
            token, (start, end) = self.tokens[found[0]], found.span()
            beside = text[start - 1:start] + text[end:end + 1]
            if token.single_word and any(map(is_of_a_word, beside)):
                continue
            while token.lstrip and start > begin and text[start - 1].isspace():
                start -= 1
            while token.rstrip and text[end:end + 1].isspace():
                end += 1
            parts += [text[begin:start], token]
            begin = end
        return [part for part in (*parts, text[begin:]) if part]


def is_of_a_word(character: str) -> bool:
    """Whether a character is a letter, a digit, a mark on one, or joins words, such as "_"."""
    return character.isalnum() or unicodedata.category(character) in ("Mn", "Mc", "Me", "Pc")
