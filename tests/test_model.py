"""Logits and greedy tokens against transformers, for every architecture and every way that a
config.json says the same thing."""

import json
import shutil

import pytest
import torch
from torch import nn

from convert_hf import convert
from formats.config import config_from_hf, hf_parts, model_layers
from generate import generate, load
from helpers import TINY, hf_model
from kv_cache import KVCache
from quantize import empty_model, stored_shapes

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             initializer_range=0.15, eos_token_id=None, bos_token_id=1, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=30000.0, factor=4.0, original_max_position_embeddings=128,
            beta_fast=20.0, beta_slow=2.0)
MIXED = dict(sliding_window=24, layer_types=[
    "sliding_attention", "full_attention", "sliding_attention"])
SLIDING = dict(rope_type="default", rope_theta=300.0)
GEMMA3 = dict(MIXED, head_dim=24, query_pre_attn_scalar=20, attention_bias=True,
              rope_parameters=dict(sliding_attention=SLIDING, full_attention=dict(
                  rope_type="linear", factor=4.0, rope_theta=50000.0)))
OLMO3 = dict(MIXED, attention_bias=True, rope_parameters=dict(
    sliding_attention=SLIDING, full_attention=YARN))
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.5,
                short_factor=[1.0, 1.5, 2.0, 4.0], long_factor=[9.0] * 4)
MODELS = {
    "llama": ("Llama", {}),
    "llama-multi-head": ("Llama", dict(num_key_value_heads=4)),
    "llama-biased": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=32)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama3-scaled": ("Llama", dict(rope_parameters=LLAMA3)),
    "linear-scaled": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=24)),
    "mistral-windowed": ("Mistral", dict(sliding_window=24)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen2-mixed": ("Qwen2", dict(use_sliding_window=True, max_window_layers=1, sliding_window=24)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama-dynamic": ("Llama", dict(rope_parameters=dict(
        rope_type="dynamic", factor=4.0, rope_theta=10000.0))),
    "gemma3": ("Gemma3", GEMMA3),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True,
                                rope_parameters=YARN)),
    "phi3": ("Phi3", dict(rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75))),
    "phi3-longrope": ("Phi3", dict(original_max_position_embeddings=256,
                               rope_parameters=LONGROPE, tie_word_embeddings=True)),
    "olmo3": ("Olmo3", OLMO3),
}


@pytest.fixture(scope="module", params=MODELS)
def hf(request, tmp_path_factory):
    """(transformers' model, its folder), biases and norms other than their initial values."""
    family, changes = MODELS[request.param]
    model = hf_model(family, **{**SIZES, **changes})
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return model, folder


def our_logits(model, tokens, chunk=16):
    config = model.config
    windowed = config.common_window
    cache = KVCache(config, len(tokens), 0 if windowed else 4, windowed or 200, chunk)
    return torch.cat([model(part, cache) for part in tokens.split(chunk, dim=1)], dim=1)


def test_logits_equal_transformers(hf):
    theirs, folder = hf
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, 512, (2, 90), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert 1 < expected.abs().max() < 30
    assert (our_logits(model, tokens) - expected).abs().max() < 1e-4
    if not model.config.common_window:  # without a cache: how training reads a sequence
        assert (model(tokens) - expected).abs().max() < 1e-4
    last = torch.tensor([5, 2])
    cache = KVCache(model.config, 2, 0, 24, 16)
    picked = model(tokens[:, :9], cache, last)
    assert (picked[:, 0] - expected[torch.arange(2), last]).abs().max() < 1e-4


def test_two_hundred_greedy_tokens_equal_transformers(hf):
    theirs, folder = hf
    model, _ = load(folder, device="cpu")
    prompt = list(range(7, 24))
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False,
                               pad_token_id=0)[0, len(prompt):].tolist()
    windowed = model.config.common_window
    cache = KVCache(model.config, 1, 0 if windowed else 4, windowed or 240)
    assert list(generate(model, cache, prompt, max_new_tokens=200)) == expected


def test_every_way_of_storing_a_checkpoint_gives_the_same_logits(hf, tmp_path):
    theirs, folder = hf
    tokens = torch.arange(40)[None]
    expected = our_logits(load(folder, device="cpu")[0], tokens)
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "ours-again")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(theirs.state_dict(), pickled / "pytorch_model.bin")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    shutil.copy(TINY / "tokenizer.model", tmp_path / "sharded")
    for stored in ("ours", "ours-again", "sharded", "pickled"):
        model, _ = load(tmp_path / stored, device="cpu")
        assert torch.equal(our_logits(model, tokens), expected), stored


# ------------------------------------------------------------------------------ the table of layers

FAMILIES = {
    "llama": ("Llama", {}), "llama-biased": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", dict(head_dim=32)),
    **{name: MODELS[name] for name in ("gemma3", "smollm3", "phi3", "olmo3")},
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def both_models(family, tied):
    """transformers' model of a family, and the config of ours."""
    name, changes = family
    theirs = hf_model(name, **{**SIZES, **changes, "tie_word_embeddings": tied})
    return theirs, config_from_hf(
        {**theirs.config.to_dict(), "architectures": [f"{name}ForCausalLM"]})


@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_layer_and_embedding_has_its_row_in_the_table(family, tied):
    _, config = both_models(family, tied)
    modules = {name: module for name, module in empty_model(config).named_modules()
               if isinstance(module, (nn.Linear, nn.Embedding))}
    table = model_layers(config)
    assert table.keys() == modules.keys() and len(modules) == 2 + 4 * config.n_layers
    for name, module in modules.items():
        row, bias = table[name], getattr(module, "bias", None)
        assert (sum(row.parts.values()), row.columns) == tuple(module.weight.shape), name
        assert row.bias == (bias is not None), name
        assert row.is_table == isinstance(module, nn.Embedding), name
    assert [name for name, row in table.items() if row.tied_to] == (["output"] if tied else [])


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_s_parts_are_exactly_what_transformers_has(family, tied):
    theirs, config = both_models(family, tied)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
                if not (tied and name == "lm_head.weight")}
    parts = [part for each in hf_parts(config).values() for part in each.items()]
    assert dict(parts) == expected and len(parts) == len(expected)
    rows = {name: sum(shape[0] for shape in each.values())
            for name, each in hf_parts(config).items()}
    assert rows == {name: shape[0] for name, shape in stored_shapes(empty_model(config)).items()}


# ------------------------------------------------------------------------------ configuration

OLD = dict(architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96, vocab_size=512,
           num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=512)


def test_older_files_say_rope_at_the_top_level():
    old = config_from_hf({**OLD, "rope_theta": 5e5,
                               "rope_scaling": {"type": "linear", "factor": 2}})
    new = config_from_hf({**OLD, "rope_parameters": {
        "rope_type": "linear", "factor": 2, "rope_theta": 5e5}})
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling["factor"] == 2
    assert old.n_kv_heads == 4 and old.head_dim == 16
    assert config_from_hf({**OLD, "rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize("change, named", [
    (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"), (dict(architectures=[]), "none"),
    (dict(rope_scaling={"rope_type": "longrope", "factor": 4}), "longrope"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 4}), "low_freq_factor"),
    (dict(hidden_act="gelu"), "gelu"), (dict(hidden_size="64"), "hidden_size"),
    (dict(num_hidden_layers=0), "num_hidden_layers"), (dict(num_key_value_heads=3), "3"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(architectures={"a": 1}), "architecture"), (dict(hidden_size=2**40), "hidden_size"),
    (dict(head_dim=True), "head_dim is True"), (dict(rms_norm_eps="x"), "rms_norm_eps is 'x'"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"), (dict(rms_norm_eps=-1), "a number"),
    (dict(rope_theta="10000"), "rope_theta"), (dict(rope_theta=-1.0), "rope_theta"),
    (dict(rope_parameters={"rope_theta": [1]}), "rope_theta"),
    (dict(rope_scaling=[1]), "an object"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "factor is 0"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 4, "low_freq_factor": 4,
                        "high_freq_factor": 4, "original_max_position_embeddings": 512}), "below"),
    (dict(tie_word_embeddings="no"), "true or false"), (dict(attention_bias=2), "attention_bias"),
    (dict(sliding_window=-4), "sliding_window"), (dict(gpt_stream=1), "gpt_stream"),
    (dict(gpt_stream={"quantization": {"layers": 3}}), "layers is 3")])
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        config_from_hf({**OLD, **change})


def test_eos_ids_come_from_both_files(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert load(tmp_path / "model", device="cpu")[0].config.eos_ids == (7, 9, 11)
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": 3}')
    assert load(tmp_path / "model", device="cpu")[0].config.eos_ids == (3, 7, 9)
