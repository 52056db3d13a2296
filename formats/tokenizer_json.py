"""A checkpoint's tokenizer.json, as the optional library tokenizers reads it, and the tokens that
other files add.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path

from formats.added_tokens import (
    AFTER_TEXT,
    AFTER_TOKEN,
    START,
    AddedToken,
    Finder,
    read_added_tokens,
    read_special_tokens,
)
from formats.files import import_optional
from formats.tokenizer_config import is_legacy, llama_class

# The special tokens of transformers' classes for Llamas, where no file says others.
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class TokenizerJson:
    """A vocabulary of the library tokenizers.

    added has the added tokens by text, and front the ids that a text gets in front. Raises
    ValueError naming a file that cannot be read."""

    user_defined: dict[str, int] = {}  # only sentencepiece has these

    def __init__(self, folder: Path, settings: dict):
        path = folder / "tokenizer.json"
        tokenizers = import_optional("tokenizers", path)
        content = path.read_bytes()
        try:
            self.library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        # These belong to training, and a file keeps those of its last use.
        self.library.no_truncation()
        self.library.no_padding()
        if getattr(self.library.model, "dropout", None):
            self.library.model.dropout = None
        llama = llama_class(folder, settings) if b'"ByteLevel"' not in content else None
        if llama:
            self.take_llama_spaces(is_legacy(folder, settings), settings.get("add_prefix_space"))
        self.add_tokens(read_added_tokens(folder, settings, self.own_added_tokens()))
        self.added = {token.text: token for token in self.own_added_tokens()}
        self.front = front_of(self.library.post_processor)
        self.named = {name: text for name, text in LLAMA_NAMES.items()
                      if llama and text in self.added}
        if self.front:
            self.named["bos_token"] = self.library.id_to_token(self.front[0])
        for name, token in read_special_tokens(folder, settings).items():
            self.named[name] = token.text if token else None

    def take_llama_spaces(self, legacy: bool, prefix: bool | None) -> None:
        """Put spaces in front as transformers 5's LlamaTokenizer does, and 4's slow one: as
        tokenizer_config.json says it, whatever tokenizer.json says."""
        from tokenizers import decoders, models, pre_tokenizers
        if not isinstance(self.library.model, models.BPE):
            return
        scheme = "never" if prefix is False else "always" if legacy else "first"
        self.library.normalizer = None
        self.library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix is not False:
            steps.append(decoders.Strip(" ", 1, 0))
        self.library.decoder = decoders.Sequence(steps)

    def own_added_tokens(self) -> list[AddedToken]:
        return [AddedToken(token.content, token_id, token.special, token.single_word,
                           token.lstrip, token.rstrip, token.normalized)
                for token_id, token in self.library.get_added_tokens_decoder().items()]

    def add_tokens(self, tokens: list[AddedToken]) -> None:
        """Add tokens to the library's. One that the vocabulary lacks gets the next free id."""
        from tokenizers import AddedToken as LibraryToken
        self.library.add_tokens([
            LibraryToken(token.text, special=token.special, single_word=token.single_word,
                         lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized)
            for token in tokens])

    def find(self, text: str) -> int | None:
        """The id of a token with this text, added or of the vocabulary."""
        return self.library.token_to_id(text)

    def encode(self, text: str, after: int = START) -> list[int]:
        """Ids of a text, in which added tokens are found."""
        if after == START or self.prefix_free:
            try:
                return self.library.encode(text, add_special_tokens=False).ids
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of the library's is no Exception
                raise cannot_encode(text, error) from None
        return self.finder.encode(text, after, self.encode_part)

    def encode_part(self, part: str, after: int) -> list[int]:
        """Ids of text in which no added token is looked for."""
        normalizer, pre_tokenizer = self.steps[after]
        text = normalizer.normalize_str(part) if normalizer else part
        words = [text]
        if pre_tokenizer:
            words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        try:
            return [token.id for word in words for token in self.library.model.tokenize(word)]
        except Exception as error:
            raise cannot_encode(part, error) from None

    @functools.cached_property
    def finder(self) -> Finder:
        return Finder(self.added.values())

    @functools.cached_property
    def steps(self) -> list[tuple]:
        """The library's normalizer and pre-tokenizer at the start of a text, after an added token,
        and for text that goes on."""
        both = (self.library.normalizer, self.library.pre_tokenizer)
        return [both, *(tuple(going_on(step, after) for step in both)
                        for after in (AFTER_TOKEN, AFTER_TEXT))]

    @functools.cached_property
    def prefix_free(self) -> bool:
        """Whether no space is ever put in front, so that all places of a text are alike."""
        return all(str(here) == str(there)
                   for here, there in zip(self.steps[START], self.steps[AFTER_TEXT]))

    def stream(self, hidden_ids: set[int]) -> JsonStream:
        return JsonStream(self.library, hidden_ids)


def front_of(post_processor) -> list[int]:
    """The ids that a post-processor puts in front of a text, such as BOS."""
    from tokenizers import PreTokenizedString, Token
    if post_processor is None:
        return []
    text = PreTokenizedString("a")
    text.tokenize(lambda part: [Token(0, "a", (0, 1))])
    done = post_processor.process(text.to_encoding())
    marked = zip(done.ids, done.special_tokens_mask)  # 1 for what is put, 0 for the text
    return [token_id for token_id, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def going_on(step, after: int):
    """A normalizer or pre-tokenizer as it treats text that isn't a text's start; None for none."""
    state = prefix_off(json.loads(step.__getstate__()), after) if step else None
    if state is None:
        return None
    step = copy.deepcopy(step)
    step.__setstate__(json.dumps(state).encode())
    return step


def prefix_off(state: dict, after: int) -> dict | None:
    """A step's state without what puts a space in front. After an added token there is one, but
    for Metaspace's "first"."""
    kind = state["type"]
    for steps in ("normalizers", "pretokenizers"):
        if steps in state:
            parts = [prefix_off(part, after) for part in state[steps]]
            return {**state, steps: [part for part in parts if part]}
    if kind == "Metaspace" and (after != AFTER_TOKEN or state.get("prepend_scheme") == "first"):
        return {**state, "prepend_scheme": "never"}
    if after == AFTER_TOKEN:
        return state
    if kind == "ByteLevel" and "add_prefix_space" in state:
        return {**state, "add_prefix_space": False}
    return None if kind == "Prepend" else state


def cannot_encode(text: str, error: Exception) -> ValueError:
    """Of a vocabulary that lacks its own unknown token, for example."""
    return ValueError(f"tokenizer.json cannot encode {text[:40]!r}: {error}")


class JsonStream:
    """Decodes ids one by one, of which hidden_ids stand for no text. See Tokenizer.stream."""

    def __init__(self, library, hidden_ids: set[int]):
        self.library, self.hidden_ids = library, hidden_ids
        # The library strips the space in front of a stream's first token. These ids come before it.
        self.ids_before = library.encode("a", add_special_tokens=False).ids
        self.held_ids: list[int] = []  # they have not completed any text yet
        self.decode_stream = self.new_decode_stream()

    def new_decode_stream(self):
        from tokenizers.decoders import DecodeStream
        return DecodeStream(ids=self.ids_before, skip_special_tokens=True)

    def __call__(self, token_id: int | None) -> str:
        if token_id is None:
            return self.library.decode(self.held_ids)
        if token_id in self.hidden_ids:
            return ""
        self.held_ids.append(token_id)
        try:
            text = self.decode_stream.step(self.library, token_id)
        except Exception:
            # These bytes can't become a character any more. Show them as they are and start again.
            text = self.library.decode(self.held_ids)
            self.decode_stream = self.new_decode_stream()
        if text:
            self.held_ids.clear()
        return text or ""
