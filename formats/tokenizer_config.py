"""What a checkpoint's folder says of its tokenizer, beside the vocabulary.

Its chat templates may stand in four places (read_templates). In every function, settings is what
tokenizer_config.json holds.
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


# Classes of transformers 5 that put spaces as tokenizer_config.json says, whatever the vocabulary's
# file says. For these families it takes another class than the one that is named.
LLAMA_CLASSES, OTHER_FAMILIES = ("LlamaTokenizer", "CodeLlamaTokenizer"), ("mistral", "qwen2")


def llama_class(folder: Path, settings: dict) -> str | None:
    """The one of LLAMA_CLASSES by which transformers 5 reads a folder."""
    config = read_json(folder / "config.json")
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class"))
    name = name.removesuffix("Fast")
    is_other = config.get("model_type") in OTHER_FAMILIES
    return name if name in LLAMA_CLASSES and not is_other else None


def is_legacy(folder: Path, settings: dict) -> bool:
    """Whether a space is put in front of what follows an added token, and not only in front of a
    text. An absent "legacy" means so, except to transformers 5's LlamaTokenizer: files without it
    are older than the setting. transformers 4 made no exception. CodeLlama's class knows no such
    space."""
    name = llama_class(folder, settings)
    return name != "CodeLlamaTokenizer" and bool(settings.get("legacy", not name))
