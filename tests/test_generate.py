"""Sampling against closed forms, prefill and decode against the model called plainly, and the
programs' output."""

import json
import math

import pytest
import torch

from draw import RowSampler, sample
from generate import decode, generate, load, make_cache, prefill
from helpers import TINY, as_on_a_gpu, random_model, run
from kv_cache import KVCache
from sample import Sampling, probabilities
from speculate import Speculation

# ------------------------------------------------------------------------------ sampling


def test_temperature_divides_the_logits():
    logits = torch.tensor([1.0, 2.0, 4.0])
    assert torch.allclose(probabilities(logits, 0.5), (logits * 2).exp() / (logits * 2).exp().sum())


def test_top_k_keeps_exactly_k_even_among_equals():
    probs = probabilities(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), 1.0, top_k=2)
    assert (probs > 0).sum() == 2 and probs[0] > probs[1:].max()
    assert probabilities(torch.arange(5.0), 1.0, top_k=99).count_nonzero() == 5


@pytest.mark.parametrize("top_p, kept", [
    (0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_the_mass(top_p, kept):
    p = torch.tensor([0.125, 0.5, 0.125, 0.25])
    probs = probabilities(p.log(), 1.0, top_p=top_p)
    expected = torch.where(p >= p.sort(descending=True).values[kept - 1], p, 0)
    if kept != 3:  # of the two equal ones either may stay
        assert torch.allclose(probs, expected / expected.sum())
    assert probs.count_nonzero() == kept and math.isclose(probs.sum(), 1, rel_tol=1e-6)


def test_top_p_of_zero_is_the_likeliest_token():
    assert probabilities(torch.tensor([0.0, 3.0, 1.0]), 1.0, top_p=0.0).tolist() == [0, 1, 0]


def test_a_tiny_temperature_is_the_likeliest_token():
    logits = torch.tensor([1.0, 88.0, 87.0])
    assert probabilities(logits, 1e-30).tolist() == [0, 1, 0]


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=5), dict(top_p=0.8), dict(top_k=6, top_p=0.7)])
def test_draws_have_the_distribution(settings):
    """Chi-square over 20,000 draws: 99.9% of true samplers stay below the bound."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3)) * 1.5
    probs = probabilities(logits, 0.9, **settings)
    n = 20_000
    draws = sample(logits.expand(n, -1), Sampling(0.9, **settings),
                   torch.Generator().manual_seed(4))
    counts = torch.bincount(draws, minlength=10)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - n * probs) ** 2 / (n * probs))[possible].sum().item()
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 3.1 * math.sqrt(2 * degrees) + 7


def test_temperature_zero_is_argmax():
    logits = torch.randn(3, 1, 50)
    assert torch.equal(sample(logits), logits.argmax(-1))


# ------------------------------------------------------------------------------ prefill and decode


@pytest.mark.parametrize("length", [1, 31, 32, 33, 128, 129, 300, 700])
def test_padded_prefill_equals_one_token_at_a_time(length):
    model = random_model()
    prompt = torch.randint(0, 64, (length,)).tolist()
    plain, padded = (KVCache(model.config, 1, 4, 60) for _ in range(2))
    for token in prompt:
        expected = model(torch.tensor([[token]]), plain)
    assert (prefill(model, padded, prompt) - expected).abs().max() < 1e-4
    assert padded.length.item() == length
    following = torch.tensor([[5]])
    assert (model(following, padded) - model(following, plain)).abs().max() < 1e-4


def test_a_prompt_of_ten_windows_then_ten_windows_of_decoding():
    model = random_model()
    cache, plain = KVCache(model.config, 1, 4, 28, 64), KVCache(model.config, 1, 4, 28, 1)
    prompt = torch.randint(0, 64, (280,)).tolist()
    ids = list(generate(model, cache, prompt, max_new_tokens=280))
    expected = []
    for token in prompt:
        logits = model(torch.tensor([[token]]), plain)
    for _ in ids:
        expected.append(logits.argmax().item())
        logits = model(torch.tensor([[expected[-1]]]), plain)
    assert ids == expected


@pytest.mark.parametrize("taken", [1, 3, 8])
def test_whoever_stops_at_a_token_finds_it_in_the_cache(taken):
    """Stopping early and going on later equals never having stopped."""
    model = random_model()
    whole, cut = KVCache(model.config, 1, 4, 28, 64), KVCache(model.config, 1, 4, 28, 64)
    expected = list(generate(model, whole, [1, 2, 3], max_new_tokens=8))
    stream = generate(model, cut, [1, 2, 3], max_new_tokens=8)
    ids = [next(stream) for _ in range(taken)]
    stream.close()
    assert ids == expected[:taken] and cut.length.item() == 3 + taken
    follow_up = [9, 8]
    assert whole.length.item() == 11
    if taken == 8:
        assert torch.equal(prefill(model, cut, follow_up), prefill(model, whole, follow_up))


def test_decoding_ends_at_any_eos_id_and_yields_it():
    model = random_model()
    free = list(generate(model, KVCache(model.config, 1, 4, 28, 64), [1, 2], max_new_tokens=30))
    eos = free[7]
    model.config = type(model.config)(**{**model.config.__dict__, "eos_ids": (63, eos)})
    cache = KVCache(model.config, 1, 4, 28, 64)
    assert list(generate(model, cache, [1, 2], max_new_tokens=30)) == free[:free.index(eos) + 1]
    cache.reset()
    assert list(generate(model, cache, [1, 2], 30, stop_ids=())) == free


@pytest.mark.parametrize("prompt, word", [([], "empty"), ([64], "outside"), ([-1], "outside")])
def test_unusable_prompts_are_refused(prompt, word):
    model = random_model()
    with pytest.raises(ValueError, match=word):
        generate(model, KVCache(model.config, 1, 4, 28, 64), prompt)


@pytest.mark.parametrize("arguments, words", [
    (dict(temperature=-1), ["temperature -1"]), (dict(top_p=1.5), ["top_p 1.5"]),
    (dict(sampling=Sampling(0.5), top_k=3), ["sampling", "top_k=3"]),
    (dict(sampling=Sampling(), seed=0), ["sampling", "seed=0"]),
    (dict(speculation=Speculation(), repetition_penalty=1.3), ["penalty", "speculation"]),
    (dict(speculation=Speculation(), sampling=Sampling(presence_penalty=1)),
     ["penalty", "speculation"])])
def test_wrong_arguments_are_said_at_the_call(arguments, words):
    """And nothing is written before the first token is asked for."""
    model = random_model()
    cache = make_cache(model, 4, 60)
    with pytest.raises(ValueError) as raised:
        generate(model, cache, [1], **arguments)
    assert all(word in str(raised.value) for word in words)
    generate(model, cache, [1])
    assert cache.length.item() == 0


def test_a_cache_of_several_rows_or_of_another_kind_is_refused_at_the_call():
    model = random_model()
    with pytest.raises(ValueError, match="one row, and this one has 3"):
        generate(model, make_cache(model, 4, 60, batch_size=3), [1])
    with pytest.raises(ValueError, match="float16"):
        generate(model, KVCache(model.config, 1, 4, 60, dtype=torch.float16), [1])


def test_a_sampling_is_its_settings_one_by_one():
    model, settings = random_model(), dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01,
                                           repetition_penalty=1.1, seed=3)
    one_by_one = generate(model, make_cache(model, 4, 60), [1, 2], 30, **settings)
    together = generate(model, make_cache(model, 4, 60), [1, 2], 30, sampling=Sampling(**settings))
    assert list(one_by_one) == list(together)


def test_any_ids_may_end_an_answer():
    model = random_model()
    free = list(generate(model, make_cache(model, 4, 60), [1, 2], 30, stop_ids=()))
    ended = generate(model, make_cache(model, 4, 60), [1, 2], 30, stop_ids=[free[9], free[20]])
    assert list(ended) == free[:min(free.index(free[9]), free.index(free[20])) + 1]


def test_the_decode_loop_reads_the_device_once_a_token(monkeypatch):
    """Only the token that is yielded is read, and the next step is queued before it is."""
    model, events = random_model(), []
    cache = KVCache(model.config, 1, 4, 28, 64)
    logits = prefill(model, cache, [1, 2, 3])
    step, tolist = model.step, torch.Tensor.tolist
    monkeypatch.setattr(model, "step", lambda *a: events.append("step") or step(*a))
    as_on_a_gpu(monkeypatch)
    row = RowSampler(1, 64)
    row.begin(0, Sampling(0.7, top_p=0.9, seed=1), [])
    token = row.sample(logits)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: events.append("read") or tolist(t))
    for name in ("item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(
            f"{name} in decode"))
    list(decode(model, cache, token, 5, stop_ids=(), draw=row.sample))
    assert events == ["step", "read"] * 5


# ------------------------------------------------------------------------------ the program


def records(*argv, program="generate", **kwargs):
    status, out, err = run(program, "--json", "--seed", 5, *argv, **kwargs)
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_json_has_the_figures_and_the_seed_decides_the_text():
    first, again = (records("--max-new-tokens", 300, "--window", 60)[0] for _ in range(2))
    assert set(first) == {
        "prompt_tokens", "new_tokens", "text", "token_ids", "ttft_s", "prefill_tok_s",
        "decode_tok_s", "compile_s", "evicted", "finish_reason", "seed", "weight_bytes",
        "cache_bytes"}
    assert first["token_ids"] == again["token_ids"] and first["text"] == again["text"]
    assert first["new_tokens"] == len(first["token_ids"]) == 300
    assert first["finish_reason"] == "length" and first["seed"] == 5
    assert first["evicted"] == first["prompt_tokens"] + 300 - 64
    model, tokenizer = load(TINY, device="cpu")
    assert first["text"] == tokenizer.decode(first["token_ids"])
    assert first["weight_bytes"] == sum(p.nbytes for p in model.parameters())
    assert first["cache_bytes"] == make_cache(model, 4, 60).nbytes()


def test_text_goes_to_stdout_and_everything_else_to_stderr():
    argv = ("--max-new-tokens", 40, "--seed", 5)
    status, out, err = run("generate", *argv)
    (record,) = records(*argv[:2])
    assert status == 0 and out == record["text"] + "\n"
    for word in ("40 new tokens", "tok/s", "evicted", "seed 5", "cache"):
        assert word in err


def test_a_stop_text_ends_the_text_before_it():
    (free,) = records("--max-new-tokens", 100)
    word = free["text"].split()[6]
    (stopped,) = records("--max-new-tokens", 100, "--stop", word, "--stop", "never said")
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == free["text"][:free["text"].index(word)]


def test_greedy_text_is_the_api_s():
    (record,) = records("--temperature", 0, "--prompt", "The cat", "--max-new-tokens", 20)
    model, tokenizer = load(TINY, device="cpu")
    ids = tokenizer.encode("The cat")
    assert record["token_ids"] == list(generate(model, make_cache(model), ids, 20))


def test_greedy_leaves_the_random_numbers_alone():
    model = random_model()
    before = torch.random.get_rng_state()
    list(generate(model, make_cache(model, 4, 60), [1], 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_penalty_under_speculation_is_refused():
    model = random_model()
    with pytest.raises(ValueError, match="penalty"):
        list(generate(model, make_cache(model, 4, 60), [1], 3, speculation=Speculation(),
                      repetition_penalty=1.3))


def test_samples_are_what_their_seeds_say_alone():
    argv = ("--max-new-tokens", 30, "--min-p", 0.05, "--repetition-penalty", 1.2)
    samples = records(*argv, "--samples", 3)
    assert [(r["index"], r["seed"]) for r in samples] == [(0, 5), (1, 6), (2, 7)]
    for record in samples:
        status, out, _ = run("generate", "--json", *argv, "--seed", record["seed"])
        assert json.loads(out)["token_ids"] == record["token_ids"]
    assert len({record["text"] for record in samples}) == 3
    status, out, _ = run("generate", "--seed", 5, *argv, "--samples", 2)
    assert status == 0 and out == samples[0]["text"] + "\n" + samples[1]["text"] + "\n"
