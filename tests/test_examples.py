"""The examples run on the embedded model, and their own arithmetic is held against others'."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from examples import attention_sinks, dilated_window, steering
from formats.hub import CHECKPOINTS
from generate import load, make_cache
from helpers import TINY, hf_model, random_model, run
from kv_cache import KVCache
from load import compile_model
from oracle import Stream
from test_attention import a_call, by_the_formula, mask_of
from test_errors import refused

ROOT = TINY.parent.parent
SMOLLM2 = CHECKPOINTS / "smollm2-135m-instruct"
released = [pytest.mark.released, pytest.mark.slow, pytest.mark.skipif(
    not SMOLLM2.exists(), reason="needs SmolLM2: python -m formats.hub smollm2")]
PROMPT = [5, 17, 300, 2, 9]


@pytest.fixture(params=[TINY, pytest.param("smollm2", marks=released)], ids=["tiny", "smollm2"])
def checkpoint(request, monkeypatch):
    monkeypatch.chdir(ROOT)  # where one runs them
    return request.param


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random Llama in transformers' hands, and the same one in ours."""
    theirs = hf_model("Llama", vocab_size=512, hidden_size=64, intermediate_size=96,
                      num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                      initializer_range=0.15)
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return theirs, load(folder, device="cpu")[0]


# ------------------------------------------------------------------------------ attention's weights


def test_attention_sinks_prints_and_draws(checkpoint, tmp_path):
    status, out, err = run("examples.attention_sinks", "--checkpoint", checkpoint,
                           "--plot", tmp_path / "plot.png")
    assert status == 0, err
    rows = torch.tensor([[float(x) for x in line.split()] for line in out.splitlines()[1:]])
    assert torch.allclose(rows[:, 1:].sum(1), torch.ones(len(rows)), atol=0.01)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    sinks = rows[:, 1:5].sum(1)
    if checkpoint == "smollm2":  # the paper's finding
        assert (sinks[12:] > 0.25).all()  # 4 keys of 256


def test_weights_equal_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(0, 512, (1, 90), generator=torch.Generator().manual_seed(1))
    expected = torch.stack(theirs(tokens, output_attentions=True).attentions)  # (L, 1, heads, T, T)
    weights = attention_sinks.record_weights(ours, make_cache(ours, 4, 252), tokens)
    assert (weights - expected[:, 0].mean(1)).abs().max() < 1e-5


def test_weights_of_a_window_that_slides_give_what_attention_gives():
    """With one key-value head, the mean over the heads is the mean weights' sum of the values."""
    cache, positions, q_sink, q_recent = a_call(4, [500], 5, n_kv_heads=1)
    at = SimpleNamespace(mask=mask_of(cache, positions, 4), n_sink=4)
    weights = attention_sinks.weights(q_sink, q_recent, cache.k[0], at)
    expected = by_the_formula(q_sink, q_recent, cache.k[0], cache.v[0], cache, positions).mean(2)
    assert (weights @ cache.v[0][:, 0] - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------ steering


def test_steering_changes_the_text(checkpoint):
    status, out, err = run("examples.steering", "--checkpoint", checkpoint, "--max-new-tokens", 20)
    assert status == 0, err
    before, towards, away = out.splitlines()
    assert len({line[6:] for line in (before, towards, away)}) == 3


def test_activations_equal_transformers(pair):
    theirs, ours = pair
    ids = {"a": PROMPT, "b": PROMPT[:3]}
    states = [theirs(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
              for prompt in ids.values()]
    tokenizer = SimpleNamespace(encode=ids.__getitem__)
    found = steering.mean_activation(ours, tokenizer, 1, "ab")
    assert (found - torch.stack(states).mean(0)).abs().max() < 1e-4


@pytest.mark.slow
def test_a_hook_that_was_there_before_is_compiled_too():
    model, tokens = random_model(), torch.tensor([[5]])
    torch.manual_seed(0)
    vector = torch.randn(model.config.dim)
    plain = model(tokens, make_cache(model, 4, 60))
    with steering.hooked(model.layers[0], lambda x: x + vector):
        expected = model(tokens, make_cache(model, 4, 60))
        compile_model(model)
        steered = model(tokens, make_cache(model, 4, 60))
    assert (steered - expected).abs().max() < 1e-4 < 0.1 < (plain - expected).abs().max()


def test_a_layer_that_is_not_there_is_refused():
    refused("examples.steering", "--checkpoint", TINY, "--layer", 5, naming=["--layer 5", "0 to 4"])


# ------------------------------------------------------------------------------ another rule


def test_dilated_window_prints_three_perplexities(monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, err = run("examples.dilated_window", "--checkpoint", TINY,
                           "--max-tokens", 900)
    assert status == 0, err
    whole, dilated, narrow = (float(line.split()[-1]) for line in out.splitlines())
    assert whole < dilated and whole < narrow and dilated != narrow


@pytest.mark.parametrize("length", [3, 70, 251, 256, 900])
def test_dilated_cache_sees_the_positions_that_its_rule_says(length):
    S, W, near, every = 4, dilated_window.W, dilated_window.NEAR, dilated_window.EVERY
    cache = dilated_window.DilatedCache(random_model().config, 1, S, W, 128)
    cache.length.fill_(length)
    positions = cache.positions(40)
    [geometry], [slots] = cache.geometries, cache.every_slot
    seen = cache.visible(geometry, positions, slots)[0]
    for p, slots in zip(positions[0].tolist(), seen):
        held = [k for k in range(p + 1)
                if k < S or k > p - near or (k > p - W and k % every == 0)]
        assert sorted(slots.nonzero()[:, 0].tolist()) == sorted(
            cache.slots(geometry, torch.tensor([held]))[0].tolist())


@pytest.mark.slow
def test_another_rule_is_compiled_as_it_is():
    model = random_model()
    caches = [dilated_window.DilatedCache(model.config, 1, 4, 252, 128) for _ in range(2)]
    tokens = torch.randint(64, (1, 390), generator=torch.Generator().manual_seed(0))
    plain = make_cache(model, 4, 252)
    for part in tokens.split(128, dim=1):
        for cache in (*caches, plain):
            model(part, cache)
    eager, otherwise = model(tokens[:, :1], caches[0]), model(tokens[:, :1], plain)
    compile_model(model)
    assert (model(tokens[:, :1], caches[1]) - eager).abs().max() < 1e-4
    assert (otherwise - eager).abs().max() > 1e-3


class WindowOfEachLayer(KVCache):
    """Notes what each layer's own window leaves of what the widest sees."""

    def visible(self, geometry, positions, slot):
        seen = super().visible(geometry, positions, slot)
        distance = positions[:, :, None] - self.held(geometry, positions, slot)[:, None]
        self.seen_by_layer = [seen & (distance < window) for window in WINDOWS]
        return seen


WINDOWS = 5, 20


def narrow_each_layer(model, cache):
    """Two forward hooks: a layer's mask becomes what its own window leaves."""
    groups = model.config.n_heads // model.config.n_kv_heads

    def narrowed(layer):
        def hook(module, args):
            x, at, k, v = args
            hidden = ~cache.seen_by_layer[layer].repeat_interleave(groups, 1)
            return x, replace(at, mask=at.mask.masked_fill(hidden, -math.inf)), k, v
        return hook

    for layer, block in enumerate(model.layers):
        block.register_forward_pre_hook(narrowed(layer))


class OracleOfEachLayer(Stream):
    def attention(self, i, x):
        self.window = WINDOWS[i]
        return super().attention(i, x)


@pytest.mark.slow
def test_a_window_of_each_layer_is_a_hook_that_narrows_its_mask():
    """Against the oracle, over three wraps; and compiled, where the layers still share a graph."""
    tokens = torch.randint(64, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    oracle = OracleOfEachLayer(random_model(), 0, max(WINDOWS))
    expected = torch.stack([oracle.feed(token) for token in tokens])
    for compiled in (False, True):
        model = random_model()
        cache = WindowOfEachLayer(model.config, 1, 0, max(WINDOWS), 8)
        narrow_each_layer(model, cache)
        if compiled:
            compile_model(model)
        logits = torch.cat([model(torch.tensor([[token]]), cache)[0] for token in tokens])
        assert (logits - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------ chat


def test_the_smallest_chat_answers_each_line(checkpoint):
    torch.manual_seed(0)
    status, out, err = run("examples.smallest_chat", "--checkpoint", checkpoint,
                           stdin="Hello!\nWho are you?\n")
    assert status == 0, err
    assert out.count("\n> ") == 2 and all(answer.strip() for answer in out.split("\n> ")[:2])


def test_it_has_25_lines_at_most():
    lines = (ROOT / "examples/smallest_chat.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 25


@pytest.mark.parametrize("name", [path.stem for path in ROOT.glob("examples/[a-z]*.py")])
def test_a_checkpoint_that_is_not_there_is_one_line(name):
    refused(f"examples.{name}", "--checkpoint", "nowhere", naming=["nowhere"])
