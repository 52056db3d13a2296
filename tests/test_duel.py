"""bench.duel and bench.shift, beside a llama_cpp whose logits are all equal.

The real one takes ten minutes to build. What is held here is what was asked of it, and what is
made of its answers.
"""

import json
import math
import sys

import pytest

from helpers import ROOT, TINY, run
from test_errors import refused

TEXT = ROOT / "tests" / "text.txt"
UNIFORM = '''
import ctypes, os
V, calls = 4096, open(os.environ["CALLS"], "a")

class Llama:
    ctx = "context"
    def __init__(self, path, n_ctx, **settings):
        self.size = 256 if path.endswith("rounding.gguf") else n_ctx
        if path.endswith("broken.gguf"):
            raise ValueError("Failed to load model from file")
    def n_ctx(self): return self.size
    def n_vocab(self): return V
    def reset(self): pass
    def eval(self, ids): print("eval", len(ids), file=calls, flush=True)

llama_token, logits = ctypes.c_int32, (ctypes.c_float * V)()
llama_get_memory = llama_memory_clear = lambda *_: "memory"
llama_batch_get_one = lambda token, n: token[0]
llama_decode = lambda context, token: 0
llama_get_logits_ith = lambda context, i: logits
def llama_memory_seq_rm(*given): print("rm", *given[1:], file=calls, flush=True)
def llama_memory_seq_add(*given): print("add", *given[1:], file=calls, flush=True)
__version__ = "0"
'''


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The file in which the stand-in for llama_cpp writes what it was asked."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "llama_cpp.py").write_text(UNIFORM)
    (tmp_path / "model.gguf").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for module in ("bench.duel", "bench.shift"):
        monkeypatch.setattr(f"{module}.keep_threads", lambda: None, raising=False)
    monkeypatch.setattr("bench.clocks.compile_model", lambda model: None)
    return tmp_path / "calls"


def figures(program, calls, *argv):
    status, out, err = run(program, "--checkpoint", TINY, "--gguf", calls.parent / "model.gguf",
                           "--llama-python", sys.executable, "--json", *argv,
                           *(["--text", TEXT] if program == "bench.shift" else []))
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_a_full_context_keeps_its_first_tokens_and_drops_half_of_the_rest(calls, monkeypatch):
    """24 of context, 4 kept: 10 go at position 24, and again after each 10 tokens. Turns of 7 do
    not change that, and the perplexity of equal logits is the size of the vocabulary."""
    monkeypatch.setattr("bench.shift.TURN", 7)
    [record] = figures("bench.shift", calls, "--window", 20, "--max-tokens", 59)
    asked = calls.read_text().splitlines()
    assert asked == ["rm 0 4 14", "add 0 14 24 -10"] * math.ceil((59 - 24) / 10)
    assert record["llama.cpp"]["perplexity"] == pytest.approx(4096)
    assert record["llama.cpp"]["longest_s"] >= record["llama.cpp"]["step_median_s"] > 0


def test_our_side_is_what_eval_says(calls):
    [record] = figures("bench.shift", calls, "--window", 60, "--max-tokens", 300,
                       "--dtype", "fp32")
    status, out, err = run("eval", "--checkpoint", TINY, "--text", TEXT, "--window", 60,
                           "--max-tokens", 300, "--dtype", "fp32", "--json")
    assert status == 0, err
    assert record["gpt-stream"]["perplexity"] == pytest.approx(
        json.loads(out.splitlines()[0])["perplexity"], rel=1e-4)


def test_duel_asks_both_for_the_same_and_draws(calls, monkeypatch):
    picture = calls.parent / "held.png"
    records = figures("bench.duel", calls, "--eager", "--held", 5, 40, "--rounds", 2,
                      "--plot", picture)
    assert [r["what"] for r in records] == ["prefill of 128", "prefill of 10", "decode, 5 held",
                                            "decode, 40 held"]
    for record in records:
        assert record["lowest"] <= record["ratio"] <= record["highest"]
    asked = [int(line.split()[1]) for line in calls.read_text().splitlines()]
    assert asked.count(128) == asked.count(10) == asked.count(5) == asked.count(40) == 3
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize("argv, naming", [
    (["--gguf", "/no/such.gguf"], ["--gguf /no/such.gguf"]),
    (["--gguf", __file__, "--llama-python", "/no/python"], ["--llama-python /no/python"]),
    (["--gguf", __file__, "--llama-python", sys.executable], ["pip install llama-cpp-python"])])
def test_a_peer_that_is_not_there(argv, naming, monkeypatch, capfd):
    monkeypatch.setattr("bench.clocks.compile_model", lambda model: None)
    refused("bench.shift", "--checkpoint", TINY, *argv, "--text", TEXT, "--window", 60,
            "--max-tokens", 300, naming=naming)
    assert "Traceback" not in capfd.readouterr().err  # of the peer's process


def test_a_file_that_llama_cpp_does_not_take(calls, capfd):
    broken = calls.parent / "broken.gguf"
    broken.touch()
    refused("bench.duel", "--checkpoint", TINY, "--gguf", broken, "--llama-python", sys.executable,
            naming=[f"--gguf {broken}", "Failed to load"])
    assert "Traceback" not in capfd.readouterr().err


def test_a_context_that_llama_cpp_rounds_up_is_not_compared(calls):
    """It would see more than this engine."""
    rounding = calls.parent / "rounding.gguf"
    rounding.touch()
    refused("bench.shift", "--checkpoint", TINY, "--gguf", rounding, "--llama-python",
            sys.executable, "--text", TEXT, "--window", 60, "--max-tokens", 300,
            naming=["--sink and --window are 64", "256"])


def test_calls_are_counted_in_steps_of_one_row(monkeypatch):
    monkeypatch.setattr("bench.calls.keep_threads", lambda: None)
    monkeypatch.setattr("load.compile_model", lambda model, prefill: None)
    status, out, err = run("bench.calls", "--checkpoint", TINY, "--rounds", 1, "--calls", 1,
                           "--json")
    step, *others = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and step["what"] == "a step" and step["steps"] == 1, err
    assert [other["what"] for other in others] == [
        "8 rows", "6 tokens", "eager step", "prompt of 10", "prompt of 128"]
    for other in others:
        assert other["steps"] == pytest.approx(other["seconds"] / step["seconds"])
