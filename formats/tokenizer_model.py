"""A checkpoint's tokenizer.model, as sentencepiece reads it, and the tokens that other files add.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from formats.added_tokens import (
    AFTER_TOKEN,
    START,
    AddedToken,
    Finder,
    read_added_tokens,
    read_special_tokens,
)
from formats.tokenizer_config import is_legacy, llama_class

# sentencepiece puts a space in front of a text. Text that goes on must not get it, and only the
# model's file can switch it off. That file is a protocol buffer, into which appended fields are
# merged. This appends field 3 (normalizer_spec), whose field 3 (add_dummy_prefix) is false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class TokenizerModel:
    """A vocabulary of sentencepiece's.

    added has the added tokens by text, user_defined the ids of pieces that sentencepiece itself
    finds in every text, and front the ids that a text gets in front. Raises ValueError naming a
    file that cannot be read."""

    def __init__(self, folder: Path, settings: dict):
        path = folder / "tokenizer.model"
        proto = path.read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.without_prefix = sentencepiece.SentencePieceProcessor(
                model_proto=proto + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model") from None
        llama = llama_class(folder, settings) is not None
        self.space_after_tokens = is_legacy(folder, settings)
        # transformers 5 and 4's fast tokenizers put no second space in front of a space, unless
        # they do all as sentencepiece itself does.
        self.second_space = self.space_after_tokens and not llama
        own = [AddedToken(self.sp.id_to_piece(token_id), token_id, special=True)
               for token_id in range(self.sp.get_piece_size())
               if self.sp.is_control(token_id) or self.sp.is_unknown(token_id)]
        self.user_defined = user_defined_pieces(self.sp)
        if llama:  # it finds these before sentencepiece does
            own += [AddedToken(text, token_id) for text, token_id in self.user_defined.items()]
        tokens = read_added_tokens(folder, settings, own)
        if not llama:  # all are found in the text as it is; else `normalized` ones come second
            tokens = [token._replace(normalized=False) for token in tokens]
        self.added = self.number(tokens)
        self.finder = Finder(self.added.values())
        # The named special tokens; where the files don't say them, sentencepiece's own.
        self.named = {name: self.sp.id_to_piece(token_id) for name, token_id in (
            ("bos_token", self.sp.bos_id()), ("eos_token", self.sp.eos_id()),
            ("unk_token", self.sp.unk_id())) if token_id >= 0}
        for name, token in read_special_tokens(folder, settings).items():
            self.named[name] = token.text if token else None
        # transformers 4, llama.cpp and mistral-common put BOS in front where no file says so.
        # transformers 5 does not, though the checkpoints are the same.
        bos = self.named.get("bos_token") if settings.get("add_bos_token", True) else None
        self.front = [self.added[bos].id] if bos else []

    def number(self, tokens: Iterable[AddedToken]) -> dict[str, AddedToken]:
        """Added tokens by text, each with its id. A piece of the vocabulary keeps its id, and an id
        in the vocabulary is taken as a file says it. Other tokens come behind in their order."""
        numbered, next_id = {}, self.sp.get_piece_size()
        for token in tokens:
            token_id = self.sp.piece_to_id(token.text)
            if self.sp.id_to_piece(token_id) != token.text:
                token_id = token.id
            if token_id is None or token_id >= self.sp.get_piece_size():
                token_id, next_id = next_id, next_id + 1
            numbered[token.text] = token._replace(id=token_id)
        return numbered

    def find(self, text: str) -> int | None:
        """The id of a token with this text, added or of the vocabulary."""
        if text in self.added:
            return self.added[text].id
        token_id = self.sp.piece_to_id(text)
        return token_id if self.sp.id_to_piece(token_id) == text else None

    def encode(self, text: str, after: int = START) -> list[int]:
        """Ids of a text, in which added tokens are found."""
        return self.finder.encode(text, after, self.encode_part)

    def encode_part(self, part: str, after: int) -> list[int]:
        """Ids of text in which no added token is looked for."""
        space = after == START or after == AFTER_TOKEN and self.space_after_tokens
        if part.startswith((" ", "\u2581")) and not self.second_space:
            space = False
        return (self.sp if space else self.without_prefix).encode(part)

    def stream(self, hidden_ids: set[int]) -> ModelStream:
        return ModelStream(self, hidden_ids)


class ModelStream:
    """Decodes ids one by one, of which hidden_ids stand for no text. See Tokenizer.stream."""

    def __init__(self, model: TokenizerModel, hidden_ids: set[int]):
        self.sp, self.hidden_ids = model.sp, hidden_ids
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds half characters
        self.added = {token.id: token.text.encode(errors="replace")
                      for token in model.added.values()}

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.utf8.decode(b"", final=True)
        return self.utf8.decode(self.bytes_of(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for: none for a hidden one, or one out of range."""
        if token_id in self.hidden_ids:
            return b""
        if token_id in self.added:
            return self.added[token_id]
        if token_id >= self.sp.get_piece_size():
            return b""
        piece = self.sp.id_to_piece(token_id)
        if self.sp.is_byte(token_id):  # such as "<0x0A>"
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()


def user_defined_pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """The pieces that a sentencepiece model finds in every text before it cuts the rest, by text.

    The library doesn't tell their type. In the model's protocol buffer every piece is a field 1, of
    which the last field is the type: 3 << 3, and 4 for USER_DEFINED."""
    proto, found, at = processor.serialized_model_proto(), {}, 0
    for token_id in range(processor.get_piece_size()):
        size, at = proto[at + 1], at + 2
        if size > 127:  # a varint of two bytes
            size, at = size & 127 | proto[at] << 7, at + 1
        at += size
        if proto[at - 2:at] == b"\x18\x04":
            found[processor.id_to_piece(token_id)] = token_id
    return found
