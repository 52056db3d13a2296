"""What a converted folder holds. test_model.py checks its logits."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_hf import convert
from formats.config import config_from_hf, hf_parts
from formats.folder import open_file, read_config
from generate import load
from helpers import TINY, random_model, run
from linear import ONEDNN, cpu_kind
from model import Transformer
from quantize import empty_model
from terminal import progress

LLAMA = dict(architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48,
             vocab_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)


@pytest.fixture
def hf_folder(tmp_path):
    """A Hugging Face folder of random weights, in two files."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    shutil.copy(TINY / "tokenizer.model", folder)
    config = config_from_hf(LLAMA)
    ours = random_model().state_dict()
    weights = {}
    for name, parts in hf_parts(config).items():
        assert sum(shape[0] for shape in parts.values()) == len(ours[name])
        weights.update({part: torch.randn(shape) for part, shape in parts.items()})
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # q, k, v apart
    for file, held in files.items():
        save_file({n: weights[n] for n in held}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {n: file for file, held in files.items() for n in held}}))
    return folder


def weights_of(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_rows_are_stacked_in_order_and_files_come_along(hf_folder, tmp_path):
    status, out, err = run("convert_hf", hf_folder, tmp_path / "out")
    assert status == 0 and "of 15 tensors" in err
    theirs, ours = weights_of(hf_folder), weights_of(tmp_path / "out")
    layer = "model.layers.1.self_attn."
    assert torch.equal(ours["layers.1.attention.qkv.weight"], torch.cat(
        [theirs[f"{layer}{n}_proj.weight"] for n in "qkv"]))
    assert torch.equal(ours["layers.0.feed_forward.gate_up.weight"], torch.cat(
        [theirs[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")]))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.model", "model.safetensors"}
    assert read_config(tmp_path / "out")[1] == read_config(hf_folder)[1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("terminal", [None, "dumb"])
def test_in_a_log_and_on_a_dumb_terminal_progress_is_few_plain_lines(terminal, capsys, monkeypatch):
    monkeypatch.setenv("TERM", terminal or "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal))
    with progress("reading", "books") as show:
        for n in range(1, 48):
            show(n, 47, f"page {n}")
    assert capsys.readouterr().err == "reading: 47 of 47 books, 00:00 passed, page 47\n"
    with pytest.raises(KeyError), progress("reading a{x}.txt", "books") as show:
        show(3, 47)
        raise KeyError
    assert capsys.readouterr().err == "reading a{x}.txt: 3 of 47 books, 00:00 passed\n"
    with pytest.raises(KeyError), progress("reading", "books"):
        raise KeyError
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_on_a_terminal_progress_is_one_moving_line(hf_folder, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(sys.executable, ["convert_hf.py", str(hf_folder), str(tmp_path / "out")],
                          cwd=TINY.parent.parent, encoding="utf-8", timeout=60,
                          env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"}, dimensions=(24, 40))
    child.expect(pexpect.EOF)
    moving, said, end = child.before.split("\r\n")
    assert "\x1b" not in moving and all(len(state) <= 40 for state in moving.split("\r"))
    assert "100%" in moving and "15/15" in moving and moving.startswith("\rconverting:")
    assert (said, end) == (f"wrote {tmp_path / 'out'}", "")


def test_several_files_are_written_one_after_the_other(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.folder.FILE_BYTES", 10_000)
    convert(hf_folder, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model, _ = load(tmp_path / "out", device="cpu")
    direct, _ = load(hf_folder, device="cpu")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_dtype_is_converted_and_recorded(hf_folder, tmp_path):
    run("convert_hf", hf_folder, tmp_path / "out", "--dtype", "bf16")
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "out", device="cpu")[0].embed.weight.dtype == torch.bfloat16


def test_a_checkpoint_of_mixed_dtypes_takes_its_embedding_s(hf_folder):
    weights = load_file(hf_folder / "b.safetensors")
    save_file({n: t.double() if "norm" in n else t for n, t in weights.items()},
              hf_folder / "b.safetensors")
    model, _ = load(hf_folder, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model, _ = load(hf_folder, device="cpu", dtype=torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16


def test_old_files_extra_tables_and_tied_copies_are_no_obstacle(hf_folder, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(extra, hf_folder / "c.safetensors")
    index = hf_folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(extra))] = "c.safetensors"
    index.write_text(json.dumps(content))
    (hf_folder / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    copy = {"lm_head.weight": weights_of(hf_folder)["model.embed_tokens.weight"].clone()}
    save_file({**load_file(hf_folder / "a.safetensors"), **copy}, hf_folder / "a.safetensors")
    convert(hf_folder, tmp_path / "out")
    assert "output.weight" not in weights_of(tmp_path / "out")


def test_a_damaged_pickle_is_named(tmp_path):
    """It asks for a memo that was never stored, which the unpickler answers with a KeyError."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, path)
    assert open_file(path)["b"].tolist() == [1, 1]
    whole = path.read_bytes()
    assert b"h\x02" in whole  # BINGET 2
    path.write_bytes(whole.replace(b"h\x02", b"h\xc8"))
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged or not a weights file"):
        open_file(path)
    torch.save([torch.ones(3)], path)
    with pytest.raises(ValueError, match="pytorch_model.bin: .* other things than plain tensors"):
        open_file(path)


@pytest.mark.slow
def test_loading_maps_the_file_instead_of_copying_it(tmp_path):
    """Resident anonymous memory stays far below the size of the weights."""
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 40_000,
              "gpt_stream": {"format": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Transformer(
            config_from_hf(config)).named_parameters()}
    weights = {n: torch.zeros(s) for n, s in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    script = ("import sys; from generate import load\n"
              "anonymous = lambda: next(int(line.split()[1]) for line in open('/proc/self/status')"
              " if line.startswith('RssAnon'))\n"
              "load('checkpoints/tiny', device='cpu')\n"  # imports the libraries
              "before = anonymous(); model, _ = load(sys.argv[1], device='cpu')\n"
              "model.embed.weight.sum(); print(anonymous() - before)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=TINY.parent.parent,
                          capture_output=True, text=True, check=True)
    size = sum(w.nbytes for w in weights.values())
    assert size > 200e6 and int(done.stdout) * 1024 < 0.1 * size


def test_on_a_cpu_bf16_weights_are_laid_out_for_its_library_and_others_stay():
    """The CPU's library reads its own layout of bf16 faster. `to_dense` gives the rows back."""
    rows, _ = load(TINY, device="cpu", dtype=torch.float32)
    packed, _ = load(TINY, device="cpu", dtype=torch.bfloat16)
    assert ONEDNN not in [getattr(module, "layout", None) for module in rows.modules()]
    if cpu_kind() in ("avx512", "amx"):
        weight = packed.layers[0].feed_forward.down.weight
        assert packed.output.layout == packed.layers[0].feed_forward.down.layout == ONEDNN
        assert torch.equal(weight.to_dense(), rows.layers[0].feed_forward.down.weight.bfloat16())


def test_loading_opens_every_file_once_and_builds_one_empty_model(hf_folder, monkeypatch):
    """A folder is read into one Checkpoint, which the model is made of."""
    opened, built = [], []
    monkeypatch.setattr("formats.folder.open_file",
                        lambda path, read=open_file: opened.append(path.name) or read(path))
    monkeypatch.setattr("load.empty_model",
                        lambda *args, make=empty_model: built.append(args) or make(*args))
    load(hf_folder, device="cpu", quantize="int8")
    assert sorted(opened) == ["a.safetensors", "b.safetensors"] and len(built) == 1


@pytest.mark.parametrize("key", ["gpt_stream", "quantization_config"])
def test_null_in_a_config_is_as_if_the_key_were_missing(tmp_path, key):
    shutil.copytree(TINY, tmp_path / "it")
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    (tmp_path / "it" / "config.json").write_text(json.dumps({**config, key: None}))
    model, _ = load(tmp_path / "it", device="cpu")
    assert model.fingerprint == load(TINY, device="cpu")[0].fingerprint
    convert(tmp_path / "it", tmp_path / "out")
