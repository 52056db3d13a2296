"""Speculation is lossless: greedy token for token, sampling in distribution."""

import copy
import itertools
import json
import math
import shutil
from array import array
from dataclasses import replace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from convert_hf import convert
from generate import answer, generate, load, make_cache, timed_prefill, warm
from helpers import TINY, random_model, run
from kv_cache import KVCache
from load import compile_model
from quantize import asked_quantization
from sample import Sampling, distribution
from speculate import Speculation, look_up, propose, verify
from tokenizer import Tokenizer

DRAFT = TINY.parent / "tiny-draft"
WINDOW = 28


def of_draft(draft, fixed=None, window=WINDOW):
    return Speculation(draft, make_cache(draft, 4, window), fixed)


@pytest.fixture(scope="module")
def models():
    return [load(path, device="cpu", dtype=torch.float32)[0] for path in (TINY, DRAFT)]


@pytest.fixture(scope="module")
def plain(models):
    """A prompt of 40 tokens, and the 300 that plain greedy decoding says after it."""
    target, prompt = models[0], list(range(300, 340))
    return prompt, list(generate(target, make_cache(target, 4, WINDOW), prompt, 300, stop_ids=()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draft", "lookup", "itself", "adaptive"])
def test_greedy_equals_plain_greedy_over_many_wraps(models, plain, kind):
    (target, draft), (prompt, expected) = models, plain
    speculation = {"draft": lambda: of_draft(draft, 5), "lookup": lambda: Speculation(fixed=3),
                   "itself": lambda: of_draft(target, 4),
                   "adaptive": lambda: of_draft(draft, window=100)}[kind]()
    cache = make_cache(target, 4, WINDOW)
    said = generate(target, cache, prompt, 300, stop_ids=(), speculation=speculation)
    assert list(said) == expected
    assert int(cache.length) == len(prompt) + 300
    assert 0 < speculation.accepted <= speculation.proposed
    if kind == "itself":
        assert speculation.accepted > 0.99 * speculation.proposed
    if speculation.draft and speculation.size:
        assert int(speculation.cache.length) == len(prompt) + 300 - 1


@pytest.mark.slow
def test_what_a_verified_round_draws_has_the_models_distribution():
    """Chi-square of 4,000 two-token draws against the exact product, for a bad proposer."""
    torch.manual_seed(0)
    generator, V, rounds = torch.Generator().manual_seed(1), 6, 4000
    for sampling in (Sampling(0.7), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.8),
                     Sampling(1.1, min_p=0.15)):
        first, after = torch.randn(V) * 2, torch.randn(V, V) * 2  # logits, also after each token
        q = distribution(torch.randn(1, V) * 2, sampling)
        counts = torch.zeros(V, V)
        for proposal in torch.multinomial(q[0], rounds, replacement=True, generator=generator):
            p = distribution(torch.stack([first, after[proposal]]), sampling)
            n, following = verify(p, q, proposal[None], sampling, generator)
            if n:
                counts[proposal, following] += 1
            else:  # the token after a replaced one is drawn in the next round
                p = distribution(after[following], sampling)
                counts[following, torch.multinomial(p[0], 1, generator=generator)] += 1
        expected = rounds * distribution(first, sampling)[:, None] * distribution(after, sampling)
        assert (counts[expected == 0] == 0).all()
        cells = expected > 5
        chi2 = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
        freedom = int(cells.sum()) - 1
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


@pytest.mark.slow
def test_whole_streams_of_samples_have_the_models_distribution():
    """Three tokens after a prompt, through both caches, against the exact joint distribution."""
    target, draft = random_model(0, vocab_size=5), random_model(1, vocab_size=5)
    prompt, sampling = [1, 2, 3], Sampling(0.9, top_k=4, min_p=0.05)

    def next_token(ids):
        return distribution(target(torch.tensor([prompt + list(ids)]))[0, -1], sampling)

    expected = {}
    for ids in itertools.product(range(5), repeat=3):
        expected[ids] = float(next_token([])[ids[0]] * next_token(ids[:1])[ids[1]]
                              * next_token(ids[:2])[ids[2]])
    draws, counts = 900, dict.fromkeys(expected, 0)
    cache, its = KVCache(target.config, 1, 2, 6, 8), KVCache(draft.config, 1, 2, 6, 8)
    for draw in range(draws):
        cache.reset()
        its.reset()
        ids = tuple(generate(target, cache, prompt, 3, sampling=replace(sampling, seed=draw),
                             stop_ids=(), speculation=Speculation(draft, its, 2)))
        counts[ids] += 1
    assert all(counts[ids] == 0 for ids, p in expected.items() if p == 0)
    big = [ids for ids, p in expected.items() if p * draws > 5]
    chi2 = sum((counts[i] - draws * expected[i]) ** 2 / (draws * expected[i]) for i in big)
    assert chi2 < len(big) + 4 * (2 * len(big)) ** 0.5


def test_impossible_tokens_are_never_accepted_and_an_empty_residual_falls_back():
    p = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[1.0, 0.0, 0.0]])
    for seed in range(200):
        n, following = verify(p, q, torch.tensor([0]), Sampling(1.0),
                              torch.Generator().manual_seed(seed))
        assert n == 0 and following == 1
    same = torch.tensor([[0.5, 0.5, 0.0]])
    p = torch.cat([same, same])
    for seed in range(50):  # proposed outside q's support: refused, and p - q leaves nothing
        n, following = verify(p, same, torch.tensor([2]), Sampling(1.0),
                              torch.Generator().manual_seed(seed))
        assert n == 0 and following in (0, 1)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 7])
def test_stopping_anywhere_in_a_run_leaves_the_cache_at_the_token_yielded(models, stop_after):
    target, prompt = models[0], list(range(300, 320))
    cache, speculation = make_cache(target, 4, WINDOW), of_draft(target, 5)
    said = list(itertools.islice(generate(target, cache, prompt, 50, speculation=speculation,
                                          stop_ids=()), stop_after))
    assert int(cache.length) == len(prompt) + stop_after
    assert int(speculation.cache.length) == len(prompt) + stop_after - 1
    again = make_cache(target, 4, WINDOW)
    follow = list(generate(target, again, prompt, stop_after, stop_ids=()))
    assert said == follow
    turns = [list(generate(target, c, [9, 8, 7], 20, speculation=s, stop_ids=()))
             for c, s in ((cache, speculation), (again, None))]
    assert turns[0] == turns[1]


def test_eos_and_the_limit_end_inside_an_accepted_run(models):
    target, prompt = models[0], list(range(300, 320))
    plain = list(generate(target, make_cache(target, 4, WINDOW), prompt, 30, stop_ids=()))
    eos = plain[9]
    ending, _ = load(TINY, device="cpu", dtype=torch.float32)
    object.__setattr__(ending.config, "eos_ids", (eos,))
    for limit in (1, 4, 30):
        cache = make_cache(ending, 4, WINDOW)
        said = list(generate(ending, cache, prompt, limit, speculation=of_draft(target, 5)))
        wanted = plain[:plain.index(eos) + 1][:limit]
        assert said == wanted and int(cache.length) == len(prompt) + len(wanted)


def test_speculation_that_does_not_pay_stops_and_says_so_once(models, caplog):
    caplog.set_level("INFO", "gpt_stream")
    target = models[0]
    silly = random_model(7, vocab_size=target.config.vocab_size)
    cache, speculation = make_cache(target, 4, WINDOW), of_draft(silly)
    list(generate(target, cache, [300, 301], 200, stop_ids=(), speculation=speculation))
    list(generate(target, cache, [300, 301], 50, stop_ids=(), speculation=speculation))
    assert speculation.size == 0 and speculation.proposed <= 40
    assert caplog.text.count("speculation stopped: 0 of") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(7, 9), (9, 7)], ids=["the draft's is longer", "shorter"])
def test_a_draft_whose_vocabulary_is_padded_otherwise_changes_nothing(sizes):
    """Chi-square of what a round draws, for a draft that likes most what the model has not; and
    greedy streams, also of tokens that the draft has not."""
    V, its = sizes
    target, draft = random_model(0, vocab_size=V), random_model(1, vocab_size=its)
    draft.output.weight[V:] *= 9
    cache, other = KVCache(target.config, 1, 2, 20, 64), KVCache(draft.config, 1, 2, 20, 64)
    prompt = [V - 1, 1, V - 1, 3]  # which may be beyond the draft's vocabulary
    plain = list(generate(target, cache, prompt, 60, stop_ids=()))
    cache.reset()
    speculation = Speculation(draft, other, 3)
    assert list(generate(target, cache, prompt, 60, stop_ids=(), speculation=speculation)) == plain
    assert speculation.proposed > 0
    sampling, generator, counts = Sampling(1.0, top_p=0.95), torch.Generator(), torch.zeros(V, V)
    generator.manual_seed(0)
    token, draws = torch.tensor([[V - 1]]), 600
    first = distribution(target(token)[0, -1], sampling)
    pairs = torch.stack([torch.full((V,), V - 1), torch.arange(V)], dim=1)
    after = distribution(target(pairs)[:, -1], sampling)
    for _ in range(draws):
        other.reset()
        speculation.restart([0])  # the draft reads on from any token
        proposals, q = propose(speculation, token, 1, V, sampling, generator)
        assert q.shape == (1, V) and proposals.max() < min(V, its)
        assert torch.allclose(q.sum(-1), torch.ones(1)) and (q[:, its:] == 0).all()
        p = torch.stack([first, after[proposals[0, 0]]])
        n, following = verify(p, q, proposals[0], sampling, generator)
        if n:
            counts[proposals[0, 0], following] += 1
        else:  # the token after a replaced one is drawn in the next round
            second = torch.multinomial(after[following[0]], 1, generator=generator)
            counts[following, second] += 1
    expected = draws * first[:, None] * after
    assert (counts[expected == 0] == 0).all()
    cells = expected > 5
    chi2 = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def resized(source, folder, extra):
    """A copy of a checkpoint with so many more rows for tokens, or fewer, which no text has."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / "config.json").read_text())
    size = raw["vocab_size"] + extra
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": size}))
    weights = load_file(folder / "model.safetensors")
    weights["embed.weight"] = F.pad(weights["embed.weight"], (0, 0, 0, extra))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_draft_needs_the_same_tokenizer_and_not_the_same_padding(tmp_path):
    """A vocabulary's size is not its tokenizer. What has another one is told so."""
    shared = ["--max-new-tokens", 40, "--temperature", 0, "--dtype", "fp32", "--json"]
    plain = json.loads(run("generate", *shared)[1])
    for name, extra in (("longer", 64), ("shorter", -8)):
        draft = resized(DRAFT, tmp_path / name, extra)
        status, out, err = run("generate", *shared, "--draft", draft, "--speculate", 4)
        assert status == 0, err
        assert json.loads(out)["token_ids"] == plain["token_ids"] and json.loads(out)["accepted"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    (tmp_path / "longer" / "tokenizer.model").unlink()
    words.save(str(tmp_path / "longer" / "tokenizer.json"))
    status, _, err = run("generate", *shared, "--draft", tmp_path / "longer")
    assert status == 2 and "has another tokenizer than the model" in err.splitlines()[-1]


def not_finite(model):
    """A copy of a model whose logits are NaN from its ninth step on."""
    broken, calls = copy.deepcopy(model), []

    def step(tokens, *rest, original=broken.step):
        calls.append(tokens)
        return original(tokens, *rest) * (math.nan if len(calls) > 8 else 1)

    broken.step = step
    return broken


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9, seed=1)])
def test_logits_that_are_not_finite_end_an_answer_and_a_draft_s_end_speculation(models, sampling,
                                                                               caplog):
    target, draft = models
    for speculation in (None, of_draft(draft, 3), Speculation(fixed=2)):
        broken = not_finite(target)
        stream = generate(broken, make_cache(broken, 4, WINDOW), [300, 301], 200, stop_ids=(),
                          sampling=sampling, speculation=speculation)
        said = []
        with pytest.raises(ValueError, match="NaN or infinite"):
            for token_id in stream:
                said.append(token_id)
        assert len(said) >= 7 and min(said) >= 0
        if not sampling.temperature:
            assert said == list(generate(target, make_cache(target, 4, WINDOW), [300, 301],
                                         len(said), stop_ids=()))
    speculation = of_draft(not_finite(draft), 3)
    said = list(generate(target, make_cache(target, 4, WINDOW), [300, 301], 60, stop_ids=(),
                         sampling=sampling, speculation=speculation))
    assert len(said) == 60 and min(said) >= 0 and speculation.size == 0
    assert caplog.text.count("speculation stopped: the draft's logits are NaN or infinite") == 1
    if not sampling.temperature:
        assert said == list(generate(target, make_cache(target, 4, WINDOW), [300, 301], 60,
                                     stop_ids=()))


def test_look_up():
    history = array("q", [5, 6, 7, 8, 1, 2, 5, 6, 7, 9, 3, 5, 6, 7])
    assert look_up(history, 3) == [9, 3, 5]  # the last occurrence of 5 6 7, not the first
    assert look_up(array("q", [1, 2, 1, 2]), 5) == [1, 2, 1, 2, 1]
    assert look_up(array("q", [4, 4, 4, 4]), 2) == [4, 4]
    assert look_up(array("q", [1, 2, 3, 4]), 2) is None
    assert look_up(array("q", [1]), 2) is None
    assert look_up(array("q", [256, 0, 1, 256]), 2) is None  # bytes alike, tokens not


@pytest.mark.slow
def test_nothing_is_compiled_after_warming_with_a_draft():
    torch._dynamo.reset()
    counters.clear()
    target, _ = load(DRAFT, device="cpu", dtype=torch.float32)
    draft, _ = load(DRAFT, device="cpu", dtype=torch.float32)
    for model in (target, draft):
        compile_model(model)
    cache, speculation = make_cache(target, 4, WINDOW), of_draft(draft)
    warm(target, cache, speculation, Sampling(0.8, seed=1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 50, 300):
            list(generate(target, cache, [7] * length, 60, temperature=0.8, stop_ids=(),
                          speculation=speculation))
    assert speculation.accepted > 0 and not counters["graph_break"]


def test_the_programs_speculate_and_refuse_what_cannot_be(tmp_path):
    shared = ["--max-new-tokens", 40, "--temperature", 0, "--json", "--dtype", "fp32"]
    texts = []
    for flags in ([], ["--draft", DRAFT, "--speculate", 3], ["--lookup"]):
        status, out, err = run("generate", *shared, *flags)
        assert status == 0, err
        record = json.loads(out)
        texts.append(record["text"])
        assert ("rounds" in record) == bool(flags)
    assert texts[0] == texts[1] == texts[2]
    status, out, err = run("chat", *shared, "--lookup", stdin="Hello there\nHello there\n/quit\n")
    assert status == 0 and [json.loads(line)["turn"] for line in out.split("\n") if line] == [0, 1]
    for flags, words in ((["--draft", DRAFT, "--lookup"], "exclude each other"),
                         (["--speculate", 3], "goes with --draft or --lookup"),
                         (["--lookup", "--samples", 2], "--samples works without --draft"),
                         (["--draft", DRAFT, "--repetition-penalty", 1.1],
                          "--repetition-penalty works without --draft"),
                         (["--lookup", "--speculate", 128], "at most 127"),
                         (["--lookup", "--speculate", 0], "must be at least 1")):
        status, _, err = run("generate", *shared, *flags)
        assert status == 2 and words in err.splitlines()[-1]


def test_the_rate_counts_every_round(monkeypatch):
    """By a clock that ticks once a call of the model."""
    model, calls, tokenizer = random_model(), [], Tokenizer(TINY)
    step = model.step
    model.step = lambda *args: calls.append(1) or step(*args)
    monkeypatch.setattr("generate.time.perf_counter", lambda: float(len(calls)))
    for speculation in (None, Speculation(fixed=3)):
        calls.clear()
        prompt = timed_prefill(model, make_cache(model, 4, 60), [1, 2] * 5, speculation)
        record = answer(model, tokenizer, prompt, 12, Sampling(seed=0), stop_ids=(),
                        speculation=speculation)
        steps = len(calls) - 1  # without the prefill
        assert record["decode_tok_s"] == 11 / (steps if speculation else steps - 1)
        assert steps == 12 if speculation is None else steps < 12


@pytest.mark.slow
def test_quantized_models_and_stop_texts_inside_a_run(tmp_path):
    convert(DRAFT, tmp_path / "draft", None, asked_quantization("int4", 32))
    shared = ["--max-new-tokens", 60, "--temperature", 0, "--json", "--dtype", "fp32",
              "--quantize", "int8", "--window", 40]
    _, out, _ = run("generate", *shared)
    text = json.loads(out)["text"]
    speculated = ["--draft", tmp_path / "draft", "--speculate", 5]
    for stop in ([], ["--stop", text[30:36]], ["--stop", text[61:64]], ["--stop", text[95:101]]):
        plain, ours = (json.loads(run("generate", *shared, *stop, *flags)[1])
                       for flags in ([], speculated))
        for key in ("text", "token_ids", "finish_reason", "evicted"):
            assert ours[key] == plain[key], (stop, key)
        assert ours["accepted"] > 0 and (ours["finish_reason"] == "stop") == bool(stop)
