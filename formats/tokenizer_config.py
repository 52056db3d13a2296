"""What a checkpoint's folder says of its tokenizer, beside the vocabulary.

Its chat templates are in one of four places (read_templates). The special tokens of a
tokenizer.model are in tokenizer_config.json and added_tokens.json. In every function, settings is
what tokenizer_config.json holds.
"""

from __future__ import annotations

from pathlib import Path

from formats.files import read_json

TEMPLATE_FOLDER = "additional_chat_templates"


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
        raise ValueError(f"{folder / 'tokenizer_config.json'}: no default chat_template in it, nor in "
                         "chat_template.jinja")
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
