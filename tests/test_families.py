"""Families that mix kinds of layers, or have other ones: Gemma 3, SmolLM3, Phi-3 and OLMo 3.

Logits and greedy tokens against transformers are in test_model.py, what their config.json says in
test_settings.py, GGUF files in test_gguf.py. Here the streams, and everything that works on one."""

import copy
import json
import shutil
import subprocess

import pytest
import torch
import torch._inductor.graph
from safetensors.torch import load_file, save_file

import gptq
import tp
import tp_worker
from batch import Batch, generate_batch
from convert_hf import convert
from eval import measure
from formats.config import config_from_hf
from formats.session import load_session, save_session
from generate import generate, load, make_cache
from gptq import gptq_checkpoint
from helpers import ONE_THREAD, TINY, TORCHRUN, as_on_a_gpu, hf_model, random_model
from kv_cache import KVCache
from load import compile_model
from oracle import Stream
from quantize import asked_quantization, dequantize
from server.prefix_cache import copy_from_row, copy_to_row
from speculate import Speculation
from test_kv_cache import MIXED, largest_difference, tokens_of
from test_model import MODELS, SIZES
from test_published import EXPORTED, SCHEMES, check_logits, compress, dequantized, edit
from test_published import SIZES as PUBLISHED

FAMILIES = ("gemma3", "smollm3", "phi3-longrope", "olmo3")
SINKS, WINDOW, CHUNK = 2, 30, 16  # wider than the sliding windows of 24


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(transformers' model, its folder)"""
    name, changes = MODELS[request.param]
    theirs = hf_model(name, **{**SIZES, **changes})
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return theirs, folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The same of Gemma 3, with sizes that fit int4."""
    name, changes = MODELS["gemma3"]
    theirs = hf_model(name, **{**SIZES, **changes, "intermediate_size": 128, "head_dim": 32})
    folder = tmp_path_factory.mktemp("gemma")
    theirs.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return theirs, folder


def rotary_of(theirs):
    """The frequencies of each kind of layers in transformers' model, and its amplitude."""
    rotary = theirs.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return {"full": (rotary.inv_freq, rotary.attention_scaling)}
    return {kind: [getattr(rotary, f"{kind}_attention_{what}")
                   for what in ("inv_freq", "attention_scaling")] for kind in ("full", "sliding")}


def test_the_stream_equals_the_paper_over_three_wraps(family):
    theirs, folder = family
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    tokens = tokens_of(SINKS + 3 * (WINDOW + CHUNK))
    oracle = Stream(model, SINKS, WINDOW, rotary_of(theirs))
    expected = [oracle.feed(t) for t in tokens[0]]
    cache = KVCache(model.config, 1, SINKS, WINDOW, CHUNK)
    parts = tokens.split([16, 1, 7, 1, 16, 5, *[16] * 5, *[1] * (tokens.shape[1] - 126)], dim=1)
    with torch.no_grad():
        logits = torch.cat([model(part, cache)[0] for part in parts])
    assert logits.abs().max() > 1
    assert largest_difference(logits, expected) < 1e-4


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_it_says_what_its_dequantized_weights_say(family, mode, tmp_path):
    _, folder = family
    convert(folder, tmp_path / "q", torch.float32, asked_quantization(mode, 32))
    stored = load_file(tmp_path / "q" / "model.safetensors")
    plain, _ = load(folder, device="cpu", dtype=torch.float32)
    for name in [name for name in stored if name.endswith(".scale")]:
        layer = name.removesuffix(".scale")
        parts = {part: stored[f"{layer}.{part}"] for part in ("weight", "scale", "zero")
                 if f"{layer}.{part}" in stored}
        plain.get_submodule(layer).weight = torch.nn.Parameter(dequantize(parts), False)
    if plain.config.tied_embeddings:
        plain.output.weight = plain.embed.weight
    for quantized in (load(tmp_path / "q", device="cpu", dtype=torch.float32)[0],
                      load(folder, device="cpu", dtype=torch.float32, quantize=mode)[0]):
        with torch.no_grad():
            ours, expected = (m(tokens_of(16), make_cache(m, SINKS, WINDOW))
                              for m in (quantized, plain))
        assert (ours - expected).abs().max() < 2e-2 * expected.abs().max()


def test_a_batch_says_what_each_prompt_says_alone(family, monkeypatch):
    _, folder = family
    monkeypatch.setattr("generate.LARGE_CHUNK", 16)
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    prompts = [tokens_of(n, seed=n)[0].tolist() for n in (3, 60, 17)]
    alone = [list(generate(model, make_cache(model, SINKS, WINDOW), prompt, 40, stop_ids=()))
             for prompt in prompts]
    batch, said = Batch(model, 2, SINKS, WINDOW), {}
    for stream, token_id in generate_batch(model, prompts, max_new_tokens=40, stop_ids=(),
                                           batch=batch):
        if token_id is not None:
            said.setdefault(stream.index, []).append(token_id)
    assert [said[i] for i in range(3)] == alone


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    names = ["gemma3", "smollm3", "phi3-longrope"]
    for name in names:
        kind, changes = MODELS[name]
        size = {"head_dim": 32} if name == "gemma3" else {}
        hf_model(kind, **{**SIZES, **changes, **size, "intermediate_size": 128}
                 ).save_pretrained(tmp_path / name)
        shutil.copy(TINY / "tokenizer.model", tmp_path / name)
    names += [f"{name}=int4" for name in names]
    subprocess.run([*TORCHRUN, "--nproc-per-node", "2", tp_worker.__file__, tmp_path, *names],
                   env=ONE_THREAD, check=True, timeout=300, capture_output=True)
    found, one = load_file(tmp_path / "ranks-2.safetensors"), tp_worker.of_folders(tmp_path, names)
    for name in names:
        assert (found[name] - one[name]).abs().max() < 1e-4 * one[name].abs().max(), name


def test_norms_over_all_heads_are_refused_under_torchrun():
    with pytest.raises(ValueError, match="OLMo 3.* cannot be shared by 2 processes"):
        tp.shard_config(random_model(qk_norm=True, norm_all_heads=True).config, 2)


# ------------------------------------------------------------------------------ mixed layers


def test_speculation_says_what_plain_greedy_says():
    model, prompt = random_model(**MIXED), tokens_of(40)[0].tolist()
    plain = list(generate(model, make_cache(model, 4, 12), prompt, 120, stop_ids=()))
    for speculation in (Speculation(fixed=3), Speculation(model, make_cache(model, 4, 12), 4)):
        cache = make_cache(model, 4, 12)
        assert list(generate(model, cache, prompt, 120, stop_ids=(),
                             speculation=speculation)) == plain
        assert speculation.accepted > 0


@pytest.mark.parametrize("length", [3, 60])
def test_a_session_and_a_kept_prefix_go_on_as_the_stream_does(length, tmp_path):
    model, tokens = random_model(**MIXED), tokens_of(length + 20)
    cache, others = (KVCache(model.config, 1, 4, 12, 16) for _ in range(2))
    for part in tokens[:, :length].split(16, dim=1):
        model(part, cache)
    save_session(tmp_path / "s", {"model": (model, cache)})
    sizes = {name: len(tensor[0, 0]) for name, tensor in load_file(tmp_path / "s").items()}
    assert sizes["model.k.0"] == min(length, 5 + 15) and sizes["model.k.1"] == min(length, 4 + 27)
    prefix = copy_from_row(cache, 0, tokens[0, :length].tolist())
    expected = torch.cat([model(part, cache) for part in tokens[:, length:].split(7, dim=1)], dim=1)
    for restore in (lambda: load_session(tmp_path / "s", {"model": (model, others)}),
                    lambda: copy_to_row(prefix, others)):
        others.reset()
        restore()
        logits = torch.cat([model(part, others)
                            for part in tokens[:, length:].split(7, dim=1)], dim=1)
        assert torch.equal(logits, expected)


def test_as_a_gpu_computes_it_nothing_differs(monkeypatch):
    model, tokens = random_model(**MIXED), tokens_of(100)
    plain, cache = (KVCache(model.config, 1, 4, 12, 16) for _ in range(2))
    expected = torch.cat([model(part, plain) for part in tokens.split(7, dim=1)], dim=1)
    as_on_a_gpu(monkeypatch)
    logits = torch.cat([model(part, cache) for part in tokens.split(7, dim=1)], dim=1)
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("sliding", "full"), ("full", "unrotated")])
def test_compiled_it_is_a_region_for_each_kind_at_most(kinds, monkeypatch):
    """One token, whatever the layers hold, and nothing is compiled again."""
    codes = []
    monkeypatch.setattr("torch._inductor.graph.GraphLowering._compile_to_module",
                        keep_code(torch._inductor.graph.GraphLowering._compile_to_module, codes))
    model, tokens = random_model(**{**MIXED, "n_layers": 4, "kinds": kinds * 2}), tokens_of(90)
    eager, compiled = (KVCache(model.config, 1, 4, 12, 16) for _ in range(2))
    expected = [model(token, eager) for token in tokens.split(1, dim=1)]
    model = copy.deepcopy(model)
    compile_model(model)
    with torch._inductor.config.patch(force_disable_caches=True):
        logits = [model(tokens[:, :1], compiled)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits += [model(token, compiled) for token in tokens[:, 1:].split(1, dim=1)]
    assert (torch.cat(logits) - torch.cat(expected)).abs().max() < 1e-4
    [code] = codes
    assert 1 <= code.count("def auto_functionalized_subgraph_") <= 2


def keep_code(compile_to_module, codes):
    def kept(graph):
        module = compile_to_module(graph)
        with open(module.__file__) as file:
            codes.append(file.read())
        return module
    return kept


def test_recomputing_masks_each_kind_by_its_own_window():
    """What the latest tokens alone say of the next one, against the oracle fed with these."""
    model, ids = random_model(**MIXED), tokens_of(16)[0]
    nats = measure(model, ids, "recompute", 0, 9)
    for at in (5, 9, 14):
        oracle = Stream(model, 0, 9)
        logits = [oracle.feed(t) for t in ids[max(0, at + 1 - 9):at + 1]][-1]
        assert abs(nats[at] + logits.log_softmax(-1)[ids[at + 1]]) < 1e-4
    assert len(measure(model, ids, "dense", 4, 9)) == 15  # full layers see everything


@pytest.mark.slow
def test_gptq_calibrates_each_layer_on_what_its_own_window_shows(gemma, tmp_path, monkeypatch):
    """The two sums of q, k and v are those of whole models' inputs there: of the one that is
    written, whose layers before it are quantized, and of the original. A sequence is longer than
    the sliding window."""
    _, folder = gemma
    ids, sums, solve = torch.arange(80).view(2, 40) * 5, {}, gptq.quantize_gptq

    def spy(weight, hessian, drift, group_size, name):
        sums[name] = hessian.clone(), drift.clone()
        return solve(weight, hessian, drift, group_size, name)

    monkeypatch.setattr(gptq, "sequences_of", lambda *_: ids)
    monkeypatch.setattr(gptq, "quantize_gptq", spy)
    gptq_checkpoint(folder, "", tmp_path / "q", 2, 40, 32, "cpu")
    assert len(sums) == 12
    inputs, logits = [], []
    for checkpoint in (folder, tmp_path / "q"):
        model, _ = load(checkpoint, device="cpu", dtype=torch.float32)
        found = {}
        for layer, block in enumerate(model.layers):
            block.attention.qkv.register_forward_pre_hook(
                lambda module, args, layer=layer, found=found: found.update(
                    {layer: args[0].flatten(0, 1)}))
        with torch.no_grad():
            logits.append(model(ids))
        inputs.append(found)
    for layer in range(3):
        y, x = (found[layer] for found in inputs)
        for ours, expected in zip(sums[f"layers.{layer}.attention.qkv.weight"],
                                  (x.t() @ x, (y - x).t() @ x)):
            assert (ours - expected).norm() < 1e-2 * expected.norm(), layer
    assert (logits[1] - logits[0]).norm() < 0.5 * logits[0].norm()


# ------------------------------------------------------------------------------ Gemma 3's files


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_that_sees_pictures(gemma, tmp_path, prefix):
    """As older and newer files name its tensors, beside those for pictures."""
    theirs, folder = gemma
    raw = json.loads((folder / "config.json").read_text())
    both = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": {key: value for key, value in raw.items() if key != "architectures"},
            "vision_config": {"hidden_size": 32}, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(both))
    tensors = {prefix + name.removeprefix("model."): tensor
               for name, tensor in load_file(folder / "model.safetensors").items()}
    own = "" if prefix.startswith("language") else "model."
    for name in ("vision_tower.vision_model.head.bias", "multi_modal_projector.weight"):
        tensors[own + name] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    ours, alone = (load(it, device="cpu")[0] for it in (tmp_path, folder))
    assert ours.config.eos_ids == (1, 106)
    with torch.no_grad():
        assert torch.equal(ours(tokens_of(40)), alone(tokens_of(40)))


def test_transformers_names_of_its_language_model_are_those():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    text = {**SIZES, **MODELS["gemma3"][1], "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14), mm_tokens_per_image=4)
    names = set(Gemma3ForConditionalGeneration(config).state_dict())
    assert "model.language_model.layers.2.self_attn.q_norm.weight" in names
    assert all(name.startswith(("model.language_model.", "model.vision_tower.",
                                "model.multi_modal_projector.", "lm_head.")) for name in names)
    raw = {**json.loads(config.to_json_string()),
           "architectures": ["Gemma3ForConditionalGeneration"]}
    ours = config_from_hf(raw)
    assert ours.kinds == ("sliding", "full", "sliding") and ours.dim == 64


TWO_KINDS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=24,
                 head_dim=16, query_pre_attn_scalar=20, tie_word_embeddings=False)


@pytest.mark.parametrize("name", ["pack-4-32", "int-8"])
def test_a_compressed_tensors_folder_of_gemma_3(name, tmp_path):
    read = compress(tmp_path / "it", SCHEMES[name], family="Gemma3", **TWO_KINDS)
    model, _ = load(tmp_path / "it", device="cpu", dtype=torch.float32)
    assert len(read) == 14 and model.config.kinds == ("sliding", "full")
    check_logits(model, tmp_path / "it", read)


@pytest.mark.parametrize("name", ["gptq-act-order", "gptq-8bit"])
def test_a_gptq_folder_of_gemma_3(name, tmp_path):
    """What a tool wrote of a Llama's layer, in both layers of a Gemma 3 of its sizes."""
    theirs = hf_model("Gemma3", **{**PUBLISHED, **TWO_KINDS}, initializer_range=0.2)
    theirs.half().save_pretrained(tmp_path)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name: tensor for name, tensor in stored.items() if "_proj." not in name}
    read, written = dequantized(name), load_file(EXPORTED / name / "model.safetensors")
    for layer in ("layers.0", "layers.1"):
        stored |= {tensor_name.replace("layers.0", layer): tensor.clone()
                   for tensor_name, tensor in written.items() if "_proj." in tensor_name}
    read |= {weight.replace("layers.0", "layers.1"): tensor for weight, tensor in read.items()}
    save_file(stored, tmp_path / "model.safetensors")
    exported = json.loads((EXPORTED / name / "config.json").read_text())
    edit(tmp_path, quantization_config=exported["quantization_config"])
    model, _ = load(tmp_path, device="cpu", dtype=torch.float32)
    assert len(read) == 14
    check_logits(model, tmp_path, read)


@pytest.mark.slow
@pytest.mark.parametrize("name, modules", [
    ("gemma3", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    ("phi3-longrope", ["qkv_proj", "gate_up_proj", "down_proj"])])
def test_lora_merged_in_equals_peft_s(name, modules, tmp_path):
    peft = pytest.importorskip("peft")
    kind, changes = MODELS[name]
    theirs = hf_model(kind, **{**SIZES, **changes})
    theirs.save_pretrained(tmp_path / "base")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=modules))
    for weight_name, weight in adapted.named_parameters():
        if "lora_" in weight_name:
            weight.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        expected = adapted(tokens_of(40)).logits
        plain, ours = (load(tmp_path / "base", device="cpu", adapters=adapters)[0](tokens_of(40))
                       for adapters in ([], [tmp_path / "lora"]))
    assert (ours - expected).abs().max() < 1e-4 < 0.1 < (plain - expected).abs().max()
