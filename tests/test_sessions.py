"""A saved session goes on as if nothing had interrupted it; a refused one changes nothing."""

import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import chat
from formats import session
from formats.session import load_session, save_session
from generate import generate, load, make_cache
from helpers import TINY, random_model, run
from kv_cache import KVCache
from speculate import Speculation
from test_errors import refused
from test_generate import records
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
    assert load_session(tmp_path / "s", resumed)["last_id"] == 7
    following = tokens_of(60, seed=1, rows=rows)
    assert torch.equal(feed(resumed, following), feed(kept, following))
    assert addresses == [t.data_ptr() for t in (*cache.k, *cache.v, cache.length)]


def test_a_rollback_stays_as_deep_as_it_was(tmp_path):
    kept, resumed = new_caches(rows=2), new_caches(rows=2)
    feed(kept, tokens_of(64, rows=2))
    kept["model"][1].rollback([CHUNK - 1, 3])
    save_session(tmp_path / "s", kept)
    assert "last_id" not in load_session(tmp_path / "s", resumed)
    for caches in (kept, resumed):
        with pytest.raises(ValueError, match="may be undone"):
            caches["model"][1].rollback([2, 0])
        caches["model"][1].rollback([1, 13])
    following = tokens_of(40, seed=1, rows=2)
    assert torch.equal(feed(resumed, following), feed(kept, following))


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_uninterrupted_stream(tmp_path):
    model, _ = load(TINY, device="cpu", dtype=torch.float32)
    prompt, options = list(range(300, 340)), dict(stop_ids=())
    whole = list(generate(model, make_cache(model, 4, 60), prompt, 300, **options))
    cache = make_cache(model, 4, 60)
    first = list(generate(model, cache, prompt, 200, **options))
    cache.rollback(1)  # to be read again: a generation begins with a prompt
    save_session(tmp_path / "s", {"model": (model, cache)}, last_id=first[-1])
    resumed = make_cache(model, 4, 60)
    assert load_session(tmp_path / "s", {"model": (model, resumed)})["last_id"] == first[-1]
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
    with session.safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[session.SESSION])
    tensors = load_file(path)
    (change_tensors or (lambda t: None))(tensors)
    (change_facts or (lambda f: None))(facts)
    save_file(tensors, path, {session.SESSION: json.dumps(facts)})


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
        {"length": None}, {"length": [-1]}, {"length": 40}, {"overhang": []}, {"overhang": ["1"]},
        {"overhang": [10**6]})],
    lambda path: rewrite(path, None, lambda f: f.update(model=[])),
    *[lambda path, bad=bad: rewrite(path, None, lambda f: f.update(bad)) for bad in (
        {"last_id": "7"}, {"last_id": 64}, {"unread": 5}, {"unread": [-1]}, {"unread": [1, 2]})],
    lambda path: rewrite(path, None, lambda f: f["model"].update(length=[2**62])),
    lambda path: save_file(load_file(path), path, {session.SESSION: "[" * 100_000}),
    lambda path: save_file(load_file(path), path, {session.SESSION: "{"})])
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
    monkeypatch.setattr(session, "save_file", half_then(error))
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_session(saved, new_caches())
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_save_while_another_program_loads_gives_it_one_of_the_two(saved, monkeypatch):
    """The tensors of one session and the facts of another would be neither."""
    ours, other, original = new_caches(), new_caches(), torch.UntypedStorage.from_file
    feed(ours, tokens_of(3))
    feed(other, tokens_of(40, seed=5))
    before = load_file(saved)

    def meanwhile(*args, **options):
        save_session(saved, other, last_id=8)
        return original(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", meanwhile)
    assert load_session(saved, ours)["last_id"] == 7
    assert torch.equal(ours["model"][1].k[0][:, :, :29], before["model.k.0"])
    monkeypatch.undo()
    assert load_session(saved, ours)["last_id"] == 8


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path, "not a file"), (tmp_path / "pipe", "not a file"),
                       (tmp_path / "none" / "s", "no folder")):
        with pytest.raises(ValueError, match=word):
            save_session(path, new_caches())
    assert os.listdir(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


# ------------------------------------------------------------------------------ chat.py

GREEDY = ("--dtype", "fp32", "--temperature", 0, "--max-new-tokens", 12, "--window", 60)


def turns(path, first, last):
    lines = [json.dumps({"turns": [f"Tell me of cat {i}."]}) for i in range(first, last)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [(), ("--draft", DRAFT, "--speculate", 3), ("--lookup",)])
def test_two_halves_are_one_conversation(tmp_path, speculation):
    def chat(first, last, *argv):
        return records("--prompts", turns(tmp_path / "turns.jsonl", first, last), *GREEDY, *argv,
                       program="chat")

    session = tmp_path / "s"
    plain, whole = chat(0, 8), chat(0, 8, *speculation)
    halves = chat(0, 4, "--save-session", session, *speculation)
    halves += chat(4, 8, "--load-session", session, *speculation)
    keys = ["token_ids", "text", "prompt_tokens", "evicted", "finish_reason", "cache_bytes"]
    for key in keys + (["proposed", "accepted"] if "--draft" in speculation else []):
        assert [r[key] for r in halves] == [r[key] for r in whole], key
    assert [r["token_ids"] for r in halves] == [r["token_ids"] for r in plain]
    assert halves[-1]["evicted"] > 2 * 64


def test_a_draft_that_the_session_does_not_hold_begins_anew(tmp_path):
    turns(tmp_path / "turns.jsonl", 0, 3)
    argv = ("--json", "--prompts", tmp_path / "turns.jsonl", *GREEDY)
    run("chat", *argv, "--save-session", tmp_path / "s")
    _, plain, _ = run("chat", *argv, "--load-session", tmp_path / "s")
    _, speculated, err = run("chat", *argv, "--load-session", tmp_path / "s", "--draft", DRAFT)
    assert "the draft begins anew" in err
    for line, expected in zip(speculated.splitlines(), plain.splitlines(), strict=True):
        assert json.loads(line)["token_ids"] == json.loads(expected)["token_ids"]


def test_a_draft_that_no_longer_reads_along_is_not_kept(tmp_path):
    model, tokenizer = load(TINY, device="cpu")
    draft, _ = load(DRAFT, device="cpu")
    speculation = Speculation(draft, make_cache(draft, 4, 60))
    talk = chat.Conversation(model, tokenizer, make_cache(model, 4, 60), speculation, None)
    list(generate(model, talk.cache, [5, 6, 7], 40, speculation=speculation, stop_ids=()))
    speculation.size = 0  # it did not pay
    list(generate(model, talk.cache, [8, 9], 3, speculation=speculation, stop_ids=()))
    chat.save_conversation(tmp_path / "s", talk)
    chat.load_conversation(tmp_path / "s", talk)
    assert talk.cache.length == 48 and talk.speculation.cache.length == 0
    assert speculation.size > 0  # and may try again


def test_typed_save_and_load_take_the_conversation_back(tmp_path):
    typed = f"Hello\n/save {tmp_path}/s\nGo on\n/load {tmp_path}/s\nGo on\n/reset\nGo on\n"
    status, out, err = run("chat", "--json", *GREEDY, stdin=typed)
    _, once, again, fresh = map(json.loads, out.splitlines())
    assert status == 0 and f"saved {tmp_path}/s" in err and f"loaded {tmp_path}/s" in err
    for key in ("token_ids", "prompt_tokens", "evicted"):
        assert once[key] == again[key]
    assert fresh["token_ids"] != again["token_ids"]


def test_a_typed_refusal_is_one_line_and_the_conversation_goes_on(tmp_path):
    (tmp_path / "foreign").write_text("x" * 100)
    refusals = ["/load", "/save", f"/load {tmp_path}/none", f"/load {tmp_path}/foreign",
                f"/load {tmp_path}", f"/save {tmp_path}", f"/save {tmp_path}/none/s"]
    plain = records(*GREEDY, program="chat", stdin="Hello\nGo on\n")
    typed = "\n".join(["Hello", *refusals, "Go on"])
    status, out, err = run("chat", "--json", *GREEDY, stdin=typed)
    assert status == 0 and "Traceback" not in err
    between = err[err.index("turn 0:"):err.index("turn 1:")].splitlines()[1:]
    assert len(between) == len(refusals)
    for line, command in zip(between, refusals, strict=True):
        assert command.split()[-1] in line
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == [
        r["token_ids"] for r in plain]
    assert os.listdir(tmp_path) == ["foreign"]


def test_a_pinned_system_turn_is_read_once_and_begins_every_conversation(tmp_path):
    system, session = "You are a cat, and you speak of fish.", tmp_path / "s"
    pinned = ("--pin-system", system, *GREEDY)
    plain = records(*pinned, program="chat", stdin="Hello\nGo on\n")
    status, out, err = run("chat", *pinned, "--save-session", session, stdin="")
    assert (status, out) == (0, ""), err
    before = session.read_bytes()
    _, tokenizer = load(TINY, device="cpu")
    n_system = len(tokenizer.system_turn(system))
    for _ in range(2):
        first, second = records(*pinned, "--load-session", session, program="chat",
                                stdin="Hello\nGo on\n")
        assert first["prompt_tokens"] == plain[0]["prompt_tokens"] - n_system
        assert [first["token_ids"], second["token_ids"]] == [r["token_ids"] for r in plain]
        for key in ("prompt_tokens", "evicted"):
            assert second[key] == plain[1][key]
    assert session.read_bytes() == before
    other = system.replace("fish", "mice")
    for argv in (["--pin-system", other], ["--sink", n_system]):
        refused("chat", *argv, *GREEDY, "--load-session", session, naming=[session, system])


def test_raw_lines_go_on_where_a_session_ends(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"prompt": "The cat"}\n')
    argv = ("--prompts", tmp_path / "raw.jsonl", *GREEDY)
    run("chat", *argv, "--save-session", tmp_path / "s")
    resumed = records(*argv, "--load-session", tmp_path / "s", program="chat")
    _, tokenizer = load(TINY, device="cpu")
    assert resumed[0]["prompt_tokens"] == len(tokenizer.encode("The cat", bos=False))


def test_the_command_line_refuses_in_one_line(tmp_path):
    session = tmp_path / "s"
    refused("chat", "--save-session", session, naming=[session, "nothing has been said"])
    refused("chat", "--save-session", tmp_path / "no" / "s", naming=["no folder"])
    refused("chat", "--save-session", tmp_path, naming=[tmp_path, "not a file"])
    refused("chat", "--load-session", session, naming=[session, "no such"])
    run("chat", *GREEDY, "--save-session", session, stdin="Hello\n")
    before = session.read_bytes()
    for argv, word in ((["--window", 59], "window is 60"), (["--sink", 5], "sink"),
                       (["--dtype", "bf16"], "dtype"), (["--checkpoint", DRAFT], "model"),
                       (["--quantize", "int8"], "model and quantization")):
        refused("chat", *GREEDY, *argv, "--load-session", session, naming=[session, word])
    assert session.read_bytes() == before
