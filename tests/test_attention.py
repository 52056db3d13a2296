"""Attention on a CPU (slots that hold something) and on a GPU (all slots), against the formula."""

import pytest
import torch

from attention import attend_all, attend_causal, attend_in_sums
from helpers import random_model
from kv_cache import KVCache

WINDOW, CHUNK = 60, 32


def by_the_formula(q_sink, q_recent, k, v, cache, positions):
    """One query and one head at a time, in float64, over the slots for which cache.visible is true.
    """
    B, T, n_heads, D = q_recent.shape
    q_sink, q_recent, k, v = (x.double() for x in (q_sink, q_recent, k, v))
    visible = cache.visible(cache.of_layer[0], positions, cache.every_slot[0])
    y = torch.empty(B, T, n_heads, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            slots = visible[b, t].nonzero()[:, 0]
            for h in range(n_heads):
                kv = h // (n_heads // k.shape[1])
                scores = torch.stack([(q_sink if slot < cache.n_sink else q_recent)[b, t, h]
                                      @ k[b, kv, slot] for slot in slots]) / D ** 0.5
                y[b, t, h] = scores.softmax(0) @ v[b, kv, slots]
    return y


def a_call(n_sink, lengths, T, n_kv_heads=2, window=WINDOW, dtype=torch.float32):
    """A cache of random keys whose rows hold so many tokens, and a query for each of T more."""
    torch.manual_seed(0)
    cache = KVCache(random_model(n_kv_heads=n_kv_heads).config, len(lengths), n_sink, window,
                    CHUNK, dtype)
    for x in (*cache.k, *cache.v):
        x.normal_()
    cache.length.copy_(torch.tensor(lengths))
    positions = cache.positions(T)
    q_recent, other = torch.randn(2, len(lengths), T, 4, 8, dtype=dtype) * 2
    same = positions <= n_sink + window - 1  # until there, both rotations are one
    q_sink = torch.where(same[..., None, None], q_recent, other)
    return cache, positions, q_sink, q_recent


def mask_of(cache, positions, groups, slots=None):
    [slots] = cache.in_use(positions.shape[1]) if slots is None else slots
    return cache.mask(cache.of_layer[0], positions, slots).repeat_interleave(groups, dim=1)


def op(q_sink, q_recent, cache, mask):
    return torch.ops.gpt_stream.attend_held(q_sink, q_recent, cache.k[0], cache.v[0], mask,
                                            cache.n_sink, cache.window)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("n_sink", [0, 4])
@pytest.mark.parametrize("lengths, T", [
    ([0], 1), ([2], 1), ([63], 1), ([64], 1), ([500], 1), ([0], 32), ([2], 7), ([60], 32),
    ([1000], 32), ([0, 70, 10**8], 1), ([3, 62, 300], 5)])
def test_both_equal_the_formula(lengths, T, n_sink, n_kv_heads):
    """An empty cache, fewer tokens than sinks, the step at which the window first slides, far on;
    rows that stand at different places."""
    cache, positions, q_sink, q_recent = a_call(n_sink, lengths, T, n_kv_heads)
    expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions)
    mask = mask_of(cache, positions, 4 // n_kv_heads, cache.every_slot)
    everywhere = attend_all(q_sink, q_recent, cache.k[0], cache.v[0], mask, n_sink)
    assert (everywhere - expected).abs().max() < 1e-5
    mask = mask_of(cache, positions, 4 // n_kv_heads)
    assert (op(q_sink, q_recent, cache, mask) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("lengths, T", [([1200], 1), ([900], 20), ([3, 1900], 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_window_of_several_of_the_kernel_s_blocks(lengths, T, dtype):
    cache, positions, q_sink, q_recent = a_call(4, lengths, T, window=1100, dtype=dtype)
    expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions)
    mask = mask_of(cache, positions, 2).to(dtype)
    assert (op(q_sink, q_recent, cache, mask) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("length", [20, 500])
def test_the_operator_is_to_the_compiler_what_it_says(length):
    cache, positions, q_sink, q_recent = a_call(4, [length], 3)
    mask = mask_of(cache, positions, 2)
    torch.library.opcheck(torch.ops.gpt_stream.attend_held.default, (
        q_sink, q_recent, cache.k[0], cache.v[0], mask, cache.n_sink, cache.window))


def test_a_chunk_that_begins_among_the_sinks_and_ends_beyond_the_window():
    """Its first queries see no ring at all."""
    cache = KVCache(random_model().config, 1, 4, 10, CHUNK)
    _, _, q_sink, q_recent = a_call(4, [0], 32)
    positions = cache.positions(32)
    q_sink[:, :14] = q_recent[:, :14]
    for x in (cache.k[0], cache.v[0]):
        x.normal_()
    expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions)
    mask = mask_of(cache, positions, 2)
    assert (op(q_sink, q_recent, cache, mask) - expected).abs().max() < 1e-5


RULES = {"no sinks": lambda slot, positions: (slot >= 4) & (positions > -1),
         "one sink": lambda slot, positions: (slot >= 4) | (slot == positions % 4),
         "sinks for some": lambda slot, positions: (slot >= 4) | (positions % 2 == 0),
         "sinks only": lambda slot, positions: (slot < 4) & (positions > -1)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths, T", [([500], 1), ([40], 5), ([1000, 200], 32)])
def test_another_rule_of_what_is_visible_is_the_formula_too(rule, lengths, T):
    class Cache(KVCache):
        def visible(self, geometry, positions, slot):
            seen = super().visible(geometry, positions, slot)
            return seen & RULES[rule](slot, positions[:, :, None])

    cache, positions, q_sink, q_recent = a_call(4, lengths, T)
    cache.__class__ = Cache
    expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions)
    found = op(q_sink, q_recent, cache, mask_of(cache, positions, 2))
    assert (found - expected).abs().max() < 1e-5


def test_queries_may_lie_in_memory_in_any_order():
    """A product W x^T leaves them transposed, and the kernel does not check."""
    cache, positions, q_sink, q_recent = a_call(4, [20], 16, n_kv_heads=4)
    mask = mask_of(cache, positions, 1)
    lying = [q.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) for q in (q_sink, q_recent)]
    assert lying[0].stride(-1) != 1
    assert torch.equal(op(*lying, cache, mask),
                       op(q_sink, q_recent, cache, mask))


@pytest.mark.slow
@pytest.mark.parametrize("n_sink, batch_size", [(4, 1), (0, 3)])
def test_a_token_s_graph_equals_the_formula_whatever_is_held(n_sink, batch_size):
    """One graph from nothing held to a window that slides, rows at different places."""
    torch._dynamo.reset()
    graph = torch.compile(attend_in_sums, fullgraph=True, dynamic=False)
    for i, lengths in enumerate([[0, 1, 2], [1, 0, 0], [30, 2, 17], [63, 64, 9], [91, 70, 90],
                                 [94, 95, 96], [500, 3, 10**8]]):
        cache, positions, q_sink, q_recent = a_call(n_sink, lengths[:batch_size], 1)
        expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions)
        mask = mask_of(cache, positions, 2)
        torch._dynamo.decorators.mark_unbacked(mask, 2)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            y = graph(q_sink, q_recent, cache.k[0], cache.v[0], mask, n_sink)
        assert (y - expected).abs().max() < 1e-5


def test_what_is_not_held_is_not_read():
    cache, positions, q_sink, q_recent = a_call(4, [30], 3)
    mask = mask_of(cache, positions, 2)
    expected = op(q_sink, q_recent, cache, mask)
    cache.k[0][:, :, 33:], cache.v[0][:, :, 33:] = torch.nan, torch.nan
    assert torch.equal(op(q_sink, q_recent, cache, mask), expected)


def test_without_a_cache_it_is_the_formula():
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    cache = KVCache(random_model().config, 2, 0, WINDOW, CHUNK)
    held = [torch.zeros(2, 2, WINDOW + CHUNK - 1, 8) for _ in range(2)]
    for x, slots in zip((k, v), held):
        slots[:, :, :9] = x.transpose(1, 2)
    expected = by_the_formula(q, q, *held, cache, cache.positions(9))
    assert (attend_causal(q, k, v) - expected).abs().max() < 1e-5
