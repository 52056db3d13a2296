"""Text to token ids and back, and a generated text as it comes.

A checkpoint's `tokenizer.model` is read by sentencepiece; one that only ships a `tokenizer.json`
(Llama 3, Qwen) needs the optional package `tokenizers`. The text of a conversation's turns is
chat_template.py's; what a message holds is text there, and never becomes a special token.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece

from chat_template import BREAK, VICUNA_TEMPLATE, ChatTemplate, any_of, pieces_of, whole
from formats.files import read_json
from formats.tokenizer_config import read_specials, read_template, token_text

# sentencepiece puts a space before a text; inside a conversation that is one too many, and the only
# switch is in the model's file. Protocol buffers merge what is appended: field 3 (normalizer_spec)
# with its field 3 (add_dummy_prefix) false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises ValueError naming the folder or the file."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        template = read_template(folder, settings)
        self.template = VICUNA_TEMPLATE if template is None else template
        # Text -> id of every special token, and of words that were added to the vocabulary
        self.specials, self.ordinary = read_specials(folder, settings)  # and which are such words
        self.sentencepiece = self.tokenizers = None  # the libraries' own: one of the two is used
        if (folder / "tokenizer.model").exists():
            self._open_sentencepiece(folder / "tokenizer.model", settings)
        elif (folder / "tokenizer.json").exists():
            self._open_tokenizers(folder / "tokenizer.json")
        else:
            raise ValueError(f"{folder}: no tokenizer; it needs tokenizer.model or tokenizer.json")
        names = {token_id: text for text, token_id in self.specials.items()}
        self.bos_token = token_text(settings, "bos_token", names.get(self.bos_id, ""))
        self.eos_token = token_text(settings, "eos_token", names.get(self.eos_id, ""))
        self.special_pattern = any_of(self.specials)
        self.chat_template = ChatTemplate(
            self.template, set(self.specials) - self.ordinary, self.ordinary, self.bos_token,
            self.eos_token)

    def _open_sentencepiece(self, path: Path, settings: dict) -> None:
        proto = path.read_bytes()
        try:
            self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model") from None
        sp = self.sentencepiece
        for token_id in range(sp.get_piece_size()):
            if sp.is_control(token_id):
                self.specials.setdefault(sp.id_to_piece(token_id), token_id)
        # A space in front is put to what follows a special token, too, unless the checkpoint says
        # that it was trained the other way ("legacy": false); what follows BOS always gets it.
        self.spaced = settings.get("legacy") is not False
        adds_bos = sp.bos_id() >= 0 and settings.get("add_bos_token") is not False
        self.bos_id = sp.bos_id() if adds_bos else None
        self.eos_id = sp.eos_id() if sp.eos_id() >= 0 else None

    def _open_tokenizers(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path} needs tokenizers: pip install tokenizers") from None
        try:
            self.tokenizers = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        added = self.tokenizers.get_added_tokens_decoder()
        self.specials = {token.content: token_id for token_id, token in added.items()}
        self.ordinary = {token.content for token in added.values() if not token.special}
        before_text = ids_of(self.tokenizers, "", True)  # what it puts in front: BOS or nothing
        self.bos_id = before_text[0] if before_text else None
        self.eos_id, self.spaced = None, False

    # -------------------------------------------------------------------------- text and ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, BOS first where the checkpoint uses one. A special token written out in
        the text becomes that token, as in transformers. `bos=False` is for text that goes on."""
        if self.tokenizers:
            ids = ids_of(self.tokenizers, text)
        else:
            ids = self._encode_around_specials(text, bos, self._encode_plain)
        return self._with_bos(ids, bos)

    def encode_rendered(self, text: str, bos: bool = True) -> list[int]:
        """Ids of what a ChatTemplate rendered: a special token that was written out in a message
        becomes its characters."""
        if BREAK not in text:
            return self.encode(text, bos)
        return self._with_bos(self._encode_around_specials(text, bos, self._encode_message), bos)

    def _with_bos(self, ids: list[int], bos: bool) -> list[int]:
        if self.bos_id is None:
            return ids
        return [self.bos_id] * bos + [i for i in ids if i != self.bos_id]  # BOS comes once

    def _encode_around_specials(self, text: str, spaced: bool,
                                encode_part: Callable[[str, bool], list[int]]) -> list[int]:
        """Ids of the special tokens in a text, and of the parts between them; spaced says whether
        the first gets sentencepiece's space in front."""
        ids = []
        for part in self.special_pattern.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
                spaced = self.spaced or ids[-1] == self.bos_id
            elif part:
                ids += encode_part(part, spaced)
                spaced = False
        return ids

    def _encode_plain(self, part: str, spaced: bool) -> list[int]:
        """Ids of text without special tokens."""
        if self.tokenizers:
            return ids_of(self._verbatim, part)
        return (self.sentencepiece if spaced else self.inner).encode(part)

    def _encode_message(self, part: str, spaced: bool) -> list[int]:
        """Ids of rendered text between special tokens."""
        ids = self._encode_plain(whole(part), spaced)
        if BREAK not in part:
            return ids
        reserved_ids = {self.specials[text] for text in self.chat_template.reserved}
        if reserved_ids.isdisjoint(ids):
            return ids
        # A vocabulary may hold the name as a word: cut inside of it.
        first, *others = pieces_of(part)
        ids = self._encode_plain(first, spaced)
        for other in others:
            ids += self._encode_plain(other, False)
        return ids

    @functools.cached_property
    def _verbatim(self):
        """The library's tokenizer, to which special tokens are text like any other."""
        import tokenizers
        verbatim = tokenizers.Tokenizer.from_str(self.tokenizers.to_str())
        verbatim.encode_special_tokens = True
        if getattr(verbatim.pre_tokenizer, "prepend_scheme", None) == "first":
            verbatim.pre_tokenizer.prepend_scheme = "never"  # a part goes on from a special token
        return verbatim

    def decode(self, ids: list[int]) -> str:
        """The text of ids that go on from something: nothing is stripped."""
        stream = self.stream()
        return "".join(stream(token_id) for token_id in ids) + stream(None)

    def stream(self) -> SentencePieceStream | TokenizersStream:
        """A function that takes one id after the other and returns the text that each completes,
        never half a character; None ends the stream and returns what was still held back."""
        return TokenizersStream(self) if self.tokenizers else SentencePieceStream(self)

    # -------------------------------------------------------------------------- conversations

    def system_turn(self, system: str) -> list[int]:
        """Ids that the template opens a conversation with, before the user's turn."""
        return self.encode_rendered(self.chat_template.system_turn(system))

    def opening(self, entry: dict) -> list[int]:
        """Ids of a prompts file's entry: raw text, or the first of its turns in the template."""
        if "prompt" in entry:
            return self.encode(entry["prompt"])
        return self.first_turn(entry["turns"][0])

    def first_turn(self, user: str, system: str | None = None) -> list[int]:
        """Ids of a conversation's beginning, up to where the answer begins."""
        turns = [{"role": "system", "content": system}] if system else []
        return self.conversation(turns + [{"role": "user", "content": user}])

    def conversation(self, messages: list[dict]) -> list[int]:
        """Ids of messages, each {"role": ..., "content": text}, up to where an answer begins.

        If the first is a system turn, they start with those of system_turn, whatever follows.
        Raises ValueError for what the chat template refuses."""
        opening, rest = self.chat_template.conversation(messages)
        if not opening:
            return self.encode_rendered(rest)
        return self.encode_rendered(opening) + self.encode_rendered(rest, bos=False)

    def next_turn(self, user: str, last_id: int | None = None) -> list[int]:
        """Ids from the end of an answer to where the next one begins. last_id is the answer's last
        token: an end-of-turn token that the model said itself is not said twice."""
        return self._encode_after_answer(self.chat_template.next_turn(user), last_id)

    def turns_after(self, messages: list[dict], answer: int,
                    last_id: int | None = None) -> list[int]:
        """Ids of what follows the answer messages[answer], up to where the next one begins."""
        return self._encode_after_answer(self.chat_template.turns_after(messages, answer), last_id)

    def _encode_after_answer(self, rendered: str, last_id: int | None) -> list[int]:
        ids = self.encode_rendered(rendered, bos=False)
        if last_id in ids and not self.decode(ids[:ids.index(last_id)]).strip():
            ids = ids[ids.index(last_id) + 1:]  # some templates put a space before it
        return ids


class SentencePieceStream:
    """Tokenizer.stream of a sentencepiece model."""

    def __init__(self, tokenizer: Tokenizer):
        self.sentencepiece = tokenizer.sentencepiece
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds half characters
        ends = (tokenizer.bos_id, tokenizer.eos_id)
        self.hidden_ids = set(tokenizer.specials.values())
        self.words = {tokenizer.specials[word]: word.encode(errors="replace")
                      for word in tokenizer.ordinary if tokenizer.specials[word] not in ends}

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.utf8.decode(b"", final=True)
        return self.utf8.decode(self.bytes_of(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        if token_id in self.words:
            return self.words[token_id]
        if token_id in self.hidden_ids or token_id >= self.sentencepiece.get_piece_size():
            return b""
        piece = self.sentencepiece.id_to_piece(token_id)
        if self.sentencepiece.is_byte(token_id):  # "<0x0A>"
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()


class TokenizersStream:
    """Tokenizer.stream of a tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizers = tokenizer.tokenizers
        # Something must come before, or the first token would lose the space in front of it.
        self.before = ids_of(self.tokenizers, "a")
        self.held: list[int] = []  # ids whose text has not been returned
        self.decoder = self.new_decoder()

    def new_decoder(self):
        from tokenizers.decoders import DecodeStream
        return DecodeStream(ids=self.before, skip_special_tokens=True)

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.tokenizers.decode(self.held)
        self.held.append(token_id)
        try:
            text = self.decoder.step(self.tokenizers, token_id)
        except Exception:  # bytes that can never become a character: show them, begin anew
            text = self.tokenizers.decode(self.held)
            self.decoder = self.new_decoder()
        if text:
            self.held.clear()
        return text or ""


def stop_at(stops: Sequence[str]):
    """A filter for streamed text: it takes the next piece and returns what can be shown of it, and
    whether a stop text was reached. What may yet become one is held back until the final piece."""
    held = ""

    def add(piece: str, final: bool = False) -> tuple[str, bool]:
        nonlocal held
        text = held + piece
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            return text[:min(found)], True
        keep = 0 if final else max((n for stop in stops for n in range(1, len(stop))
                                    if text.endswith(stop[:n])), default=0)
        held = text[len(text) - keep:]
        return text[:len(text) - keep], False

    return add


class GeneratedText:
    """One answer as it comes: its token ids, and its text up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.ids: list[int] = []  # every token added
        self.stopped = False  # a stop text was reached; the text ends before it
        self.decoded_length = 0  # of all text decoded so far, shown or held back
        self._pieces: list[str] = []
        self._detokenize, self._before_stop = tokenizer.stream(), stop_at(stop)

    @property
    def text(self) -> str:
        """What may be shown so far; the text that is held back is not in it."""
        return "".join(self._pieces)

    def add(self, token_id: int) -> str:
        """Take the next token. Returns the text that can be shown now; none after a stop text."""
        self.ids.append(token_id)
        return self._show(self._detokenize(token_id))

    def flush(self) -> str:
        """End the text. Returns what was held back; none after a stop text."""
        return "" if self.stopped else self._show(self._detokenize(None), final=True)

    def _show(self, piece: str, final: bool = False) -> str:
        self.decoded_length += len(piece)
        if self.stopped:
            return ""
        shown, self.stopped = self._before_stop(piece, final)
        self._pieces.append(shown)
        return shown


def ids_of(tokenizer, text: str, special: bool = False) -> list[int]:
    """A text's ids by the package tokenizers, with what its post-processor adds if special."""
    try:
        return tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # plain, of a vocabulary that lacks what it needs
        raise ValueError(f"tokenizer.json cannot encode {text[:40]!r}: {error}") from None
