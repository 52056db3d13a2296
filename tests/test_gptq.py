"""GPTQ: the solver against its formulas in float64, the layers' inputs against whole models, the
file against its dequantized weights, and what is refused."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptq
from convert_hf import convert
from eval import read_text
from formats.config import block_layers
from generate import load, make_cache, prefill
from gptq import DAMPENING, DRIFT, gptq_checkpoint, quantize_gptq, sequences_of
from helpers import TINY, run
from quantize import asked_quantization, dequantize, quantize_int4
from test_errors import refused

pytestmark = pytest.mark.slow

DRAFT = TINY.parent / "tiny-draft"
TEXT = TINY.parent.parent / "tests" / "text.txt"


def nibbles_of(parts):
    return torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(1)


def random_problem(N=16, K=192, tokens=600, seed=0):
    """A weight, and the inputs that two versions of the layers before it give it. The inputs depend
    on each other, and some are large."""
    g = torch.Generator().manual_seed(seed)
    weight, mix = torch.randn(N, K, generator=g), torch.randn(K, K, generator=g)
    seen = (torch.randn(tokens, K, generator=g) @ mix + 9 * torch.randn(tokens, 1, generator=g)
            ) * torch.logspace(-1, 1, K)[torch.randperm(K, generator=g)]
    exact = seen + 0.1 * seen.std(0) * torch.randn(tokens, K, generator=g)
    return weight, seen.double(), exact.double()


def sums(seen, exact):
    return (seen.t() @ seen).float(), ((exact - seen).t() @ seen).float()


def slow_gptq(weight, seen, exact, g):
    """Optimal Brain Quantization in a fixed order, in float64: every column inverts the rest of the
    Hessian. Returns nibbles, scale, zero, the target weight and the Hessian."""
    hessian = seen.t() @ seen
    hessian += DAMPENING * hessian.diagonal().mean() * torch.eye(len(hessian))
    aim = weight.double() @ (
        torch.eye(len(hessian)) + DRIFT * (exact - seen).t() @ seen @ torch.linalg.inv(hessian))
    large = hessian.diagonal().tolist()
    groups = [list(range(k, k + g)) for k in range(0, len(large), g)]
    groups.sort(key=lambda columns: -sum(large[c] for c in columns))
    left = [c for columns in groups for c in sorted(columns, key=lambda c: -large[c])]
    w, nibbles = aim.clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    scales, zeros = (torch.zeros(len(w), len(groups), dtype=torch.float64) for _ in range(2))
    while left:
        c, group = left[0], left[0] // g
        if len(left) % g == 0:
            grid = quantize_int4(w[:, left[:g]].float(), g)
            scales[:, group], zeros[:, group] = grid["scale"][:, 0], grid["zero"][:, 0] / 16
        scale, zero = scales[:, group], zeros[:, group]
        nibbles[:, c] = (w[:, c] / scale + zero).round().clamp(0, 15)
        inverse = torch.linalg.inv(hessian[left][:, left])
        error = w[:, c] - (nibbles[:, c] - zero) * scale
        w[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return nibbles, scales, (zeros * 16).to(torch.uint8), aim, hessian


@pytest.mark.parametrize("g", [32, 64])
def test_the_integers_are_those_of_the_formula_written_out(g):
    weight, seen, exact = random_problem()
    parts = quantize_gptq(weight, *sums(seen, exact), g)
    nibbles, scale, zero, aim, hessian = slow_gptq(weight, seen, exact, g)
    assert torch.equal(nibbles_of(parts), nibbles) and torch.equal(parts["zero"], zero)
    # The scales: least squares of every row, in coordinates where the error is a plain distance.
    root = torch.linalg.cholesky(hessian)
    steps = (nibbles - zero.repeat_interleave(g, 1).double() / 16).unflatten(1, (-1, g))
    for row in range(len(weight)):
        columns = torch.block_diag(*steps[row][:, :, None])  # (K, G)
        best = torch.linalg.lstsq(root.t() @ columns, root.t() @ aim[row][:, None]).solution
        assert torch.allclose(parts["scale"][row].double(), best[:, 0], rtol=1e-3)
    assert not torch.allclose(parts["scale"].double(), scale, rtol=1e-3)


@pytest.mark.parametrize("g", [32, 64, 128])
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(g):
    weight, seen, exact = random_problem(K=256)
    ours, nearest = (dequantize(parts).double() for parts in (
        quantize_gptq(weight, *sums(seen, seen), g), quantize_int4(weight, g)))
    wanted = seen @ weight.t().double()
    assert (seen @ ours.t() - wanted).norm() < 0.6 * (seen @ nearest.t() - wanted).norm()
    wanted = exact @ weight.t().double()  # the original layer's outputs, from its own inputs
    drifted = dequantize(quantize_gptq(weight, *sums(seen, exact), g)).double()
    assert (seen @ drifted.t() - wanted).norm() < (seen @ ours.t() - wanted).norm()


@pytest.mark.parametrize("diagonal", [torch.full((256,), 3.0), torch.zeros(256),
                                      torch.arange(256.0) % 7])
def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest(diagonal):
    """All equally large, all zero, or some of them zero."""
    weight, _, _ = random_problem(K=256)
    ours = quantize_gptq(weight, diagonal.diag(), torch.zeros(256, 256), 64)
    nearest = quantize_int4(weight, 64)
    assert torch.equal(ours["weight"], nearest["weight"])
    assert torch.equal(ours["zero"], nearest["zero"])


def test_weights_that_are_zero_stay_zero():
    weight, seen, exact = random_problem()
    weight[3] = 0
    assert (dequantize(quantize_gptq(weight, *sums(seen, exact), 32))[3] == 0).all()


def test_a_hessian_without_a_cholesky_factor_is_dampened_more_and_that_is_said(caplog):
    weight, seen, _ = random_problem()
    hessian = sums(seen, seen)[0]
    lowest = torch.linalg.eigvalsh(hessian)[0] + 0.05 * hessian.diagonal().mean()
    with caplog.at_level(logging.INFO, "gpt_stream"):
        parts = quantize_gptq(weight, hessian - lowest * torch.eye(192), 0 * hessian, 32, "layer 5")
    assert [r.getMessage() for r in caplog.records] == [
        "layer 5: its Hessian has no Cholesky factor; dampened by 0.1 now"]
    assert dequantize(parts).isfinite().all()


def test_sequences_are_drawn_from_all_over_the_text_and_begin_with_bos():
    _, tokenizer = load(TINY, device="cpu")
    ids = tokenizer.encode(read_text(str(TEXT)), bos=False)
    drawn = sequences_of(str(TEXT), tokenizer, 10, 21)
    assert drawn.shape == (10, 21) and (drawn[:, 0] == tokenizer.bos_id).all()
    starts = [next(i for i in range(0, len(ids), 20) if ids[i:i + 20] == row)
              for row in drawn[:, 1:].tolist()]
    assert len(set(starts)) == 10 and max(starts) > len(ids) / 2
    assert torch.equal(drawn, sequences_of(str(TEXT), tokenizer, 10, 21))


def stands_for(model, file):
    """The float32 model with the weights that a quantized file stands for."""
    for name, weight in model.named_parameters():
        layer = name.removesuffix("weight")
        if layer + "scale" in file:
            weight.copy_(dequantize({name.removeprefix(layer): part for name, part in file.items()
                                     if name.startswith(layer)}))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that the command writes, and the arguments of each call of the solver."""
    out, calls, solve = tmp_path_factory.mktemp("gptq") / "out", {}, gptq.quantize_gptq

    def spy(weight, hessian, drift, group_size, name):
        calls[name] = weight.clone(), hessian.clone(), drift.clone()
        return solve(weight, hessian, drift, group_size, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "quantize_gptq", spy)
        patch.setattr(gptq, "TOKENS", 50)  # a sequence at a time
        status, out_text, err = run("gptq", "--checkpoint", TINY, "--text", TEXT, "--sequences", 2,
                                    "--length", 40, "--group-size", 64, "--out", out)
    assert (status, out_text) == (0, "") and "wrote" in err and "5 of 5 layers" in err
    return out, calls


def test_a_written_folder_is_in_our_format_and_runs_as_what_it_stands_for(written, tmp_path):
    out, _ = written
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    convert(TINY, tmp_path / "nearest", None, asked_quantization("int4", 64))
    ours, nearest = (load_file(folder / "model.safetensors")
                     for folder in (out, tmp_path / "nearest"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in nearest.items()}
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "nearest").iterdir())
    assert (out / "config.json").read_text() == (tmp_path / "nearest" / "config.json").read_text()
    model, tokenizer = load(out, device="cpu", dtype=torch.float32)
    plain = stands_for(load(TINY, device="cpu", dtype=torch.float32)[0], ours)
    prompt = tokenizer.encode("It was a dark and stormy night")
    a, b = (prefill(m, make_cache(m), prompt) for m in (model, plain))
    assert (a - b).abs().max() < 1e-3
    assert run("generate", "--checkpoint", out, "--max-new-tokens", 5)[0] == 0


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_a_layer_is_calibrated_on_what_the_quantized_ones_before_it_say(written, layer):
    """The sums equal those of the layer's inputs in whole models, original and quantized."""
    out, calls = written
    plain, tokenizer = load(TINY, device="cpu", dtype=torch.float32)
    file = load_file(out / "model.safetensors")
    before = {name: part for name, part in file.items() if not name.startswith("layers.")
              or int(name.split(".")[1]) < layer}
    quantized = stands_for(load(TINY, device="cpu", dtype=torch.float32)[0], before)
    sequences, inputs = sequences_of(str(TEXT), tokenizer, 2, 40), {}
    for kind, model in (("seen", quantized), ("exact", plain)):
        for name in block_layers(plain.config):
            model.layers[layer].get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=(kind, name): inputs.update({key: args[0].flatten(0, 1)}))
        model(sequences)
    for name in block_layers(plain.config):
        weight, hessian, drift = calls[f"layers.{layer}.{name}.weight"]
        x, y = inputs["seen", name].double(), inputs["exact", name].double()
        assert torch.equal(weight, plain.layers[layer].get_submodule(name).weight)
        for ours, expected in ((hessian, x.t() @ x), (drift, (y - x).t() @ x)):
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_it_beats_rounding_to_nearest_on_another_text(tmp_path):
    """By the divergence, in nats, from the original's predictions."""
    text = read_text(str(TEXT))
    (tmp_path / "half.txt").write_text(text[:len(text) // 2])
    gptq_checkpoint(TINY, str(tmp_path / "half.txt"), tmp_path / "q", 16, 128, 128, "cpu")
    plain, tokenizer = load(TINY, device="cpu", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(text[len(text) // 2:])[:256]])
    wanted = plain(ids).log_softmax(-1)
    ours, nearest = ((wanted.exp() * (wanted - model(ids).log_softmax(-1))).sum(-1).mean()
                     for model, _ in (load(tmp_path / "q", "cpu", torch.float32),
                                      load(TINY, "cpu", torch.float32, "int4", group_size=128)))
    assert ours < 0.8 * nearest


ARGUMENTS = ["--checkpoint", TINY, "--text", TEXT, "--sequences", 2, "--length", 40]


def test_what_is_refused(written, tmp_path, monkeypatch):
    out = tmp_path / "q"

    def check(*argv, naming):
        refused("gptq", *ARGUMENTS, "--out", out, *argv, naming=naming)
        assert not out.exists()

    check("--sequences", 10**6, naming=[TEXT, "--sequences 1000000", "--length 40", "39000000"])
    check("--length", 257, naming=["--length 257", "256"])
    check("--length", 1, naming=["--length", "at least 2"])
    check("--sequences", 0, naming=["--sequences", "at least 1"])
    check("--group-size", 16, naming=["--group-size"])
    check("--text", tmp_path / "none.txt", naming=[tmp_path / "none.txt"])
    check("--text", TINY / "tokenizer.model", naming=[TINY / "tokenizer.model", "UTF-8"])
    check("--checkpoint", tmp_path / "none", naming=[tmp_path / "none"])
    check("--checkpoint", DRAFT, "--group-size", 128, naming=["group size 128", "64 inputs"])
    check("--checkpoint", written[0], naming=[written[0], "quantized already (int4)"])
    check("--device", "tpu", naming=["tpu"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(naming=["torchrun"])
    monkeypatch.delenv("WORLD_SIZE")
    out.mkdir()
    (out / "mine").write_text("kept")
    refused("gptq", *ARGUMENTS, "--out", out, naming=[out, "exists already"])
    assert (out / "mine").read_text() == "kept"


@pytest.mark.parametrize("name, naming", [
    ("layers.1.attention.out.weight", "layers.1.attention.out.weight has NaN or infinite"),
    ("layers.1.attention_norm.weight", "layers.1.attention.qkv.weight: the text makes its inputs"),
    ("embed.weight", "embed.weight has NaN or infinite")])
def test_what_is_not_finite_is_refused_by_name(name, naming, tmp_path):
    broken = shutil.copytree(DRAFT, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    refused("gptq", *ARGUMENTS, "--checkpoint", broken, "--out", tmp_path / "q", naming=[naming])
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    solve = gptq.quantize_gptq

    def interrupted(weight, hessian, drift, group_size, name):
        if name.startswith("layers.1.feed_forward"):
            raise KeyboardInterrupt
        return solve(weight, hessian, drift, group_size, name)

    monkeypatch.setattr(gptq, "quantize_gptq", interrupted)
    assert run("gptq", *ARGUMENTS, "--checkpoint", DRAFT, "--out", tmp_path / "q")[0] == 130
    assert not list(tmp_path.iterdir())


def test_a_folder_of_hugging_face_gives_the_same(tmp_path, monkeypatch):
    """Its q/k/v and gate/up are apart, and its output projection is not tied."""
    from convert_hf import convert
    from helpers import hf_model
    source = tmp_path / "hf"
    hf_model("Qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=400,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             tie_word_embeddings=False).save_pretrained(source)
    shutil.copyfile(DRAFT / "tokenizer.model", source / "tokenizer.model")
    raw = json.loads((source / "config.json").read_text())
    assert raw["vocab_size"] == 400
    convert(source, tmp_path / "ours")
    monkeypatch.setattr(gptq, "sequences_of", lambda *_: torch.arange(128).view(4, 32) * 3)
    for name in ("hf", "ours"):
        gptq_checkpoint(tmp_path / name, "", tmp_path / f"{name}-q", 4, 32, 32, "cpu")
    a, b = (load_file(tmp_path / f"{name}-q" / "model.safetensors") for name in ("hf", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert a["output.weight"].dtype == torch.int8 and "layers.1.attention.qkv.bias" in a
