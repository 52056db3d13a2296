"""The tokenizer in a GGUF file's metadata, written as files that `tokenizer.py` reads.

Byte-level BPE becomes a tokenizer.json, sentencepiece a tokenizer.model.
"""

from __future__ import annotations

import struct
from pathlib import Path

from formats.files import import_optional, write_json

# The numbers of token types, in GGUF and in sentencepiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# The names of special tokens in tokenizer_config.json, by llama.cpp's names, and sentencepiece's
# defaults of their ids.
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}

# How a text is split before its bytes are merged, by llama.cpp's names. Each expression splits the
# pieces that the one before it left. https://github.com/ggml-org/llama.cpp, llama-vocab
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# Names of one way of splitting. Llama 3's are also for files that put BOS in front, and whose words
# are taken whole where the vocabulary has them.
LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
                "lfm2")
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "kormo")
DIGITS_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
GPT2_NAMES = ("gpt-2", "phi-2", "mpt", "olmo", "trillion", "gigachat", "mellum", "exaone4")
SPLITS = {"default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
          **dict.fromkeys(GPT2_NAMES, (GPT2,)),
          **dict.fromkeys(DIGITS_NAMES, (r"\p{N}", GPT2)),
          **dict.fromkeys((*LLAMA3_NAMES, "smaug-bpe", "dbrx"), (LLAMA3,)),
          **dict.fromkeys(QWEN2_NAMES, (QWEN2,))}
# These are control tokens, as llama.cpp has it, whatever type a file gives them.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # sentencepiece's pieces for single bytes


def write_tokenizer(folder: Path, metadata: dict) -> None:
    """Write the tokenizer's files from the metadata. Raises ValueError naming what is not
    supported: a key, or a token by its number and text."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer.ggml.model {model!r} is not supported; known: llama, gpt2")
    tokens = read_list(metadata, "tokens", str)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # llama.cpp's name for it
    types = read_types(metadata, tokens)
    ids = special_ids(metadata, SPM_IDS if model == "llama" else {}, len(tokens))
    add_bos = model == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_NAMES
    add_bos = "bos" in ids and bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    settings = {"add_bos_token": add_bos, "chat_template": chat_templates(metadata),
                **{NAMES[name]: tokens[token_id] for name, token_id in ids.items()}}
    if model == "gpt2":
        bos = ids["bos"] if add_bos else None
        write_bpe(folder / "tokenizer.json", metadata, tokens, types, bos)
    else:
        # llama.cpp finds these tokens before all others, and puts a space in front of what follows
        # one. Files do not say which are special, like <|im_start|>, and which text, like <think>.
        settings["legacy"] = True
        settings["added_tokens_decoder"] = {
            i: {"content": token, "special": token.startswith("<|"), "normalized": False}
            for i, token in enumerate(tokens) if types[i] == USER_DEFINED}
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(metadata, tokens, types, ids))
    write_json(folder / "tokenizer_config.json", settings)


def chat_templates(metadata: dict) -> list[dict[str, str]] | None:
    """The chat templates as tokenizer_config.json has them: the default one, and those with names.
    """
    key = "tokenizer.chat_template"
    named = {name.removeprefix(key + "."): text for name, text in metadata.items()
             if name.startswith(key + ".") and isinstance(text, str)}
    if metadata.get(key):
        named["default"] = metadata[key]
    return [{"name": name, "template": text} for name, text in named.items()] or None


def read_types(metadata: dict, tokens: list[str]) -> list[int]:
    """Each token's type. Raises ValueError naming a token that is there twice (llama.cpp refuses
    it, too), or whose type nobody knows."""
    types = read_list(metadata, "token_type", int, [NORMAL] * len(tokens))
    numbers: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if numbers.setdefault(token, i) != i:
            raise ValueError(f"token {i} of tokenizer.ggml.tokens is {token!r}, as token "
                             f"{numbers[token]} is; each must be another")
        if not 0 <= kind <= BYTE:
            raise ValueError(f"token {i} of tokenizer.ggml.tokens, {token!r}, is of the type "
                             f"{kind} in tokenizer.ggml.token_type; known: 1 to 6")
    return [CONTROL if token in ENDS else kind or NORMAL for token, kind in zip(tokens, types)]


def special_ids(metadata: dict, default: dict[str, int], n_tokens: int) -> dict[str, int]:
    """The ids of "bos", "eos", "unknown" and "padding", as far as there are any. Raises ValueError
    naming one that is out of range."""
    ids = {}
    for name in NAMES:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata.get(key, default.get(name))
        if token_id is None:
            continue
        if token_id not in range(n_tokens):
            raise ValueError(f"{key} is {token_id}; there are {n_tokens} tokens")
        ids[name] = token_id
    return ids


def read_list(metadata: dict, name: str, kind: type, default: list | None = None) -> list:
    """A list of the metadata with a value for each token. Raises ValueError naming the key."""
    values, tokens = (metadata.get(f"tokenizer.ggml.{n}", default) for n in (name, "tokens"))
    if not isinstance(values, list) or not values or len(values) != len(tokens) or not all(
            isinstance(value, (kind, int) if kind is float else kind) for value in values):
        raise ValueError(f"tokenizer.ggml.{name} is {str(values)[:40]}; it must be a list of "
                         f"{kind.__name__}, one for each token")
    return values


def write_bpe(path: Path, metadata: dict, tokens: list[str], types: list[int],
              bos: int | None) -> None:
    """Write byte-level BPE as the tokenizer.json of the package `tokenizers`. bos is the id that it
    puts first, if any. Raises ValueError naming what is not supported."""
    tokenizers = import_optional("tokenizers", "its tokenizer")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    if (pre := metadata.get("tokenizer.ggml.pre", "default")) not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported; known: {', '.join(SPLITS)}")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(pair, str) for pair in merges):
        raise ValueError(f"tokenizer.ggml.merges is {merges!r:.40}; it must be a list of texts")
    try:
        bpe = tokenizers.Tokenizer(
            models.BPE(vocabulary, [tuple(pair.split(" ", 1)) for pair in merges],
                       ignore_merges=pre in LLAMA3_NAMES))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None
    if pre in QWEN2_NAMES:
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in SPLITS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    if bos is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])
    bpe.add_tokens([tokenizers.AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                    for token, kind in zip(tokens, types)
                    if kind in (CONTROL, USER_DEFINED, UNKNOWN)])
    path.write_text(bpe.to_str(pretty=True), encoding="utf-8")


def sentencepiece_model(metadata: dict, tokens: list[str], types: list[int],
                        ids: dict[str, int]) -> bytes:
    """A tokenizer.model as sentencepiece reads it, a protocol buffer. Its fields' numbers are those
    of https://github.com/google/sentencepiece, src/sentencepiece_model.proto."""
    scores = map(float, read_list(metadata, "scores", float))
    types = sentencepiece_types(tokens, types, ids)
    pieces = b"".join(field(1, field(1, token.encode()) + field(2, score) + field(3, kind))
                      for token, score, kind in zip(tokens, scores, types))
    trainer = field(3, 2) + field(35, BYTE in types)  # BPE, with bytes for text without a token
    for at, name in enumerate(("unknown", "bos", "eos")):
        trainer += field(40 + at, ids[name]) + field(45 + at, tokens[ids[name]].encode())
    space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = field(1, b"identity") + field(3, space_prefix) + field(4, False)  # keep all spaces
    return pieces + field(2, trainer) + field(3, normalizer)


def sentencepiece_types(tokens: list[str], types: list[int], ids: dict[str, int]) -> list[int]:
    """The types that sentencepiece accepts: one token is UNKNOWN, and all bytes are BYTE or none.
    Raises ValueError naming a token that can't be so."""
    # Any other UNKNOWN is to llama.cpp as a control token. Bytes are known by their texts.
    types = [BYTE if token in BYTES else CONTROL if kind == UNKNOWN else kind
             for token, kind in zip(tokens, types)]
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind == BYTE and token not in BYTES:
            raise ValueError(f"token {i} of tokenizer.ggml.tokens, {token!r}, is of the type 6, a "
                             "byte; its text must be <0x00> to <0xFF>")
    if BYTE in types and (missing := BYTES - set(tokens)):
        raise ValueError(f"tokenizer.ggml.tokens has the byte {tokens[types.index(BYTE)]} but not "
                         f"{min(missing)}")
    # BOS and EOS are never text.
    for name, kind in (("bos", CONTROL), ("eos", CONTROL), ("unknown", UNKNOWN)):
        types[ids[name]] = kind
    return types


def field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protocol buffer: bytes with their length, a 32-bit float, or an integer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def varint(n: int) -> bytes:
    """An integer as a protocol buffer's varint: seven bits a byte, the lowest first, and the high
    bit set in all bytes but the last."""
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])
