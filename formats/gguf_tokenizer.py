"""The tokenizer in a GGUF file's metadata, written as files that `tokenizer.py` reads.

Byte-level BPE becomes a tokenizer.json, sentencepiece a tokenizer.model.
"""

from __future__ import annotations

import struct
from pathlib import Path

from formats.files import import_optional, write_json

# The numbers of token types, in GGUF and in sentencepiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # sentencepiece's defaults

# How a text is split before its bytes are merged, by llama.cpp's names. Each expression splits the
# pieces that the one before it left. https://github.com/ggml-org/llama.cpp, llama-vocab
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
SPLITS = {"default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
          "gpt-2": (GPT2,), "smollm": (r"\p{N}", GPT2), "llama-bpe": (LLAMA3,),
          "llama-v3": (LLAMA3,), "llama3": (LLAMA3,), "qwen2": (QWEN2,)}


def write_tokenizer(folder: Path, metadata: dict) -> None:
    """Write the tokenizer's files from the metadata. Raises ValueError naming what is not
    supported."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer.ggml.model {model!r} is not supported; known: llama, gpt2")
    tokens = read_list(metadata, "tokens", str)
    types = read_list(metadata, "token_type", int, [NORMAL] * len(tokens))
    ids = special_ids(metadata, SPM_IDS if model == "llama" else {}, len(tokens))
    add_bos = model == "llama" or SPLITS.get(metadata.get("tokenizer.ggml.pre")) == (LLAMA3,)
    add_bos = "bos" in ids and bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    settings = {"add_bos_token": add_bos, "chat_template": metadata.get("tokenizer.chat_template"),
                **{f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids}}
    if model == "gpt2":
        bos = ids["bos"] if add_bos else None
        write_bpe(folder / "tokenizer.json", metadata, tokens, types, bos)
    else:
        scores = read_list(metadata, "scores", float)
        # The converter gives this score to tokens that were added to the sentencepiece model. Files
        # do not say which of them are special, like <|im_end|>, and which are text, like <think>.
        settings["added_tokens_decoder"] = {
            i: {"content": token, "special": token.startswith("<|")}
            for i, token in enumerate(tokens) if types[i] == USER_DEFINED and scores[i] <= -1000}
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(
            tokens, scores, types, ids, metadata.get("tokenizer.ggml.add_space_prefix", True)))
    write_json(folder / "tokenizer_config.json", settings)


def special_ids(metadata: dict, default: dict[str, int], n_tokens: int) -> dict[str, int]:
    """The ids of "bos", "eos" and "unknown", as far as there are any. Raises ValueError naming one
    that is out of range."""
    ids = {}
    for name in SPM_IDS:
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
            isinstance(value, kind) for value in values):
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
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.get("tokenizer.ggml.merges", [])]
    try:
        bpe = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, ignore_merges=SPLITS[pre] == (LLAMA3,)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in SPLITS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    if bos is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])
    bpe.add_tokens([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
                    for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)])
    path.write_text(bpe.to_str(pretty=True), encoding="utf-8")


def sentencepiece_model(tokens: list[str], scores: list[float], types: list[int],
                        ids: dict[str, int], space_prefix: bool) -> bytes:
    """A tokenizer.model as sentencepiece reads it, a protocol buffer. Its fields' numbers are those
    of https://github.com/google/sentencepiece, src/sentencepiece_model.proto."""
    types = list(types)
    # sentencepiece requires these types. They also keep BOS and EOS from ever being text.
    for name, kind in (("bos", CONTROL), ("eos", CONTROL), ("unknown", UNKNOWN)):
        types[ids[name]] = kind
    pieces = b"".join(field(1, field(1, token.encode()) + field(2, score) + field(3, kind))
                      for token, score, kind in zip(tokens, scores, types))
    trainer = field(3, 2) + field(35, BYTE in types)  # BPE, with bytes for text without a token
    for at, name in enumerate(("unknown", "bos", "eos")):
        trainer += field(40 + at, ids[name]) + field(45 + at, tokens[ids[name]].encode())
    normalizer = field(1, b"identity") + field(3, space_prefix) + field(4, False)  # keep all spaces
    return pieces + field(2, trainer) + field(3, normalizer)


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
