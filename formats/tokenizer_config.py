"""What a checkpoint says of its tokenizer beside the vocabulary: its chat template and its special
tokens, in tokenizer_config.json (settings), chat_template.jinja and added_tokens.json."""

from __future__ import annotations

from pathlib import Path

from formats.files import read_json


def read_template(folder: Path, settings: dict) -> str | None:
    """A checkpoint's chat template, if it has one. Raises ValueError naming the file."""
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except ValueError:
            raise ValueError(f"{folder / 'chat_template.jinja'}: not UTF-8 text") from None
    template = settings.get("chat_template")
    if not template:
        return None
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
