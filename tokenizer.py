"""Text to token ids and back, and generated text as it comes.

A checkpoint's vocabulary is its tokenizer.json, which the optional package `tokenizers` reads
(formats/tokenizer_json.py), or its tokenizer.model, which sentencepiece reads
(formats/tokenizer_model.py). formats/chat_template.py renders a conversation's turns, which are
encoded here.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from formats.added_tokens import AFTER_TEXT, START, read_extra_tokens
from formats.chat_template import (
    ESCAPE,
    VICUNA_TEMPLATE,
    ChatTemplate,
    any_of,
    unescape,
    unescaped_pieces,
)
from formats.files import read_json
from formats.tokenizer_config import read_templates
from formats.tokenizer_json import JsonStream, TokenizerJson
from formats.tokenizer_model import ModelStream, TokenizerModel

log = logging.getLogger("gpt_stream")
# The ends of a turn that a vocabulary may hold though no file says that they end anything.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
# What may follow a text: its last piece can merge with one of these, or with none. Only the text's
# last characters decide about that.
FOLLOWING, SETTLING = string.printable + "\u00e9\u65e5\u0301", 80


class Tokenizer:
    """The tokenizer in a checkpoint's folder, and its chat template.

    Raises ValueError naming the folder or the file that cannot be read. bos_id and eos_id are None
    where the checkpoint doesn't use them."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        self.vocabulary = open_vocabulary(folder, settings)
        self.added = self.vocabulary.added  # by text, all tokens that are beside the vocabulary
        # specials maps the text of each special token and of each added word to its id. Added words
        # are shown in answers, special tokens aren't.
        self.specials = {token.text: token.id for token in self.added.values()}
        self.added_words = {token.text for token in self.added.values() if not token.special}
        self.user_defined = self.vocabulary.user_defined
        self.named_ids = {**self.user_defined, **self.specials}
        # The special tokens that have a name, such as bos_token, as a chat template asks for them.
        self.special_tokens = {name: text for name, text in self.vocabulary.named.items() if text}
        self.bos_token = self.special_tokens.get("bos_token", "")
        self.eos_token = self.special_tokens.get("eos_token", "")
        self.front = self.vocabulary.front  # the ids that are put in front of a text, such as BOS
        self.bos_id = self.front[0] if self.front else None
        self.eos_id = self.named_ids.get(self.eos_token)
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

    # -------------------------------------------------------------------------- text and ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, behind BOS where the checkpoint uses one, unless the text itself begins
        with it. `bos=False` is for text that goes on. The name of a special token in the text
        becomes that token, as in transformers."""
        check_characters(text)
        if not bos:
            return self.vocabulary.encode(text, AFTER_TEXT)
        ids = self.vocabulary.encode(text)
        return ids if ids[:len(self.front)] == self.front else self.front + ids

    def encode_rendered(self, text: str, start: bool = True) -> list[int]:
        """Ids of text that ChatTemplate rendered: the template's own tokens, to the last BOS, and a
        name that it escaped as the ids of its characters. `start=False` is for text that goes on.
        """
        check_characters(text)
        after = START if start else AFTER_TEXT
        if ESCAPE not in text:
            ids = self.vocabulary.encode(text, after)
            names = self._mark_pattern.findall(text)
            marks = Counter(self.named_ids[name] for name in names)
            found = Counter(token_id for token_id in ids if token_id in self._reserved_ids)
            if found <= marks:
                return ids
            # A message holds what the tokenizer normalizes to a mark, such as one in wide letters.
        return self.vocabulary.finder.encode(text, after, self._encode_escaped)

    def _encode_escaped(self, part: str, after: int) -> list[int]:
        """Ids of text without added tokens, in which names are escaped. The template's own marks
        are in it where sentencepiece itself finds them."""
        ids = []
        for piece in filter(None, self._user_defined_pattern.split(part)):
            if piece in self.user_defined:
                ids += self.vocabulary.encode_part(piece, after)
            else:
                ids += self._encode_without_marks(piece, after)
            after = AFTER_TEXT
        return ids

    def _encode_without_marks(self, text: str, after: int) -> list[int]:
        """Ids of escaped text that holds no mark, though the vocabulary itself may find one in it.
        """
        ids = self.vocabulary.encode_part(unescape(text), after)
        if self._reserved_ids.isdisjoint(ids) or len(text) < 2:
            return ids
        pieces = unescaped_pieces(text)  # cut inside the names
        if len(pieces) == 1:  # or anywhere, where the text only becomes one by being normalized
            pieces = [pieces[0][:len(text) // 2], pieces[0][len(text) // 2:]]
        ids = []
        for piece in filter(None, pieces):
            ids += self._encode_without_marks(piece.replace(ESCAPE, 2 * ESCAPE), after)
            after = AFTER_TEXT
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids that go on from others. The first token keeps its space in front."""
        stream = self.stream()
        return "".join(stream(token_id) for token_id in ids) + stream(None)

    def stream(self) -> ModelStream | JsonStream:
        """A callable that decodes ids one by one and returns the text that each completes.

        It holds half a character back until the rest comes. None ends the stream: the callable then
        returns what is still held back."""
        return self.vocabulary.stream(self.hidden_ids)

    # -------------------------------------------------------------------------- turns

    def system_turn(self, system: str, template_args: dict | None = None) -> list[int]:
        """Ids of what opens a conversation, before the user's turn. A last piece that could merge
        with what follows is left out; it belongs to the next turn."""
        return self._settled_ids(*self.chat_template.system_turn(system, template_args))

    def opening(self, entry: dict, template_args: dict | None = None) -> list[int]:
        """Ids of an entry of a prompts file, {"prompt": raw text} or {"turns": [text, ...]}: of its
        prompt, or of its first turn."""
        if "prompt" in entry:
            return self.encode(entry["prompt"])
        return self.first_turn(entry["turns"][0], template_args=template_args)

    def first_turn(self, user: str, system: str | None = None,
                   template_args: dict | None = None, pinned: bool = False) -> list[int]:
        """Ids of a conversation's first turn, up to where the answer begins. pinned is as in
        conversation."""
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        return self.conversation(turns, template_args, pinned)

    def conversation(self, messages: list[dict], template_args: dict | None = None,
                     pinned: bool = False, ends_with: str = "answer") -> list[int]:
        """Ids of messages, each {"role": ..., "content": text}, up to where an answer begins, or to
        where ends_with says (ChatTemplate.conversation).

        template_args is what else the chat template is given, such as {"enable_thinking": False}.
        Where the first message is a system turn, the ids begin with those of system_turn, so that
        its cache can be shared. Some texts merge farther back than system_turn foresees: then they
        only do so for `pinned`, whose system turn is in the cache already. Raises ValueError for
        what the chat template refuses."""
        opening, rest = self.chat_template.conversation(messages, template_args, ends_with)
        ids = self.encode_rendered(opening + rest)
        if not (pinned and opening):
            return ids
        settled = self.system_turn(messages[0]["content"], template_args)
        if ids[:len(settled)] == settled:
            return ids
        unsettled = self.encode_rendered(opening)[len(settled):]
        return settled + unsettled + self.encode_rendered(rest, start=False)

    def _settled_ids(self, text: str, header: str) -> list[int]:
        """Ids of a text's beginning that are the same whatever follows the text and the header
        behind it: those before the last piece with which a following character can merge."""
        tail = text[-SETTLING:]
        ids = self.encode_rendered(tail, start=False)
        n_same = len(ids)
        for following in FOLLOWING:
            longer = self.encode_rendered(tail + header + following, start=False)
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
        """Ids that only the template's marks may have. What the vocabulary does not know has the id
        of unk_token, too."""
        names = self.chat_template.reserved - {self.special_tokens.get("unk_token")}
        return {self.named_ids[name] for name in names}

    @functools.cached_property
    def _mark_pattern(self) -> re.Pattern:
        return any_of(self.chat_template.reserved)

    @functools.cached_property
    def _user_defined_pattern(self) -> re.Pattern:
        return any_of(self.chat_template.reserved & self.user_defined.keys())

    @functools.cached_property
    def turn_end_ids(self) -> set[int]:
        """The tokens that end an answer of a chat, beside the EOS ids of the checkpoint's config:
        eos_token, what the template puts after an answer, and marks that end nothing else."""
        return self._ids_of({self.eos_token, self.chat_template.turn_end, *TURN_ENDS})

    @functools.cached_property
    def hidden_ids(self) -> set[int]:
        """The tokens that are not shown in an answer: the special ones, and the ends of a turn."""
        names = self.specials.keys() - self.added_words | {*self.special_tokens.values()}
        return self._ids_of(names) | self.turn_end_ids

    def _ids_of(self, names: Iterable[str]) -> set[int]:
        """The ids of the tokens with these names, as far as the vocabulary has them."""
        ids = (self.vocabulary.find(name) for name in names if name)
        return {token_id for token_id in ids if token_id is not None}

    def _encode_after_answer(self, rendered: str, last_id: int | None) -> list[int]:
        ids = self.encode_rendered(rendered, start=False)
        marks = self.hidden_ids | self._reserved_ids
        first = next((n for n, token_id in enumerate(ids) if token_id in marks), len(ids))
        # Some templates put a space before the end-of-turn token.
        if ids[first:first + 1] == [last_id] and not self.decode(ids[:first]).strip():
            return ids[first + 1:]
        return ids


# ------------------------------------------------------------------------------ generated text


class GeneratedText:
    """One answer as it comes: its token ids, and its text up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (),
                 marks: dict[int, str] | None = None):
        """stop are texts that end it. marks are special tokens that are to be shown, by id."""
        self.ids: list[int] = []  # every token added
        self.stopped = False  # a stop text was reached; the text ends before it
        self.decoded_length = 0  # of all text decoded so far, shown or held back
        self._stream, self._stops, self._marks = tokenizer.stream(), stop, marks or {}
        self._shown: list[str] = []  # one piece a token
        self._held = ""  # decoded, and it may become a stop text

    @property
    def text(self) -> str:
        """What may be shown so far; the text that is held back is not in it."""
        return "".join(self._shown)

    def add(self, token_id: int) -> str:
        """Take the next token. Returns the text that can be shown now; none after a stop text."""
        self.ids.append(token_id)
        return self._take(self._marks.get(token_id) or self._stream(token_id))

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


# ------------------------------------------------------------------------------ vocabularies


def open_vocabulary(folder: Path, settings: dict) -> TokenizerJson | TokenizerModel:
    """The vocabulary in a folder: tokenizer.json, as transformers 5 takes it, whatever stands
    beside it (a tokenizer.model may be tiktoken's). Without the library tokenizers, it is the
    tokenizer.model beside it, if that is sentencepiece's."""
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.exists():
        if importlib.util.find_spec("tokenizers") or not model_path.exists():
            return TokenizerJson(folder, settings)
        log.info("%s is not read: for that, pip install tokenizers", json_path)
    if not model_path.exists():
        raise ValueError(f"{folder}: no tokenizer; it needs tokenizer.model or tokenizer.json")
    return TokenizerModel(folder, settings)


def check_characters(text: str) -> None:
    """Raises ValueError for text that holds half a character, which no vocabulary can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a character, {text[error.start]!r}, at "
                         f"{error.start}; whole ones are needed") from None
