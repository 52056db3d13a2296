"""int8 and int4: the kernels against explicit dequantization, files, and what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert_hf import convert
from generate import generate, load, make_cache, prefill, weight_bytes
from helpers import TINY, run
from layers import GroupedInt8Linear, Int4Linear, Int8Linear
from linear import CPUS, LANES, WORDS
from quantize import asked_quantization, dequantize, quantize_int4, quantize_int8, quantize_weight

DRAFT = TINY.parent / "tiny-draft"
KINDS = [("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)]


def random_weight(N=48, K=256):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return weight * torch.logspace(-2, 0, N)[:, None]


def linear_of(parts, group_size):
    """A module with these stored tensors, ready to run in float32."""
    N, K = dequantize(parts).shape
    layer = Int8Linear(K, N, False) if "zero" not in parts else Int4Linear(K, N, False, group_size)
    layer.load_state_dict(parts)
    if "zero" in parts:
        layer.pack(torch.float32)
    return layer


def test_int8_is_within_half_a_step_of_every_weight():
    weight = random_weight()
    weight[3] = 0
    parts = quantize_int8(weight)
    assert parts["weight"].dtype == torch.int8 and parts["scale"].dtype == torch.float32
    error = (dequantize(parts) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert (dequantize(parts)[3] == 0).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_within_a_step_and_better_than_rounding_the_full_range(group_size):
    weight = random_weight()
    weight[5, :] = 0
    weight[6, :] = 0.25  # a group on one side of zero
    parts = quantize_int4(weight, group_size)
    assert parts["weight"].shape == (48, 128) and parts["weight"].dtype == torch.uint8
    groups = weight.unflatten(1, (-1, group_size))
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp(min=1e-30)
    zero = (-low / step).round()
    plain = (((groups / step + zero).round().clamp(0, 15) - zero) * step).flatten(1)
    ours = dequantize(parts)
    assert (ours - weight).square().sum() < (plain - weight).square().sum()
    assert (ours[5] == 0).all() and (ours[6] - 0.25).abs().max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_kernels_equal_explicit_dequantization(tokens):
    """All kinds in one graph, so that little is compiled."""
    stored = [quantize_weight(random_weight(), {"mode": mode, "group_size": group_size})
              for mode, group_size in KINDS]
    layers = [linear_of(parts, group_size) for parts, (_, group_size) in zip(stored, KINDS)]
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], dynamic=False)
    x = torch.randn(1, tokens, 256)
    with torch.no_grad():
        for parts, layer, in_graph in zip(stored, layers, compiled(x)):
            expected = F.linear(x.double(), dequantize(parts).double())
            for y in (layer(x), in_graph):
                assert y.shape == (1, tokens, 48)
                assert (y - expected).abs().max() < 1e-4


# (mode, N, K, group size): rows in no 16s, K in no 4s, one group, groups in no 8s.
LAYERS = [("int8", 37, 20, None), ("int8", 7, 18, None), ("int8", 48, 64, 32),
          ("int8", 37, 96, 32), ("int4", 48, 32, 32), ("int4", 16, 128, 128),
          ("int4", 80, 576, 64), ("int4", 32, 160, 32)]


def any_layer(mode, N, K, group_size):
    """An empty module, and stored tensors for it of every integer that it can hold."""
    random = torch.Generator().manual_seed(N + K)
    parts = {"scale": torch.rand(N, *([K // group_size] if group_size else []), generator=random)}
    if mode == "int4":
        parts["weight"] = torch.randint(0, 256, (N, K // 2), generator=random, dtype=torch.uint8)
        parts["zero"] = torch.randint(0, 256, parts["scale"].shape, generator=random,
                                      dtype=torch.uint8)
        parts["weight"][:2] = torch.tensor([[0], [255]], dtype=torch.uint8)
        return Int4Linear(K, N, False, group_size), parts
    parts["weight"] = torch.randint(-128, 128, (N, K), generator=random, dtype=torch.int8)
    parts["weight"][:2] = torch.tensor([[-128], [127]])
    if group_size is None:
        return Int8Linear(K, N, False), parts
    parts["zero"] = torch.randint(-128, 128, parts["scale"].shape, generator=random,
                                  dtype=torch.int16)
    return GroupedInt8Linear(K, N, False, group_size), parts


def packed_layer(mode, N, K, group_size, compiled):
    """A module laid out for graphs or for eager calls, and the weight that it stands for."""
    layer, parts = any_layer(mode, N, K, group_size)
    layer.load_state_dict({name: part.clone() for name, part in parts.items()}, assign=True)
    layer.pack(torch.float32, compiled) if mode == "int4" else layer.pack(compiled)
    return layer, dequantize(parts).double()


def is_product(y, x, weight):
    """Whether y is x W^T but for float32's roundings of sums of such terms."""
    exact, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    return y.shape == exact.shape and bool(((y - exact).abs() <= 2e-6 * terms.amax()).all())


@pytest.mark.parametrize("processor", CPUS.split())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager model", "compiled model"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layout_and_number_of_tokens_equals_dequantization(processor, compiled, layer,
                                                                 monkeypatch):
    monkeypatch.setenv("GPT_STREAM_CPU", processor)
    module, weight = packed_layer(*layer, compiled)
    for tokens in (1, 2, 5, 8, 9, 16, 17, 130):
        x = torch.randn(1, tokens, layer[2], generator=torch.Generator().manual_seed(tokens))
        assert is_product(module(x), x, weight)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_graphs_for_avx2_equal_dequantization(tokens, monkeypatch):
    """All kinds and sizes in one graph, so that little is compiled."""
    monkeypatch.setenv("GPT_STREAM_CPU", "avx2")
    torch._dynamo.reset()
    modules, weights = zip(*[packed_layer(*layer, compiled=True) for layer in LAYERS[1:]])
    xs = [torch.randn(1, tokens, K, generator=torch.Generator().manual_seed(tokens))
          for _, _, K, _ in LAYERS[1:]]
    graph = torch.compile(lambda xs: [module(x) for module, x in zip(modules, xs)],
                          fullgraph=True, dynamic=False)
    with torch.no_grad():
        for y, x, weight in zip(graph(xs), xs, weights):
            assert is_product(y, x, weight)


def test_layouts_for_avx2_are_no_second_copy_and_are_copied_as_any_tensor(monkeypatch):
    monkeypatch.setenv("GPT_STREAM_CPU", "avx2")
    layer, parts = any_layer("int8", 48, 64, None)
    layer.load_state_dict(parts, assign=True)
    layer.pack(compiled=True)
    assert layer.layout == WORDS and layer.weight.data_ptr() == parts["weight"].data_ptr()
    layer.pack(compiled=True)
    layer.unpack()
    assert torch.equal(layer.weight, parts["weight"])
    for shape in (("int8", 48, 64, 32), ("int4", 48, 64, 32)):
        module, weight = packed_layer(*shape, compiled=True)
        other, x = copy.deepcopy(module), torch.randn(1, 3, 64)
        assert module.layout == other.layout == LANES
        assert module.weight.nbytes == 48 * 64 // (2 if shape[0] == "int4" else 1)
        module.weight.zero_()
        assert is_product(other(x), x, weight)


@pytest.mark.parametrize("mode, group_size", KINDS)
def test_a_quantized_folder_equals_quantizing_at_load(mode, group_size, tmp_path):
    """Both equal the plain model with the file's dequantized weights, in fp32: bf16 rounds
    differently on other CPUs."""
    out = tmp_path / "any-name"
    convert(TINY, out, None, asked_quantization(mode, group_size))
    stored, _ = load(out, device="cpu", dtype=torch.float32)
    at_load, _ = load(TINY, device="cpu", dtype=torch.float32, quantize=mode, group_size=group_size)
    plain, _ = load(TINY, device="cpu", dtype=torch.float32)
    prompt = list(range(40, 60))
    a, b, c = (prefill(m, make_cache(m), prompt) for m in (stored, at_load, plain))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.01
    file = load_file(out / "model.safetensors")
    for name, weight in plain.named_parameters():
        layer = name.removesuffix("weight")
        if layer + "scale" in file:
            weight.copy_(dequantize({name.removeprefix(layer): part for name, part in file.items()
                                     if name.startswith(layer)}))
    assert (a - prefill(plain, make_cache(plain), prompt)).abs().max() < 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["any-name"]
    bf16, quantized = (weight_bytes(load(path, device="cpu")[0]) for path in (TINY, out))
    assert quantized < {"int8": 0.53, "int4": 0.42}[mode] * bf16


def test_rows_and_group_aligned_columns_of_the_file_stand_alone(tmp_path):
    convert(TINY, tmp_path / "q", None, asked_quantization("int4", 32))
    whole = load_file(tmp_path / "q" / "model.safetensors")
    name = "layers.1.feed_forward.down."
    full = dequantize({part: whole[name + part] for part in ("weight", "scale", "zero")})
    with safe_open(tmp_path / "q" / "model.safetensors", framework="pt") as file:
        slices = {part: file.get_slice(name + part) for part in ("weight", "scale", "zero")}
        rows = dequantize({part: s[16:32] for part, s in slices.items()})
        columns = dequantize({"weight": slices["weight"][:, 32:64],
                              "scale": slices["scale"][:, 2:4], "zero": slices["zero"][:, 2:4]})
    assert torch.equal(rows, full[16:32]) and torch.equal(columns, full[:, 64:128])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compiled_equals_eager(mode):
    eager, _ = load(DRAFT, device="cpu", dtype=torch.float32, quantize=mode)
    compiled, _ = load(DRAFT, device="cpu", dtype=torch.float32, quantize=mode, compile=True)
    prompt = list(range(50, 90))
    answers = [list(generate(m, make_cache(m, 4, 28), prompt, 60, stop_ids=()))
               for m in (eager, compiled)]
    assert answers[0] == answers[1]


def test_what_is_refused(tmp_path):
    status, _, err = run("quantize", "--checkpoint", TINY, "--mode", "int8",
                         "--out", tmp_path / "q")
    assert status == 0 and "wrote" in err
    for program, *flags in (["quantize", "--mode", "int4", "--out", tmp_path / "r"],
                            ["generate", "--quantize", "int8"]):
        status, _, err = run(program, "--checkpoint", tmp_path / "q", *flags)
        assert status == 2 and "quantized already (int8)" in err.splitlines()[-1]
    status, _, err = run("quantize", "--checkpoint", "a.gguf", "--mode", "int4", "--out", "r")
    assert status == 2 and "convert_hf.py --quantize int4" in err
    # draft: dim 64, so groups of 128 do not divide
    status, _, err = run("quantize", "--checkpoint", DRAFT, "--mode", "int4", "--group-size", 128,
                         "--out", tmp_path / "r")
    assert status == 2 and "group size 128 does not divide the 64 inputs" in err
    assert "[32, 64] would" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (broken / name).write_bytes((DRAFT / name).read_bytes())
    tensors = load_file(DRAFT / "model.safetensors")
    tensors["layers.1.attention.out.weight"][2, 3] = bad
    save_file(tensors, broken / "model.safetensors")
    status, _, err = run("quantize", "--checkpoint", broken, "--mode", "int4",
                         "--out", tmp_path / "q")
    assert status == 2 and "layers.1.attention.out.weight has NaN or infinite" in err
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_truncated_quantized_file_and_an_unknown_scheme_are_refused(tmp_path):
    convert(DRAFT, tmp_path / "q", None, asked_quantization("int8", 32))
    path = tmp_path / "q" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    status, _, err = run("generate", "--checkpoint", tmp_path / "q")
    assert status == 2 and "model.safetensors: damaged" in err.splitlines()[-1]
    path.write_bytes(whole)
    config = tmp_path / "q" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "gpt_stream": {
        "format": 1, "quantization": {"mode": "int3"}}}))
    status, _, err = run("generate", "--checkpoint", tmp_path / "q")
    assert status == 2 and "int3" in err.splitlines()[-1]
