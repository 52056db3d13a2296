"""Tokens as clients see them in logprobs: their text, their bytes, and where they stand."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from grammar import token_bytes
from tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf, and this is OpenAI's


@dataclass
class Token:
    """A token with its log-probability, and the likeliest ones in its place."""

    text: str  # a part of a character has none, and shows as U+FFFD
    bytes: list[int]
    logprob: float | None  # None: the first of a prompt, which nothing stands before
    top: list[Token] = field(default_factory=list)
    offset: int = 0  # characters before it


class TokenNames:
    """What each token of a vocabulary is called."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.special_names = {token_id: text for text, token_id in tokenizer.specials.items()}
        self.known: dict[int, tuple[str, list[int]]] = {}

    @functools.cached_property
    def bytes(self) -> list[bytes] | None:
        """Of each token; None where the vocabulary does not say. It takes a while to make."""
        try:
            return token_bytes(self.tokenizer, self.vocab_size)
        except ValueError:
            return None

    def name(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes, looked up once: 20 alternatives a token are many."""
        if token_id not in self.known:
            text, found = self.special_names.get(token_id), None
            if text is None:
                text = self.tokenizer.decode([token_id])
                found = self.bytes[token_id] if self.bytes else None
            self.known[token_id] = text, list(text.encode() if found is None else found)
        return self.known[token_id]

    def token(self, token_id: int, logprob: float | None, likeliest: dict[int, float] | None = None,
              offset: int = 0) -> Token:
        logprob = None if logprob is None else max(logprob, LEAST_LOGPROB)
        top = [self.token(*other) for other in (likeliest or {}).items()]
        return Token(*self.name(token_id), logprob, top, offset)

    def prompt_tokens(self, ids: list[int], logprobs: list[tuple[float, dict[int, float]]],
                      text: str) -> list[Token]:
        """The tokens of a prompt with this text, which have log-probabilities but for the first."""
        stream, offsets, length = self.tokenizer.stream(), [], 0
        for token_id in ids:
            offsets.append(length)
            length += len(stream(token_id))
        length += len(stream(None))
        extra = length - len(text)  # some vocabularies put a space in front
        return [self.token(token_id, *pair, offset=max(0, at - extra))
                for token_id, pair, at in zip(ids, [(None, None), *logprobs], offsets, strict=True)]
