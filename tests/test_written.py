"""Files of earlier versions load to the same bits.

Commit c6a0d63 of 2026-11-21 wrote tests/written: a small random Qwen2 of transformers (source),
converted, quantized, and a session of the int4 one in float32 after 70 tokens. Their tokenizer is
the embedded model's.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.session import load_session
from generate import load, make_cache
from helpers import TINY, run

WRITTEN = Path(__file__).parent / "written"
FINGERPRINTS = {"converted": "3e68ebbe2ceb5b71", "int4": "5153bfbb9cb0fbc7",
                "int8": "f290cf2308a3a6c2"}


@pytest.fixture
def folder(tmp_path):
    """tests/written, each checkpoint with its tokenizer."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    for config in (tmp_path / "written").glob("*/config.json"):
        shutil.copyfile(TINY / "tokenizer.model", config.parent / "tokenizer.model")
    return tmp_path / "written"


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_an_old_folder_is_the_same_model_to_the_bit(folder, name):
    model, _ = load(folder / name, device="cpu")
    stored = load_file(folder / name / "model.safetensors")
    if name == "int4":  # its kernel needs another layout
        names = [key for key in stored if "zero" not in key and f"{key[:-6]}zero" not in stored
                 and not (key.endswith("scale") and key.startswith("layers"))]
    else:
        names = list(stored)
        assert {*names} == {*model.state_dict()}
    assert len(names) >= 10
    for key in names:
        ours = model.state_dict()[key]
        assert torch.equal(ours.to_dense(), stored[key]) and ours.dtype == stored[key].dtype
    assert load(folder / name, device="cpu", dtype=torch.float32)[0].fingerprint == (
        FINGERPRINTS[name])


def test_an_old_session_goes_on_to_the_bit(folder):
    model, _ = load(folder / "int4", device="cpu", dtype=torch.float32)
    cache = make_cache(model, 4, 20)
    facts = load_session(folder / "int4.session", {"model": (model, cache)}, system="Be brief.")
    assert facts["last_id"] == 7 and cache.length.tolist() == [70]
    stored = load_file(folder / "int4.session")
    for name, tensor in stored.items():
        _, kind, layer = name.split(".")
        assert torch.equal(getattr(cache, kind)[int(layer)][:, :, :tensor.shape[2]], tensor)


def test_converting_writes_the_same_bytes_as_then(folder, tmp_path):
    status, _, err = run("convert_hf", folder / "source", tmp_path / "out")
    assert status == 0, err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (WRITTEN / "converted" / name).read_bytes()


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_quantizing_says_the_same_of_itself_as_then(folder, tmp_path, mode):
    """Scales may differ in the last bit between machines. Layout and config may not."""
    status, _, err = run("quantize", "--checkpoint", folder / "source", "--quantize", mode,
                         "--out", tmp_path / "out")
    assert status == 0, err
    ours, then = (load_file(at / "model.safetensors") for at in (tmp_path / "out", WRITTEN / mode))
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
        (k, v.shape, v.dtype) for k, v in then.items()]
    configs = [json.loads((at / "config.json").read_text())
               for at in (tmp_path / "out", WRITTEN / mode)]
    assert configs[0] == configs[1]
