"""How a token is drawn: every setting against transformers' own or a formula, every way of drawing
by chi-square, and rows that say what they say alone."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

import draw as module
from draw import (
    BLOCK,
    UNDRAWN,
    RowSampler,
    block_cdf,
    blockwise_topk,
    check_drawn,
    draw_from_weights,
    inverse_cdf,
    inverse_cdf_one,
    mix,
    sample,
    seed_key,
    uniform,
)
from generate import generate, make_cache
from helpers import random_model
from sample import (
    RANGES,
    Sampling,
    distribution,
    log_probabilities,
    penalize,
    probabilities,
    seen_in,
)
from speculate import Speculation

MIXED = [Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_p=0.9, seed=4),
         Sampling(1.3, 5, 0.7, seed=5), Sampling(1.0, min_p=0.1, seed=6),
         Sampling(0.7, 50, 0.95, 0.02, seed=7), Sampling(2.0, 0, 0.6, 0.05, seed=8),
         Sampling(0.9, 3, seed=2**60)]


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """A CPU draws otherwise than a GPU; here both ways run on a CPU."""
    if request.param == "gpu":
        for name in ("sample.on_cpu", "draw.on_cpu"):
            monkeypatch.setattr(name, lambda logits: False)


def some_logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def column(name, settings=MIXED):
    return torch.tensor([getattr(one, name) for one in settings])


def goodness(draws, probs):
    """Chi-square of ids against probabilities (V,), and its bound, which 99.9% of true samplers
    stay below. Rare tokens are one cell."""
    n, counts = len(draws), torch.bincount(draws, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    big = n * probs >= 5
    counts = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = n * torch.cat([probs[big], probs[~big].sum()[None]]).double()
    cells = expected > 1e-3
    chi_square = ((counts - expected) ** 2 / expected)[cells].sum().item()
    degrees = int(cells.sum()) - 1
    return chi_square, degrees + 3.1 * math.sqrt(2 * degrees) + 7


# ------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=20, top_p=0.9),
    dict(top_k=20, top_p=0.9, min_p=0.2), dict(top_p=0.97, min_p=0.02), dict(penalty=1.3),
    dict(penalty=0.7, top_k=9, min_p=0.01)])
def test_settings_are_those_of_transformers_in_its_order(way, settings):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    settings = dict(settings)
    logits, said = some_logits(3, 300), torch.randint(0, 300, (3, 40))
    penalty = settings.pop("penalty", 1.0)
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(0.8)]
        + [kind(settings[name]) for name, kind in (
            ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper)) if name in settings])
    expected = theirs(said, logits.double()).softmax(-1)
    seen = torch.cat([seen_in(ids, 300) for ids in said.tolist()])
    ours = probabilities(penalize(logits, seen, repetition=penalty), 0.8, **settings)
    assert torch.equal(ours > 0, expected > 0) and (ours - expected).abs().max() < 1e-6
    rows = {name: torch.full((3,), value) for name, value in settings.items()}
    per_row = probabilities(penalize(logits, seen, repetition=torch.full((3,), penalty)),
                            torch.full((3,), 0.8), **rows)
    assert torch.equal(per_row > 0, expected > 0) and (per_row - expected).abs().max() < 1e-6


def test_penalties_are_the_formula():
    """OpenAI: mu[j] - c[j] * frequency - float(c[j] > 0) * presence, c being what was said."""
    logits, counts = some_logits(2, 6), torch.tensor([[0, 1, 2, 0, 0, 3], [5, 0, 0, 1, 0, 0]])
    seen = (counts > 0) | torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    repetition, presence, frequency = [1.5, 0.8], [0.5, -1.0], [0.25, 0.1]
    ours = penalize(logits, seen, counts.float(), *map(torch.tensor, (
        repetition, presence, frequency)))
    for row in range(2):
        for j in range(6):
            x, c = logits[row, j].item(), counts[row, j].item()
            if seen[row, j]:
                x = x / repetition[row] if x > 0 else x * repetition[row]
            x -= c * frequency[row] + (c > 0) * presence[row]
            assert math.isclose(ours[row, j], x, rel_tol=1e-5, abs_tol=1e-6)


def test_settings_of_each_row_are_those_of_the_row_alone(way):
    logits = some_logits(7, 300)
    names = ("temperature", "top_k", "top_p", "min_p")
    ours = probabilities(logits, *(column(name, MIXED[1:]) for name in names))
    for row, one in enumerate(MIXED[1:]):
        alone = probabilities(logits[row], *(getattr(one, name) for name in names))
        assert torch.equal(ours[row] > 0, alone > 0) and (ours[row] - alone).abs().max() < 1e-6


def test_log_probabilities_are_those_of_the_logits():
    logits, ids = some_logits(3, 50), torch.tensor([[7], [0], [49]])
    values, which = log_probabilities(logits, ids, 4)
    exact = logits.double().log_softmax(-1)
    assert torch.equal(which[:, :1], ids) and torch.equal(which[:, 1:], exact.topk(4).indices)
    assert (values - exact.gather(-1, which)).abs().max() < 1e-5


@pytest.mark.parametrize("changes, word", [
    (dict(temperature=-1), "temperature -1"), (dict(top_p=1.5), "top_p 1.5"),
    (dict(min_p=math.nan), "min_p nan"), (dict(repetition_penalty=0), "repetition_penalty 0"),
    (dict(presence_penalty=math.inf), "presence_penalty inf"), (dict(top_k=-3), "top_k -3"),
    (dict(top_k=2.5), "top_k 2.5 must be a whole")])
def test_settings_that_cannot_be_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**changes)
    assert Sampling(**dict.fromkeys(changes)) == Sampling()  # None is the default


# ------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("size", [10, 37, 5 * BLOCK])
@pytest.mark.parametrize("one", MIXED[1:])
def test_draws_have_the_distribution(way, one, size):
    logits, n = some_logits(size, seed=size), 4000
    draws = sample(logits.expand(n, -1), one, torch.Generator().manual_seed(1))
    chi_square, bound = goodness(draws, probabilities(
        logits, one.temperature, one.top_k, one.top_p, one.min_p))
    assert chi_square < bound


def test_draws_of_flat_logits_with_a_small_nucleus():
    """Nearly every first draw is refused, so most come from many rounds."""
    logits, n = some_logits(4 * BLOCK, scale=0.3), 4000
    for settings in (dict(top_p=0.03), dict(min_p=0.8)):
        draws = sample(logits.expand(n, -1), Sampling(1.0, **settings),
                       torch.Generator().manual_seed(2))
        chi_square, bound = goodness(draws, probabilities(logits, 1.0, **settings))
        assert chi_square < bound


@pytest.mark.parametrize("top_p, kept", [(0.0, 1), (0.2, 1), (0.3, 2), (0.55, 3), (0.95, 4)])
def test_of_equal_tokens_as_many_are_kept_as_reach_the_mass(way, top_p, kept):
    logits = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]) * 30
    draws = sample(logits.expand(500, -1), Sampling(1.0, top_p=top_p))
    assert len(draws.unique()) == kept and set(draws.tolist()) <= {1, 2, 4, 5}


def test_top_k_among_equals_keeps_exactly_k(way):
    draws = sample(torch.zeros(500, 3 * BLOCK), Sampling(1.0, top_k=2))
    assert len(draws.unique()) == 2


@pytest.mark.parametrize("size", [49, 64, 1000, 64 * 30])
def test_blockwise_topk_is_topk(size):
    logits = some_logits(size)
    for k in (1, 5, 40):
        ours, theirs = blockwise_topk(logits, k), logits.topk(k)
        assert torch.equal(ours[0], theirs.values) and torch.equal(ours[1], theirs.indices)


def test_one_row_is_inverse_cdf_and_takes_nothing_of_weight_zero():
    weights = some_logits(40, 5 * BLOCK).relu()
    weights[:, BLOCK:2 * BLOCK] = 0
    weights[0, :-1] = 0
    weights[0, -1] = 1e-30
    for u in (0.0, 1e-9, 0.1, 0.5, 0.99, 1 - 2**-32):
        ids = inverse_cdf(weights, torch.full((40,), u, dtype=torch.float64))
        assert (weights.gather(1, ids[:, None]) > 0).all()
        mass = weights.double().cumsum(-1)
        exact = (mass <= u * mass[:, -1:]).sum(-1)
        assert (ids - exact).count_nonzero() <= 1  # a sum in float32 may differ at a border
        for row in range(40):
            assert ids[row] == inverse_cdf_one(weights[row], block_cdf(weights[row]), u)


def test_however_cold_the_likeliest_is_drawn(way):
    logits = some_logits(20, 5 * BLOCK)
    for temperature in (1e-20, 1e-46, 1e-300):
        assert torch.equal(sample(logits, Sampling(temperature)), logits.argmax(-1))
        assert torch.equal(probabilities(logits, temperature).argmax(-1), logits.argmax(-1))
        rows = RowSampler(20, 5 * BLOCK)
        for row in range(20):
            rows.begin(row, Sampling(temperature, seed=row), [])
        assert torch.equal(rows.sample(logits[:, None])[:, 0], logits.argmax(-1))


WAYS = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.0, top_p=0.9),
        Sampling(1.3, min_p=0.1), Sampling(0.8, 40, 0.95, 0.05),
        Sampling(repetition_penalty=1.3), Sampling(0.9, presence_penalty=1.0, top_p=0.8)]


def damaged(logits, kind):
    """The logits with a value in them with which no token can be drawn."""
    logits = logits.clone()
    if "-inf" in kind:
        logits[:] = -math.inf
    else:
        logits[slice(None) if "all" in kind else 37] = float(kind.split()[-1])
    return logits


@pytest.mark.parametrize("kind", ["one nan", "all nan", "one inf", "all inf", "all -inf"])
def test_where_no_token_can_be_drawn_the_id_says_so_and_other_rows_are_as_ever(way, kind):
    logits, bad = some_logits(len(WAYS), 128), torch.arange(len(WAYS)) % 2 == 1
    for _ in range(2):  # so that every way of drawing is in a good row and in a bad one
        broken = torch.stack([damaged(row, kind) if is_bad else row
                              for row, is_bad in zip(logits, bad)])
        drawn = []
        for given in (logits, broken):
            rows = RowSampler(len(WAYS), 128)
            for row, one in enumerate(WAYS):
                rows.begin(row, replace(one, seed=row), [5, 37])
            drawn.append([rows.sample(given[:, None])[:, 0] for _ in range(3)])
        for ids, expected in zip(*reversed(drawn)):
            assert torch.equal(ids, torch.where(bad, UNDRAWN, expected))
        bad = ~bad
    for one in WAYS[:6]:
        both = torch.stack([logits[0], damaged(logits[0], kind)])
        ids = sample(both, one, torch.Generator().manual_seed(1))
        assert ids[1] == UNDRAWN and 0 <= ids[0] < 128
        weights = distribution(both, one)
        assert weights[0].isfinite().all() and weights[1].isnan().any()
        assert (draw_from_weights(weights, one) == UNDRAWN).tolist() == [False, True]


def test_a_logit_of_minus_infinity_is_a_mask(way):
    """Tokens of which all are masked but a few are drawn as if there were only those."""
    logits, left = torch.full((128,), -math.inf), torch.tensor([3, 70, 127])
    logits[left] = some_logits(3)
    for one in WAYS[:6]:
        expected = torch.zeros(128)
        expected[left] = distribution(logits[left], one)
        draws = sample(logits.expand(2000, -1), one, torch.Generator().manual_seed(1))
        chi_square, bound = goodness(draws, expected)
        assert chi_square < bound


def test_a_token_that_could_not_be_drawn_is_one_line():
    assert check_drawn(0) == 0
    with pytest.raises(ValueError, match=r"^[^\n]*NaN or infinite[^\n]*--dtype[^\n]*$"):
        check_drawn(UNDRAWN)


def test_keys_give_uniform_and_independent_numbers():
    """Of tokens that follow each other, and of seeds that do."""
    n = 20_000
    for keys in (mix(seed_key(0) ^ torch.arange(n)), torch.tensor([mix(seed_key(s) ^ 5)
                                                                   for s in range(n)])):
        u = uniform(keys)
        assert u.min() >= 0 and u.max() < 1
        chi_square, bound = goodness((u * 100).long(), torch.full((100,), 0.01))
        assert chi_square < bound
        pairs = (u[1:] * 10).long() * 10 + (u[:-1] * 10).long()
        chi_square, bound = goodness(pairs, torch.full((100,), 0.01))
        assert chi_square < bound
        again = (uniform(keys, 1) * 10).long() * 10 + (u * 10).long()
        chi_square, bound = goodness(again, torch.full((100,), 0.01))
        assert chi_square < bound
        assert [uniform(key) for key in keys[:50].tolist()] == u[:50].tolist()


# ------------------------------------------------------------------------------ rows


def said_by(rows, logits, steps=6):
    return torch.cat([rows.sample(logits[step][:, None]) for step in range(steps)], 1)


def test_a_row_says_what_it_says_alone_in_any_slot(way):
    asked = [*MIXED, Sampling(0.9, 0, 0.9, 0, 1.2, 0.3, 0.2, seed=9), Sampling(0, 0, 1, 0, 1.5)]
    asked = asked[3:] + asked[:3]
    logits = some_logits(6, len(asked), 5 * BLOCK)
    logits[:, :] = logits[:, :1]
    together = RowSampler(len(asked), 5 * BLOCK)
    for row, one in enumerate(asked):
        together.begin(row, one, [1, 2, 3])
    said = said_by(together, logits)
    for row, one in enumerate(asked):
        alone = RowSampler(1, 5 * BLOCK)
        alone.begin(0, one, [1, 2, 3])
        assert torch.equal(said_by(alone, logits[:, :1])[0], said[row])
    assert len(said.unique(dim=0)) > 7


def test_rows_draw_from_the_distribution(way):
    """Of 3,000 seeds, each row's second token, whose penalty the first has changed."""
    logits, n = some_logits(40), 3000
    one = Sampling(0.9, 0, 0.9, 0.01, 1.5, 0.5, 0.7)
    rows = RowSampler(n, 40)
    for row in range(n):
        rows.begin(row, Sampling(**{**one.__dict__, "seed": row}), [4, 5])
    first, second = said_by(rows, logits.expand(2, n, -1), 2).T
    token = first.mode().values
    counts = torch.zeros(1, 40)
    counts[0, token] = 1
    seen = seen_in([4, 5, int(token)], 40)
    probs = probabilities(penalize(logits[None], seen, counts, 1.5, 0.5, 0.7), 0.9, None, 0.9, 0.01)
    chi_square, bound = goodness(second[first == token], probs[0])
    assert (first == token).sum() > 300 and chi_square < bound


def test_what_a_row_ended_with_is_forgotten():
    logits = some_logits(2, 20)
    rows = RowSampler(2, 20)
    rows.begin(0, Sampling(0, 0, 1, 0, 5.0, 2.0, 2.0), list(range(10)))
    rows.sample(logits[:, None])
    rows.end(0)
    assert torch.equal(rows.sample(logits[:, None])[:, 0], logits.argmax(-1))
    rows.begin(0, Sampling(0, 0, 1, 0, 1.0, 2.0), [])
    assert rows.seen[0].count_nonzero() == rows.counts[0].count_nonzero() == 0


def test_sampling_leaves_the_logits_as_they_are(way):
    logits = some_logits(8, 5 * BLOCK)
    before, rows = logits.clone(), RowSampler(8, 5 * BLOCK)
    for row, one in enumerate(MIXED):
        rows.begin(row, Sampling(**{**one.__dict__, "frequency_penalty": 0.1}), [1])
    rows.sample(logits[:, None])
    sample(logits, Sampling(0.8, top_p=0.9))
    assert torch.equal(logits, before)


def test_the_repetition_penalty_is_that_of_transformers_all_along_an_answer():
    from transformers import RepetitionPenaltyLogitsProcessor
    model, prompt, ids = random_model(), [1, 2, 3, 60], []
    theirs = RepetitionPenaltyLogitsProcessor(1.4)
    for _ in range(30):
        said = torch.tensor([prompt + ids])
        ids.append(theirs(said, model(said)[:, -1]).argmax().item())
    assert list(generate(model, make_cache(model, 4, 60), prompt, 30,
                         repetition_penalty=1.4)) == ids
    assert len(set(ids)) > len(set(generate(model, make_cache(model, 4, 60), prompt, 30)))


@dataclass(frozen=True)
class WithFloor(Sampling):
    """Sampling with one setting more: a token less probable than the floor is never drawn."""

    floor: float = 0.0


def with_floor(logits, temperature, top_k=None, top_p=None, min_p=None, floor=0.0):
    probs = probabilities(logits, temperature, top_k, top_p, min_p)
    floor = floor[:, None] if isinstance(floor, torch.Tensor) else floor
    probs = probs.masked_fill(probs < floor, 0)
    return probs / probs.sum(-1, keepdim=True)


def test_a_new_setting_needs_a_field_a_range_and_a_step(way, monkeypatch):
    """No way of drawing knows it, and every one heeds it, beside rows that do not ask for it."""
    monkeypatch.setitem(RANGES, "floor", (0, 1))
    monkeypatch.setattr("draw.probabilities", with_floor)
    monkeypatch.setattr("draw.GREEDY", WithFloor())
    with pytest.raises(ValueError, match="floor 2"):
        WithFloor(floor=2)
    logits, n = some_logits(40), 3000
    for one in (WithFloor(0.9, floor=0.05), WithFloor(1.1, 12, 0.9, 0.01, floor=0.05)):
        expected = with_floor(logits, **one.limits())
        assert expected.count_nonzero() < probabilities(logits, one.temperature, one.top_k,
                                                        one.top_p, one.min_p).count_nonzero()
        chi_square, bound = goodness(sample(logits.expand(n, -1), one,
                                            torch.Generator().manual_seed(1)), expected)
        assert chi_square < bound
        rows = RowSampler(n, 40)
        for row in range(n):
            rows.begin(row, replace(one if row % 3 else WithFloor(0.9), seed=row), [])
        ids = rows.sample(logits.expand(n, 1, -1))[:, 0]
        asked = torch.arange(n) % 3 > 0
        chi_square, bound = goodness(ids[asked], expected)
        assert chi_square < bound
        assert len(ids[~asked].unique()) > expected.count_nonzero()


def test_a_cpu_draws_from_probabilities_what_its_fast_draws_do_not_know(monkeypatch):
    """As if they knew of no min-p: another way to the same distribution."""
    monkeypatch.setattr("draw.FAST", {"temperature", "top_k", "top_p"})
    monkeypatch.setattr("draw.draw_by_rejection", lambda *a: pytest.fail("a fast draw"))
    logits, one = some_logits(40), Sampling(1.0, min_p=0.1)
    draws = sample(logits.expand(4000, -1), one, torch.Generator().manual_seed(1))
    chi_square, bound = goodness(draws, probabilities(logits, 1.0, min_p=0.1))
    assert chi_square < bound


def test_one_way_of_drawing_is_for_a_cpu(monkeypatch):
    """So that the tests above mean what they say."""
    called = []
    for name in ("draw_on_cpu", "draw_on_gpu"):
        monkeypatch.setattr(module, name, lambda rows, *rest, name=name: called.append(name)
                            or rows.argmax(-1))
    sample(torch.randn(2, 9), Sampling(1.0))
    monkeypatch.setattr(module, "on_cpu", lambda logits: False)
    sample(torch.randn(2, 9), Sampling(1.0))
    assert called == ["draw_on_cpu", "draw_on_gpu"]


@pytest.mark.parametrize("one", MIXED[1:])
def test_rows_of_one_setting_draw_on_a_gpu_as_beside_others(one, monkeypatch):
    """With the settings as numbers, or as tensors because a greedy row is among them."""
    for name in ("sample.on_cpu", "draw.on_cpu"):
        monkeypatch.setattr(name, lambda logits: False)
    logits = some_logits(4, 1, 5 * BLOCK)
    same, mixed = RowSampler(3, 5 * BLOCK), RowSampler(4, 5 * BLOCK)
    for row in range(3):
        same.begin(row, replace(one, seed=row), [])
        mixed.begin(row, replace(one, seed=row), [])
    for _ in range(20):
        assert torch.equal(same.sample(logits[:3]), mixed.sample(logits)[:3])
    assert isinstance(same.limits(slice(None))["temperature"], float)
    assert isinstance(mixed.limits(slice(None))["temperature"], torch.Tensor)


def test_a_bias_is_added_and_a_stop_id_waits_for_min_tokens():
    """By the formula: logits + bias, and no stop id among the first min_tokens."""
    logits = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(3))
    bias, stop_ids = ((5, 3.0), (9, -100.0)), (7, 11)
    row = RowSampler(2, 64)
    row.begin(1, Sampling(logit_bias=bias, min_tokens=2), [1], stop_ids)
    biased = logits[1, 0].clone()
    biased[5] += 3
    biased[9] -= 100
    forced = logits.clone()
    forced[1, 0, 7] = 50.0  # a stop id that the model wants
    without = biased.clone()
    without[[7, 11]] = -math.inf
    for n in range(4):
        ids = row.sample(forced)[:, 0].tolist()
        assert ids == [logits[0, 0].argmax().item(), 7 if n >= 2 else without.argmax().item()]
    assert torch.equal(row.bias(logits[:, 0], slice(None))[0], logits[0, 0])
    assert torch.allclose(row.bias(logits[:, 0], slice(None))[1], biased)  # the two were drawn
    row.begin(1, Sampling(), [1], stop_ids)
    assert row.sample(logits)[1].item() == logits[1, 0].argmax().item()


def test_speculation_refuses_what_it_cannot_obey():
    model = random_model()
    for settings, naming in (({"logit_bias": ((1, 1.0),)}, "logit_bias"),
                             ({"min_tokens": 2}, "min_tokens")):
        with pytest.raises(ValueError, match=f"{naming} works without speculation"):
            generate(model, make_cache(model), [1], sampling=Sampling(**settings),
                     speculation=Speculation(fixed=2))
    with pytest.raises(ValueError, match="min_tokens -1"):
        Sampling(min_tokens=-1)
