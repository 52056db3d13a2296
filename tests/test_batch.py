"""Streams side by side against each of them alone, and how the rows are kept busy."""

import json
import random
import signal

import pytest
import torch

import batch as program
from batch import Batch, generate_batch
from generate import generate, load, make_cache
from helpers import TINY, as_on_a_gpu, random_model, run
from test_chat import write_turns
from test_errors import refused
from test_generate import records

WINDOW = 28
# Of one token, of less than a chunk, of whole chunks, of more than ten windows.
PROMPT_LENGTHS = [1, 5, 130, 33, 2, 300, 16, 64, 90, 8]
NEW_TOKENS = [30, 120, 10, 45, 1, 20, 77, 3, 60, 100]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Rings of 43 slots, so that they wrap often, and prompts of many chunks."""
    monkeypatch.setattr("generate.LARGE_CHUNK", 16)
    monkeypatch.setattr("generate.SMALL_CHUNK", 8)


def prompts_of(lengths, seed=0):
    numbers = random.Random(seed)
    return [[numbers.randrange(64) for _ in range(n)] for n in lengths]


def alone(model, prompt, max_new_tokens, **options):
    return list(generate(model, make_cache(model, 4, WINDOW), prompt, max_new_tokens, **options))


def collected(events):
    """({index: token ids}, the indices in the order in which they ended)."""
    ids, ended = {}, []
    for index, token_id in events:
        assert index not in ended
        if token_id is None:
            ended.append(index)
        else:
            ids.setdefault(index, []).append(token_id)
    assert sorted(ids) == sorted(ended)
    return ids, ended


def with_eos(model, *eos_ids):
    model.config = type(model.config)(**{**model.config.__dict__, "eos_ids": eos_ids})
    return model


@pytest.fixture(scope="module")
def expected():
    """What each prompt's stream says alone, from caches with chunks of the usual sizes."""
    model = random_model()
    return [alone(model, *pair) for pair in zip(prompts_of(PROMPT_LENGTHS), NEW_TOKENS)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_stream_is_what_it_is_alone(expected, batch_size):
    """More streams than rows, fewer, and one row; prompts and answers of very different lengths."""
    ids, _ = collected(generate_batch(random_model(), prompts_of(PROMPT_LENGTHS), batch_size, 4,
                                      WINDOW, NEW_TOKENS))
    assert [ids[index] for index in range(len(PROMPT_LENGTHS))] == expected


def test_an_eos_ends_its_stream_and_the_row_is_refilled_while_others_go_on():
    prompts = prompts_of([9, 20, 3, 40, 12, 7, 31])
    eos = alone(random_model(), prompts[1], 8)[-1]
    model = with_eos(random_model(), eos)
    ids, ended = collected(generate_batch(model, prompts, 2, 4, WINDOW, 50))
    assert [ids[index] for index in range(7)] == [alone(model, prompt, 50) for prompt in prompts]
    assert ids[1][-1] == eos and len(ids[1]) <= 8
    assert len(ids[ended[-1]]) == 50 and ended != sorted(ended)
    free, _ = collected(generate_batch(model, prompts[:3], 2, 4, WINDOW, 50, ignore_eos=True))
    assert [len(free[index]) for index in range(3)] == [50] * 3


def test_streams_are_told_to_have_ended_in_the_order_in_which_they_did():
    _, ended = collected(generate_batch(random_model(), prompts_of([4] * 5), 2, 4, WINDOW,
                                        [40, 9, 8, 7, 6]))
    assert ended == [1, 2, 3, 4, 0]


def test_a_stream_can_be_ended_from_outside(expected):
    model, prompts = random_model(), prompts_of(PROMPT_LENGTHS)
    batch, said = Batch(model, 2, 4, WINDOW), []
    for index, token_id in generate_batch(model, prompts[:3], max_new_tokens=20, batch=batch):
        said.append((index, token_id))
        if said.count((0, None)) == 0 and len([1 for i, _ in said if i == 0]) == 6:
            batch.stream(0).left = 0
    ids, ended = collected(said)
    assert ids[0] == expected[0][:6] and ended[0] == 0
    assert ids[1] == expected[1][:20] and ids[2][:10] == expected[2]


def test_no_more_chunks_come_between_two_steps_than_one_and_the_idle_rows(monkeypatch):
    model = random_model()
    batch, step, chunks, most = Batch(model, 3, 4, WINDOW), model.step, [], {}

    def watched(tokens, cache, *rest):
        if cache is batch.staging[0]:
            chunks.append(batch.rows.count(None))
        else:
            if chunks:
                idle = max(chunks)
                most[idle] = max(most.get(idle, 0), len(chunks))
            chunks.clear()
        return step(tokens, cache, *rest)

    monkeypatch.setattr(model, "step", watched)
    list(generate_batch(model, prompts_of([40] * 3 + [200] * 4), max_new_tokens=30, batch=batch))
    assert most[0] == 1 and most[1] == 2 and most[2] <= 3


def test_the_device_is_read_once_a_step_after_the_next_step_is_queued(monkeypatch):
    model, events = random_model(), []
    batch, step, tolist = Batch(model, 2, 4, WINDOW), model.step, torch.Tensor.tolist
    stream = generate_batch(model, prompts_of([3, 3]), max_new_tokens=9, batch=batch,
                            temperature=0.7)
    next(stream)  # both rows are busy and no prompt waits
    monkeypatch.setattr(model, "step", lambda *a: events.append("step") or step(*a))
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: events.append("read") or tolist(t))
    for name in ("item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(
            f"{name} in a step"))
    list(stream)
    assert events == ["step", "read"] * 8


def test_rows_are_busy_at_nine_steps_of_ten():
    numbers = random.Random(1)
    lengths = [(numbers.randrange(1, 100), numbers.randrange(10, 80)) for _ in range(60)]
    model = random_model(n_layers=1)
    batch = Batch(model, 4, 4, WINDOW)
    list(generate_batch(model, prompts_of([prompt for prompt, _ in lengths]),
                        max_new_tokens=[new for _, new in lengths], batch=batch))
    assert batch.busy == sum(new for _, new in lengths)  # every step of a busy row tells a token
    assert batch.busy / (4 * batch.steps) > 0.9


def test_a_seed_decides_what_is_sampled():
    model, prompts = random_model(), prompts_of([1, 30, 7, 12])
    first, again, other = (
        list(generate_batch(model, prompts, 2, 4, WINDOW, 20, temperature=1.0, top_p=0.9,
                            generator=torch.Generator().manual_seed(seed))) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("changes, word", [
    (dict(batch_size=0), "batch size 0"), (dict(prompts=[[1], []]), "empty"),
    (dict(prompts=[[64]]), "outside"), (dict(max_new_tokens=0), "max_new_tokens 0"),
    (dict(window=0), "window 0")])
def test_what_cannot_be_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        list(generate_batch(random_model(), **{"prompts": [[1]], **changes}))


def test_no_prompts_are_no_events():
    assert list(generate_batch(random_model(), [])) == []


# ------------------------------------------------------------------------------ the program


@pytest.fixture
def prompts(tmp_path):
    lines = ['{"prompt": "The cat"}', *write_turns(tmp_path / "turns.jsonl", 8).open()]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line.strip() for line in lines) + "\n")
    return path


def greedy(prompts, *argv):
    return records("--prompts", prompts, "--batch", 2, "--dtype", "fp32", "--temperature", 0,
                   "--window", 60, "--max-new-tokens", 12, *argv, program="batch")


def test_results_are_json_lines_with_the_figures_of_each_prompt_alone(prompts):
    found = greedy(prompts, "--limit", 4)
    assert sorted(record["index"] for record in found) == [0, 1, 2, 3]
    model, tokenizer = load(TINY, device="cpu", dtype=torch.float32)
    (generated,) = records("--max-new-tokens", 1)
    for record in found:
        ids = (tokenizer.first_turn(f"Tell me of cat {record['index'] - 1}.") if record["index"]
               else tokenizer.encode("The cat"))
        cache = make_cache(model, 4, 60)
        assert set(record) == {"index", *generated}
        assert record["token_ids"] == list(generate(model, cache, ids, 12))
        assert record["text"] == tokenizer.decode(record["token_ids"])
        assert record["prompt_tokens"] == len(ids) and record["new_tokens"] == 12
        assert record["evicted"] == max(0, len(ids) + 12 - 64)
        assert record["finish_reason"] == "length" and record["cache_bytes"] == 3 * cache.nbytes()
        assert record["ttft_s"] > 0 and record["prefill_tok_s"] > 0 and record["decode_tok_s"] > 0


def test_a_stop_text_ends_only_the_stream_that_says_it(prompts):
    free = {record["index"]: record for record in greedy(prompts)}
    word = free[0]["text"].split()[2]
    assert not all(word in record["text"] for record in free.values())
    for record in greedy(prompts, "--stop", word):
        whole = free[record["index"]]
        stops = word in whole["text"]
        assert record["finish_reason"] == ("stop" if stops else "length")
        assert record["text"] == whole["text"].partition(word)[0]


def test_progress_and_totals_go_to_stderr(prompts):
    status, out, err = run("batch", "--prompts", prompts, "--max-new-tokens", 4, "--batch", 3,
                           "--seed", 7)
    assert status == 0 and len([json.loads(line) for line in out.splitlines()]) == 5
    assert "\r" not in err and "generating: 20 tokens, " in err  # plain lines: no terminal
    assert err.splitlines()[-1].startswith("5 of 5 prompts, 20 new tokens, ")
    assert "tok/s, rows busy" in err and err.endswith("seed 7\n")


def test_an_interrupted_run_has_written_what_is_finished(prompts, monkeypatch):
    steps, read = [], program.start_reading

    def interrupting(tokens):
        steps.append(1)
        if len(steps) == 16:
            signal.raise_signal(signal.SIGINT)
        return read(tokens)

    expected = {record["index"]: record["token_ids"] for record in greedy(prompts)}
    monkeypatch.setattr(program, "start_reading", interrupting)
    status, out, err = run("batch", "--prompts", prompts, "--batch", 2, "--dtype", "fp32",
                           "--temperature", 0, "--window", 60, "--max-new-tokens", 12)
    written = [json.loads(line) for line in out.splitlines()]
    assert status == 130 and "Traceback" not in err
    assert [record["index"] for record in written] == [0, 1]
    assert all(record["token_ids"] == expected[record["index"]] for record in written)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("argv, naming", [
    (["--lookup"], ["--lookup", "one stream"]), (["--draft", TINY], ["--draft", "one stream"]),
    (["--speculate", "3"], ["--speculate"]), (["--batch", "0"], ["--batch", "0"]),
    (["--limit", "0"], ["--limit"]), (["--window", "999"], ["999"]),
    (["--prompts", "/no/such.jsonl"], ["/no/such.jsonl"])])
def test_arguments(prompts, argv, naming):
    refused("batch", "--prompts", prompts, *argv, naming=naming)


def test_prompts_are_required():
    refused("batch", naming=["--prompts"])
