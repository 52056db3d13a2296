"""Small random models and in-process runs of the programs, for every test file."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch

from attention import attend_all
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def random_model(seed=0, **changes):
    """A small Transformer whose logits are of order 1 to 10."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48,
                 vocab_size=64, max_seq_len=4096)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**sizes, **changes})).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5 if "embed" not in name else 1.0)
        else:
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def hf_model(family, **config):
    """transformers' model of a family, random, with biases and norms other than 0 and 1."""
    transformers = pytest.importorskip("transformers")  # a second that most files do not need
    name = family + ("TextConfig" if family == "Gemma3" else "Config")
    config = getattr(transformers, name)(**config)
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")._from_config(
        config, attn_implementation="eager").eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.3 * torch.randn(weight.shape))
    return model


def as_on_a_gpu(monkeypatch):
    """Attention and sampling as GPUs compute them. (A CPU looks how much is held, and at what is
    drawn, which costs it nothing.)"""
    for module in ("sample", "draw"):
        monkeypatch.setattr(f"{module}.on_cpu", lambda logits: False)
    monkeypatch.setattr("kv_cache.KVCache.in_use", lambda cache, n_tokens: cache.every_slot)
    monkeypatch.setattr("model.attend", lambda q_sink, q_recent, k, v, at: attend_all(
        q_sink, q_recent, k, v, at.mask, at.n_sink))


def run(program, *argv, stdin=""):
    """(exit status, stdout, stderr) of a program's main, in this process."""
    folder = program in ("bench", "server")
    module = importlib.import_module(f"{program}.__main__" if folder else program)
    if program == "chat" and "--checkpoint" not in argv:  # its own default would be fetched
        argv = ("--checkpoint", TINY, *argv)
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [f"{program}.py", *map(str, argv)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv, sys.stdin = before
    return status, out.getvalue(), err.getvalue()
