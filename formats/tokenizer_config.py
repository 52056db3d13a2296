"""What a checkpoint's folder says of its tokenizer, beside the vocabulary.

Its chat template is in chat_template.jinja or tokenizer_config.json. Tokens that were added to the
vocabulary stand in several files, of which each may name tokens that the others don't:
tokenizer.json, tokenizer_config.json, added_tokens.json and special_tokens_map.json. In every
function, settings is what tokenizer_config.json holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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


def read_template(folder: Path, settings: dict) -> str | None:
    """A chat template's source, None where the checkpoint has none.

    Raises ValueError naming the file that holds no usable template."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError:
            raise ValueError(f"{path}: not UTF-8 text") from None
    template = settings.get("chat_template")
    if not template:
        return None
    if isinstance(template, list):  # several templates, each with a name
        named = [entry for entry in template if isinstance(entry, dict)]
        default = [entry for entry in named if entry.get("name") == "default"]
        template = default[0].get("template") if default else None
    if not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: no default chat_template in it")
    return template


# ------------------------------------------------------------------------------ special tokens


def read_special_tokens(folder: Path, settings: dict) -> dict[str, AddedToken | None]:
    """The special tokens that have a name, such as bos_token or a model's own image_token. None is
    a name that the files say has no token.

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
            if name in NAMES or name.endswith("_token") and isinstance(value, (str, dict)):
                named[name] = None if value is None else as_token(value, name, source)
            elif name == "extra_special_tokens" and isinstance(value, dict):
                named.update({own: as_token(token, own, source) for own, token in value.items()})
    return named


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


def read_added_tokens(folder: Path, settings: dict) -> list[AddedToken]:
    """All tokens that the files beside the vocabulary add to it, by text the first that names it:
    those with an id in the order of their ids, then those that are only named."""
    named = [token for token in read_special_tokens(folder, settings).values() if token]
    named += read_extra_tokens(folder, settings)
    special = {token.text for token in named}
    decoder = settings.get("added_tokens_decoder") or {}  # id -> {"content": text, ...}
    older = read_json(folder / "added_tokens.json")  # text -> id
    try:
        tokens = [AddedToken(str.__str__(token["content"]), int(token_id),
                             bool(token.get("special", False)) or token["content"] in special,
                             **flags(token)) for token_id, token in decoder.items()]
        tokens += [AddedToken(str.__str__(text), int(token_id), text in special,
                              normalized=text not in special) for text, token_id in older.items()]
        if not all(0 <= token.id < 2**31 for token in tokens):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise ValueError(f"{folder}: its added tokens are not a table of ids and texts") from None
    added = {}
    for token in [*sorted(tokens, key=lambda token: token.id), *named]:
        added.setdefault(token.text, token)
    return [token for text, token in added.items() if text]
