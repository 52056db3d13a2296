"""What a checkpoint's folder says of its tokenizer, beside the vocabulary.

Its chat templates may stand in four places (read_templates). Tokens that were added to the
vocabulary stand in several files, of which each may name tokens that the others don't:
tokenizer.json, tokenizer_config.json, added_tokens.json and special_tokens_map.json. In every
function, settings is what tokenizer_config.json holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from formats.files import read_json

TEMPLATE_FOLDER = "additional_chat_templates"
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


def read_templates(folder: Path, settings: dict) -> dict[str, str]:
    """The chat templates' sources by name, of which one is "default"; empty where the checkpoint
    has none.

    They may stand in several files. For each name the latest form counts: chat_template.jinja and
    additional_chat_templates/, then tokenizer_config.json, then chat_template.json. Raises
    ValueError naming the file that holds no usable template."""
    path = folder / "chat_template.json"
    templates = named_templates(path, read_json(path).get("chat_template"))
    path = folder / "tokenizer_config.json"
    templates.update(named_templates(path, settings.get("chat_template")))
    files = {file.stem: file for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (path := folder / "chat_template.jinja").exists():
        files["default"] = path
    for name, file in files.items():
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except ValueError:
            raise ValueError(f"{file}: not UTF-8 text") from None
    if templates and "default" not in templates:
        path = folder / "tokenizer_config.json"
        raise ValueError(f"{path}: no default chat_template in it, nor in chat_template.jinja")
    return templates


def named_templates(path: Path, value: str | list | dict | None) -> dict[str, str]:
    """The chat templates in a JSON file, by name: one, or several that each have a name."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    templates = value if isinstance(value, dict) else {"default": value} if value else {}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise ValueError(f"{path}: chat_template is {value!r:.80}; it must be a text, or a list of "
                         '{"name": text, "template": text}')
    return templates


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
