"""A GGUF file's numbers, text and logits after conversion: against the package gguf's own reading,
transformers, tokenizers and sentencepiece. Every file here is written by gguf.GGUFWriter."""

import json
import random
import sys

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import convert_hf
import quantize
from formats.gguf import convert_gguf
from generate import load
from helpers import TINY, hf_model, run
from layers import Int4Linear, Int8Linear, Linear
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

NASTY = ("Hello,  I'm née e\u0301té 日本語 👩‍👩‍👧 1234567 x²٣Ⅷ   \n\n\t y = 3.14; "
         "don't WE'LL zzq qz\r\n"
         "<|im_start|>user\nhi<|im_end|> <tool> \u200b end  ")
SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             initializer_range=0.15, eos_token_id=None, bos_token_id=1)
CORPUS = ["Hello there, said the cat. It sat on the mat 1234 times, and the others don't."] * 20
SPECIALS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
          "{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ------------------------------------------------------------------------------ making files


def write(path, metadata, tensors):
    """A GGUF file; a tensor is an array, or (bytes, Kind)."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bpe():
    """(tokens, types, merges) of a byte-level BPE with special tokens, an added one, a token that
    no merge leads to, and unused ones up to 512, one of them a word."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIALS, show_show=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    saved = json.loads(tok.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get) + ["<tool>", "Ġzzq"]
    types = [3] * 4 + [1] * (len(tokens) - 6) + [4, 1]
    merges = [" ".join(pair) for pair in saved["merges"]]
    tokens += ["Ġqz"] + [f"[PAD{i}]" for i in range(511 - len(tokens))]
    return tokens, types + [5] * (512 - len(types)), merges


def tokenizer_keys(bpe, pre, **more):
    tokens, types, merges = bpe
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            **{f"tokenizer.{key}": value for key, value in more.items()}}


def interleave(rows, n_heads):
    """q's or k's rows in llama.cpp's order: the two halves of each head interleaved."""
    D = len(rows) // n_heads
    return rows[[h * D + half * D // 2 + i
                 for h in range(n_heads) for i in range(D // 2) for half in (0, 1)]]


def file_of(model, arch, bpe, pre="gpt-2"):
    """(metadata, tensors) of transformers' model."""
    config, name = model.config, {}
    for theirs, ours in [("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"),
                         ("o_proj", "attn_output"), ("q_norm", "attn_q_norm"),
                         ("k_norm", "attn_k_norm")]:
        name["self_attn." + theirs] = ours
    name |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    name |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if arch == "gemma3":
        name |= {"post_attention_layernorm": "post_attention_norm",
                 "pre_feedforward_layernorm": "ffn_norm",
                 "post_feedforward_layernorm": "post_ffw_norm"}
    outside = {"model.embed_tokens.weight": "token_embd.weight",
               "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    tensors = {}
    for hf, tensor in model.state_dict().items():
        rows = tensor.numpy()
        if arch == "gemma3" and hf.endswith("norm.weight"):  # stored plus one
            rows = rows + 1
        if hf in outside:
            if hf != "lm_head.weight" or not config.tie_word_embeddings:
                tensors[outside[hf]] = rows
            continue
        _, _, layer, rest = hf.split(".", 3)
        module, part = rest.rsplit(".", 1)
        if arch == "llama" and module[-6:] in ("q_proj", "k_proj"):
            rows = interleave(rows, config.num_attention_heads if "q_proj" in module
                              else config.num_key_value_heads)
        tensors[f"blk.{layer}.{name[module]}.{part}"] = rows
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {"block_count": config.num_hidden_layers, "context_length": 512,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters.get(
                "full_attention", config.rope_parameters)["rope_theta"]),
            "attention.key_length": head_dim, "attention.value_length": head_dim,
            **({"rope.dimension_count": head_dim} if arch == "llama" else {})}
    return {"general.architecture": arch, "general.name": "small",
            **{f"{arch}.{key}": value for key, value in keys.items()},
            **tokenizer_keys(bpe, pre)}, tensors


def small_model(family, **changes):
    return hf_model(family, **{**SIZES, **changes})


@pytest.fixture
def small(bpe):
    """(metadata, tensors) of a small Llama that can be converted, for tests to change."""
    return file_of(small_model("Llama"), "llama", bpe)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


# ------------------------------------------------------------------------------ logits

LLAMA3 = dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {  # family, its config, architecture and keys of the file
    "llama": ("Llama", {}, "llama", {}),
    "llama-biased-tied": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=32,
                                        tie_word_embeddings=True), "llama", {}),
    "llama3-scaled": ("Llama", dict(rope_parameters=LLAMA3), "llama", {}),
    "linear-scaled": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=10000.0)), "llama",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    "linear-scaled-old": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=10000.0)), "llama",
        {"llama.rope.scale_linear": 4.0}),
    "mistral-windowed": ("Mistral", dict(sliding_window=24), "llama",
                         {"llama.attention.sliding_window": 24}),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True), "qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=128), "qwen3", {}),
    "gemma3": ("Gemma3", dict(head_dim=256, sliding_window=16, num_hidden_layers=6,
                              tie_word_embeddings=True), "gemma3",
               {"gemma3.attention.sliding_window": 16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, bpe, tmp_path):
    """The original model's, and those of the file as transformers reads it, where it does."""
    family, changes, arch, keys = MODELS[name]
    theirs = small_model(family, **changes)
    metadata, tensors = file_of(theirs, arch, bpe)
    if name == "llama3-scaled":  # as divisors of the plain frequencies
        plain = 50000.0 ** -(np.arange(0, 16, 2) / 16)
        tensors["rope_freqs.weight"] = (plain / theirs.model.rotary_emb.inv_freq.numpy()
                                        ).astype(np.float32)
    write(tmp_path / "a.gguf", {**metadata, **keys}, tensors)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    model, _ = load(tmp_path / "out", device="cpu")
    assert model.embed.weight.dtype == torch.float32 and model.config.eos_ids == (1,)
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert 1 < expected.abs().max() < 30
    assert (model(tokens) - expected).abs().max() < 1e-4
    assert model.config.sliding_window == changes.get("sliding_window")
    if name in ("llama", "qwen2", "qwen3", "gemma3"):
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="a.gguf", dtype=torch.float32)
        assert (model(tokens) - read(tokens).logits).abs().max() < 1e-4


def test_what_a_file_suggests_for_sampling_is_kept(bpe, tmp_path):
    """Under the keys that llama.cpp's converter makes of a generation_config.json."""
    metadata, tensors = file_of(small_model("Llama"), "llama", bpe)
    keys = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "penalty_repeat": 1.0}
    write(tmp_path / "a.gguf", {**metadata, **{f"general.sampling.{key}": value
                                               for key, value in keys.items()}}, tensors)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    model, _ = load(tmp_path / "out", device="cpu")
    assert model.suggested == {"temperature": 0.5, "top_k": 20, "top_p": 0.75}


def test_more_tokens_than_rows_are_refused(bpe, tmp_path):
    metadata, tensors = file_of(small_model("Llama"), "llama", bpe)
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = tensors[name][:500]
    write(tmp_path / "a.gguf", metadata, tensors)
    with pytest.raises(ValueError, match="tokenizer.ggml.tokens are 512; .* rows for 500"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_llama_3_1s_own_scaling_is_found_again(bpe, tmp_path):
    """From the divisors that its config.json implies, with and without the original context."""
    scaling = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    theirs = small_model("Llama", head_dim=128, rope_parameters=scaling)
    metadata, tensors = file_of(theirs, "llama", bpe)
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    divisors = (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    for original in ({}, {"llama.rope.scaling.original_context_length": 8192}):
        file = write(tmp_path / "a.gguf", {**metadata, **original},
                     {**tensors, "rope_freqs.weight": divisors})
        convert_gguf(file, tmp_path / f"out{len(original)}")
        raw = json.loads((tmp_path / f"out{len(original)}/config.json").read_text())
        found = {key: round(value, 3) if isinstance(value, float) else value
                 for key, value in raw["rope_parameters"].items()}
        assert found == scaling


# ------------------------------------------------------------------------------ tensor types

MADE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
RANDOM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
          "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS")  # gguf reads these but writes none


def in_type(rows, name):
    """(bytes, Kind): quantized rows, or random bytes without NaN if gguf cannot quantize to it."""
    kind = Kind[name]
    if name in MADE:
        return gguf.quants.quantize(rows, kind), kind
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows.shape[0], rows.shape[1] // block * size)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8) & 0xBF, kind


def read_by_gguf(path):
    """name -> the float32 tensor, with q's and k's rows in Hugging Face's order."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        rows = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if n_heads := {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2]):
            order = interleave(torch.arange(len(rows)), n_heads)
            rows = torch.empty_like(rows).index_copy_(0, order, rows)
        tensors[tensor.name] = rows
    return tensors


def stacked(theirs, layer):
    """Our tensors of a layer, stacked from the file's."""
    at = f"blk.{layer}."
    return {f"layers.{layer}.{ours}.weight": torch.cat([theirs[f"{at}{n}.weight"] for n in names])
            for ours, names in {"attention.qkv": ("attn_q", "attn_k", "attn_v"),
                                "attention.out": ("attn_output",),
                                "feed_forward.down": ("ffn_down",),
                                "feed_forward.gate_up": ("ffn_gate", "ffn_up")}.items()}


def matrices(tensors):
    return [name for name, rows in tensors.items() if rows.ndim == 2]


def test_every_type_is_read_to_the_bit(bpe, tmp_path, monkeypatch):
    """Each matrix of a model has another type and is read a few rows at a time."""
    monkeypatch.setattr("formats.gguf.ROWS", 7)
    metadata, tensors = file_of(small_model("Llama", hidden_size=256, intermediate_size=256,
                                         head_dim=64, num_hidden_layers=4), "llama", bpe)
    for i, name in enumerate(matrices(tensors)):
        tensors[name] = in_type(tensors[name], (MADE + RANDOM)[i % len(MADE + RANDOM)])
    assert len({kind for t in tensors.values() if isinstance(t, tuple) for kind in t[1:]}) == 24
    file = write(tmp_path / "a.gguf", metadata, tensors)
    convert_gguf(file, tmp_path / "out", dtype=torch.float32)
    ours, theirs = weights_of(tmp_path / "out"), read_by_gguf(file)
    assert all(t.isfinite().all() for t in theirs.values())
    for layer in range(4):
        for name, rows in stacked(theirs, layer).items():
            assert torch.equal(ours[name], rows), name
    assert torch.equal(ours["embed.weight"], theirs["token_embd.weight"])
    assert torch.equal(ours["output.weight"], theirs["output.weight"])


@pytest.mark.parametrize("name, dtype", [("F32", torch.float32), ("F16", torch.float16),
                                         ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)])
def test_the_dtype_is_that_of_most_matrices(small, tmp_path, name, dtype):
    metadata, tensors = small
    for matrix in matrices(tensors)[1:]:
        tensors[matrix] = gguf.quants.quantize(tensors[matrix], Kind[name]), Kind[name]
    convert_gguf(write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "out")
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {dtype}
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["dtype"] == str(dtype)[6:]
    assert raw["gpt_stream"] == {"format": 1, "source": f"a.gguf, {name}"}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_file_is_a_checkpoint_s_name_and_is_converted_once(small, tmp_path, monkeypatch,
                                                             quantize):
    metadata, tensors = small
    for name in matrices(tensors):
        tensors[name] = in_type(tensors[name], "Q4_0")
    file = write(tmp_path / "a.gguf", metadata, tensors)
    monkeypatch.setattr("formats.hub.CHECKPOINTS", tmp_path / "checkpoints")
    flags = ["--quantize", quantize] if quantize else []
    said = []
    for _ in range(2):
        status, out, err = run("generate", "--checkpoint", file, "--prompt", "Hello there",
                               "--max-new-tokens", 8, "--temperature", 0, "--json", *flags)
        assert status == 0, err
        said.append((json.loads(out)["token_ids"], "converting" in err))
    assert said[0][0] == said[1][0] and [new for _, new in said] == [True, False]
    model, _ = load(file, device="cpu", quantize=quantize)
    kind = {None: Linear, "int8": Int8Linear, "int4": Int4Linear}[quantize]
    assert type(model.layers[1].feed_forward.down) is kind


def test_q4_0_becomes_int4_without_a_change(small, tmp_path):
    """Matrices in Q4_0 keep the file's numbers, also where k and up have other types."""
    metadata, tensors = small
    for name in matrices(tensors):
        other = {"blk.1.attn_k.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_1"}.get(name, "Q4_0")
        tensors[name] = in_type(tensors[name], other)
    file = write(tmp_path / "a.gguf", metadata, tensors)
    status, _, _ = run("convert_hf", file, tmp_path / "out", "--quantize", "int4")
    assert status == 0
    ours, theirs = weights_of(tmp_path / "out"), read_by_gguf(file)
    for layer in (0, 1):
        for name, rows in stacked(theirs, layer).items():
            stem = name.removesuffix("weight")
            got = quantize.dequantize({p: ours[stem + p] for p in ("weight", "scale", "zero")})
            exact = torch.ones(len(rows), dtype=torch.bool)
            if layer == 1 and "qkv" in name:
                exact[64:96] = False
            elif layer == 1 and "gate_up" in name:
                exact[96:] = False
            assert torch.equal(got[exact], rows[exact]), name
            again = quantize.dequantize(quantize.quantize_int4(rows, 32))
            assert torch.equal(got[~exact], again[~exact]), name
            assert not torch.equal(again, rows)  # quantizing the floats again would not give these
    assert ours["embed.weight"].dtype == torch.int8
    model, _ = load(tmp_path / "out", device="cpu")
    plain, _ = load_plain(file, tmp_path)
    tokens = torch.arange(40)[None]
    difference = (model(tokens) - plain(tokens)).abs().max()
    assert difference < 0.1 * plain(tokens).abs().max()


def load_plain(file, tmp_path):
    convert_gguf(file, tmp_path / "plain")
    return load(tmp_path / "plain", device="cpu")


@pytest.mark.parametrize("quantization", [{"mode": "int8"}, {"mode": "int4", "group_size": 32}])
def test_other_types_are_quantized_as_quantize_does(small, tmp_path, quantization):
    file = write(tmp_path / "a.gguf", *small)
    convert_gguf(file, tmp_path / "ours", quantization=quantization)
    convert_gguf(file, tmp_path / "plain")
    convert_hf.convert(tmp_path / "plain", tmp_path / "theirs", None, quantization)
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and "layers.0.attention.qkv.scale" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------ tokenizers


def published(bpe, pre):
    """The tokenizer that the models' own tokenizer.json describe."""
    tokens, types, merges = bpe
    vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != 5}
    tok = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(m.split()) for m in merges],
                                          ignore_merges=pre == "llama-bpe"))
    digits = {"llama-bpe": "{1,3}", "qwen2": ""}.get(pre)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits is None:
        tok.pre_tokenizer = whole if pre == "gpt-2" else pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + "| ?"
                r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIALS)
    tok.add_tokens(["<tool>"])
    tok.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return tok


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_equal_the_published_tokenizer(small, bpe, tmp_path, pre):
    metadata, tensors = small
    keys = tokenizer_keys(bpe, pre, **{"ggml.add_bos_token": True})
    convert_gguf(write(tmp_path / "a.gguf", {**metadata, **keys}, tensors), tmp_path / "out")
    ours, theirs = Tokenizer(tmp_path / "out"), published(bpe, pre)
    ids = ours.encode(NASTY)
    assert ids == theirs.encode(NASTY).ids
    assert ids[0] == 0 and bpe[0].index("<tool>") in ids
    assert (bpe[0].index("Ġzzq") in ids) == (pre == "llama-bpe")
    assert ours.decode(ids) == theirs.decode(ids) and "<tool>" in ours.decode(ids)
    assert "<|im_start|>" not in ours.decode(ids)


def test_the_default_cuts_are_llama_cpps(small, bpe, tmp_path):
    """Four expressions in turn, by another engine for regular expressions. A file without the key
    has the default."""
    metadata, tensors = small
    del metadata["tokenizer.ggml.pre"]
    convert_gguf(write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "out")
    cuts = [r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+", r"[0-9][0-9][0-9]"]
    text = NASTY.replace("<", "[").replace(">", "]")  # no special tokens
    pieces = [text]
    for cut in cuts:
        pieces = [p for piece in pieces for p in regex.split(f"({cut})", piece) if p]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    got = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)]
    assert got == [whole.pre_tokenize_str(piece)[0][0] for piece in pieces]
    assert [p for p in got if p.isascii() and p.isdigit()][:3] == ["123", "456", "7"]


@pytest.mark.parametrize("pre, key, begins", [
    ("llama-bpe", None, True), ("llama-v3", None, True), ("smollm", None, False),
    ("qwen2", None, False), ("llama-bpe", False, False), ("qwen2", True, True)])
def test_bos_comes_where_the_file_or_its_family_says(small, bpe, tmp_path, pre, key, begins):
    metadata, tensors = small
    keys = tokenizer_keys(bpe, pre, **({} if key is None else {"ggml.add_bos_token": key}))
    convert_gguf(write(tmp_path / "a.gguf", {**metadata, **keys}, tensors), tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert (tokenizer.encode("Hello")[0] == 0) == begins
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")


def test_turns_equal_transformers_reading_the_same_file(bpe, tmp_path):
    metadata, tensors = file_of(small_model("Qwen2"), "qwen2", bpe, "qwen2")
    metadata |= {"tokenizer.chat_template": CHATML, "tokenizer.ggml.eot_token_id": 3,
                 "tokenizer.ggml.padding_token_id": 1}
    convert_gguf(write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(  # older versions do not read this token
        tmp_path, gguf_file="a.gguf", bos_token="<|begin|>")
    model, ours = load(tmp_path / "out", device="cpu")
    said = NASTY.strip()
    for name in ("<|im_start|>", "<|im_end|>"):  # in a message they are only text
        said = said.replace(name, "")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": said}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = ours.first_turn(said, "Be kind.")
    assert ids == ours.encode(text) and text.startswith("<|begin|><|im_start|>system\nBe kind.")
    # Reading a GGUF file, transformers leaves out the added token and Qwen's normalizer (NFC).
    plain = NASTY.replace("<tool>", "tool").replace("e\u0301", "é")
    assert ours.encode(plain) == theirs(plain, add_special_tokens=False)["input_ids"]
    assert model.config.eos_ids == (1, 3)


@pytest.fixture
def spm(small):
    """(metadata, tensors) with the embedded model's sentencepiece tokenizer."""
    metadata, tensors = small
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    n = sp.get_piece_size()
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in range(n)]
    metadata = {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")}
    metadata |= {"tokenizer.ggml.model": "llama",
                 "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)],
                 "tokenizer.ggml.scores": [sp.get_score(i) for i in range(n)],
                 "tokenizer.ggml.token_type": kinds}
    tensors |= {name: np.resize(tensors[name], (n + 3, 64))
                for name in ("token_embd.weight", "output.weight")}
    return metadata, tensors


def test_a_sentencepiece_model_is_written_again(spm, tmp_path):
    convert_gguf(write(tmp_path / "a.gguf", *spm), tmp_path / "out")
    ours, theirs = Tokenizer(tmp_path / "out"), Tokenizer(TINY)
    rng = random.Random(0)
    texts = [NASTY, "", " ", "\n", "a  b", "</s>so<unk>", " lead", "\u2581", "\x00\x7f",
             *("".join(rng.choices("abe 1\n\té日👩.'\u2581", k=40)) for _ in range(50))]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert (ours.bos_id, ours.eos_id, ours.specials) == (1, 2, theirs.specials)


def test_a_file_may_put_no_space_in_front_and_add_tokens_of_its_own(spm, tmp_path):
    metadata, tensors = spm
    metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    for key, values in {"tokens": ["<|im_end|>", "<tool>", "<think>"],
                        "scores": [-1e3, 0.0, -1e3], "token_type": [4, 4, 4]}.items():
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + values
    convert_gguf(write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "out")
    ours, theirs = Tokenizer(tmp_path / "out"), Tokenizer(TINY)
    cat, the = theirs.encode("the cat", bos=False), theirs.encode("the", bos=False)
    assert ours.encode("the cat<|im_end|>the<tool>") == [*cat, 4096, *the, 4097]
    assert [ours.decode([i]) for i in (4096, 4097, 4098)] == ["", "<tool>", "<think>"]


# ------------------------------------------------------------------------------ what is refused


def is_refused(file, tmp_path, *named):
    status, out, err = run("convert_hf", file, tmp_path / "new" / "out")
    assert status == 2 and out == "" and len(err.splitlines()) == 1, err
    assert str(file) in err and all(word in err for word in named), err
    assert not (tmp_path / "new").exists()


KEYS = {  # key -> a value that is refused, and what the error names
    "general.architecture": ("gemma", "gemma", "llama, qwen2, qwen3"),
    "tokenizer.ggml.pre": ("tekken", "tekken", "llama-bpe"),
    "tokenizer.ggml.model": ("bert", "bert", "gpt2"),
    "tokenizer.ggml.merges": (["nothing there"], "merges"),
    "tokenizer.ggml.tokens": ([1, 2, 3], "tokens"),
    "tokenizer.ggml.token_type": ([1, 2], "token_type", "one for each token"),
    "tokenizer.ggml.bos_token_id": (512, "bos_token_id", "512"),
    "split.count": (3, "file 1 of 3", "merge"),
    "llama.rope.scaling.type": ("yarn", "yarn"),
    "llama.rope.dimension_count": (8, "rope.dimension_count is 8", "16"),
    "llama.attention.value_length": (8, "attention.value_length is 8"),
    "llama.attention.head_count_kv": ([2, 1], "head_count_kv is [2, 1]", "positive int"),
    "llama.expert_count": (8, "llama.expert_count is 8"),
    "llama.attention.scale": (0.5, "llama.attention.scale"),
    "llama.context_length": (0, "llama.context_length is 0"),
    "llama.rope.freq_base": ("high", "rope.freq_base"),
    "llama.embedding_length": (32, "token_embd.weight", "(512, 32)"),
    "llama.block_count": (2**31 - 1, "block_count is 2147483647", "no tensors"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_cannot_be_is_named(small, tmp_path, key):
    metadata, tensors = small
    value, *named = KEYS[key]
    is_refused(write(tmp_path / "a.gguf", {**metadata, key: value}, tensors), tmp_path, *named)


TENSORS = {  # name -> its value (None takes it away), and what the error names
    "blk.1.ffn_up.weight": (None, "is missing"), "token_embd.weight": (None, "is missing"),
    "blk.0.attn_k.bias": (np.zeros(32, np.float32), "does not belong"),
    "blk.0.attn_q.bias": (np.zeros(64, np.float32), "blk.0.attn_k.bias is missing"),
    "blk.0.ffn_gate_exps.weight": (np.zeros((2, 64), np.float32), "does not belong"),
    "blk.0.attn_q.weight": (np.zeros((64, 32), np.float32), "(64, 32)", "(64, 64)"),
    "blk.0.attn_v.weight": (np.zeros((32, 64), np.int32), "blk.0.attn_v.weight", "I32"),
    "rope_freqs.weight": (np.linspace(1, 9, 8, dtype=np.float32), "llama3"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_cannot_be_is_named(small, tmp_path, name):
    metadata, tensors = small
    value, *named = TENSORS[name]
    tensors = {n: t for n, t in {**tensors, name: value}.items() if t is not None}
    is_refused(write(tmp_path / "a.gguf", metadata, tensors), tmp_path, *named)


def test_a_type_of_the_future_is_refused(small, tmp_path):
    file = write(tmp_path / "a.gguf", *small)
    field = gguf.GGUFReader(file).tensors[3].field
    data = bytearray(file.read_bytes())
    at = field.offset + sum(part.nbytes for part in field.parts[:4])  # where its type stands
    data[at:at + 4] = (999).to_bytes(4, "little")
    file.write_bytes(data)
    is_refused(file, tmp_path, "999")


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    file = write(tmp_path / "a.gguf", *small)
    whole, start = file.read_bytes(), gguf.GGUFReader(file).data_offset
    for length in (3, 4, 20, 100, start // 2, start - 200, start, start + 1000, len(whole) - 100):
        file.write_bytes(whole[:length])
        is_refused(file, tmp_path, "damaged or not a GGUF file: it is cut off")
    file.write_bytes(b"")
    is_refused(file, tmp_path, "not a GGUF file")


def test_damage_never_ends_in_a_traceback(small, tmp_path):
    """A file with random bytes in its head is converted, or refused in one line."""
    file, rng = write(tmp_path / "a.gguf", *small), random.Random(0)
    whole, start = file.read_bytes(), gguf.GGUFReader(file).data_offset
    sizes = [at for at in range(start) if whole[at:at + 5] in (b"gener", b"llama", b"token")]
    refused = 0
    for i in range(40):
        data = bytearray(whole)
        at = rng.randrange(start) if i % 2 else rng.choice(sizes) - 8 + rng.randrange(60)
        data[max(at, 0)] = rng.randrange(256)
        file.write_bytes(data)
        try:
            convert_gguf(file, tmp_path / f"out{i}")
        except ValueError as error:
            refused += str(file) in str(error) and "\n" not in str(error)
            assert not (tmp_path / f"out{i}").exists()
    assert refused > 5


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(500))
    is_refused(tmp_path / "a.gguf", tmp_path, "not a GGUF file")
    is_refused(tmp_path / "missing.gguf", tmp_path)
    (tmp_path / "folder").mkdir()
    is_refused(tmp_path / "folder", tmp_path)


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_package_that_is_not_installed_is_named(small, tmp_path, monkeypatch, package):
    file = write(tmp_path / "a.gguf", *small)
    monkeypatch.setitem(sys.modules, package, None)
    is_refused(file, tmp_path, f"pip install {package}")
