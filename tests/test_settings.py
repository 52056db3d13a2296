"""A setting that stands in two places: the one that transformers 5 obeys counts, or it is refused
by name. Tables of combinations, each against transformers reading the same folder."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_hf import convert
from formats.config import config_from_hf
from generate import generate, load, make_cache
from helpers import TINY, hf_model, run
from model import rope_amplitude, rope_frequencies
from sample import Sampling
from test_errors import refused

SIZES = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
             initializer_range=0.2)
TOKENS = torch.randint(3, 4096, (1, 40), generator=torch.Generator().manual_seed(0))


def each(**choices):
    """Every combination of some keys' values; ... is a key that is missing."""
    for values in itertools.product(*choices.values()):
        yield {key: value for key, value in zip(choices, values) if value is not ...}


def hf_logits(folder):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(TOKENS).logits.float(), model.dtype


def our_logits(folder):
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS, make_cache(model))


def assert_same(folder, tmp_path):
    """Our logits are transformers', from the folder and once it is converted."""
    expected = hf_logits(folder)[0]
    assert (our_logits(folder) - expected).abs().max() < 1e-4 * expected.abs().max()
    convert(folder, tmp_path / "converted")
    assert torch.equal(our_logits(tmp_path / "converted"), our_logits(folder))
    return expected


# ------------------------------------------------------------------------------ config.json

LLAMA3 = dict(rope_type="llama3", factor=4, low_freq_factor=1, high_freq_factor=4)


def test_rotary_positions_whichever_keys_they_are_written_under():
    """longrope slips past its refusal under no key."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    yarn = dict(rope_type="yarn", factor=2, original_max_position_embeddings=64)
    taken = set()
    for raw in each(
            rope_scaling=(..., None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 2},
                          {"rope_type": "linear", "type": "default", "factor": 4,
                           "rope_theta": 7e4},
                          LLAMA3, {**LLAMA3, "original_max_position_embeddings": 64}, {"factor": 8},
                          {"rope_type": "linear", "type": None, "factor": 5},
                          {**yarn, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 4.5},
                          {"rope_type": "dynamic", "factor": 2},
                          {"type": "longrope", "short_factor": [1.0] * 8}),
            rope_parameters=(..., None, {"rope_type": "default", "rope_theta": 5e5},
                             {"rope_type": "linear", "factor": 3},
                             {**LLAMA3, "original_max_position_embeddings": 128},
                             {**yarn, "factor": 8, "attention_factor": 1.7, "beta_slow": 2},
                             {"type": "longrope", "rope_type": "default"},
                             {"full_attention": {"rope_type": "linear", "factor": 2}}),
            rope_theta=(..., 3e4), original_max_position_embeddings=(..., 256)):
        named = json.dumps(raw)
        model = {"architectures": ["LlamaForCausalLM"], **SIZES, **raw}
        if any(odd in named for odd in ("longrope", "full_attention")):
            with pytest.raises(ValueError, match="longrope|full_attention"):
                config_from_hf(model)
            continue
        theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps({**SIZES, **raw}))))
        config = config_from_hf(model)
        ours = rope_frequencies(config)
        assert torch.allclose(ours.float(), theirs.inv_freq, rtol=1e-6, atol=0), named
        assert abs(rope_amplitude(config, "full") - theirs.attention_scaling) < 1e-6, named
        taken.add(tuple(theirs.inv_freq.tolist()))
    assert len(taken) > 15


FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_windows_that_follow_from_others_or_are_missing(family):
    import transformers
    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 256, "num_hidden_layers": 2}
    sizes.pop("num_key_value_heads")
    choices = dict(num_key_value_heads=(..., None, 4), head_dim=(..., 24),
                   sliding_window=(..., None, 64), tie_word_embeddings=(..., True))
    if family == "Mistral":
        choices["num_key_value_heads"] = (..., 4)  # it has no null
    if family.startswith("Qwen"):
        choices |= dict(use_sliding_window=(..., False, True), max_window_layers=(..., 0, 1),
                        layer_types=(..., None, ["full_attention"] * 2,
                                     ["full_attention", "sliding_attention"]))
    else:  # which transformers does not look at
        choices |= dict(use_sliding_window=(..., True), max_window_layers=(..., 0),
                        layer_types=(..., ["sliding_attention"] * 2), mlp_bias=(..., True))
    for raw in each(**choices):
        theirs = getattr(transformers, family + "Config")(**{**sizes, **raw})
        model = {"architectures": [family + "ForCausalLM"], **sizes, **raw}
        kinds = theirs.layer_types if family.startswith("Qwen") else [
            "sliding_attention" if family == "Mistral" else "full_attention"]
        slides = "sliding_attention" in kinds
        if slides and theirs.sliding_window is None and family != "Mistral":
            with pytest.raises(ValueError, match="layer_types"):  # there it fails in the model
                config_from_hf(model)
            continue
        ours = config_from_hf(model)
        assert ours.n_kv_heads == theirs.num_key_value_heads, raw
        assert ours.head_dim == getattr(theirs, "head_dim", 8), raw
        assert ours.sliding_window == (theirs.sliding_window if slides else None), raw
        mixed = len(set(kinds)) > 1
        assert ours.kinds == tuple(k.removesuffix("_attention") for k in kinds if mixed), raw
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        assert ours.ffn_bias == getattr(theirs, "mlp_bias", False) * (family == "Llama")


LATER = {  # what their config.json may lack or say twice
    "Gemma3": dict(
        layer_types=(..., None, ["full_attention", "sliding_attention"] * 3,
                     ["sliding_attention"] * 6, ["full_attention"] * 6),
        sliding_window_pattern=(..., 2), rope_local_base_freq=(..., 5e3), rope_theta=(..., 3e4),
        rope_scaling=(..., None, {"rope_type": "linear", "factor": 8.0}),
        rope_parameters=(..., {"full_attention": {"rope_type": "linear", "factor": 2.0,
                                                  "rope_theta": 7e4},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 9e3}})),
    "Olmo3": dict(
        layer_types=(..., ["sliding_attention"] * 6, ["full_attention"] * 6),
        sliding_window=(..., 64), rope_theta=(..., 3e4), num_key_value_heads=(..., 1),
        rope_scaling=(..., {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2,
                            "original_max_position_embeddings": 64})),
    "SmolLM3": dict(no_rope_layers=(..., None, [1] * 6, [0, 1] * 3), rope_theta=(..., 3e4),
                    no_rope_layer_interval=(..., 3), num_key_value_heads=(..., None, 1)),
    "Phi3": dict(
        rope_theta=(..., 3e4), partial_rotary_factor=(..., 0.5), sliding_window=(..., None, 64),
        num_key_value_heads=(..., 1), original_max_position_embeddings=(..., 128),
        rope_scaling=(..., None, {"type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0],
                                  "long_factor": [9.0] * 4}))}


def kind_of_theirs(config, i):
    """Of a layer of transformers' config."""
    if not getattr(config, "no_rope_layers", [1] * 6)[i]:
        return "unrotated"
    types = getattr(config, "layer_types", None) or ["full_attention"] * 6
    return types[i].removesuffix("_attention")


@pytest.mark.parametrize("family", LATER)
def test_what_later_families_lack_is_what_transformers_takes(family):
    import transformers
    config_of = {"Gemma3": transformers.Gemma3TextConfig}.get(
        family) or getattr(transformers, family + "Config")
    model_of = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Model")
    sizes = {**SIZES, "num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64}
    rotary_of = type(model_of(config_of(**{**sizes, "pad_token_id": None})).rotary_emb)
    sizes.pop("num_key_value_heads")
    for raw in each(**LATER[family]):
        if family == "Phi3" and bool(raw.get("rope_scaling")) != (
                raw.get("partial_rotary_factor") == 0.5):
            continue  # four factors are for half a head
        theirs = config_of(**json.loads(json.dumps({**sizes, "pad_token_id": None, **raw})))
        ours = config_from_hf({"architectures": [family + "ForCausalLM"], **sizes, **raw})
        kinds = [kind_of_theirs(theirs, i) for i in range(6)]
        mixed = len(set(kinds)) > 1 or "unrotated" in kinds
        assert ours.kinds == (tuple(kinds) if mixed else ()), raw
        slides = "sliding" in kinds or family == "Phi3"
        assert ours.sliding_window == (theirs.sliding_window if slides else None), raw
        assert (ours.n_kv_heads, ours.norm_eps, ours.tied_embeddings) == (
            theirs.num_key_value_heads, theirs.rms_norm_eps, theirs.tie_word_embeddings), raw
        rotary = rotary_of(theirs)
        for kind in set(kinds) - {"unrotated"}:
            prefix = "" if hasattr(rotary, "inv_freq") else f"{kind}_attention_"
            found = rope_frequencies(ours, kind=kind if mixed else "full").float()
            assert torch.allclose(found, getattr(rotary, prefix + "inv_freq"), rtol=2e-6), raw
            assert abs(rope_amplitude(ours, kind)
                       - getattr(rotary, prefix + "attention_scaling")) < 1e-6, raw
        if "short_factor" in json.dumps(raw):  # where its long factors begin
            assert ours.max_seq_len == min(512, theirs.original_max_position_embeddings)


def test_a_released_config_says_only_what_differs():
    """That of Gemma 3 4B, in the text_config of a model that sees pictures, too."""
    from transformers import Gemma3TextConfig
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text",
                num_hidden_layers=34, rope_scaling={"factor": 8.0, "rope_type": "linear"},
                sliding_window=1024)
    ours = config_from_hf({"architectures": ["Gemma3ForConditionalGeneration"],
                           "model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    theirs = Gemma3TextConfig(**text)
    assert (ours.dim, ours.n_layers, ours.n_heads, ours.n_kv_heads, ours.head_dim, ours.ffn_dim,
            ours.vocab_size, ours.max_seq_len) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads, theirs.head_dim, theirs.intermediate_size, theirs.vocab_size,
        theirs.max_position_embeddings)
    assert ours.kinds == tuple(kind.removesuffix("_attention") for kind in theirs.layer_types)
    assert ours.eos_ids == (1, 106) and ours.tied_embeddings


@pytest.mark.parametrize("family, change, named", [
    ("Gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
    ("Gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
    ("Gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention True"),
    ("Gemma3", dict(hidden_activation="gelu"), "hidden_activation 'gelu' .*gelu_pytorch_tanh"),
    ("Gemma3", dict(query_pre_attn_scalar=None), "query_pre_attn_scalar is None"),
    ("SmolLM3", dict(no_rope_layer_interval=None), "no_rope_layer_interval is None"),
    ("Gemma3", dict(sliding_window=None), "sliding_window says that no layer slides"),
    ("Gemma3", dict(layer_types=["full_attention"]), "layer_types must be"),
    ("Gemma3", dict(rope_parameters={"rope_theta": 1e4}), "rope_parameters has 'rope_theta'"),
    ("Gemma3", dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2}}),
     "'linear' of sliding_attention"),
    ("Olmo3", dict(rope_scaling={"rope_type": "longrope"}), "rope type 'longrope'"),
    ("Olmo3", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ("SmolLM3", dict(no_rope_layers=[1, 1]), "no_rope_layers must be 1.* each of 6"),
    ("SmolLM3", dict(no_rope_layers=[2] * 6), "no_rope_layers must be 1"),
    ("SmolLM3", dict(use_sliding_window=True, sliding_window=64), "use_sliding_window"),
    ("Phi3", dict(rope_scaling={"rope_type": "llama3"}), "'llama3' .*default, longrope, su"),
    ("Phi3", dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 3}), "8 positive"),
    ("Phi3", dict(rope_scaling={"type": "longrope"}), "short_factor is None"),
    ("Phi3", dict(partial_rotary_factor=0.2), "rotates 3 of a head's 16"),
    ("Phi3", dict(partial_rotary_factor=1.5), "partial_rotary_factor is 1.5"),
    ("Llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2, "truncate": False}), "truncate"),
    ("Llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2}, rope_theta=1.0),
     "rope_theta is 1.0")])
def test_what_later_families_may_have_and_nothing_computes_is_named(family, change, named):
    raw = {"architectures": [family + "ForCausalLM"], **SIZES, "num_hidden_layers": 6}
    assert config_from_hf(raw).n_layers == 6
    with pytest.raises(ValueError, match=named):
        config_from_hf({**raw, **change})


@pytest.mark.parametrize("change, named", [
    (dict(model_type="mistral"), "model_type 'mistral' is not that of LlamaForCausalLM"),
    (dict(text_config={"hidden_size": 64}, hidden_size=None), "hidden_size is None"),
    (dict(layer_types=["full_attention"], architectures=["Qwen2ForCausalLM"],
          num_hidden_layers=2, model_type="qwen2"), "layer_types"),
    (dict(layer_types=["chunked_attention"], architectures=["Qwen3ForCausalLM"],
          model_type="qwen3"), "layer_types"),
    (dict(partial_rotary_factor=1.0, rope_scaling={"rope_type": "linear", "factor": 2,
                                                   "partial_rotary_factor": 0.5}), "partial")])
def test_what_disagrees_is_refused_by_name(change, named):
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
    config_from_hf(raw)
    with pytest.raises(ValueError, match=named):
        config_from_hf({**raw, **change})


# ------------------------------------------------------------------------------ tensors and files


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers', with a tokenizer."""
    folder = tmp_path / "model"
    hf_model("Llama", **SIZES).save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("tied, held, ending", [
    *itertools.product([True, False], ["both, equal", "both", "embedding", "output"],
                       ["safetensors"]),
    (True, "both, equal", "bin"), (True, "both", "bin"), (True, "output", "bin")])
def test_a_tied_output_beside_a_table_of_its_own(folder, tmp_path, tied, held, ending):
    """transformers fills what an untied model lacks with random numbers; here it is missing."""
    edit(folder, tie_word_embeddings=tied)
    weights = load_file(folder / "model.safetensors")
    if held == "both, equal":
        weights[HEAD] = weights[EMBED].clone()
    elif held != "both":
        weights.pop(HEAD if held == "embedding" else EMBED)
    if ending == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if not tied and "both" not in held:
        with pytest.raises(ValueError, match=f"tensor {HEAD if held == 'embedding' else EMBED}"):
            load(folder, device="cpu")
        return
    assert_same(folder, tmp_path)
    raw = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert raw["tie_word_embeddings"] == (tied and held != "both")


def test_tables_that_share_memory_in_a_bin_file_are_converted(folder, tmp_path):
    """As a tied model was saved, beside a config that does not say so."""
    edit(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights[EMBED]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same(folder, tmp_path)


def other(weights):
    return {name: weight * 1.5 for name, weight in weights.items()}


def write_shards(folder, shards, weight_map):
    for name, weights in shards.items():
        save_file(weights, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("case", [
    "index beside one file", "stale index", "bin beside", "two shards",
    "index that names another shard", "index without a tensor"])
def test_weights_that_lie_in_two_places(folder, tmp_path, case):
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weights = load_file(one)
    names = sorted(weights)
    plain = assert_same(folder, tmp_path)
    shutil.rmtree(tmp_path / "converted")
    if case == "index beside one file":
        named = dict.fromkeys(names, "a.safetensors")
        write_shards(folder, {"a.safetensors": other(weights)}, named)
    elif case == "stale index":  # of a model that was saved here before
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": "gone.safetensors"}}))
    elif case == "bin beside":
        torch.save(other(weights), folder / "pytorch_model.bin")
    else:
        one.unlink()
        named = dict.fromkeys(names, "a.safetensors")
        shards = {"a.safetensors": weights, "b.safetensors": other({EMBED: weights[EMBED]})}
        if case == "index without a tensor":
            named = {names[0]: "a.safetensors", names[1]: "b.safetensors"}
        elif case == "index that names another shard":
            named = {**dict.fromkeys(names, "b.safetensors"), EMBED: "a.safetensors"}
            shards = {"a.safetensors": {EMBED: weights[EMBED]}, "b.safetensors": other(weights)}
        else:
            named["x"] = "b.safetensors"
        write_shards(folder, shards, named)
    found = assert_same(folder, tmp_path)
    assert torch.equal(found, plain) == (case in ("index beside one file", "stale index",
                                                  "bin beside"))


def test_the_dtype_that_the_config_names_is_computed_in(folder):
    """dtype counts more than torch_dtype, its older name, and both more than the weights'."""
    for raw in each(dtype=(..., None, "bfloat16"), torch_dtype=(..., None, "float16", "float32")):
        edit(folder, **{"dtype": ..., "torch_dtype": ..., **raw})
        model, _ = load(folder, device="cpu")
        assert model.norm.weight.dtype == hf_logits(folder)[1], raw


def test_two_ways_in_which_weights_are_said_to_be_stored(folder, tmp_path):
    convert(folder, tmp_path / "ours")
    edit(tmp_path / "ours", quantization_config={"quant_method": "gptq", "bits": 4})
    refused("generate", "--checkpoint", tmp_path / "ours",
            naming=[tmp_path / "ours", "gpt_stream and quantization_config"])
    edit(folder, quantization_config=None)  # null is as if it were missing
    (folder / "quantize_config.json").write_text('{"bits": 3, "group_size": 128}')
    refused("generate", "--checkpoint", folder, naming=["gptq with 3 bits"])
    edit(folder, quantization_config={"quant_method": "bitsandbytes"})
    refused("generate", "--checkpoint", folder, naming=["bitsandbytes"])


# ------------------------------------------------------------------------------ generation_config


@pytest.fixture
def suggesting(tmp_path):
    """The embedded checkpoint with a generation_config.json."""
    folder = shutil.copytree(TINY, tmp_path / "suggesting")

    def write(**settings):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder

    return write


def said(program, folder, *flags, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["Tell me of the cat.", "And the dog?"]}\n')
    given = ["--prompt", "The cat"] if program == "generate" else ["--prompts", prompts]
    status, out, err = run(program, "--checkpoint", folder, "--json", "--seed", 3, "--dtype",
                           "fp32", "--max-new-tokens", 12, *given, *flags)
    assert status == 0, err
    told = [line for line in err.splitlines() if "generation_config.json" in line]
    return [json.loads(line)["token_ids"] for line in out.splitlines()], told


@pytest.mark.parametrize("program", ["generate", "chat", "batch"])
def test_what_a_model_suggests_is_each_program_s_default(program, suggesting, tmp_path):
    settings = dict(temperature=1.4, top_k=30, top_p=0.7, min_p=0.01, repetition_penalty=1.2)
    folder, flags = suggesting(do_sample=True, **settings), []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", value]
    expected, nothing = said(program, TINY, *flags, tmp_path=tmp_path)
    found, [told] = said(program, folder, tmp_path=tmp_path)
    assert found == expected and nothing == []
    assert all(word in told for word in ("temperature 1.4", "top k 30", "top p 0.7", "min p 0.01",
                                         "repetition penalty 1.2"))


def test_a_flag_counts_more_than_what_a_model_suggests(suggesting, tmp_path):
    folder = suggesting(temperature=1.4, top_k=30, top_p=0.7, min_p=0.01, repetition_penalty=1.2)
    flags = ["--temperature", 0.7, "--top-k", 9, "--repetition-penalty", 1]
    found, [told] = said("generate", folder, *flags, tmp_path=tmp_path)
    expected, _ = said("generate", TINY, *flags, "--top-p", 0.7, "--min-p", 0.01,
                       tmp_path=tmp_path)
    assert found == expected and told.endswith("says: top p 0.7, min p 0.01")
    greedy, nothing = said("generate", folder, "--temperature", 0, "--repetition-penalty", 1,
                           tmp_path=tmp_path)
    assert nothing == []
    folder = suggesting(do_sample=False, temperature=0.9, top_p=0.5)  # as in transformers
    found, [told] = said("generate", folder, tmp_path=tmp_path)
    assert found == greedy and told.endswith("says: temperature 0")
    plain, nothing = said("generate", suggesting(eos_token_id=2), tmp_path=tmp_path)
    assert nothing == [] and plain == said("generate", TINY, tmp_path=tmp_path)[0] != greedy


def test_speculation_goes_without_a_suggested_penalty(suggesting, tmp_path):
    folder = suggesting(temperature=0.7, repetition_penalty=1.3)
    _, [told] = said("generate", folder, "--lookup", tmp_path=tmp_path)
    assert told.endswith("says: temperature 0.7")


def test_calls_from_python_are_greedy_unless_they_ask_for_what_is_suggested(suggesting, tmp_path):
    folder = suggesting(temperature=1.2, top_k=50)
    convert(folder, tmp_path / "converted")
    for place in (folder, tmp_path / "converted"):
        model, _ = load(place, device="cpu", dtype=torch.float32)
        assert model.suggested == {"temperature": 1.2, "top_k": 50}
    plain, _ = load(TINY, device="cpu", dtype=torch.float32)
    assert plain.suggested == {} and plain.fingerprint == model.fingerprint
    ids = [list(generate(one, make_cache(one), [300, 301], 20, **settings))
            for one, settings in ((model, {}), (plain, {}), (model, {**model.suggested, "seed": 1}),
                                  (plain, dict(temperature=1.2, top_k=50, seed=1)))]
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize("settings, named", [
    (dict(temperature=-1), "temperature is -1"), (dict(top_p=1.5), "top_p is 1.5"),
    (dict(top_k=0.5), "top_k is 0.5"), (dict(temperature="hot"), "temperature is 'hot'"),
    (dict(do_sample=1), "do_sample is 1"), (dict(repetition_penalty=0), "repetition_penalty is 0")])
def test_a_suggestion_that_cannot_be_is_named(suggesting, settings, named):
    folder = suggesting(**settings)
    refused("generate", "--checkpoint", folder, naming=[folder / "generation_config.json", named])


def test_a_server_s_requests_count_more_than_what_its_model_suggests():
    pytest.importorskip("pydantic")
    from server.protocol import parse_request
    suggested = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}

    def asked(suggested=suggested, **fields):
        body = {"model": "m", "prompt": "a", **fields}
        return parse_request(json.dumps(body).encode(), False, "m", 9, suggested).sampling

    assert asked() == Sampling(0.6, 20, 0.9)
    assert asked(temperature=1.0, top_k=None) == Sampling(1.0, 20, 0.9)
    assert asked(top_k=-1, top_p=1, presence_penalty=0.5) == Sampling(0.6, presence_penalty=0.5)
    assert asked({}) == Sampling(1.0) and asked({"temperature": 0.0}) == Sampling()


def test_a_server_draws_as_its_model_suggests(suggesting):
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from server.app import Settings, make_app
    from server.engine import Engine
    model, tokenizer = load(suggesting(do_sample=False), device="cpu", dtype=torch.float32)
    engine = Engine(model, tokenizer, 1, window=60).start()
    client = TestClient(make_app(engine, Settings("m")), base_url="http://localhost")

    def said(**fields):
        body = {"model": "m", "prompt": [300, 301], "max_tokens": 20, **fields}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    try:
        greedy = tokenizer.decode(list(generate(model, make_cache(model, 4, 60), [300, 301], 20)))
        assert said() == said(temperature=None) == said(temperature=0) == greedy
        assert said(temperature=1.5, seed=1) != greedy
    finally:
        engine.stop()
        assert engine.ended.wait(20)
