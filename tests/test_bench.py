"""bench on a tiny model: its figures are there and agree with each other. Nothing is compiled here,
and peers run in this process."""

import contextlib
import functools
import json

import pytest
import torch

import linear
from bench import apart, busy, clocks, gpu, gpu_figures, gpu_first, models, products, steps
from bench.steps import seconds_a_token
from bench.streams import synthetic
from helpers import TINY, run
from test_chat import write_turns
from test_errors import refused


@pytest.fixture
def quick(monkeypatch):
    """bench with small sizes, few rounds and nothing compiled."""
    monkeypatch.setitem(models.SHAPES, "small", (32, 2, 4, 2, 48, 4096, 256, True))
    for module in (clocks, steps):
        monkeypatch.setattr(module, "compile_model", lambda model: None)
    for module in (apart, steps):
        monkeypatch.setattr(module, "apart",
                            lambda make, *args: contextlib.nullcontext(make(*args)))
    monkeypatch.setattr(clocks, "STEPS", 2)
    monkeypatch.setattr(clocks, "ROUNDS", 2)
    torch.manual_seed(0)


def figures(*argv):
    status, out, err = run("bench", *argv, "--json", "--device", "cpu")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("argv, naming", [
    (["--turns", "f", "--streams", "3"], ["--turns", "--streams"]), (["--limit", "3"], ["--turns"]),
    (["--max-new-tokens", "3"], ["--turns"]), (["--turns", "f", "--max-new-tokens", "1"], ["2"]),
    (["--turns", "f", "--batch", "2"], ["--turns", "one row"]), (["--streams", "0"], ["--streams"]),
    (["--turns", "/no/such.jsonl"], ["/no/such.jsonl"]),
    (["--shape", "1.1b", "--peer", "streaming"], ["--peer streaming", "--turns"]),
    (["--shape", "1.1b", "--peer", "streaming", "--streams", "3"], ["--peer streaming", "--turns"]),
    (["--shape", "1.1b", "--peer", "transformers", "--turns", "f"], ["--peer", "--turns"]),
    (["--peer", "streaming", "--turns", "f"], ["--peer", "--shape"]),
    (["--shape", "1.1b", "--peer", "transformers", "--batch", "2"], ["--peer", "one row"]),
    (["--shape", "1.1b", "--turns", "f", "--recompute"], ["--recompute"]),
    (["--shape", "1.1b", "--streams", "3", "--speculate", "3"], ["--speculate"]),
    (["--sampling", "--streams", "3"], ["--sampling", "--streams"]),
    (["--busy", "2", "--batch", "8"], ["--busy", "one row"]),
    (["--gpu", "decode", "--batch", "8"], ["--gpu", "--batch"]),
    (["--gpu", "limits", "--quantize", "int8"], ["--quantize", "decode"]),
    (["--rounds", "2"], ["--rounds", "--gpu"]),
    (["--gpu", "decode", "--gpt-fast", "d"], ["--gpt-fast", "--gpu peers"])])
def test_flags_that_do_not_go_together(argv, naming):
    refused("bench", *argv, naming=naming)


@pytest.mark.slow
def test_steps_beside_everything(quick, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr("bench.steps.bandwidth", lambda buffers: 1.0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    out = figures("--shape", "small", "--window", 252, "--peer", "transformers", "--recompute",
                  "--speculate", 3)
    assert out["bandwidth_GB_s"] == 1 and out["decode_tok_s"] > 0 < out["prefill_2048_tok_s"]
    for peer in ("recompute", "transformers_eager_decode", "transformers_compiled_decode",
                 "transformers_prefill_128"):
        assert out[f"{peer}_tok_s"] > 0 < out[f"over_{peer}"]
    assert out["speculation_agreeing_over_plain"] > 0 < out["speculation_contrary_over_plain"]


def test_drawing_beside_a_step(quick, monkeypatch):
    monkeypatch.setattr("bench.sampling.STEPS", 2)
    out = figures("--shape", "small", "--sampling", "--window", 60, "--batch", 3)
    for kind in ("greedy", "default", "top_k", "mixed"):
        assert out[f"{kind}_share"] == out[f"{kind}_s"] / out["step_s"] > 0


def test_a_grammar_beside_a_step(quick, monkeypatch):
    monkeypatch.setattr("bench.grammar.STEPS", 2)
    out = figures("--checkpoint", TINY, "--grammar", "--window", 60, "--batch", 3)
    assert out["grammar_s"] > 0 < out["free_s"] and out["added_share"] * out["step_s"] < out[
        "grammar_s"]


@pytest.mark.slow
def test_decoding_beside_others(quick, monkeypatch):
    monkeypatch.setattr(busy, "TURN", 0.3)
    monkeypatch.setattr(busy, "ROUNDS", 1)
    out = figures("--shape", "small", "--window", "20", "--busy", "1")
    for n in (0, 1):
        chosen, one = out[f"beside_{n}_chosen_tok_s"], out[f"beside_{n}_one_tok_s"]
        assert out[f"beside_{n}_chosen_over_one"] == pytest.approx(chosen / one)


def test_a_conversation_beside_streaming_llm(quick, tmp_path):
    turns = write_turns(tmp_path / "turns.jsonl", 8)
    out = figures("--shape", "small", "--turns", turns, "--limit", 6, "--max-new-tokens", 10,
                  "--window", 60, "--peer", "streaming")
    assert (out["turns"], out["new_tokens"], out["sink"], out["window"]) == (6, 60, 4, 60)
    for who in ("", "streaming_"):
        assert out[who + "decode_tok_s"] > 0 < out[who + "ttft_p50_s"] <= out[who + "ttft_p99_s"]
        assert out[who + "peak_bytes_first_turn"] <= out[who + "peak_bytes_last_turn"]
    assert out["cache_bytes_first_turn"] == out["cache_bytes_last_turn"]
    token = 2 * 2 * 2 * 8 * 2  # K and V, layers, KV heads, head size, bytes
    assert out["streaming_cache_bytes_last_turn"] <= 63 * token
    assert out["tok_s_over_streaming"] == out["tok_s"] / out["streaming_tok_s"]


def test_a_conversation_of_a_checkpoint(quick, tmp_path):
    turns = tmp_path / "raw.jsonl"
    turns.write_text('{"prompt": "A cat"}\n{"prompt": "and a dog"}\n')
    out = figures("--turns", turns, "--max-new-tokens", 2)
    assert (out["turns"], out["new_tokens"]) == (2, 4) and "tok_s_over_streaming" not in out


def test_streams_beside_static_batches(quick, monkeypatch):
    monkeypatch.setattr("bench.streams.synthetic", lambda n, vocab: (
        [[7] * (3 + i) for i in range(n)], [3 + 5 * (i % 2) for i in range(n)]))
    out = figures("--shape", "small", "--streams", 5, "--batch", 2, "--peer", "transformers")
    assert (out["streams"], out["batch"], out["new_tokens"]) == (5, 2, 3 * 3 + 2 * 8)
    assert out["steps"] >= 13 and 0.5 < out["rows_busy"] <= 1
    assert out["over_transformers_static"] == pytest.approx(
        out["tok_s"] / out["transformers_static_tok_s"])
    assert out["batch_over_single"] > 0


def test_synthetic_prompts_are_the_same_every_time():
    prompts, wanted = synthetic(64, 1000)
    assert synthetic(64, 1000) == (prompts, wanted)
    assert 10 <= min(map(len, prompts)) < 50 and 350 < max(map(len, prompts)) <= 400
    assert 10 <= min(wanted) < 30 and 170 < max(wanted) <= 200
    assert min(map(min, prompts)) >= 0 and max(map(max, prompts)) < 1000


def counter(start):
    held = [start]

    def add(n):
        if n < 0:
            raise ValueError(f"{n} is negative")
        held[0] += n
        return held[0]

    return add


@pytest.mark.slow
def test_a_function_in_a_process_of_its_own():
    with apart.apart(counter, 5) as add:
        assert [add(1), add(2)] == [6, 8]
        with pytest.raises(ValueError, match="-1 is negative"):
            add(-1)
    with pytest.raises(ValueError, match="invalid literal"), apart.apart(int, "x"):
        pass


# ------------------------------------------------------------------------------ a GPU's table


@pytest.fixture
def table(quick, monkeypatch):
    """The rows of `bench --gpu`, by name, of a tiny shape and on a CPU."""
    for name in ("small", "160m"):  # their weights divide into groups
        monkeypatch.setitem(models.SHAPES, name, (32, 2, 4, 2, 64, 4096, 256, False))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(gpu_figures, "compile_model", lambda model: None)
    monkeypatch.setattr(gpu, "apart", lambda make, *args: contextlib.nullcontext(make(*args)))
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    sizes = dict(COPIED=1 << 12, SQUARE=16, TOKENS=4, PROMPTS=(16, 40), ROWS=(2, 3))
    for name, small in sizes.items():
        monkeypatch.setattr(gpu_figures, name, small)
    monkeypatch.setattr(gpu, "TOKENS", 4)
    monkeypatch.setattr(clocks, "ROUNDS", 1)
    monkeypatch.setattr(gpu_figures, "seconds_a_token",
                        functools.partial(seconds_a_token, length=9))

    def rows(*argv):
        status, out, err = run("bench", "--gpu", *argv, "--device", "cpu", "--window", 252)
        assert status == 0, err
        lines, text = out.split("\n\n")
        found = [json.loads(line) for line in lines.splitlines()]
        assert all(f"| {row['row']} | " in text for row in found)
        return found

    return rows


def test_the_limits_of_a_machine(table):
    machine, limits = table("limits")
    assert machine["torch"] == torch.__version__
    assert limits["copy_spread"][0] <= limits["copy_GB_s"] <= limits["copy_spread"][1]
    assert limits["matmul_TFLOP_s"] > 0


def test_decode_and_prefill_in_every_format(table):
    rows = table("decode", "--shape", "small")
    assert [row["row"].removeprefix("small ") for row in rows] == 2 * ["bf16"] + 2 * ["int8"] + (
        2 * ["int4 in groups of 32"]) + ["bf16", "int8", "int4 in groups of 32"]
    bf16, prefill, int8, _, int4, *_ = rows
    for row in (bf16, int8, int4):
        assert row["share_of_copy"] > 0 < row["after_10_windows"] and row["sampled_tok_s"] > 0
        assert row["decode_spread"][0] <= row["decode_tok_s"] <= row["decode_spread"][1]
    assert bf16["step_GB"] > int8["step_GB"] > int4["step_GB"] > bf16["cache_GB"]
    assert prefill["prefill_40_tok_s"] > 0 < prefill["prefill_16_share"]
    assert all(row["compile_warm_s"] > 0 for row in rows[-3:])


def test_one_format_in_so_many_rounds(table, monkeypatch):
    counted = []
    monkeypatch.setattr(gpu_figures, "rounds", lambda n: counted.append(n) or range(n))
    rows = table("decode", "--shape", "small", "--quantize", "int8", "--rounds", 2)
    assert [row["row"] for row in rows] == 3 * ["small int8"] and set(counted) == {2}


@pytest.mark.parametrize("text, settings", [
    ("7b:bf16", ("7b", "bf16", 1, False)), ("8b:int8:8", ("8b", "int8", 8, False)),
    ("1.1b:int4:tuned", ("1.1b", "int4", 1, True)), ("7b:int8:16:tuned", ("7b", "int8", 16, True))])
def test_a_row_of_a_gpus_first_minutes(text, settings):
    assert tuple(gpu_first.read_row(text).values()) == settings


@pytest.mark.parametrize("text", ["7b", "9b:bf16", "7b:int3", "7b:int8:0", "7b:int8:fast"])
def test_a_row_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="SHAPE:KIND"):
        gpu_first.read_row(text)


def test_what_is_for_a_gpu_needs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused("bench", "--gpu", "limits", naming=["'cuda'", "0 CUDA devices"])
    refused("bench.gpu_first", "--out", tmp_path / "new", naming=["'cuda:0'", "0 CUDA devices"])
    assert not (tmp_path / "new").exists()


def test_peers_in_turns(table, tmp_path):
    turns = write_turns(tmp_path / "turns.jsonl", 4)
    rows = table("peers", "--shape", "small", "--turns", turns, "--limit", 2,
                 "--max-new-tokens", 3, "--gpt-fast", tmp_path)
    assert [list(row)[1] for row in rows] == ["error", "error", "tok_s", "sink"]
    assert "no generate.py" in rows[0]["error"]
    assert rows[2]["their_tok_s"] > 0 < rows[2]["over_theirs"]
    assert rows[3]["tok_s_over_streaming"] > 0


def test_rows_a_draft_and_loading(table):
    rows = table("batches", "--shape", "small")
    assert [row.get("rows") for row in rows[:2]] == [2, 3] and rows[0]["over_one_row"] > 0
    assert [row["quantize"] for row in rows[2:5]] == [None, "int8", "int4"]
    right, never = rows[5:]
    assert right["accepted"] == right["proposed"] > 0 == never["accepted"] < never["proposed"]


def test_a_row_that_fails_costs_no_other(table, monkeypatch):
    def broken(args):
        yield dict(fine=1)
        raise ValueError("not here\nat all")

    monkeypatch.setattr(gpu, "batch_figures", broken)
    monkeypatch.setattr(gpu, "load_figures", lambda *args: iter(()))
    monkeypatch.setattr(gpu, "draft_figures", lambda args: iter([dict(fine=2)]))
    assert [list(row.items())[1] for row in table("batches", "--shape", "small")] == [
        ("fine", 1), ("error", "not here"), ("fine", 2)]


def test_products_times_every_function_of_the_table_and_prints_rows(monkeypatch):
    monkeypatch.setattr(products, "SIZES", {"large": (128, 64), "small": (64, 64)})
    monkeypatch.setattr(products, "CALLS", 1)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    status, out, err = run("bench", "--products", "bf16", "int8")
    assert status == 0, err
    timed = {(kind, function) for kind, _, _, _, _, _, function, _ in
             (line.split() for line in out.splitlines() if not line.startswith("("))}
    for kind in ("bf16", "int8"):
        for (other, processor, _), (_, functions) in linear.ROW.items():
            if other == kind and processor != "cuda":
                assert {(kind, function.__name__) for function in functions} <= timed
        assert f'("{kind}", "{linear.cpu_kind()}", ' in out


def test_emulating_starts_the_command_anew_without_avx512(monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda path, argv, environment: started.append(environment))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    products.emulate()
    assert products.EMULATED.items() <= started[0].items()
    assert started[0]["TORCHINDUCTOR_CACHE_DIR"] == "/cache-avx2"
    for name, value in products.EMULATED.items():
        monkeypatch.setenv(name, value)
    products.emulate()
    assert len(started) == 1
