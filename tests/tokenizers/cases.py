"""Vocabularies, folders and texts on which libraries are compared. Only the standard library is
needed here, since other environments import this file, too (export.py)."""

import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
TEXTS = ["", "a", "Hello", "Hello there", " Hello", "  two  spaces ", "\u2581Hello", "\n", " \n x",
         "née 日本語 ₿\u200b", "<s>Hello", "<s> Hello", "<s>[INST] Hi [/INST]", "<s> [INST] Hi",
         "Hi</s>so", "Hi </s> so", "é</s></s>x", "x</s", "<unk> <pad>",
         "a<|im_start|>b", " <|im_start|> b", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
         "<x> <x>y <xx>", "A<|im_start|><x> b  <x>  c\n <|im_end|> d", "word<x>word <x> word.<x>,"]


def token(text, **flags):
    """An entry of added_tokens_decoder."""
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True, **flags}


def write_folder(folder, vocabulary, files):
    """A checkpoint's folder with a vocabulary of this folder and JSON files, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name = "tokenizer.json" if vocabulary.endswith(".json") else "tokenizer.model"
    shutil.copy(HERE / vocabulary, folder / name)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------ folders

OWN = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}
ADDED = ("<|im_start|>", "<|im_end|>", "<x>")


def places(size, own=OWN):
    """Where ADDED may stand, beside a vocabulary of this size with these special tokens."""
    decoder = {str(size + i): token(text) for i, text in enumerate(ADDED)}
    decoder[str(size + 2)].update(special=False, normalized=True)
    return {
        "nowhere": {},
        "decoder": {"tokenizer_config": {"added_tokens_decoder": {**own, **decoder}}},
        "file": {"added_tokens": {text: size + i for i, text in enumerate(ADDED)}},
        "map": {"special_tokens_map": {"additional_special_tokens": list(ADDED),
                                       "eos_token": "</s>", "bos_token": "<s>"}},
        "additional": {"tokenizer_config": {"additional_special_tokens": list(ADDED)}},
        "names": {"tokenizer_config": {"eos_token": "</s>", "pad_token": "<pad>"}}}


def with_config(files, **settings):
    """A folder's files with more in tokenizer_config.json."""
    return {**files, "tokenizer_config": {**files.get("tokenizer_config", {}), **settings}}


SLOW_SIZES = {"llama.model": 400, "unigram.model": 320, "spaces.model": 100}


def slow_folders():
    """(vocabulary, place, legacy) -> files of what transformers 4's slow tokenizer reads."""
    return {(vocabulary, place, legacy): with_config(files, **(
                {} if legacy == "absent" else {"legacy": legacy}))
            for vocabulary, size in SLOW_SIZES.items()
            for place, files in places(size).items() for legacy in ("absent", True, False)
            if legacy is not False or vocabulary != "spaces.model"}  # where 5 differs a lot


# ------------------------------------------------------------------------------ GGUF

PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "falcon3", "pixtral", "smaug-bpe",
                  "qwen2", "deepseek-r1-qwen")
SPLIT_TEXTS = ["Don't WE'LL they're", "1234567 x²٣Ⅷ 12 3", "a\n\n\n b\r\n\tc  ", "née 日本語!?",
               "x+=1; y<=2 $3.50 (a)", "\u200b\u00a0. ...", "'s 'S 're"]


def gguf_cases():
    """name -> the keys of a GGUF file's tokenizer that aren't a vocabulary's plain ones."""
    spm = {name: {"model": "llama.model", **keys} for name, keys in {
        "plain": {}, "no space in front": {"add_space_prefix": False},
        "no BOS": {"add_bos_token": False},
        "types": {"types": {"<|im_start|>": 4, "<|im_end|>": 3, "<x>": 2, "": 1, "[PAD]": 5}}
    }.items()}
    return spm | {pre: {"model": "bytes.json", "pre": pre} for pre in PRE_TOKENIZERS}


# ------------------------------------------------------------------------------ Mistral

TURNS = [("user", "Hello there"), ("assistant", "Hi. It sat"), ("user", " the cat\n")]
MARKS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
# What a template renders for TURNS in each version of Mistral's form.
FORMS = {  # by version: the vocabulary, which has the marks from v2 on, and the text
    "v1": ("llama.model",
           "<s> [INST] Hello there [/INST] Hi. It sat</s> [INST]  the cat\n [/INST]"),
    **dict.fromkeys(("v2", "v3", "v7"), ("marks.model", (
        "<s>[INST] Hello there[/INST] Hi. It sat</s>[INST]  the cat\n[/INST]")))}
