"""The cache against the paper, read slowly: tests/oracle.py."""

import copy
import dataclasses
import types

import pytest
import torch

from generate import make_cache
from helpers import as_on_a_gpu, random_model
from kv_cache import KVCache, allocated_slots
from oracle import Stream

WINDOW, CHUNK = 12, 16  # a ring of 27 slots


def tokens_of(n, seed=0, rows=1):
    return torch.randint(0, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


def largest_difference(logits, expected):
    return (logits.double() - torch.stack(expected)).abs().max().item()


@pytest.mark.parametrize("chunk", [1, 3, 16, 20])
@pytest.mark.parametrize("n_sink", [0, 1, 4])
def test_stream_equals_the_paper_at_every_step_over_three_wraps(n_sink, chunk):
    model, tokens = random_model(), tokens_of(n_sink + 3 * (WINDOW + 20) + 5)
    oracle = Stream(model, n_sink, WINDOW)
    expected = [oracle.feed(t) for t in tokens[0]]
    cache = KVCache(model.config, 1, n_sink, WINDOW, max_chunk=20)
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(chunk, dim=1)])
    assert logits.abs().max() > 1
    assert largest_difference(logits, expected) < 1e-4


@pytest.mark.parametrize("changes", [dict(n_kv_heads=4), dict(n_kv_heads=1), dict(qk_norm=True),
                                     dict(qkv_bias=True, out_bias=True, tied_embeddings=True)])
def test_stream_equals_the_paper_for_every_kind_of_attention(changes):
    model, tokens = random_model(**changes), tokens_of(70)
    oracle = Stream(model, 2, WINDOW)
    expected = [oracle.feed(t) for t in tokens[0]]
    cache = KVCache(model.config, 1, 2, WINDOW, CHUNK)
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(7, dim=1)])
    assert largest_difference(logits, expected) < 1e-4


# A model that mixes kinds of layers.
MIXED = dict(n_layers=3, kinds=("sliding", "full", "sliding"), sliding_window=5,
             sliding_theta=50.0)


@pytest.mark.parametrize("n_sink, native, chunk", [
    (0, 5, 1), (4, 5, 7), (2, WINDOW + 2, 16), (0, WINDOW, 7), (4, 99, 16)])
def test_mixed_layers_equal_the_paper_each_with_its_own_window(n_sink, native, chunk):
    """A sliding layer sees no sinks, and no further back than its own window and the stream's."""
    model, tokens = random_model(**{**MIXED, "sliding_window": native}), tokens_of(110)
    oracle = Stream(model, n_sink, WINDOW)
    expected = [oracle.feed(t) for t in tokens[0]]
    cache = KVCache(model.config, 1, n_sink, WINDOW, CHUNK)
    assert cache.of_layer[0][:2] == (0, min(native, n_sink + WINDOW)) == cache.of_layer[2][:2]
    assert cache.of_layer[1][:2] == (n_sink, WINDOW)
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(chunk, dim=1)])
    assert largest_difference(logits, expected) < 1e-4
    assert cache.nbytes() == sum(
        2 * 4 * 2 * 8 * (S + W + CHUNK - 1) for S, W, _ in cache.of_layer)


def test_layers_without_rotary_positions_equal_the_paper():
    model, tokens = random_model(kinds=("full", "unrotated")), tokens_of(70)
    oracle, cache = Stream(model, 2, WINDOW), KVCache(model.config, 1, 2, WINDOW, CHUNK)
    expected = [oracle.feed(t) for t in tokens[0]]
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(7, dim=1)])
    assert largest_difference(logits, expected) < 1e-4
    assert len(cache.geometries) == 1


@pytest.mark.parametrize("n_tokens", [4, 9])
def test_without_a_cache_each_kind_is_masked_by_its_own_window(n_tokens):
    """It is a stream that is too short for the full layers' window to slide."""
    model, tokens = random_model(**MIXED), tokens_of(n_tokens, rows=2)
    oracle = Stream(model, 0, WINDOW)
    expected = [oracle.feed(t) for t in tokens[0]]
    assert largest_difference(model(tokens)[0], expected) < 1e-4
    cache = KVCache(model.config, 2, 0, WINDOW, CHUNK)
    assert (model(tokens) - model(tokens, cache)).abs().max() < 1e-5


@pytest.mark.parametrize("n_sink", [0, 1, 4])
@pytest.mark.parametrize("before", [-1, 0, 1])
def test_edges_of_sinks_and_window(n_sink, before):
    """One chunk that ends at S-1, S, S+1, S+W-1, S+W or S+W+1, then single tokens."""
    model = random_model()
    for length in (n_sink + before, n_sink + WINDOW + before):
        if length < 1:
            continue
        tokens = tokens_of(length + 3)
        oracle, cache = Stream(model, n_sink, WINDOW), KVCache(model.config, 1, n_sink, WINDOW, 20)
        expected = [oracle.feed(t) for t in tokens[0]]
        parts = tokens.split([length, 1, 1, 1], dim=1)
        logits = torch.cat([model(part, cache)[0] for part in parts])
        assert largest_difference(logits, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("n_sink, changes", [
    (0, {}), (1, {}), (4, {}), (0, MIXED), (4, MIXED)])
def test_rollbacks_up_to_the_limit_leave_no_trace(n_sink, changes):
    model, tokens = random_model(**changes), tokens_of(400)[0].tolist()
    oracle, cache = Stream(model, n_sink, WINDOW), KVCache(model.config, 1, n_sink, WINDOW, CHUNK)
    plan = [(16, 3), (5, 0), (16, 15), (16, 16), (1, 0), (16, 1), (1, 1), (9, 9), (16, 8)] * 3
    for n_tokens, n_back in plan:
        part, tokens = tokens[:n_tokens], tokens[n_tokens:]
        expected = [oracle.feed(t) for t in part]
        logits = model(torch.tensor([part]), cache)[0]
        assert largest_difference(logits, expected) < 1e-4
        cache.rollback(n_back)
        oracle.rollback(n_back)
    assert cache.length.item() > n_sink + WINDOW + CHUNK


def test_rollback_deeper_than_the_ring_allows_is_refused_and_changes_nothing():
    model = random_model()
    cache = KVCache(model.config, 1, 1, WINDOW, CHUNK)
    for part in tokens_of(64).split(CHUNK, dim=1):
        model(part, cache)
    with pytest.raises(ValueError, match="17"):
        cache.rollback(CHUNK + 1)
    cache.rollback(CHUNK - 1)
    with pytest.raises(ValueError):  # 15 tokens are forgotten already
        cache.rollback(2)
    model(tokens_of(5), cache)  # overwrites 5 of them: the overhang is 10
    with pytest.raises(ValueError):
        cache.rollback(7)
    cache.rollback(6)
    assert cache.length.item() == 64 - 15 + 5 - 6
    for wrong in (-1, [1, 1], [], [-2]):
        with pytest.raises(ValueError, match="one for each of 1 rows, and none negative"):
            cache.rollback(wrong)
    cache.reset()
    model(tokens_of(3), cache)
    with pytest.raises(ValueError, match="holds"):
        cache.rollback(4)
    assert cache.length.item() == 3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MIXED])
def test_rows_of_different_lengths_do_not_touch_each_other(changes):
    """Row 0 runs ahead; row 1 is rolled back after every call, row 2 every second time."""
    model, rows = random_model(**changes), 3
    cache = KVCache(model.config, rows, 2, WINDOW, CHUNK)
    oracles = [Stream(model, 2, WINDOW) for _ in range(rows)]
    for step in range(14):
        tokens = tokens_of(9, seed=step, rows=rows)
        logits = model(tokens, cache)
        back = [0, 4, 7 * (step % 2)]
        for row, oracle in enumerate(oracles):
            expected = [oracle.feed(t) for t in tokens[row]]
            assert largest_difference(logits[row], expected) < 1e-4
            if back[row]:
                oracle.rollback(back[row])
        cache.rollback(back)
    assert cache.length.tolist() == [126, 70, 77]


@pytest.mark.parametrize("ahead, behind, changes", [  # a ring of 27 slots
    (9, 3, {}), (70, 5, {}), (41, 64, {}), (70, 5, MIXED)])
def test_a_copied_row_goes_on_as_the_original_and_leaves_the_others_alone(ahead, behind, changes):
    """A staged row of its own length, 7 tokens of it rolled back, replaces row 1 of three."""
    model = random_model(**changes)
    cache, staged = (KVCache(model.config, rows, 2, WINDOW, CHUNK) for rows in (3, 1))
    oracles = [Stream(model, 2, WINDOW) for _ in range(3)]
    for part in tokens_of(behind, seed=1, rows=3).split(CHUNK, dim=1):
        model(part, cache)
        for row in (0, 2):
            for t in part[row]:
                oracles[row].feed(t)
    for part in tokens_of(ahead, seed=2).split(CHUNK, dim=1):
        model(part, staged)
        for t in part[0]:
            oracles[1].feed(t)
    oracles[1].rollback(n_back := min(ahead, 7))
    staged.rollback(n_back)
    cache.copy_row(1, staged)
    assert cache.length.tolist() == [behind, ahead - n_back, behind]
    assert cache.overhang == [0, n_back, 0]
    staged.reset()
    for part in tokens_of(40, seed=3).split(CHUNK, dim=1):  # the staged row moves on
        model(part, staged)
    for part in tokens_of(30, seed=4, rows=3).split(5, dim=1):
        logits = model(part, cache)
        for row, oracle in enumerate(oracles):
            expected = [oracle.feed(t) for t in part[row]]
            assert largest_difference(logits[row], expected) < 1e-4


def test_a_cache_of_other_kinds_of_layers_is_refused():
    model = random_model(kinds=("sliding", "full"), sliding_window=5)
    cache = KVCache(random_model(sliding_window=None).config, 1, 4, WINDOW, CHUNK)
    with pytest.raises(ValueError, match="kinds of layers is .*, the model's .*sliding"):
        model(tokens_of(3), cache)


def test_rows_are_not_copied_between_caches_of_different_sizes():
    model = random_model()
    cache = KVCache(model.config, 2, 4, WINDOW, CHUNK)
    for sizes in ((3, WINDOW + 1, CHUNK), (4, WINDOW + 1, CHUNK - 1)):  # as many slots in all
        with pytest.raises(ValueError, match=f"{WINDOW + 1}"):
            cache.copy_row(0, KVCache(model.config, 1, *sizes))


@pytest.mark.parametrize("position", [10**3, 10**8])
def test_the_stream_is_as_exact_at_a_far_position(position):
    """The sinks are read at the start; then the stream stands at `position` at once. Its slots hold
    nothing true until every layer has read a window of tokens."""
    model, tokens = random_model(), tokens_of(4 + 2 * WINDOW + 60)
    oracle, cache = Stream(model, 4, WINDOW), KVCache(model.config, 1, 4, WINDOW, CHUNK)
    expected = [oracle.feed(t) for t in tokens[0]]
    logits = [model(tokens[:, :4], cache)[0]]
    cache.length.fill_(position)
    logits += [model(part, cache)[0] for part in tokens[:, 4:].split(5, dim=1)]
    settled = 4 + model.config.n_layers * WINDOW
    assert largest_difference(torch.cat(logits)[settled:], expected[settled:]) < 1e-4
    assert cache.length.item() == position + tokens.shape[1] - 4


@pytest.mark.slow
def test_a_pinned_prompt_is_exact_after_fifty_windows():
    model, pinned = random_model(), 23
    tokens = tokens_of(pinned + 50 * WINDOW)
    oracle, cache = Stream(model, pinned, WINDOW), KVCache(model.config, 1, pinned, WINDOW, CHUNK)
    expected = [oracle.feed(t) for t in tokens[0]]
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(CHUNK, dim=1)])
    assert largest_difference(logits[-WINDOW:], expected[-WINDOW:]) < 1e-4


def test_reset_forgets_everything():
    model, tokens = random_model(), tokens_of(16)
    cache = KVCache(model.config, 1, 4, WINDOW, CHUNK)
    first = model(tokens, cache)
    for seed in range(5):
        model(tokens_of(16, seed=seed), cache)
    cache.reset()
    assert torch.equal(model(tokens, cache), first)


@pytest.mark.parametrize("sizes, word", [
    (dict(n_sink=-1), "negative"), (dict(window=0), "at least 1"), (dict(window=-5), "at least 1"),
    (dict(n_sink=4, window=4093), "4097"), (dict(max_chunk=0), "at least 1")])
def test_impossible_sizes_are_refused_by_number(sizes, word):
    with pytest.raises(ValueError, match=word):
        KVCache(random_model().config, **sizes)


def test_calls_that_do_not_fit_the_cache_are_refused():
    model = random_model()
    cache = KVCache(model.config, 2, 4, WINDOW, CHUNK)
    with pytest.raises(ValueError, match="17 tokens"):
        model(tokens_of(17, rows=2), cache)
    with pytest.raises(ValueError, match="1 rows"):
        model(tokens_of(3), cache)
    assert cache.length.tolist() == [0, 0]


def test_the_window_stays_within_a_sliding_window():
    with pytest.raises(ValueError, match="sliding window of 16"):
        KVCache(random_model(sliding_window=16).config, 1, 4, 17)


@pytest.mark.parametrize("window", [12, 40])  # a chunk of 16 that just fits with 4 sinks, or well
def test_a_first_chunk_is_a_sequence_read_without_a_cache(window):
    model = random_model()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 4, window, 16)
    assert (model(tokens, cache) - model(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("n_tokens", [9, 60, 200])
def test_of_a_copied_row_only_what_it_holds_is_copied_and_a_cleared_one_holds_nothing(n_tokens):
    model = random_model()
    source, other = (KVCache(model.config, rows, 4, 28, 16) for rows in (1, 2))
    ids = torch.randint(64, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in ids.split(16, dim=1):
            model(part, source)
        for _ in range(9):
            model(torch.ones(2, 16, dtype=torch.int64), other)
        other.copy_row(1, source, n_tokens=n_tokens)
        expected = model(torch.tensor([[7]]), source)
        assert torch.allclose(model(torch.tensor([[7], [7]]), other)[1], expected[0], atol=1e-5)
    other.clear_row(1, n_tokens + 1)
    assert other.length.tolist() == [145, 0] and other.overhang[1] == 0
    for layer in (*other.k, *other.v):
        assert not layer[1, :, :n_tokens + 1].any() and layer[0].any()


@pytest.mark.parametrize("changes, word", [
    (dict(dtype=torch.float32), "dtype is torch.float32, the model's torch.bfloat16"),
    (dict(device="meta"), "device is meta, the model's cpu"),
    (dict(n_kv_heads=4), r"\(2, 4, 8\), the model's \(2, 2, 8\)"),
    (dict(n_layers=3), r"\(3, 2, 8\), the model's \(2, 2, 8\)")])
def test_a_cache_of_another_kind_is_refused_at_the_call_and_not_written(changes, word):
    model = random_model().bfloat16()
    sizes = {name: changes.pop(name) for name in ("n_kv_heads", "n_layers") if name in changes}
    config = dataclasses.replace(model.config, **sizes)
    cache = KVCache(config, 1, 4, WINDOW, CHUNK, **{"dtype": torch.bfloat16, **changes})
    with pytest.raises(ValueError, match=f"the cache's .*{word}; generate.make_cache"):
        model(tokens_of(3), cache)
    if cache.length.device.type == "cpu":
        assert not cache.length.any() and not any(k.any() for k in cache.k)


def test_the_cache_that_is_made_for_a_model_fits_it():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = random_model().to(dtype)
        cache = make_cache(model, batch_size=2)
        assert model(tokens_of(3, rows=2), cache).shape == (2, 3, 64)
        copied = copy.deepcopy(cache)
        assert model(tokens_of(1, rows=2), cache).equal(model(tokens_of(1, rows=2), copied))
        torch._dynamo.mark_static_address(marked := torch.zeros(1), guard=False)
        assert marked.__dict__ and all(tensor.__dict__ == marked.__dict__ for tensor in copied.k)


# ------------------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("n_sink", [0, 4])
def test_slots_that_align_a_gpus_scores_are_never_seen_or_written(n_sink, monkeypatch):
    """Over three wraps, whatever they hold."""
    as_on_a_gpu(monkeypatch)
    model, tokens = random_model(), tokens_of(100)
    plain = KVCache(model.config, 1, n_sink, WINDOW, CHUNK)
    monkeypatch.setattr("kv_cache.allocated_slots", lambda n, device: allocated_slots(n, "cuda"))
    cache = KVCache(model.config, 1, n_sink, WINDOW, CHUNK)
    used = cache.of_layer[0].n_used
    assert cache.k[0].shape[2] == 64 > used == n_sink + 27 and cache.nbytes() > plain.nbytes()
    for tensor in (*cache.k, *cache.v):
        tensor[:, :, used:] = 50.0
    for part in tokens.split([16, 1, 7, 1, 16, 5, 16, 16, 16, 6], dim=1):
        assert (model(part, cache) - model(part, plain)).abs().max() < 1e-5
    assert all((tensor[:, :, used:] == 50.0).all() for tensor in (*cache.k, *cache.v))
    assert (allocated_slots(2175, "cuda:1"), allocated_slots(2176, "cuda")) == (2176, 2176)
    assert allocated_slots(2175, "cpu") == 2175


def test_a_tensor_that_a_compiled_step_would_copy_is_refused():
    cache = KVCache(random_model().config, 2, 4, WINDOW, CHUNK)
    for one in (cache, copy.deepcopy(cache)):
        one.check_static()
    with pytest.raises(RuntimeError, match="not marked as static"):
        cache.row(1).check_static()
    cache.length = types.SimpleNamespace(is_cuda=True)
    with pytest.raises(ValueError, match="on a GPU"):
        cache.row(1)
