"""GPTQ, AWQ and compressed-tensors folders: weights equal other tools' to the bit, then logits.

AutoGPTQ and auto-round wrote the folders in tests/published, with the weights that they read back
(tests/published/export.py). compressed-tensors is installed and runs here."""

import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import load_file, save_file

import tp_worker
from convert_hf import convert
from formats.checkpoint import stored_tensors, to_float
from formats.config import hf_parts
from formats.folder import open_checkpoint
from formats.published import PublishedLayer
from generate import generate, load, make_cache
from helpers import ONE_THREAD, TINY, TORCHRUN, hf_model, run
from test_errors import refused

transformers = pytest.importorskip("transformers")

EXPORTED = Path(__file__).parent / "published"
FOLDERS = sorted(path.name for path in EXPORTED.iterdir() if path.is_dir())
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             eos_token_id=None)
# compressed-tensors: format and settings, of all layers or by a part of their names
SCHEMES = {
    "pack-4-32": dict(num_bits=4, group_size=32),
    "pack-4-64-zeros": dict(num_bits=4, group_size=64, symmetric=False),
    "pack-4-channel": dict(num_bits=4),
    "pack-4-channel-zeros": dict(num_bits=4, symmetric=False),
    "pack-8": dict(num_bits=8),
    "pack-8-zeros": dict(num_bits=8, symmetric=False),
    "pack-8-64": dict(num_bits=8, group_size=64),
    "int-8": dict(num_bits=8, format="int-quantized"),
    "naive-8-zeros": dict(num_bits=8, symmetric=False, format="naive-quantized"),
    "mixed": {"q_proj|up_proj": dict(num_bits=4, group_size=32),
              "k_proj|gate_proj|down_proj": dict(num_bits=8, format="int-quantized"),
              "layers.1.*o_proj": dict(num_bits=8, group_size=32, symmetric=False)},
}


def in_place(made, name):
    """A copy of an exported folder with a tokenizer, to load."""
    folder = shutil.copytree(EXPORTED / name, made / name)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


def dequantized(name):
    return parse(lzma.decompress((EXPORTED / name / "dequantized.safetensors.xz").read_bytes()))


def compress(folder, scheme, old_spelling=False, family="Llama", **changes):
    """A random model's folder as compressed-tensors writes it, and the weights that it reads."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    model = hf_model(family, **{**SIZES, **changes}, initializer_range=0.2)
    model.half().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    by_name = scheme if "num_bits" not in scheme else {"": scheme}
    stored, read, groups = load_file(folder / "model.safetensors"), {}, {}
    for number, (pattern, settings) in enumerate(by_name.items()):
        settings = dict(settings)
        layout = settings.pop("format", "pack-quantized")
        args = QuantizationArgs(
            strategy="group" if "group_size" in settings else "channel", **settings)
        made = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        groups[f"group_{number}"] = made.model_dump(mode="json")
        tool = BaseCompressor.get_value_from_registry(layout)
        for name in [n for n in stored if "_proj.weight" in n and re.search(pattern, n)]:
            weight = stored.pop(name)
            blocks = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            parts = {"weight": weight, "weight_scale": scale.half(), "weight_zero_point": zero}
            parts = tool.compress(parts, made)
            stored.update({name.removesuffix("weight") + n: t for n, t in parts.items()})
            read[name] = tool.decompress({**parts, "weight_scale": scale.half().float()},
                                         made)["weight"]
    save_file(stored, folder / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"],
              "quantization_status": "compressed", "kv_cache_scheme": None,
              "format": layout if len(groups) == 1 else "mixed-precision"}
    if old_spelling:
        for group in groups.values():
            del group["format"]
    edit(folder, quantization_config=config)
    return read


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def weights_of(folder):
    """Every weight in floating point, by Hugging Face's names."""
    checkpoint = open_checkpoint(folder)
    parts = hf_parts(checkpoint.config)
    return {part: to_float(block) for name, blocks in checkpoint.blocks.items()
            for part, block in zip(parts[name], blocks)}


def plain_model(folder, read):
    """transformers' model of these weights, in float32."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**config)).eval()
    stored = load_file(folder / "model.safetensors")
    floats = {n: t.float() for n, t in stored.items() if n in model.state_dict()
              and t.is_floating_point()}
    model.load_state_dict({**floats, **read})
    return model.requires_grad_(False)


def check_logits(model, folder, read):
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = plain_model(folder, read)(tokens).logits
    with torch.no_grad():
        ours = model(tokens, make_cache(model, batch_size=2))
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def check_steps(model, folder, read):
    """The logits of one token at a time."""
    tokens = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    expected, cache = plain_model(folder, read)(tokens).logits, make_cache(model, 4, 40)
    with torch.no_grad():
        ours = torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], dim=1)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def check_tokens(model, eager):
    """Greedy tokens are equal, which a decode step computes one by one."""
    said = [list(generate(m, make_cache(m, 4, 40), list(range(5, 40)), 30)) for m in (model, eager)]
    assert said[0] == said[1]


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", FOLDERS)
def test_exported_folders(name, tmp_path):
    folder, read = in_place(tmp_path, name), dequantized(name)
    ours = weights_of(folder)
    assert len(read) == 7
    for layer, weight in read.items():
        assert torch.equal(ours[layer], weight), layer
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    check_logits(model, folder, read)
    stored = stored_tensors(open_checkpoint(folder))
    assert all(block.is_contiguous() for _, blocks in stored for block in blocks)  # CUDA needs it


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name, tmp_path):
    read = compress(tmp_path / "it", SCHEMES[name], old_spelling="int" in name)
    ours = weights_of(tmp_path / "it")
    assert len(read) == (14 if name != "mixed" else 11)
    for layer, weight in read.items():
        assert torch.equal(ours[layer], weight), layer
    model, _ = load(tmp_path / "it", device="cpu", dtype=torch.float32)
    check_logits(model, tmp_path / "it", read)


@pytest.mark.parametrize("name", ["gptq-three-orders", "gptq-8bit", "gptq-8bit-channel", "mixed"])
def test_converted_they_keep_every_integer(name, tmp_path):
    if name == "mixed":
        compress(tmp_path / name, SCHEMES[name])
    folder = tmp_path / name if name == "mixed" else in_place(tmp_path, name)
    status, _, err = run("convert_hf", folder, tmp_path / "ours", "--dtype", "fp32")
    assert status == 0, err
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in config
    a, b = (load(it, device="cpu", dtype=torch.float32)[0] for it in (folder, tmp_path / "ours"))
    assert a.fingerprint == b.fingerprint
    for (key, theirs), ours in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(theirs, ours) and theirs.dtype == ours.dtype, key
    status, _, err = run("quantize", "--checkpoint", tmp_path / "ours", "--mode", "int8",
                         "--out", tmp_path / "q")
    assert status == 2 and "is quantized already" in err


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_asked_for_it_is_quantized_anew(mode, tmp_path):
    """Loading and converting both equal quantizing the weights that the tool reads."""
    folder, read = in_place(tmp_path, "gptq-act-order"), dequantized("gptq-act-order")
    plain_model(folder, read).save_pretrained(tmp_path / "plain")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "plain")
    status, _, err = run("quantize", "--checkpoint", folder, "--mode", mode,
                         "--out", tmp_path / "q")
    assert status == 0, err
    models = [load(at, device="cpu", dtype=torch.float32, quantize=q)[0] for at, q in (
        (folder, mode), (tmp_path / "plain", mode), (tmp_path / "q", None))]
    for key, tensor in models[0].state_dict().items():
        assert all(torch.equal(tensor, m.state_dict()[key]) for m in models[1:]), key


def test_what_is_stored_in_fp16_runs_in_bf16_where_it_is_int4(tmp_path, caplog):
    caplog.set_level("INFO", logger="gpt_stream")
    for name, dtype in (("awq-32", torch.bfloat16), ("gptq-8bit-channel", torch.float16)):
        folder = in_place(tmp_path, name)
        model, _ = load(folder, device="cpu")
        assert model.norm.weight.dtype == dtype
        assert load(folder, device="cpu", dtype=torch.float16)[0].norm.weight.dtype == torch.float16
    assert [record.message for record in caplog.records] == [
        "the checkpoint is in fp16; int4 computes in bf16 (--dtype says otherwise)"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-three-orders", "gptq-8bit", "awq-32", "mixed"])
def test_compiled_equals_eager(name, tmp_path):
    read = compress(tmp_path / name, SCHEMES[name]) if name == "mixed" else dequantized(name)
    folder = tmp_path / name if name == "mixed" else in_place(tmp_path, name)
    eager, compiled = (load(folder, device="cpu", dtype=torch.float32, compile=c)[0]
                       for c in (False, True))
    check_steps(compiled, folder, read)
    check_tokens(compiled, eager)
    if name in ("gptq-8bit", "mixed"):  # of which test_quantize.py has no chunk in a graph
        check_logits(compiled, folder, read)


# ------------------------------------------------------------------------------ odd ones


def of_one_layer(folder, qweight, qzeros, **quantization_config):
    """q_proj's weight in gptq-channel with these words and scales of one."""
    path, layer = folder / "model.safetensors", "model.layers.0.self_attn.q_proj."
    tensors = load_file(path)
    for name, word in (("qweight", qweight), ("qzeros", qzeros)):
        tensors[layer + name] = torch.full_like(tensors[layer + name], word)
    tensors[layer + "scales"] = torch.ones_like(tensors[layer + "scales"])
    save_file(tensors, path)
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config={**raw, **quantization_config})
    return weights_of(folder)[layer + "weight"]


def test_zeros_of_gptq_in_its_three_spellings(tmp_path):
    """AutoGPTQ and auto-round store a zero of 16 as the nibble 15. GPTQModel subtracts ones from
    whole words, with borrows, so that a zero of 0 survives. v2 subtracts nothing."""
    folder, count = in_place(tmp_path, "gptq-channel"), torch.arange(64) % 8
    eight = 0x76543210  # inputs of 0 to 7, over and over
    weight = of_one_layer(folder, eight, -1)
    assert torch.equal(weight, (count - 16).float().expand(64, 64))
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    x, qkv = torch.randn(1, 3, 64), model.layers[0].attention.qkv
    assert (qkv(x)[..., :64] - x @ weight.t()).abs().max() < 1e-3
    zeros = torch.tensor([0, 9, 0, 0, 15, 3, 8, 1])
    word = sum(zero << 4 * i for i, zero in enumerate(zeros.tolist())) - 0x11111111
    weight = of_one_layer(folder, eight, word, meta={"quantizer": ["gptqmodel:1.9.0"]})
    assert torch.equal(weight, (count[None] - zeros.repeat(8)[:, None]).float())
    weight = of_one_layer(folder, eight, 0x33333333, checkpoint_format="gptq_v2")
    assert torch.equal(weight, (count - 3).float().expand(64, 64))


def test_compressed_tensors_in_activation_order(tmp_path):
    """Its older versions stored each input's group. The expected weight is the formula's."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    compress(tmp_path / "it", SCHEMES["pack-4-32"])
    path, layer = tmp_path / "it" / "model.safetensors", "model.layers.1.mlp.down_proj."
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # unmapped
    groups = (torch.arange(128) // 32)[torch.randperm(128)].int()
    save_file({**tensors, layer + "weight_g_idx": groups}, path)
    steps = unpack_from_int32(tensors[layer + "weight_packed"], 4, (64, 128)).float()
    expected = steps * tensors[layer + "weight_scale"].float()[:, groups]
    assert torch.equal(weights_of(tmp_path / "it")[layer + "weight"], expected)


def test_older_folders(tmp_path):
    """GPTQ with a separate file of settings, biases of zeros and no g_idx; AWQ with older names."""
    folder, name = in_place(tmp_path, "gptq-channel"), "model.layers.0.self_attn.k_proj."
    raw, tensors = (json.loads((folder / "config.json").read_text()),
                    load_file(folder / "model.safetensors"))
    theirs = raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "quantize_config.json").write_text(json.dumps(theirs))
    tensors = {n: t for n, t in tensors.items() if not n.endswith("g_idx")}
    save_file({**tensors, name + "bias": torch.zeros(32)}, folder / "model.safetensors")
    expected = dequantized("gptq-channel")
    assert torch.equal(weights_of(folder)[name + "weight"], expected[name + "weight"])
    folder, expected = in_place(tmp_path, "awq-64"), dequantized("awq-64")
    edit(folder, quantization_config={"quant_method": "awq", "w_bit": 4, "q_group_size": 64,
                                      "zero_point": True, "version": "GEMM"})
    assert torch.equal(weights_of(folder)[name + "weight"], expected[name + "weight"])


def test_layers_with_settings_of_their_own(tmp_path):
    """GPTQModel's "dynamic" lists several schemes; a layer's tensors show which is its own."""
    folder = in_place(tmp_path, "gptq-8bit")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj."
    four = load_file(EXPORTED / "gptq-channel" / "model.safetensors")
    tensors.update({n: t for n, t in four.items() if n.startswith(name)})
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    raw["dynamic"] = {"-:lm_head": {}, "+:.*down_proj": {"bits": 4, "group_size": -1}}
    edit(folder, quantization_config=raw)
    assert torch.equal(weights_of(folder)[name + "weight"],
                       dequantized("gptq-channel")[name + "weight"])


# ------------------------------------------------------------------------------ what is refused


def with_settings(name, **changes):
    """The quantization_config of an exported folder with these changes."""
    raw = json.loads((EXPORTED / name / "config.json").read_text())["quantization_config"]
    return {**raw, **changes}


def compressed_settings(format="pack-quantized", activations=None, weights=None, **changes):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
               "symmetric": True, **(weights or {})}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, **changes}


@pytest.mark.parametrize("settings, naming", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
     "quant_method 'bitsandbytes'"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method 'fp8'"),
    ({"bits": 4}, "quant_method 'unknown'"),
    ("gptq", "it must be an object"),
    (with_settings("gptq-channel", bits=3), "gptq with 3 bits"),
    (with_settings("gptq-channel", bits=2), "gptq with 2 bits"),
    (with_settings("gptq-channel", bits="4"), "gptq with 4 bits"),
    (with_settings("gptq-channel", group_size=0), "group_size 0"),
    (with_settings("gptq-channel", checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    (with_settings("gptq-channel", is_marlin_format=True), "checkpoint_format 'marlin'"),
    (with_settings("gptq-channel", pack_dtype="int64"), "pack_dtype 'int64'"),
    (with_settings("awq-32", bits=8), "awq with 8 bits"),
    (with_settings("awq-32", version="gemv"), "awq's version 'gemv'"),
    (compressed_settings(weights={"type": "float", "num_bits": 8}, format="float-quantized"),
     "float of 8 bits (float-quantized)"),
    (compressed_settings(activations={"num_bits": 8}), "quantized activations"),
    (compressed_settings(weights={"num_bits": 3}), "with 3 bits"),
    (compressed_settings(weights={"num_bits": 4.0}), "with 4.0 bits"),
    (compressed_settings(format="marlin-24"), "format 'marlin-24'"),
    (compressed_settings(weights={"strategy": "block"}), "strategy 'block'"),
    (compressed_settings(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (compressed_settings(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    (compressed_settings(config_groups={}), "an empty config_groups"),
    ({**compressed_settings(), "config_groups": {"W4A16": ["Linear"]}}, "damaged")])
def test_settings_that_are_not_supported_are_named(settings, naming, tmp_path):
    folder = in_place(tmp_path, "gptq-channel")
    edit(folder, quantization_config=settings)
    refused("generate", "--checkpoint", folder, naming=[folder, "quantization_config", naming])


Q, DOWN = "model.layers.0.self_attn.q_proj.", "model.layers.0.mlp.down_proj."


def changed(name, change):
    """A change of one tensor."""
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize("name, change, naming", [
    ("gptq-act-order", lambda t: t.pop(Q + "scales"), [Q + "scales", "missing"]),
    ("gptq-act-order", lambda t: t.pop(Q + "qzeros"), [Q + "qzeros", "missing"]),
    ("gptq-act-order", lambda t: t.pop(Q + "g_idx"), [Q + "g_idx", "missing"]),
    ("gptq-act-order", lambda t: t.pop(Q + "qweight"), [Q + "qweight", "missing"]),
    ("gptq-act-order", lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
    ("gptq-act-order", changed(Q + "g_idx", lambda t: t + 1), [Q + "g_idx", "0 to 1"]),
    ("gptq-act-order", changed(Q + "g_idx", lambda t: t * 0 - 2), [Q + "g_idx", "0 to 1"]),
    ("gptq-act-order", changed(Q + "g_idx", lambda t: t * 0), [Q + "g_idx", "unequal"]),
    ("gptq-act-order", changed(Q + "g_idx", lambda t: t[:9].clone()), [Q + "g_idx", "(9,)"]),
    ("gptq-act-order", changed(Q + "scales", lambda t: t * float("nan")), [Q + "scales", "NaN"]),
    ("gptq-act-order", changed(Q + "qweight", lambda t: t.half()), [Q + "qweight", "int32"]),
    ("gptq-act-order", changed(Q + "scales", lambda t: t.int()), [Q + "scales", "torch.float16"]),
    ("gptq-act-order", lambda t: t.update({Q + "extra": torch.ones(1)}), [Q + "extra", "belong"]),
    ("gptq-act-order", lambda t: t.update({Q + "bias": torch.ones(64)}), [Q + "bias", "belong"]),
    ("awq-32", changed(DOWN + "scales", lambda t: t / 0), [DOWN + "scales", "infinite"]),
    ("awq-32", changed(DOWN + "qzeros", lambda t: t[:1].clone()), [DOWN + "qzeros", "(1, 8)"]),
    ("awq-32", lambda t: t.pop(DOWN + "qzeros"), [DOWN + "qzeros", "missing"])])
def test_tensors_that_do_not_fit_are_named(name, change, naming, tmp_path):
    folder = in_place(tmp_path, name)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused("convert_hf", folder, tmp_path / "out", naming=[folder, *naming])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, changes, naming", [
    ("gptq-act-order", dict(bits=8), [Q + "qweight", "(8, 64)", "asks for (16, 64)"]),
    ("gptq-act-order", dict(group_size=64), [Q + "qzeros", "(2, 8)", "asks for (1, 8)"]),
    ("gptq-act-order", dict(group_size=48), ["48", "64 inputs of " + Q[:-1]]),
    ("awq-32", dict(group_size=16), [Q + "qzeros", "(2, 8)", "asks for (4, 8)"])])
def test_settings_that_do_not_match_the_tensors(name, changes, naming, tmp_path):
    folder = in_place(tmp_path, name)
    edit(folder, quantization_config=with_settings(name, **changes))
    refused("generate", "--checkpoint", folder, naming=[folder, *naming])


def test_an_order_of_columns_that_is_none(tmp_path):
    run("convert_hf", in_place(tmp_path, "gptq-act-order"), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = next(name for name in weights if name.endswith(".order"))
    weights[name][3] = 10_000
    save_file(weights, tmp_path / "out" / "model.safetensors")
    refused("generate", "--checkpoint", tmp_path / "out", naming=[name])


def test_gptq_wants_the_original(tmp_path):
    refused("gptq", "--checkpoint", in_place(tmp_path, "awq-32"), "--text", __file__,
            "--out", tmp_path / "out", naming=["awq-32", "quantize the original"])


def test_zeros_where_the_settings_have_none(tmp_path):
    compress(tmp_path / "it", SCHEMES["pack-4-64-zeros"])
    settings = json.loads((tmp_path / "it" / "config.json").read_text())["quantization_config"]
    settings["config_groups"]["group_0"]["weights"]["symmetric"] = True
    edit(tmp_path / "it", quantization_config=settings)
    refused("generate", "--checkpoint", tmp_path / "it", naming=[Q + "weight_zero_point"])


def test_groups_that_fit_no_kernel_are_refused_with_what_would_do(tmp_path):
    compress(tmp_path / "it", dict(num_bits=4, group_size=16))
    refused("generate", "--checkpoint", tmp_path / "it", naming=[
        tmp_path, Q[:-1], "groups of 16", "32, 64, 128", "--quantize"])


# ------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    """With parts that are stored apart and int8 with zeros. What cannot be sharded is named."""
    scheme = SCHEMES["mixed"]
    compress(tmp_path / "mixed", scheme)
    for name in ("gptq-8bit-channel", "gptq-act-order"):
        in_place(tmp_path, name)
    names = ["mixed", "gptq-8bit-channel"]
    one = tp_worker.of_folders(tmp_path, names)
    subprocess.run([*TORCHRUN, "--nproc-per-node", "2", Path(tp_worker.__file__), tmp_path, *names],
                   env=ONE_THREAD, check=True, timeout=300, capture_output=True)
    found = load_file(tmp_path / "ranks-2.safetensors")
    for name in names:
        assert (found[name] - one[name]).abs().max() < 1e-4, name
    done = subprocess.run([*TORCHRUN, "--nproc-per-node", "2", "generate.py", "--checkpoint",
                           tmp_path / "gptq-act-order", "--device", "cpu"], cwd=TINY.parent.parent,
                          env=ONE_THREAD, capture_output=True, text=True)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("generate.py: error")]
    assert "layers.0.attention.out is stored in activation order" in line and "2 processes" in line


def test_integers_of_the_kind_that_is_asked_for_stay_what_they_are(tmp_path):
    """Quantizing them again would choose other scales."""
    folder = in_place(tmp_path, "gptq-auto-round")
    kept, asked = tmp_path / "kept", tmp_path / "asked"
    convert(folder, kept)
    kinds = json.loads((kept / "config.json").read_text())["gpt_stream"]["quantization"]["layers"]
    kind = kinds["layers.0.attention.out"]
    convert(folder, asked, None, {"mode": "int4", "group_size": kind["group_size"]})
    stored, again = (load_file(at / "model.safetensors") for at in (kept, asked))
    names = [name for name in stored if name.startswith("layers.0.attention.out.")]
    assert len(names) == 3 and kind == {"mode": "int4", "group_size": kind["group_size"]}
    assert all(torch.equal(stored[name], again[name]) for name in names)
    assert again["embed.weight"].dtype == torch.int8  # floats are quantized


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_integers_where_floats_belong_are_refused_by_name(tmp_path, name):
    folder = in_place(tmp_path, "gptq-128")
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, name: stored[name].int()}, folder / "model.safetensors")
    for quantize in (None, "int8"):
        with pytest.raises(ValueError, match=f"tensor {name} holds torch.int32, no floats"):
            load(folder, device="cpu", quantize=quantize)


def test_of_all_layers_no_scales_stay_in_memory(tmp_path):
    """They are read when a layer is: a model of many layers would hold gigabytes of them."""
    folder = in_place(tmp_path, "gptq-128")
    names = set(load_file(folder / "model.safetensors"))
    encoded = [block for blocks in open_checkpoint(folder).blocks.values() for block in blocks
               if not isinstance(block, torch.Tensor)]
    assert encoded
    for block in encoded:  # what decodes it knows the file's own tensors, memory-mapped, alone
        tensors, *others = block.decode.args
        assert set(tensors) == names
        assert not any(isinstance(other, (torch.Tensor, PublishedLayer)) for other in others)
