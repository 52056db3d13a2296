"""One conversation through a small window, and what is typed."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from formats.session import read_session
from formats.tools import grammar_of_calls
from generate import answer, generate, load, make_cache, timed_prefill
from helpers import TINY, run
from sample import Sampling
from test_errors import refused
from test_generate import records
from tokenizer import Tokenizer
from tool_forms import CLOCK, HERMES, TOOLS


def write_turns(path, n):
    lines = [json.dumps({"turns": [f"Tell me of cat {i}.", f"And of dog {i}?"]})
             for i in range(n // 2)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """The records of forty turns, greedy, through 4 sinks and a window of 60."""
    prompts = write_turns(tmp_path_factory.mktemp("chat") / "turns.jsonl", 44)
    return records("--prompts", prompts, "--limit", 40, "--window", 60, "--max-new-tokens", 12,
                   "--temperature", 0, "--dtype", "fp32", program="chat")


@pytest.mark.slow
def test_each_of_forty_turns_prefills_only_its_own_tokens(forty):
    assert [r["turn"] for r in forty] == list(range(40))
    _, tokenizer = load(TINY, device="cpu")
    for turn, record in enumerate(forty[1:], 1):
        text = f"And of dog {turn // 2}?" if turn % 2 else f"Tell me of cat {turn // 2}."
        assert record["prompt_tokens"] == len(tokenizer.next_turn(text, -1))


def test_memory_does_not_grow(forty):
    assert len({r["cache_bytes"] for r in forty}) == 1
    assert forty[-1]["evicted"] > 10 * 64


def test_the_conversation_is_one_uninterrupted_stream(forty):
    """Replaying every id of it, one by one, gives the same greedy answers; nothing was lost."""
    model, tokenizer = load(TINY, device="cpu", dtype=torch.float32)
    cache = make_cache(model, 4, 60)
    seen, last_id = 0, None
    for turn, record in enumerate(forty[:12]):
        text = f"And of dog {turn // 2}?" if turn % 2 else f"Tell me of cat {turn // 2}."
        ids = tokenizer.next_turn(text, last_id) if turn else tokenizer.first_turn(text)
        for token_id in ids:
            logits = model(torch.tensor([[token_id]]), cache)
        for token_id in record["token_ids"]:
            # Chunks and single tokens round differently, so a near tie may fall either way.
            assert logits[0, 0, token_id] > logits.max() - 1e-3
            logits = model(torch.tensor([[token_id]]), cache)
        seen += len(ids) + len(record["token_ids"])
        last_id = record["token_ids"][-1]
        assert record["evicted"] == max(0, seen - 64)


def test_a_pinned_system_turn_becomes_the_sinks(tmp_path):
    prompts = write_turns(tmp_path / "turns.jsonl", 4)
    system = "You are a cat, and you speak of fish."
    pinned = records("--prompts", prompts, "--pin-system", system, "--window", 60,
                     "--max-new-tokens", 30, program="chat")
    model, tokenizer = load(TINY, device="cpu")
    n_sink = len(tokenizer.system_turn(system))
    assert pinned[0]["cache_bytes"] == make_cache(model, n_sink, 60).nbytes()
    assert pinned[0]["prompt_tokens"] == len(tokenizer.first_turn("Tell me of cat 0.", system))
    total = sum(r["prompt_tokens"] + r["new_tokens"] for r in pinned)
    assert pinned[-1]["evicted"] == total - n_sink - 60


def test_typed_turns_reset_and_quit():
    status, out, err = run("chat", "--json", "--temperature", 0, "--max-new-tokens", 6,
                           stdin="Hello\n\nHello\n/reset\nHello\n/quit\nnever said\n")
    first, second, fresh = map(json.loads, out.splitlines())
    assert status == 0 and "3 turns" in err
    assert fresh["token_ids"] == first["token_ids"]
    assert fresh["prompt_tokens"] == first["prompt_tokens"] and fresh["turn"] == 2


def test_a_typed_line_that_is_not_text_is_refused_and_the_conversation_goes_on():
    argv = ("chat", "--json", "--temperature", 0, "--max-new-tokens", 6)
    status, out, err = run(*argv, stdin="Hello\ncaf\udce9\nHello\n")
    assert status == 0 and "turn 0:" in err.split("the turn is not UTF-8 text")[0]
    ids = [json.loads(line)["token_ids"] for line in out.splitlines()]
    plain = run(*argv, stdin="Hello\nHello\n")[1]
    assert ids == [json.loads(line)["token_ids"] for line in plain.splitlines()]


def test_raw_prompts_go_on_without_a_template(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"prompt": "The cat"}\n{"prompt": " and the dog"}\n')
    first, second = records("--prompts", tmp_path / "raw.jsonl", "--max-new-tokens", 5,
                            program="chat")
    _, tokenizer = load(TINY, device="cpu")
    assert first["prompt_tokens"] == len(tokenizer.encode("The cat"))
    assert second["prompt_tokens"] == len(tokenizer.encode(" and the dog", bos=False))


def test_help_is_told_and_exit_leaves():
    status, out, err = run("chat", stdin="/help\n/exit\nHello\n")
    assert status == 0 and out == "" and "/save FILE" in err and "turn 0" not in err


def test_text_and_figures_are_kept_apart(tmp_path):
    prompts = write_turns(tmp_path / "turns.jsonl", 2)
    argv = ("--prompts", prompts, "--max-new-tokens", 8)
    _, out, err = run("chat", *argv, "--seed", 5)
    assert out == "".join(r["text"] + "\n" for r in records(*argv, program="chat"))
    assert "turn 1:" in err and "2 turns" in err and "first token after" in err


def test_an_interrupt_keeps_what_was_said_and_the_conversation_goes_on():
    model, tokenizer = load(TINY, device="cpu")
    cache, pieces = make_cache(model, 4, 60), []

    def emit(piece):
        pieces.append(piece)
        if len(pieces) == 5:
            signal.raise_signal(signal.SIGINT)

    ids = tokenizer.first_turn("Hello.")
    record = answer(model, tokenizer, timed_prefill(model, cache, ids), 30, Sampling(seed=0),
                    emit=emit)
    assert record["finish_reason"] == "interrupt"
    assert record["new_tokens"] == 5 and record["text"] == "".join(pieces)
    assert cache.length.item() == len(ids) + 5
    uninterrupted = make_cache(model, 4, 60)
    assert list(generate(model, uninterrupted, ids, max_new_tokens=5)) == record["token_ids"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_the_prompt_is_read_ends_the_answer_at_its_first_token():
    model, tokenizer = load(TINY, device="cpu")
    step = model.step
    model.step = lambda *args: (signal.raise_signal(signal.SIGINT), step(*args))[1]
    prompt = timed_prefill(model, make_cache(model, 4, 60), tokenizer.first_turn("Hello."))
    model.step = step
    record = answer(model, tokenizer, prompt, 30, Sampling(seed=0))
    assert record["finish_reason"] == "interrupt" and record["new_tokens"] == 1


@pytest.mark.parametrize("tokens", [1, 5])
def test_sigterm_ends_the_answer_and_the_conversation_which_is_saved(tmp_path, monkeypatch, tokens):
    pieces, session = [], tmp_path / "s"

    def emit(piece):
        pieces.append(piece)
        if len(pieces) == tokens == 5:
            signal.raise_signal(signal.SIGTERM)

    def check(model, ids):
        if tokens == 1:  # before the answer, which then is as short as can be
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("chat.show", emit)
    monkeypatch.setattr("chat.check_ids", check)
    status, _, err = run("chat", "--prompts", write_turns(tmp_path / "turns.jsonl", 6),
                         "--save-session", session, "--max-new-tokens", 30, "--temperature", 0,
                         "--dtype", "fp32")
    monkeypatch.undo()
    assert status == 143 and "turn 0:" in err and "turn 1:" not in err and f"saved {session}" in err
    assert f"{tokens} new tokens (interrupt)" in err
    facts, _ = read_session(session)
    _, tokenizer = load(TINY, device="cpu")
    assert facts["model"]["length"] == [len(tokenizer.first_turn("Tell me of cat 0.")) + tokens]


# ------------------------------------------------------------------------------ tools


@pytest.fixture
def with_tools(tmp_path):
    """The arguments for a checkpoint whose template has tools, and a file with two."""
    folder, file = shutil.copytree(TINY, tmp_path / "tiny"), tmp_path / "tools.json"
    (folder / "chat_template.jinja").write_text(HERMES)
    file.write_text(json.dumps(TOOLS))
    return ["--checkpoint", folder, "--tools", file, "--seed", 3, "--temperature", 1.2,
            "--window", 240, "--max-new-tokens", 300]


def test_calls_are_shown_and_results_are_typed(with_tools, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr("chat.grammar_of_calls", lambda tools, *rest: grammar_of_calls(
        replace(tools, forced=("get_weather",), parallel=False), *rest))  # it would call nothing
    status, out, err = run("chat", *with_tools, "--json",
                           stdin="Is it warm?\nIt is 5\n/reset\nHi\n")
    assert status == 0, err
    first, second, third = map(json.loads, out.splitlines())
    for record in (first, second, third):
        assert record["finish_reason"] == "eos" and record["text"] == ""
        for call in record["tool_calls"]:
            assert call["function"]["name"] == "get_weather"
            assert json.loads(call["function"]["arguments"]).keys() == {"city", "days"}
    assert err.count("the result of get_weather?") == 3
    tokenizer = Tokenizer(with_tools[1])
    args = {"tools": TOOLS}
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"},
             {"role": "tool", "tool_call_id": "-", "content": "It is 5"}]
    assert first["prompt_tokens"] == len(tokenizer.first_turn("Is it warm?", template_args=args))
    assert second["prompt_tokens"] == len(tokenizer.turns_after(
        turns, 1, first["token_ids"][-1], args))
    assert third["prompt_tokens"] == len(tokenizer.first_turn("Hi", template_args=args))
    status, out, _ = run("chat", *with_tools, stdin="Is it warm?\n")
    call = first["tool_calls"][0]["function"]
    assert out == f"{call['name']}({call['arguments']})\n"


def test_a_model_is_free_not_to_call(with_tools):
    with_tools[3].write_text(json.dumps([CLOCK]))
    status, out, err = run("chat", *with_tools, "--json", "--max-new-tokens", 8, stdin="Hi\nAnd?\n")
    first, second = map(json.loads, out.splitlines())
    assert status == 0 and first["text"] and first["tool_calls"] == second["tool_calls"] == []


@pytest.mark.parametrize("text, naming", [
    ("{", "not JSON"), ("[]", "no tools in it"), ("[5]", "tools.0.type"), ("5", "must be a list"),
    (json.dumps([CLOCK, CLOCK]), "tools.1.function.name: clock is")])
def test_a_file_that_holds_no_tools_is_one_line(with_tools, text, naming):
    with_tools[3].write_text(text)
    refused("chat", *with_tools, naming=["tools.json", naming])


def test_flags_that_tools_do_not_go_with_are_named(with_tools, tmp_path):
    prompts = write_turns(tmp_path / "turns.jsonl", 1)
    refused("chat", *with_tools, "--prompts", prompts, naming=["--tools", "--prompts"])
    refused("chat", *with_tools, "--regex", "a", naming=["--tools", "--regex"])
    refused("chat", *with_tools, "--lookup", naming=["strict", "--lookup"])
    refused("chat", "--checkpoint", TINY, *with_tools[2:], naming=["--tools", "has no tools"])
