"""What a checkpoint's folder says of its tokenizer, beside the vocabulary.

Its chat template is in chat_template.jinja or tokenizer_config.json. The special tokens of a
tokenizer.model are in tokenizer_config.json and added_tokens.json. In every function, settings is
what tokenizer_config.json holds.
"""

from __future__ import annotations

from pathlib import Path

from formats.files import read_json


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


def read_specials(folder: Path, settings: dict) -> tuple[dict[str, int], set[str]]:
    """(text -> id of each token that was added beside a sentencepiece model, the texts of those
    that are words: special is false)."""
    config_tokens = settings.get("added_tokens_decoder") or {}  # id -> {"content": text, ...}
    file_tokens = read_json(folder / "added_tokens.json")  # text -> id
    try:
        pairs = list(file_tokens.items())
        pairs += [(token["content"], token_id) for token_id, token in config_tokens.items()]
        # str.__str__ refuses what isn't a text.
        specials = {str.__str__(text): int(token_id) for text, token_id in pairs}
        if not all(0 <= token_id < 2**31 for token_id in specials.values()):
            raise ValueError
        added_words = {str.__str__(token["content"]) for token in config_tokens.values()
                       if token.get("special") is False}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise ValueError(f"{folder}: its added tokens are not a table of ids and texts") from None
    return specials, added_words


def token_text(settings: dict, key: str, default: str) -> str:
    """The text of bos_token or eos_token, which stands there as it is or as {"content": text}."""
    value = settings.get(key) or default
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str):
        raise ValueError(f"tokenizer_config.json: {key} is {value!r:.80}; it must be a text")
    return value
