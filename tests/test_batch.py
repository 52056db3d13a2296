"""Streams side by side against each of them alone, and how the rows are kept busy."""

import json
import math
import random
import signal
import sys

import pytest
import torch

import streams as program
from generate import generate, load, make_cache
from helpers import TINY, as_on_a_gpu, random_model, run
from sample import Sampling
from streams import Batch, Hooks, Prompt, generate_batch
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
    for stream, token_id in events:
        index = stream.index
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
    free, _ = collected(generate_batch(model, prompts[:3], 2, 4, WINDOW, 50, stop_ids=()))
    assert [len(free[index]) for index in range(3)] == [50] * 3


def test_streams_are_told_to_have_ended_in_the_order_in_which_they_did():
    _, ended = collected(generate_batch(random_model(), prompts_of([4] * 5), 2, 4, WINDOW,
                                        [40, 9, 8, 7, 6]))
    assert ended == [1, 2, 3, 4, 0]


def test_a_stream_can_be_ended_from_outside(expected):
    model, prompts = random_model(), prompts_of(PROMPT_LENGTHS)
    batch, said = Batch(model, 2, 4, WINDOW), []
    for stream, token_id in generate_batch(model, prompts[:3], max_new_tokens=20, batch=batch):
        said.append((stream, token_id))
        if stream.index == 0 and len([1 for one, _ in said if one is stream]) == 6:
            stream.cancel()
    ids, ended = collected(said)
    assert ids[0] == expected[0][:6] and ended[0] == 0
    assert ids[1] == expected[1][:20] and ids[2][:10] == expected[2]


def test_no_more_chunks_come_between_two_steps_than_one_and_the_idle_rows(monkeypatch):
    model = random_model()
    batch, begin, chunks, most = Batch(model, 3, 4, WINDOW), model.begin, [], {}

    def watched(tokens, cache, *rest):
        if cache is batch.staging[0]:
            chunks.append(batch.rows.count(None))
        else:
            if chunks:
                idle = max(chunks)
                most[idle] = max(most.get(idle, 0), len(chunks))
            chunks.clear()
        return begin(tokens, cache, *rest)

    monkeypatch.setattr(model, "begin", watched)
    list(generate_batch(model, prompts_of([40] * 3 + [200] * 4), max_new_tokens=30, batch=batch))
    assert most[0] == 1 and most[1] == 2 and most[2] <= 3


def test_the_device_is_read_once_a_step_after_the_next_step_is_queued(monkeypatch):
    model, events = random_model(), []
    batch, begin, tolist = Batch(model, 2, 4, WINDOW), model.begin, torch.Tensor.tolist
    stream = generate_batch(model, prompts_of([3, 3]), max_new_tokens=9, batch=batch,
                            sampling=Sampling(0.7))
    next(stream)  # both rows are busy and no prompt waits
    monkeypatch.setattr(model, "begin", lambda *a: events.append("step") or begin(*a))
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
    assert batch.row_steps == sum(new for _, new in lengths)  # a token each
    assert batch.row_steps / (4 * batch.steps) > 0.9


def test_a_seed_decides_what_is_sampled():
    model, prompts = random_model(), prompts_of([1, 30, 7, 12])
    first, again, other, *unseeded = (
        collected(generate_batch(model, prompts, 2, 4, WINDOW, 20,
                                 sampling=Sampling(1.0, top_p=0.9, seed=seed)))[0]
        for seed in (5, 5, 6, None, None))
    assert first == again != other
    assert unseeded[0] != unseeded[1]


def test_prompts_have_the_seeds_that_follow():
    model, prompt = random_model(), prompts_of([9])[0]
    how = dict(max_new_tokens=20, sampling=Sampling(1.0, seed=5))
    ids, _ = collected(generate_batch(model, [prompt] * 3, 2, 4, WINDOW, **how))
    for n in range(3):
        assert ids[n] == alone(model, prompt, 20, temperature=1.0, seed=5 + n)
    assert len(set(map(tuple, ids.values()))) == 3
    unseeded, _ = collected(generate_batch(model, [prompt] * 3, 2, 4, WINDOW, 20,
                                           sampling=Sampling(1.0)))
    assert len(set(map(tuple, unseeded.values()))) == 3


ASKED = [Sampling(1.0, top_p=0.9, seed=1), Sampling(), Sampling(0.8, 20, 0.9, 0.05, seed=2),
         Sampling(1.2, 0, 1.0, 0, 1.2, 0.2, 0.3, seed=3), Sampling(0, 0, 1, 0, 1.5, seed=4),
         Sampling(1.0, min_p=0.1, seed=5)]


@pytest.mark.parametrize("batch_size, n_staging", [(1, 1), (2, 2), (4, 1), (7, 3)])
def test_a_seed_says_the_same_whatever_else_runs_and_in_any_row(batch_size, n_staging):
    prompts = [Prompt(ids, one, new) for ids, one, new in zip(
        prompts_of([9, 130, 3, 40, 12, 7]), ASKED, [30, 10, 40, 20, 25, 35])]
    alone = [collected(generate_batch(random_model(), [prompt], 1, 4, WINDOW))[0][0]
             for prompt in prompts]
    batch = Batch(random_model(), batch_size, 4, WINDOW, n_staging)
    ids, _ = collected(generate_batch(random_model(), prompts, batch=batch))
    assert [ids[index] for index in range(6)] == alone
    ids, _ = collected(generate_batch(random_model(), prompts[::-1], batch=batch))
    assert [ids[index] for index in range(6)] == alone[::-1]
    assert len(set(map(tuple, alone))) == 6


def test_a_row_of_any_settings_waits_for_nothing(monkeypatch):
    """As on a GPU: a step looks at no value but the tokens that it tells."""
    model = random_model()
    batch = Batch(model, len(ASKED), 4, WINDOW)
    as_on_a_gpu(monkeypatch)
    prompts = [Prompt(ids, one, 9) for ids, one in zip(prompts_of([3] * len(ASKED)), ASKED)]
    stream = generate_batch(model, prompts, batch=batch)
    next(event for event in stream if all(batch.rows))
    for name in ("item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(
            f"{name} in a step"))
    assert sum(token_id is None for _, token_id in stream) == len(ASKED)


def test_samples_of_a_prompt_have_the_seeds_that_follow_and_one_prefill(monkeypatch):
    model, prompts = random_model(), prompts_of([40, 20])
    batch, read = Batch(model, 2, 4, WINDOW), []
    begin = model.begin
    monkeypatch.setattr(model, "begin", lambda tokens, *rest: read.append(tokens.shape[1])
                        or begin(tokens, *rest))
    ids, _ = collected(generate_batch(model, [Prompt(prompts[0], Sampling(1.0, seed=7), 9,
                                                     samples=5), prompts[1]], batch=batch,
                                      max_new_tokens=4))
    assert sum(size for size in read if size > 1) == 40 + 20
    assert len(ids) == 6 and len(set(map(tuple, ids.values()))) == 6
    for n in range(5):
        one = Prompt(prompts[0], Sampling(1.0, seed=7 + n), 9)
        assert collected(generate_batch(random_model(), [one], 1, 4, WINDOW))[0][0] == ids[n]
    assert ids[5] == alone(random_model(), prompts[1], 4)


def test_prompts_may_come_later():
    """None: nothing waits now. Rows go on meanwhile, and an idle batch may wait."""
    prompts, model = prompts_of([5, 40, 9]), random_model()
    batch, told = Batch(model, 2, 4, WINDOW), []

    def arriving():
        yield prompts[0]
        while len(told) < 10:  # as the first one is being said
            yield None
        yield prompts[1]
        while not batch.idle:
            yield None
        assert len(told) == 21 + 13
        yield prompts[2]

    for event in generate_batch(model, arriving(), max_new_tokens=[20, *[12] * 99], batch=batch):
        told.append(event)
    ids, _ = collected(told)
    assert [ids[n] for n in range(3)] == [
        alone(random_model(), prompt, n) for prompt, n in zip(prompts, (20, 12, 12))]


def test_a_short_prompt_overtakes_a_long_one_with_two_staging_rows():
    model, (long, short) = random_model(), prompts_of([600, 20])
    for n_staging, first in ((1, 0), (2, 1)):
        batch = Batch(model, 2, 4, WINDOW, n_staging)
        _, ended = collected(generate_batch(model, [long, short], max_new_tokens=5, batch=batch))
        assert ended[0] == first


def test_a_row_that_was_kept_begins_another_prompt():
    """When the end is told, the row holds the prompt and what was told."""
    model, (first, second) = random_model(), prompts_of([50, 9])
    batch, kept = Batch(model, 2, 4, WINDOW), make_cache(model, 4, WINDOW)
    stream = generate_batch(model, [Prompt(first, max_new_tokens=20)], batch=batch)
    said = []
    for one, token_id in stream:
        said.append(token_id)
        if token_id is None:
            kept.copy_row(0, batch.cache, batch.rows.index(one))
    assert int(kept.length) == 70
    hooks = Hooks(first + said[:-1], restore_prefix=lambda staging: staging.copy_row(0, kept))
    asked = [Prompt(second, Sampling(1.0, repetition_penalty=1.3, seed=4), 15, hooks=hooks),
             Prompt(first + said[:-1] + second, Sampling(1.0, repetition_penalty=1.3, seed=4), 15)]
    ids, _ = collected(generate_batch(model, asked, batch=batch))
    assert ids[0] == ids[1] and int(kept.length) == 70


def test_a_stream_can_be_ended_while_it_is_read_or_by_another():
    model, prompts = random_model(), prompts_of([5, 300, 7])
    batch, told, streams = Batch(model, 2, 4, WINDOW), [], {}
    for stream, token_id in generate_batch(model, prompts, max_new_tokens=30, batch=batch):
        index = stream.index
        streams[index] = stream
        told.append((index, token_id))
        if len(told) == 3:
            [second] = batch.prefills[0].streams
            assert second.index == 1
            second.cancel()
        if told.count((2, None)) == 0 and [i for i, _ in told].count(2) == 4 and index == 2:
            streams[0].cancel()
    of = [[token_id for i, token_id in told if i == index] for index in range(3)]
    assert of[1] == [None] and len(of[2]) == 31 and of[2][:-1] == alone(model, prompts[2], 30)
    assert 5 < len(of[0]) < 30 and of[0][:-1] == alone(model, prompts[0], 30)[:len(of[0]) - 1]


def test_what_prompts_share_is_shown_once_it_is_read(monkeypatch):
    model, (first, second) = random_model(), prompts_of([70, 9])
    kept = make_cache(model, 4, WINDOW)
    sharing = Hooks(n_shared=70, save_shared=lambda staging: kept.copy_row(0, staging))
    following = Hooks(first, restore_prefix=lambda staging: staging.copy_row(0, kept))
    asked = [Prompt(first + second, max_new_tokens=9, hooks=sharing),
             Prompt(second, max_new_tokens=9, hooks=following)]
    ids, _ = collected(generate_batch(model, asked, 2, 4, WINDOW))
    assert ids[0] == ids[1] == alone(model, first + second, 9) and int(kept.length) == 70


def test_rows_that_ended_hold_nothing_and_idle_ones_stay_short():
    model, (prompt, other) = random_model(), prompts_of([100, 5])
    batch, longest = Batch(model, 3, 4, WINDOW, n_staging=2), []
    asked = [prompt, *(Prompt(other, max_new_tokens=90) for _ in range(2))]
    for stream, _ in generate_batch(model, asked, max_new_tokens=9, batch=batch):
        if stream.index == 1 and batch.rows.count(None) == 1:
            longest.append(min(batch.cache.length.tolist()))
    assert len(longest) > 50 and set(longest[2:]) == {1}
    for cache in (batch.cache, *batch.staging):
        assert not any(layer[:, :, 1:].any() for layer in (*cache.k, *cache.v))


@pytest.mark.parametrize("n_chunks, most", [(None, 4), (1, 1), (2, 2)])
def test_how_many_chunks_come_between_two_steps_can_be_limited(monkeypatch, n_chunks, most):
    model = random_model()
    batch, begin, calls = Batch(model, 4, 4, WINDOW, n_chunks=n_chunks), model.begin, []
    monkeypatch.setattr(model, "begin", lambda tokens, cache, *rest: calls.append(
        "c" if cache is batch.staging[0] else ".") or begin(tokens, cache, *rest))
    monkeypatch.setattr(program, "PAUSE", math.inf)  # which would limit them by time
    list(generate_batch(model, prompts_of([5, 400]), max_new_tokens=60, batch=batch))
    between = "".join(calls).strip("c").strip(".").split(".")
    assert max(map(len, between)) == most


def test_a_row_that_is_busy_alone_is_stepped_alone_and_nothing_changes(monkeypatch):
    model, prompts = random_model(), prompts_of([9, 20, 3, 40])
    limits, begin, shapes = [30, 90, 10, 200], model.begin, []
    expected = [alone(model, *pair) for pair in zip(prompts, limits)]
    monkeypatch.setattr(model, "begin", lambda tokens, *rest: shapes.append(tokens.shape) or begin(
        tokens, *rest))
    ids, _ = collected(generate_batch(model, prompts, 3, 4, WINDOW, limits))
    assert [ids[n] for n in range(4)] == expected
    assert shapes.count((1, 1)) > 50 < shapes.count((3, 1)) and shapes[-1] == (1, 1)


def test_a_very_long_prompt_takes_no_more_time_than_the_steps_beside_it(monkeypatch):
    """By a clock that only the model moves: a chunk takes as long as ten steps."""
    model, now, calls = random_model(n_layers=1), [0.0], []
    batch, begin = Batch(model, 4, 4, WINDOW), model.begin
    monkeypatch.setattr(program.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(program, "LONG_PROMPT", 100)

    def timed(tokens, cache, *rest):
        calls.append("c" if cache is batch.staging[0] else ".")
        now[0] += 0.1 if cache is batch.staging[0] else 0.01
        return begin(tokens, cache, *rest)

    monkeypatch.setattr(model, "begin", timed)
    said = generate_batch(model, prompts_of([5, 900]), max_new_tokens=[300, 9], batch=batch)
    ids, _ = collected(said)
    between = "".join(calls).strip("c").split("c")[1:20]
    assert min(map(len, between)) >= 9 and max(map(len, between)) <= 12
    monkeypatch.undo()
    assert ids[1] == alone(model, prompts_of([5, 900])[1], 9)


def test_stop_ids_are_each_prompt_s_own():
    model, prompt = random_model(), prompts_of([9])[0]
    free = alone(model, prompt, 20)
    ids, _ = collected(generate_batch(model, [
        Prompt(prompt, stop_ids=[free[5]]), Prompt(prompt, max_new_tokens=20)], 2, 4, WINDOW))
    assert ids[0] == free[:free.index(free[5]) + 1] and ids[1] == free


def test_log_probabilities_are_noted_for_whoever_asks():
    """Of the logits as they are, not of what temperature and penalties make of them."""
    model, (prompt, other) = random_model(), prompts_of([9, 12])
    batch, noted = Batch(model, 2, 4, WINDOW), {}
    asked = [Prompt(prompt, Sampling(1.5, repetition_penalty=1.4, seed=1), 12, logprobs=3),
             Prompt(other, max_new_tokens=15), Prompt(other, max_new_tokens=6, logprobs=0)]
    ids, said = {}, generate_batch(model, asked, batch=batch)
    for stream, token_id in said:
        index = stream.index
        if token_id is None:
            noted[index] = stream.logprobs
        else:
            ids.setdefault(index, []).append(token_id)
            assert len(stream.logprobs) == (0 if index == 1 else len(ids[index]))
    assert noted[1] == [] and all(likeliest == {} for _, likeliest in noted[2])
    exact = model(torch.tensor([prompt + ids[0]]))[0, 8:-1].double().log_softmax(-1)
    for row, token_id, (own, likeliest) in zip(exact, ids[0], noted[0], strict=True):
        assert abs(own - row[token_id]) < 1e-4 and list(likeliest) == row.topk(3).indices.tolist()
        assert all(abs(row[i] - value) < 1e-4 for i, value in likeliest.items())


@pytest.mark.parametrize("changes, word", [
    (dict(batch_size=0), "batch size 0"),
    (dict(prompts=[[1], []]), "empty"),
    (dict(prompts=[[64]]), "outside"), (dict(max_new_tokens=-1), "max_new_tokens -1"),
    (dict(window=0), "window 0")])
def test_what_cannot_be_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        list(generate_batch(random_model(), **{"prompts": [[1]], **changes}))


@pytest.mark.parametrize("changes, word", [
    (dict(logprobs=21), "logprobs 21 .* at most 20"), (dict(samples=0), "samples 0"),
    (dict(max_new_tokens=-1), "max_new_tokens -1")])
def test_a_prompt_that_cannot_be_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        Prompt([1], **changes)


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


def test_without_tqdm_there_is_no_bar_and_all_else(prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(records("--prompts", prompts, "--limit", 2, "--max-new-tokens", 3,
                       program="batch")) == 2


def test_progress_and_totals_go_to_stderr(prompts):
    status, out, err = run("batch", "--prompts", prompts, "--max-new-tokens", 4, "--batch", 3,
                           "--seed", 7)
    assert status == 0 and len([json.loads(line) for line in out.splitlines()]) == 5
    assert "\r" not in err and "generating: 20 tokens, " in err  # plain lines: no terminal
    assert err.splitlines()[-1].startswith("5 of 5 prompts, 20 new tokens, ")
    assert "tok/s, rows busy" in err and err.endswith("seed 7\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_has_written_what_is_finished(prompts, monkeypatch, number):
    steps, read = [], program.copy_to_host

    def interrupting(tokens):
        steps.append(1)
        if len(steps) == 16:
            signal.raise_signal(number)
        return read(tokens)

    expected = {record["index"]: record["token_ids"] for record in greedy(prompts)}
    monkeypatch.setattr(program, "copy_to_host", interrupting)
    status, out, err = run("batch", "--prompts", prompts, "--batch", 2, "--dtype", "fp32",
                           "--temperature", 0, "--window", 60, "--max-new-tokens", 12)
    written = [json.loads(line) for line in out.splitlines()]
    assert status == 128 + number and "Traceback" not in err
    assert [record["index"] for record in written] == [0, 1]
    assert all(record["token_ids"] == expected[record["index"]] for record in written)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_answers_have_the_seeds_of_their_place_whatever_the_batch_size(prompts):
    argv = ("--prompts", prompts, "--limit", 3, "--samples", 2, "--dtype", "fp32", "--min-p", 0.02,
            "--repetition-penalty", 1.1, "--max-new-tokens", 9, "--window", 60)
    found = [records(*argv, "--batch", n, program="batch") for n in (1, 4)]
    texts = [{(r["index"], r["sample"]): r["text"] for r in some} for some in found]
    assert texts[0] == texts[1] and len(set(texts[0].values())) == len(texts[0]) == 6
    [second] = [r for r in found[0] if (r["index"], r["sample"]) == (0, 1)]
    _, out, _ = run("generate", "--json", "--prompt", "The cat", "--seed", second["seed"],
                    *argv[6:])  # and one sample
    assert second["seed"] == 5 + 1 and json.loads(out)["token_ids"] == second["token_ids"]


@pytest.mark.parametrize("argv, naming", [
    (["--samples", "0"], ["--samples"]), (["--min-p", "1.5"], ["--min-p"]),
    (["--lookup"], ["--lookup", "one stream"]), (["--draft", TINY], ["--draft", "one stream"]),
    (["--speculate", "3"], ["--speculate"]), (["--batch", "0"], ["--batch", "0"]),
    (["--limit", "0"], ["--limit"]), (["--window", "999"], ["999"]),
    (["--prompts", "/no/such.jsonl"], ["/no/such.jsonl"])])
def test_arguments(prompts, argv, naming):
    refused("batch", "--prompts", prompts, *argv, naming=naming)


def test_prompts_are_required():
    refused("batch", naming=["--prompts"])


def test_a_prompts_log_probabilities_hold_one_chunks_logits(monkeypatch):
    """They are those of a full pass, while other streams step between its layers."""
    model, shapes = random_model(), []
    finish = type(model).finish
    monkeypatch.setattr(type(model), "finish", lambda self, x, last: (
        shapes.append(x.shape[:2]), finish(self, x, last))[1])
    ids = torch.randint(64, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    batch = Batch(model, 2, 4, 1000, n_staging=2)
    monkeypatch.setattr(Batch, "must_pause", lambda batch: any(batch.rows))
    found = {}
    for stream, token_id in generate_batch(model, [
            Prompt(ids[:20], max_new_tokens=40), Prompt(ids, max_new_tokens=0, prompt_logprobs=2),
            Prompt(ids, max_new_tokens=1, prompt_logprobs=0)], batch=batch):
        if token_id is None:
            found[stream.index] = stream.prompt_logprobs
    assert max(T for _, T in shapes) == batch.cache.max_chunk and not found[0]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    own = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    for index in (1, 2):
        assert torch.allclose(torch.tensor([value for value, _ in found[index]]), own, atol=1e-4)
    assert [list(top) for _, top in found[1]] == expected.topk(2).indices.tolist()
    assert not any(top for _, top in found[2])
