"""A saved session goes on as if it had never been interrupted, and a refused one changes nothing."""

import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kv_cache
from generate import generate, load, make_cache
from helpers import TINY, random_model
from kv_cache import KVCache, load_session, save_session
from test_kv_cache import tokens_of

DRAFT = TINY.parent / "tiny-draft"
WINDOW, CHUNK = 12, 16  # with 2 sinks 29 slots


def new_caches(rows=1, seed=0, n_sink=2, window=WINDOW, chunk=CHUNK, dtype=torch.float32):
    model = random_model(seed).to(dtype)
    model.fingerprint = f"random {seed}"
    return {"model": (model, KVCache(model.config, rows, n_sink, window, chunk, dtype))}


def feed(caches, tokens):
    model, cache = caches["model"]
    return torch.cat([model(part, cache) for part in tokens.split(7, dim=1)], dim=1)


def state(caches):
    """Everything that a cache holds, copied."""
    _, cache = caches["model"]
    return [t.clone() for t in (*cache.k, *cache.v, cache.length)], list(cache.overhang)


def same(before, after):
    return before[1] == after[1] and all(map(torch.equal, before[0], after[0]))


@pytest.fixture
def saved(tmp_path):
    """A session of 40 tokens."""
    caches = new_caches()
    feed(caches, tokens_of(40))
    save_session(tmp_path / "a.session", caches, last_id=7)
    return tmp_path / "a.session"


# ------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 5, 28, 29, 30, 300])
def test_logits_are_those_of_the_uninterrupted_stream(tmp_path, length, rows):
    kept, resumed = new_caches(rows), new_caches(rows)
    feed(kept, tokens_of(length, rows=rows))
    save_session(tmp_path / "s", kept, last_id=7)
    feed(resumed, tokens_of(100, seed=9, rows=rows))  # what a cache held before is forgotten
    _, cache = resumed["model"]
    addresses = [t.data_ptr() for t in (*cache.k, *cache.v, cache.length)]
    assert load_session(tmp_path / "s", resumed) == 7
    following = tokens_of(60, seed=1, rows=rows)
    assert torch.equal(feed(resumed, following), feed(kept, following))
    assert addresses == [t.data_ptr() for t in (*cache.k, *cache.v, cache.length)]


def test_a_rollback_stays_as_deep_as_it_was(tmp_path):
    kept, resumed = new_caches(rows=2), new_caches(rows=2)
    feed(kept, tokens_of(64, rows=2))
    kept["model"][1].rollback([CHUNK - 1, 3])
    save_session(tmp_path / "s", kept)
    assert load_session(tmp_path / "s", resumed) is None
    for caches in (kept, resumed):
        with pytest.raises(ValueError, match="may be undone"):
            caches["model"][1].rollback([2, 0])
        caches["model"][1].rollback([1, 13])
    following = tokens_of(40, seed=1, rows=2)
    assert torch.equal(feed(resumed, following), feed(kept, following))


def test_greedy_tokens_are_those_of_the_uninterrupted_stream(tmp_path):
    model, _ = load(TINY, device="cpu", dtype=torch.float32)
    prompt, options = list(range(300, 340)), dict(ignore_eos=True)
    whole = list(generate(model, make_cache(model, 4, 60), prompt, 300, **options))
    cache = make_cache(model, 4, 60)
    first = list(generate(model, cache, prompt, 200, **options))
    cache.rollback(1)  # to be read again: a generation begins with a prompt
    save_session(tmp_path / "s", {"model": (model, cache)}, first[-1])
    resumed = make_cache(model, 4, 60)
    assert load_session(tmp_path / "s", {"model": (model, resumed)}) == first[-1]
    assert first + list(generate(model, resumed, first[-1:], 100, **options)) == whole


def test_a_short_session_is_a_small_file(tmp_path):
    caches = new_caches()
    feed(caches, tokens_of(3))
    save_session(tmp_path / "s", caches)
    tensors = load_file(tmp_path / "s")
    assert all(t.shape == (1, 2, 3, 8) for t in tensors.values()) and len(tensors) == 4


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("other, words", [
    (dict(seed=1), ["model", "random 0", "random 1"]), (dict(dtype=torch.bfloat16), ["bfloat16"]),
    (dict(window=13), ["window", "12", "13"]), (dict(n_sink=3), ["sink is 2", "3"]),
    (dict(chunk=17), ["max_chunk", "16", "17"]), (dict(rows=2), ["batch_size", "1", "2"])])
def test_a_session_of_another_model_or_cache_changes_nothing(saved, other, words):
    caches = new_caches(**other)
    feed(caches, tokens_of(20, seed=3, rows=other.get("rows", 1)))
    before = state(caches)
    with pytest.raises(ValueError) as error:
        load_session(saved, caches)
    assert all(word in str(error.value) for word in [str(saved), *words])
    assert same(before, state(caches))


def rewrite(path, change_tensors=None, change_facts=None):
    """Change what a session file holds, keeping it a valid safetensors file."""
    with kv_cache.safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[kv_cache.SESSION])
    tensors = load_file(path)
    (change_tensors or (lambda t: None))(tensors)
    (change_facts or (lambda f: None))(facts)
    save_file(tensors, path, {kv_cache.SESSION: json.dumps(facts)})


@pytest.mark.parametrize("damage", [
    *[lambda path, cut=cut: path.write_bytes(path.read_bytes()[:cut])
      for cut in (0, 5, 200, 3000, -1)],
    lambda path: path.write_text("no session " * 100), lambda path: path.unlink(),
    lambda path: path.unlink() or path.mkdir(),
    lambda path: shutil.copy(TINY / "model.safetensors", path),
    lambda path: rewrite(path, lambda t: t.pop("model.k.1")),
    lambda path: rewrite(path, lambda t: t.update({"model.v.0": t["model.v.0"][:, :, 1:].clone()})),
    lambda path: rewrite(path, lambda t: t.update({"model.v.1": t["model.v.1"].half()})),
    *[lambda path, bad=bad: rewrite(path, None, lambda f: f["model"].update(bad)) for bad in (
        {"length": None}, {"length": [-1]}, {"length": 40}, {"overhang": []}, {"overhang": ["1"]})],
    lambda path: rewrite(path, None, lambda f: f.update(model=[])),
    lambda path: rewrite(path, None, lambda f: f.pop("system")),
    lambda path: save_file(load_file(path), path, {kv_cache.SESSION: "{"})])
def test_a_damaged_or_foreign_file_changes_nothing(saved, damage):
    caches = new_caches()
    feed(caches, tokens_of(20, seed=3))
    before = state(caches)
    damage(saved)
    with pytest.raises(ValueError, match=str(saved)):
        load_session(saved, caches)
    assert same(before, state(caches))


def test_a_fingerprint_tells_models_apart(tmp_path):
    def of(folder=TINY, **options):
        return load(folder, device="cpu", **options)[0].fingerprint

    tuned = shutil.copytree(TINY, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["layers.3.feed_forward.down.weight"][0, 5] += 0.5
    save_file(weights, tuned / "model.safetensors")
    different = [of(), of(tuned), of(DRAFT), of(dtype=torch.float32), of(quantize="int8"),
                 of(quantize="int4"), of(quantize="int4", group_size=64)]
    assert len(set(different)) == 7
    assert of() == of(shutil.copytree(TINY, tmp_path / "copy"))


# ------------------------------------------------------------------------------ whole or not at all


def half_then(error):
    def write(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error
    return write


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device"),
    KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error):
    before = saved.read_bytes()
    monkeypatch.setattr(kv_cache, "save_file", half_then(error))
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_session(saved, new_caches())
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path, "not a file"), (tmp_path / "pipe", "not a file"),
                       (tmp_path / "none" / "s", "no folder")):
        with pytest.raises(ValueError, match=word):
            save_session(path, new_caches())
    assert os.listdir(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()
