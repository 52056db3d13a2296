"""The recipe of the embedded checkpoints, on a small text for a few steps."""

import json
import os
import subprocess
import sys

import pytest

from generate import generate, load, make_cache
from helpers import TINY

ROOT = TINY.parent.parent


@pytest.mark.slow
def test_the_recipe_makes_a_checkpoint_that_loads(tmp_path):
    text = (ROOT / "README.md").read_text() * 3
    (tmp_path / "text.txt").write_text(text)
    done = subprocess.run(
        [sys.executable, str(TINY / "train.py"), "--text", tmp_path / "text.txt",
         "--valid", tmp_path / "text.txt", "--out", tmp_path / "model", "--vocab", "400",
         "--dim", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--ffn", "48",
         "--steps", "20"],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 20 and result["valid_loss"] < 7
    model, tokenizer = load(tmp_path / "model", device="cpu")
    assert model.config.tied_embeddings and model.config.max_seq_len == 256
    text = "The stream\nand the bus"
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert len(list(generate(model, make_cache(model), tokenizer.encode("The"), 5))) == 5
