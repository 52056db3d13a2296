"""Text to token ids and back, and the turns of a conversation.

A checkpoint's `tokenizer.model` is read by sentencepiece; one that only ships a `tokenizer.json`
(Llama 3, Qwen) needs the optional package `tokenizers`. Its chat template runs in jinja2's sandbox.

A conversation is never rendered twice: `first_turn` renders its opening, and `next_turn` only what
the template puts between an answer and the next one. The cache holds the rest. What stands in a
message is text: a special token's name, typed by a user, becomes its characters.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from formats.files import read_json

# The form that Vicuna was trained on, for checkpoints without a template.
VICUNA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
# sentencepiece puts a space before a text; inside a conversation that is one too many, and the only
# switch is in the model's file. Protocol buffers merge what is appended: field 3 (normalizer_spec)
# with its field 3 (add_dummy_prefix) false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
USER_MARK, ANSWER_MARK = "\ue000user\ue001", "\ue000answer\ue001"  # private-use: no one types them
BREAK = "\ue002"  # after the first character of a special token's name that is only text


class Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises ValueError naming the folder or the file."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        self.template = read_template(folder, settings)
        # Text -> id of every special token, and of words that were added to the vocabulary
        self.specials, self.ordinary = read_specials(folder, settings)  # and which are such words
        self.sentencepiece = self.tokenizers = None
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
        self.eos_id = None

    # -------------------------------------------------------------------------- text and ids

    def encode(self, text: str, bos: bool = True, rendered: bool = False) -> list[int]:
        """Ids of a text, BOS first where the checkpoint uses one. A special token written out in
        the text becomes that token, as in transformers; if it was `rendered`, not in messages.
        `bos=False` is for text that goes on."""
        ids, opening = [], bos
        if self.tokenizers and not (rendered and BREAK in text):
            ids = ids_of(self.tokenizers, text)
        else:
            for part in self.special_pattern.split(text):
                if part in self.specials:
                    ids.append(self.specials[part])
                    opening = self.tokenizers or self.spaced or ids[-1] == self.bos_id
                elif part:
                    ids += self._encode_part(part, opening, rendered)
                    opening = False
        if self.bos_id is None:
            return ids
        return [self.bos_id] * bos + [i for i in ids if i != self.bos_id]  # BOS comes once

    def _encode_part(self, part: str, opening: bool, rendered: bool) -> list[int]:
        """Ids of text between special tokens."""
        if self.tokenizers:
            def encode(text: str) -> list[int]:
                return ids_of(self._verbatim, text)
        else:
            encode = (self.sentencepiece if opening else self.inner).encode
        if not rendered or BREAK not in part:
            return encode(part)
        ids, reserved = encode(whole(part)), {self.specials[text] for text in self._reserved}
        if reserved.isdisjoint(ids):
            return ids
        # A vocabulary may hold the name as a word: cut inside of it.
        first, *others = re.split(f"(?<!{BREAK}){BREAK}(?!{BREAK})", part)
        encode_on = encode if self.tokenizers else self.inner.encode
        return encode(whole(first)) + [i for other in others for i in encode_on(whole(other))]

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

    def stream(self):
        """A function that takes one id after the other and returns the text that each completes,
        never half a character; None ends the stream and returns what was still held back."""
        return self._stream_tokenizers() if self.tokenizers else self._stream_sentencepiece()

    def _stream_sentencepiece(self):
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        words = {self.specials[word]: word.encode(errors="replace") for word in self.ordinary}
        special_ids, sp = set(self.specials.values()), self.sentencepiece

        def add(token_id: int | None) -> str:
            if token_id is None:
                return utf8.decode(b"", final=True)
            if token_id in words and token_id not in (self.bos_id, self.eos_id):
                return utf8.decode(words[token_id])
            if token_id in special_ids or token_id >= sp.get_piece_size():
                return ""
            piece = sp.id_to_piece(token_id)
            if sp.is_byte(token_id):  # "<0x0A>"
                return utf8.decode(bytes([int(piece[3:-1], 16)]))
            return utf8.decode(piece.replace("\u2581", " ").encode())

        return add

    def _stream_tokenizers(self):
        from tokenizers.decoders import DecodeStream
        # Something must come before, or the first token would lose the space in front of it.
        before = ids_of(self.tokenizers, "a")

        def fresh():
            return DecodeStream(ids=before, skip_special_tokens=True)

        stream, held = fresh(), []

        def add(token_id: int | None) -> str:
            nonlocal stream
            if token_id is None:
                return self.tokenizers.decode(held)
            held.append(token_id)
            try:
                text = stream.step(self.tokenizers, token_id)
            except Exception:  # bytes that can never become a character: show them, begin anew
                text, stream = self.tokenizers.decode(held), fresh()
            if text:
                held.clear()
            return text or ""

        return add

    # -------------------------------------------------------------------------- conversations

    def system_turn(self, system: str) -> list[int]:
        """Ids that the template opens a conversation with, before the user's turn."""
        return self.encode(self._opening(system), rendered=True)

    def _opening(self, system: str) -> str:
        turns = [{"role": "system", "content": system.strip()}]  # as many templates do
        system = self._as_text(system.strip())
        opening, mark, _ = self._render(turns + [{"role": "user", "content": USER_MARK}]).partition(
            USER_MARK)
        if not mark or system not in opening:
            raise ValueError("the chat template does not render a system turn")
        try:
            alone = self._render(turns, add_generation_prompt=False)
        except ValueError:  # some templates insist on a user's turn: then its header is pinned too
            return opening
        return alone if system in alone and opening.startswith(alone) else opening

    def opening(self, entry: dict) -> list[int]:
        """Ids of a prompts file's entry: raw text, or the first of its turns in the template."""
        return self.encode(entry["prompt"]) if "prompt" in entry else self.first_turn(
            entry["turns"][0])

    def first_turn(self, user: str, system: str | None = None) -> list[int]:
        """Ids of a conversation's beginning, up to where the answer begins."""
        turns = [{"role": "system", "content": system}] if system else []
        return self.conversation(turns + [{"role": "user", "content": user}])

    def conversation(self, messages: list[dict]) -> list[int]:
        """Ids of messages, each {"role": ..., "content": text}, up to where an answer begins.

        If the first is a system turn, they start with those of system_turn, whatever follows.
        Raises ValueError for what the chat template refuses."""
        opening = ""
        if messages[0]["role"] == "system" and messages[0]["content"].strip():
            system = messages[0]["content"].strip()
            messages = [{"role": "system", "content": system}, *messages[1:]]
            opening = self._opening(system)
        text = self._render(messages)
        if not opening or not text.startswith(opening):
            return self.encode(text, rendered=True)
        return (self.encode(opening, rendered=True)
                + self.encode(text.removeprefix(opening), bos=False, rendered=True))

    def next_turn(self, user: str, last_id: int | None = None) -> list[int]:
        """Ids from the end of an answer to where the next one begins. last_id is the answer's last
        token: an end-of-turn token that the model said itself is not said twice."""
        return self.turns_after([{"role": "user", "content": USER_MARK},
                                 {"role": "assistant", "content": ANSWER_MARK},
                                 {"role": "user", "content": user}], 1, last_id)

    def turns_after(self, messages: list[dict], answer: int,
                    last_id: int | None = None) -> list[int]:
        """Ids of what follows the answer messages[answer], up to where the next one begins."""
        messages = [*messages]
        messages[answer] = {"role": "assistant", "content": ANSWER_MARK}
        _, mark, rest = self._render(messages).partition(ANSWER_MARK)
        if not mark or ANSWER_MARK in rest:
            raise ValueError("the chat template does not render the assistant's turns")
        ids = self.encode(rest, bos=False, rendered=True)
        if last_id in ids and not self.decode(ids[:ids.index(last_id)]).strip():
            ids = ids[ids.index(last_id) + 1:]  # some templates put a space before it
        return ids

    @functools.cached_property
    def _reserved(self) -> set[str]:
        """What no message can say: special tokens, and words that the template marks turns with.
        (Others, as a model's <think>, are said in answers, which come back as messages.)"""
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        try:
            marks = set(self.special_pattern.findall(self._fill(turns)))
        except ValueError:
            marks = set()
        return set(self.specials) - self.ordinary | marks

    @functools.cached_property
    def _names(self) -> re.Pattern:
        return any_of(self._reserved)

    def _as_text(self, content: str) -> str:
        """A message's content for the template: names of special tokens are broken up, which
        `whole` undoes."""
        content = content.replace(BREAK, 2 * BREAK)
        while (broken := self._names.sub(lambda name: name[0][0] + BREAK + name[0][1:],
                                         content)) != content:
            content = broken
        return content

    def _render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The template's text, for `encode(..., rendered=True)`."""
        return self._fill([{**turn, "content": self._as_text(turn["content"])}
                           for turn in messages], add_generation_prompt)

    def _fill(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token)
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise ValueError(f"the chat template cannot render this: {error}") from None

    @functools.cached_property
    def _template(self):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        return environment.from_string(self.template)


def any_of(texts) -> re.Pattern:
    """Finds any of these texts, the longest first; in a group, as re.split keeps it."""
    longest_first = sorted(map(re.escape, filter(None, texts)), key=len, reverse=True)
    return re.compile("(" + ("|".join(longest_first) or "(?!)") + ")")


def whole(text: str) -> str:
    """Text that Tokenizer._as_text broke up, as it was."""
    return re.sub(f"{BREAK}({BREAK}?)", r"\1", text)


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


def strftime_now(form: str) -> str:
    from datetime import datetime
    return datetime.now().strftime(form)


def read_template(folder: Path, settings: dict) -> str:
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except ValueError:
            raise ValueError(f"{folder / 'chat_template.jinja'}: not UTF-8 text") from None
    template = settings.get("chat_template") or VICUNA_TEMPLATE
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: no default chat_template in it")
    return template


def read_specials(folder: Path, settings: dict) -> tuple[dict[str, int], set[str]]:
    """Tokens that were added beside a sentencepiece model, by their text, and which of them are
    words like others (special: false)."""
    added = settings.get("added_tokens_decoder") or {}
    simple = read_json(folder / "added_tokens.json")
    try:
        specials = {str.__str__(text): int(token_id) for text, token_id in [
            *simple.items(), *((token["content"], token_id) for token_id, token in added.items())]}
        if specials and not 0 <= min(specials.values()) <= max(specials.values()) < 2**31:
            raise ValueError
        return specials, {str.__str__(token["content"]) for token in added.values()
                          if token.get("special") is False}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise ValueError(f"{folder}: its added tokens are not a table of ids and texts") from None


def token_text(settings: dict, key: str, default: str) -> str:
    value = settings.get(key) or default
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise ValueError(f"tokenizer_config.json: {key} is {value!r:.80}; it must be a text")
    return value
