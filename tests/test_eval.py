"""Perplexities of a text, each way of keeping the past against the plain definition of it."""

import json
import math

import pytest
import torch

from eval import measure
from generate import load
from helpers import TINY, random_model, run
from kv_cache import KVCache
from test_errors import refused

TEXT = "The cat sat on the mat. It was a dark and stormy night, and the dog was not amused.\n" * 30


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, device="cpu", dtype=torch.float32)


def nats_of(logits, targets):
    return -logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("mode, sizes", [("stream", (2, 30)), ("window", (0, 32))])
def test_a_stream_is_the_model_fed_token_by_token(tiny, mode, sizes):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer.encode(TEXT)[:200])
    cache = KVCache(model.config, 1, *sizes, max_chunk=1)
    logits = torch.cat([model(token.view(1, 1), cache)[0] for token in ids[:-1]])
    assert torch.allclose(measure(model, ids, mode, 2, 30).double(), nats_of(logits, ids[1:]),
                          atol=1e-4)


@pytest.mark.parametrize("length", [5, 32, 33, 34, 90])
def test_recomputing_reads_the_latest_tokens_anew(tiny, length):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer.encode(TEXT)[:length])
    expected = torch.cat([nats_of(model(ids[None, max(0, i - 32):i])[0, -1:], ids[i:i + 1])
                          for i in range(1, length)])
    assert torch.allclose(measure(model, ids, "recompute", 2, 30).double(), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["stream", "recompute"])
@pytest.mark.parametrize("every", [2, 7, 50])
def test_every_nth_token_is_one_of_all(tiny, mode, every):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer.encode(TEXT)[:121])
    some = measure(model, ids, mode, 2, 30, every)
    assert len(some) == 120 // every
    assert torch.allclose(some, measure(model, ids, mode, 2, 30)[every - 1::every], atol=1e-4)


def test_more_between_two_tokens_than_the_text_has_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    refused("eval", "--text", tmp_path / "text.txt", "--max-tokens", 30, "--every", 31,
            naming=["--every 31"])


def test_dense_ends_at_the_trained_context(tiny):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer.encode(TEXT)[:400])
    nats = measure(model, ids, "dense", 4, 252)
    assert len(nats) == 256
    assert torch.allclose(nats.double(), nats_of(model(ids[None, :256])[0], ids[1:257]), atol=1e-4)


def test_a_sliding_window_bounds_every_mode():
    model, ids = random_model(sliding_window=20), torch.arange(50) % 64
    assert len(measure(model, ids, "dense", 4, 20)) == 20
    for mode in ("window", "recompute"):
        assert torch.allclose(measure(model, ids, mode, 4, 20), measure(model, ids, mode, 0, 20))
    with pytest.raises(ValueError, match="21 tokens without a cache .* window of 20"):
        model(ids[None, :21])


def test_the_program_prints_a_record_a_run_and_draws(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    status, out, err = run("eval", "--text", tmp_path / "text.txt", "--max-tokens", 300, "--json",
                           "--mode", "stream", "window", "--sink", 0, 4, "--window", 60,
                           "--plot", tmp_path / "plot.png")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0, err
    assert [(r["mode"], r["sink"]) for r in records] == [
        ("stream", 0), ("stream", 4), ("window", 0)]
    for r in records:
        assert r["tokens"] == 300
        assert math.isclose(math.exp(r["nats"]), r["perplexity"], rel_tol=1e-5)
    assert (tmp_path / "plot.png").stat().st_size > 5000
