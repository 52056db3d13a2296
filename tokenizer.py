"""Text to token ids and back, and generated text as it comes.

sentencepiece reads a checkpoint's `tokenizer.model`. The optional package `tokenizers` reads the
`tokenizer.json` of a checkpoint that has no `tokenizer.model` (Llama 3, Qwen). chat_template.py
renders a conversation's turns, which are encoded here.
"""

from __future__ import annotations

import codecs
import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece

from chat_template import ESCAPE, VICUNA_TEMPLATE, ChatTemplate, any_of, unescape, unescaped_pieces
from formats.files import import_optional, read_json
from formats.tokenizer_config import (
    AddedToken,
    read_added_tokens,
    read_extra_tokens,
    read_special_tokens,
    read_templates,
)

# sentencepiece puts a space in front of a text. Text that goes on must not get it, and only the
# model's file can switch it off. That file is a protocol buffer, into which appended fields are
# merged. This appends field 3 (normalizer_spec), whose field 3 (add_dummy_prefix) is false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# The ends of a turn that a vocabulary may hold though no file says that they end anything.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
# What may follow a text: its last piece can merge with one of these, or with none. Only the text's
# last characters decide about that.
FOLLOWING, SETTLING = string.printable + "\u00e9\u65e5\u0301", 200


class Tokenizer:
    """The tokenizer in a checkpoint's folder, and its chat template.

    Raises ValueError naming the folder or the file that cannot be read. bos_id and eos_id are None
    where the checkpoint doesn't use them."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        self.added: dict[str, AddedToken] = {}  # by text, all that are beside the vocabulary
        self.sentencepiece = self.tokenizers = None  # the library's tokenizer is in one of these
        if (folder / "tokenizer.model").exists():
            self._open_sentencepiece(folder, settings)
        elif (folder / "tokenizer.json").exists():
            self._open_tokenizers(folder, settings)
        else:
            raise ValueError(f"{folder}: no tokenizer; it needs tokenizer.model or tokenizer.json")
        # specials maps the text of each special token and of each added word to its id. Added words
        # are shown in answers, special tokens aren't.
        self.specials = {token.text: token.id for token in self.added.values()}
        self.added_words = {token.text for token in self.added.values() if not token.special}
        self.special_pattern = any_of(self.specials)
        # The special tokens that have a name, such as bos_token, as a chat template asks for them.
        names = {token_id: text for text, token_id in self.specials.items()}
        named = read_special_tokens(folder, settings)
        self.special_tokens = {name: token.text for name, token in named.items() if token}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if name not in named and token_id in names:
                self.special_tokens[name] = names[token_id]
        self.bos_token = self.special_tokens.get("bos_token", "")
        self.eos_token = self.special_tokens.get("eos_token", "")
        self.user_defined = user_defined_pieces(self.sentencepiece) if self.sentencepiece else {}
        self.named_ids = {**self.user_defined, **self.specials}
        self.chat_template = self._read_chat_template(folder, settings)

    def _read_chat_template(self, folder: Path, settings: dict) -> ChatTemplate:
        context = dict(self.special_tokens)
        if extra := [token.text for token in read_extra_tokens(folder, settings)]:
            context["additional_special_tokens"] = extra
        templates = read_templates(folder, settings)
        if not templates:  # Vicuna's form puts BOS in front where the tokenizer does
            templates = {"default": VICUNA_TEMPLATE}
            if self.bos_id is None:
                context.pop("bos_token", None)
        words = self.added_words | self.user_defined.keys()
        return ChatTemplate(templates, set(self.specials) - self.added_words, words, context)

    def _open_sentencepiece(self, folder: Path, settings: dict) -> None:
        path = folder / "tokenizer.model"
        proto = path.read_bytes()
        try:
            self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # inner encodes text that goes on: without a space in front.
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model") from None
        sp = self.sentencepiece
        for token in read_added_tokens(folder, settings):
            if token.id is None:  # in the vocabulary, or the next id that is free
                token_id = sp.piece_to_id(token.text)
                if sp.id_to_piece(token_id) != token.text:
                    token_id = max([sp.get_piece_size() - 1,
                                    *(other.id for other in self.added.values())]) + 1
                token = token._replace(id=token_id)
            self.added[token.text] = token
        for token_id in range(sp.get_piece_size()):
            if sp.is_control(token_id):
                text = sp.id_to_piece(token_id)
                self.added.setdefault(text, AddedToken(text, token_id, special=True))
        # Text after a special token gets a space in front, too. A checkpoint with "legacy": false
        # was trained without this space, except after BOS.
        self.space_after_specials = settings.get("legacy") is not False
        adds_bos = sp.bos_id() >= 0 and settings.get("add_bos_token") is not False
        self.bos_id = sp.bos_id() if adds_bos else None
        self.eos_id = sp.eos_id() if sp.eos_id() >= 0 else None

    def _open_tokenizers(self, folder: Path, settings: dict) -> None:
        path = folder / "tokenizer.json"
        tokenizers = import_optional("tokenizers", path)
        try:
            self.tokenizers = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        self.tokenizers.no_truncation()
        self.tokenizers.no_padding()
        self.tokenizers.add_tokens([
            tokenizers.AddedToken(token.text, special=token.special, lstrip=token.lstrip,
                                  rstrip=token.rstrip, single_word=token.single_word,
                                  normalized=token.normalized)
            for token in read_added_tokens(folder, settings)
            if token.id is not None or self.tokenizers.token_to_id(token.text) is None])
        for token_id, token in self.tokenizers.get_added_tokens_decoder().items():
            self.added[token.content] = AddedToken(
                token.content, token_id, token.special, token.single_word, token.lstrip,
                token.rstrip, token.normalized)
        # The post-processor puts BOS in front of a text, or nothing.
        before_text = library_ids(self.tokenizers, "", post_process=True)
        self.bos_id = before_text[0] if before_text else None
        self.eos_id, self.space_after_specials = None, False

    # -------------------------------------------------------------------------- text and ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, BOS first where the checkpoint uses one. `bos=False` is for text that goes
        on. The name of a special token in the text becomes that token, as in transformers."""
        return self._with_bos(self._ids_of(text, bos), bos)

    def _ids_of(self, text: str, start: bool) -> list[int]:
        if self.tokenizers:
            return library_ids(self.tokenizers, text)
        return self._encode_around_specials(text, start, self._encode_plain)

    def encode_rendered(self, text: str, start: bool = True) -> list[int]:
        """Ids of text that ChatTemplate rendered: the template's own tokens, to the last BOS, and a
        name that it escaped as the ids of its characters. `start=False` is for text that goes on.
        """
        if ESCAPE not in text:
            ids = self._ids_of(text, start)
            marks = Counter(self.named_ids[name] for name in self._mark_pattern.findall(text))
            found = Counter(token_id for token_id in ids if token_id in self._reserved_ids)
            if found <= marks:
                return ids
            # A message holds what the tokenizer normalizes to a mark, such as one in wide letters.
        return self._encode_around_specials(text, start, self._encode_escaped)

    def _with_bos(self, ids: list[int], bos: bool) -> list[int]:
        """The ids with one BOS in front, or with none. Templates write one of their own."""
        if self.bos_id is None:
            return ids
        others = [token_id for token_id in ids if token_id != self.bos_id]
        return [self.bos_id, *others] if bos else others

    def _encode_around_specials(self, text: str, space_in_front: bool,
                                encode_part: Callable[[str, bool], list[int]]) -> list[int]:
        """Ids of the special tokens in a text, and of the parts between them.

        encode_part(part, space_in_front) encodes a part. Only sentencepiece puts spaces in front.
        """
        ids = []
        for part in self.special_pattern.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
                space_in_front = self.space_after_specials or self.specials[part] == self.bos_id
            elif part:
                ids += encode_part(part, space_in_front)
                space_in_front = False
        return ids

    def _encode_plain(self, part: str, space_in_front: bool) -> list[int]:
        """Ids of text without special tokens: a name in it becomes the ids of its characters."""
        if self.tokenizers:
            return library_ids(self._without_specials, part)
        return (self.sentencepiece if space_in_front else self.inner).encode(part)

    def _encode_escaped(self, part: str, space_in_front: bool) -> list[int]:
        """Ids of text without special tokens, in which names are escaped. sentencepiece finds the
        template's own marks in it, where they are pieces of its model."""
        ids = []
        for piece in self._mark_pattern.split(part):
            if piece in self.named_ids:
                ids.append(self.named_ids[piece])
            else:
                ids += self._encode_without_marks(piece, space_in_front)
            space_in_front = space_in_front and not ids
        return ids

    def _encode_without_marks(self, text: str, space_in_front: bool) -> list[int]:
        """Ids of escaped text that holds no mark, though the vocabulary itself may find one in it.
        """
        ids = self._encode_plain(unescape(text), space_in_front)
        if self._reserved_ids.isdisjoint(ids):
            return ids
        pieces = unescaped_pieces(text)  # cut inside the names
        if len(pieces) == 1:  # or anywhere, where the text only becomes one by being normalized
            pieces = [pieces[0][:len(text) // 2], pieces[0][len(text) // 2:]]
        ids = []
        for piece in filter(None, pieces):
            ids += self._encode_without_marks(piece.replace(ESCAPE, 2 * ESCAPE), space_in_front)
            space_in_front = False
        return ids

    @functools.cached_property
    def _without_specials(self):
        """A copy of the library's tokenizer that encodes a special token's name as text."""
        import tokenizers
        copy = tokenizers.Tokenizer.from_str(self.tokenizers.to_str())
        copy.encode_special_tokens = True  # encodes them as text, despite its name
        # "first" puts a space in front of a text. Here a text goes on from a special token.
        if getattr(copy.pre_tokenizer, "prepend_scheme", None) == "first":
            copy.pre_tokenizer.prepend_scheme = "never"
        return copy

    def decode(self, ids: list[int]) -> str:
        """The text of ids that go on from others. The first token keeps its space in front."""
        stream = self.stream()
        return "".join(stream(token_id) for token_id in ids) + stream(None)

    def stream(self) -> SentencePieceStream | TokenizersStream:
        """A callable that decodes ids one by one and returns the text that each completes.

        It holds half a character back until the rest comes. None ends the stream: the callable then
        returns what is still held back."""
        return TokenizersStream(self) if self.tokenizers else SentencePieceStream(self)

    # -------------------------------------------------------------------------- turns

    def system_turn(self, system: str, template_args: dict | None = None) -> list[int]:
        """Ids of what opens a conversation, before the user's turn. A last piece that could merge
        with what follows is left out; it belongs to the next turn."""
        return self._settled_ids(self.chat_template.system_turn(system, template_args))

    def opening(self, entry: dict, template_args: dict | None = None) -> list[int]:
        """Ids of an entry of a prompts file, {"prompt": raw text} or {"turns": [text, ...]}: of its
        prompt, or of its first turn."""
        if "prompt" in entry:
            return self.encode(entry["prompt"])
        return self.first_turn(entry["turns"][0], template_args=template_args)

    def first_turn(self, user: str, system: str | None = None,
                   template_args: dict | None = None) -> list[int]:
        """Ids of a conversation's first turn, up to where the answer begins."""
        turns = [{"role": "system", "content": system}] if system else []
        return self.conversation(turns + [{"role": "user", "content": user}], template_args)

    def conversation(self, messages: list[dict], template_args: dict | None = None) -> list[int]:
        """Ids of messages, each {"role": ..., "content": text}, up to where an answer begins.

        template_args is what else the chat template is given, such as {"enable_thinking": False}.
        Where the first message is a system turn, the ids begin with those of system_turn, so that
        its cache can be shared. Raises ValueError for what the chat template refuses."""
        opening, rest = self.chat_template.conversation(messages, template_args)
        ids, settled = self.encode_rendered(opening + rest), self._settled_ids(opening)
        if ids[:len(settled)] == settled:
            return ids
        # What follows reaches farther back into the opening than _settled_ids foresees.
        return self.encode_rendered(opening) + self.encode_rendered(rest, start=False)

    def _settled_ids(self, text: str) -> list[int]:
        """Ids of a text's beginning that are the same whatever follows the text: those before the
        last piece with which a following character can merge."""
        tail = text[-SETTLING:]
        ids = self.encode_rendered(tail, start=False)
        n_same = len(ids)
        for following in FOLLOWING:
            longer = self.encode_rendered(tail + following, start=False)
            n_same = next((n for n in range(n_same) if longer[n:n + 1] != ids[n:n + 1]), n_same)
        whole = self.encode_rendered(text)
        return whole[:len(whole) - len(ids) + n_same]

    def next_turn(self, user: str, last_id: int | None = None,
                  template_args: dict | None = None) -> list[int]:
        """Ids from the end of an answer to where the next one begins.

        last_id is the answer's last token. If the model ended its turn itself, the ids leave the
        end-of-turn token out. An answer's own ids are never encoded again."""
        text = self.chat_template.next_turn(user, template_args)
        return self._encode_after_answer(text, last_id)

    def turns_after(self, messages: list[dict], answer: int, last_id: int | None = None,
                    template_args: dict | None = None) -> list[int]:
        """Ids of what follows the answer messages[answer], up to where the next one begins. last_id
        is as in next_turn."""
        text = self.chat_template.turns_after(messages, answer, template_args)
        return self._encode_after_answer(text, last_id)

    @functools.cached_property
    def _reserved_ids(self) -> set[int]:
        return {self.named_ids[name] for name in self.chat_template.reserved}

    @functools.cached_property
    def _mark_pattern(self) -> re.Pattern:
        return any_of(self.chat_template.reserved)

    @functools.cached_property
    def turn_end_ids(self) -> set[int]:
        """The tokens that end an answer of a chat, beside the EOS ids of the checkpoint's config:
        eos_token, what the template puts after an answer, and marks that end nothing else."""
        names = {self.eos_token, self.chat_template.turn_end, *TURN_ENDS}
        return {self.named_ids[name] for name in names if name in self.named_ids}

    @functools.cached_property
    def hidden_ids(self) -> set[int]:
        """The tokens that are not shown in an answer: the special ones, and the ends of a turn."""
        names = {*self.specials} - self.added_words | {*self.special_tokens.values()}
        return {self.named_ids[name] for name in names if name in self.named_ids} | (
            self.turn_end_ids)

    def _encode_after_answer(self, rendered: str, last_id: int | None) -> list[int]:
        ids = self.encode_rendered(rendered, start=False)
        # Some templates put a space before the end-of-turn token.
        if last_id in ids and not self.decode(ids[:ids.index(last_id)]).strip():
            ids = ids[ids.index(last_id) + 1:]
        return ids


# ------------------------------------------------------------------------------ decoding


class SentencePieceStream:
    """Decodes ids one by one with sentencepiece. See Tokenizer.stream."""

    def __init__(self, tokenizer: Tokenizer):
        self.sentencepiece = tokenizer.sentencepiece
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds half characters
        self.hidden_ids = tokenizer.hidden_ids
        self.added_words = {tokenizer.specials[word]: word.encode(errors="replace")
                            for word in tokenizer.added_words}

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.utf8.decode(b"", final=True)
        return self.utf8.decode(self.bytes_of(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for: none for a special one, or one out of range."""
        if token_id in self.hidden_ids:
            return b""
        if token_id in self.added_words:
            return self.added_words[token_id]
        if token_id >= self.sentencepiece.get_piece_size():
            return b""
        piece = self.sentencepiece.id_to_piece(token_id)
        if self.sentencepiece.is_byte(token_id):  # such as "<0x0A>"
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()


class TokenizersStream:
    """Decodes ids one by one with the package tokenizers. See Tokenizer.stream."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizers, self.hidden_ids = tokenizer.tokenizers, tokenizer.hidden_ids
        # The library strips the space in front of a stream's first token. These ids come before it.
        self.ids_before = library_ids(self.tokenizers, "a")
        self.held_ids: list[int] = []  # they have not completed any text yet
        self.decode_stream = self.new_decode_stream()

    def new_decode_stream(self):
        from tokenizers.decoders import DecodeStream
        return DecodeStream(ids=self.ids_before, skip_special_tokens=True)

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.tokenizers.decode(self.held_ids)
        if token_id in self.hidden_ids:
            return ""
        self.held_ids.append(token_id)
        try:
            text = self.decode_stream.step(self.tokenizers, token_id)
        except Exception:
            # These bytes can't become a character any more. Show them as they are and start again.
            text = self.tokenizers.decode(self.held_ids)
            self.decode_stream = self.new_decode_stream()
        if text:
            self.held_ids.clear()
        return text or ""


# ------------------------------------------------------------------------------ generated text


class GeneratedText:
    """One answer as it comes: its token ids, and its text up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.ids: list[int] = []  # every token added
        self.stopped = False  # a stop text was reached; the text ends before it
        self.decoded_length = 0  # of all text decoded so far, shown or held back
        self._stream, self._stops = tokenizer.stream(), stop
        self._shown: list[str] = []  # one piece a token
        self._held = ""  # decoded, and it may become a stop text

    @property
    def text(self) -> str:
        """What may be shown so far; the text that is held back is not in it."""
        return "".join(self._shown)

    def add(self, token_id: int) -> str:
        """Take the next token. Returns the text that can be shown now; none after a stop text."""
        self.ids.append(token_id)
        return self._take(self._stream(token_id))

    def flush(self) -> str:
        """End the text. Returns what was held back; none after a stop text."""
        last = self._take(self._stream(None))
        held, self._held = self._held, ""
        self._shown.append(held)
        return last + held

    def _take(self, decoded: str) -> str:
        self.decoded_length += len(decoded)
        if self.stopped:
            return ""
        shown, self._held, self.stopped = cut_at_stop(self._held + decoded, self._stops)
        self._shown.append(shown)
        return shown


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(what can be shown of a text, what may yet become a stop text, whether one was reached)."""
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
        return text[:min(found)], "", True
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    end = len(text) - max(begun, default=0)
    return text[:end], text[end:], False


def library_ids(tokenizer, text: str, post_process: bool = False) -> list[int]:
    """A text's ids by the package tokenizers. Its post-processor adds BOS to them, if asked."""
    try:
        return tokenizer.encode(text, add_special_tokens=post_process).ids
    except Exception as error:  # the vocabulary lacks its own unknown token
        raise ValueError(f"tokenizer.json cannot encode {text[:40]!r}: {error}") from None


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
