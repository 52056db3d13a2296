"""The compiled path: the same answers, whole graphs, and nothing compiled after warming."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

from generate import generate, load, make_cache, prefill, warm, weight_bytes
from helpers import TINY, random_model, run
from linear import ONEDNN
from load import compile_model, pack
from streams import Batch, generate_batch

WINDOW = 28
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["decode", "prefill too"])
def compiled(request):
    torch._dynamo.reset()
    counters.clear()
    model, _ = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32, compile=True,
                    compile_prefill=request.param)
    cache = make_cache(model, 4, WINDOW)
    assert warm(model, cache) > 0
    assert counters["stats"]["unique_graphs"] == (3 if request.param else 1)  # two sizes of chunk
    return model, cache


def test_nothing_is_compiled_after_warming_for_any_prompt_or_length(compiled):
    model, cache = compiled
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 17, 300, 5000):
            cache.reset()
            for _ in generate(model, cache, [7] * length, max_new_tokens=3, stop_ids=()):
                pass
        for _ in generate(model, cache, [9] * 40, max_new_tokens=20 * WINDOW, stop_ids=()):
            pass
        another = make_cache(model, 4, WINDOW)  # the same sizes at other addresses
        prefill(model, another, [5] * 40)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_a_batch_adds_one_graph_however_its_rows_are_refilled(compiled):
    model, _ = compiled
    batch = Batch(model, 3, 4, WINDOW)
    graphs = counters["stats"]["unique_graphs"]
    list(generate_batch(model, [[0]] * 2, max_new_tokens=2, stop_ids=(), batch=batch))
    assert counters["stats"]["unique_graphs"] == graphs + 1
    prompts = [[7 + n] * n for n in (1, 40, 17, 300, 5, 64, 130)]
    lengths = [30, 5, 40, 12, 1, 25, 9]
    with torch._dynamo.config.patch(error_on_recompile=True):
        events = list(generate_batch(model, prompts, max_new_tokens=lengths, stop_ids=(),
                                     batch=batch))
    assert counters["stats"]["unique_graphs"] == graphs + 1
    assert not counters["graph_break"]
    eager, _ = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32)
    for index, (prompt, n) in enumerate(zip(prompts, lengths)):
        ids = list(generate(eager, make_cache(eager, 4, WINDOW), prompt, n, stop_ids=()))
        assert [token_id for stream, token_id in events if stream.index == index] == [*ids, None]


def test_compiled_equals_eager(compiled):
    model, cache = compiled
    eager, _ = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32)
    prompt = list(range(50, 350))
    cache.reset()
    plain = make_cache(eager, 4, WINDOW)
    assert (prefill(model, cache, prompt) - prefill(eager, plain, prompt)).abs().max() < 1e-4
    for tokens in (torch.tensor([[3]]), torch.tensor([[4]])):
        assert (model(tokens, cache) - eager(tokens, plain)).abs().max() < 1e-4
    cache.reset()
    plain.reset()
    options = dict(max_new_tokens=100, stop_ids=())
    assert list(generate(model, cache, prompt, **options)) == list(
        generate(eager, plain, prompt, **options))


def test_packed_weights_say_the_same(monkeypatch):
    """Large weights are laid out anew: here, all of them."""
    monkeypatch.setattr("linear.LARGE", 0)
    packed, eager = random_model(qkv_bias=True), random_model(qkv_bias=True)
    compile_model(packed)
    assert packed.layers[0].feed_forward.down.layout == ONEDNN
    assert weight_bytes(packed) == weight_bytes(eager)
    cache, plain = make_cache(packed, 4, WINDOW), make_cache(eager, 4, WINDOW)
    prompt = list(range(32))  # which is read eagerly
    assert (prefill(packed, cache, prompt) - prefill(eager, plain, prompt)).abs().max() < 1e-4
    for length in (1, 6, 1):
        tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(length))
        assert (packed(tokens, cache) - eager(tokens, plain)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiling_later_lays_weights_out_as_compiling_at_once(dtype):
    """In rows, where an eager model had packed them, and the tied table is one tensor again."""
    at_once, later = (load(TINY, device="cpu", dtype=dtype, compile=c)[0] for c in (True, False))
    plain = {name: weight.to_dense() for name, weight in later.state_dict().items()}
    compile_model(later)
    for (name, module), other in zip(later.named_modules(), at_once.modules(), strict=True):
        if hasattr(module, "layout"):
            assert module.layout == other.layout, name
            assert torch.equal(module.weight.to_dense(), plain[name + ".weight"])
    assert later.output.weight is later.embed.weight
    assert weight_bytes(later) == weight_bytes(at_once)


def test_a_rollback_between_compiled_calls(compiled):
    model, cache = compiled
    cache.reset()
    prefill(model, cache, list(range(90)))
    expected = model(torch.tensor([[3]]), cache)
    model(torch.tensor([[4]]), cache)
    cache.rollback(2)
    assert torch.equal(model(torch.tensor([[3]]), cache), expected)


def test_without_a_compiler_it_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    status, out, err = run("generate", "--compile", "--device", "cpu")
    assert status == 2 and "C++ compiler" in err and "Traceback" not in err


def test_two_models_of_one_shape_keep_their_own_graphs():
    """They differ in a number that is compiled in, and in nothing that a guard looks at."""
    tokens = torch.tensor([[7]])
    for norm_eps in (1e-6, 0.5):
        model = random_model(norm_eps=norm_eps)
        cache, plain = make_cache(model, 4, WINDOW), make_cache(model, 4, WINDOW)
        expected = model(tokens, plain)
        compile_model(model)
        assert (model(tokens, cache) - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------ copies


def logits_of(model):
    """Of a few steps of one token."""
    cache = make_cache(model, 4, WINDOW)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[token]]), cache) for token in range(20, 29)], dim=1)


def change(model):
    """As a step of training does."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05)
    return model


@pytest.mark.parametrize("tied, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_a_copy_of_a_model_is_a_model(tied, dtype, monkeypatch):
    """Eager or compiled, packed or not: a copy computes with weights of its own."""
    monkeypatch.setattr("linear.LARGE", 0)
    original = random_model(tied_embeddings=tied).to(dtype)
    expected = logits_of(original)
    pack(original, compile=False)
    copies = {"eager": copy.deepcopy(original)}
    compile_model(original)
    assert ONEDNN in [getattr(module, "layout", None) for module in original.modules()]
    copies |= {"packed": copy.deepcopy(original), "shallow": copy.copy(original)}
    compiled = logits_of(original)
    copies["compiled"] = copy.deepcopy(original)
    copies["pickled"] = pickle.loads(pickle.dumps(original))
    for name, copied in copies.items():
        assert copied.compiled is None, name
        if name != "shallow":  # which shares its layers with the original
            assert torch.equal(logits_of(copied), expected), name
            assert not torch.equal(logits_of(change(copied)), expected), name
            assert (copied.output.weight is copied.embed.weight) == tied
    assert torch.equal(logits_of(original), compiled)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    assert (compiled - expected).abs().max() < tolerance


def test_copies_compiled_beside_the_original_keep_their_own_weights(monkeypatch):
    """Guards on weights are dropped: a graph of another model's would say what that one says."""
    monkeypatch.setattr("linear.LARGE", 0)
    original = random_model()
    fine_tuned = change(copy.deepcopy(original))
    expected, changed = logits_of(original), logits_of(fine_tuned)
    assert not torch.equal(expected, changed)
    compile_model(original)
    compile_model(fine_tuned)
    later = copy.deepcopy(fine_tuned)  # of a compiled one, and before it ever ran
    compile_model(later)
    for _ in range(2):  # compiled, and again
        for model, logits in ((original, expected), (fine_tuned, changed), (later, changed)):
            assert (logits_of(model) - logits).abs().max() < 1e-4


def test_a_model_and_its_drafts_compiled_in_one_process():
    """Of different sizes, and of one."""
    models = [random_model(), random_model(seed=1),
              random_model(seed=2, n_layers=1, dim=16, head_dim=4, ffn_dim=32)]
    expected = [logits_of(model) for model in models]
    for model in models:
        compile_model(model)
    for _ in range(2):
        for model, logits in zip(models, expected):
            assert (logits_of(model) - logits).abs().max() < 1e-4


def test_operators_are_to_the_compiler_what_they_say():
    """Shapes, strides and dtypes of what they return: graphs take these on trust."""
    from layers import Int4Linear
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(96, 64)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    int4 = Int4Linear(64, 96, False, 32)
    int4.weight, int4.zero = torch.zeros_like(int4.weight), torch.zeros_like(int4.zero)
    int4.scale = torch.ones_like(int4.scale)
    int4.pack(torch.bfloat16)
    ops = torch.ops.gpt_stream
    torch.library.opcheck(ops.int4_matmul.default, (x, int4.weight, 32, int4.scales_and_zeros))
    torch.library.opcheck(ops.int8_matmul.default, (
        x, torch.zeros(96, 64, dtype=torch.int8), torch.ones(96).bfloat16()))
    y = ops.packed_linear(x[None].float(), packed, 96)  # whose weight is no plain tensor
    assert (y.shape, y.stride(), y.dtype) == ((1, 3, 96), (288, 96, 1), torch.float32)


def test_a_row_of_a_batch_is_one_graph_wherever_it_lies():
    """Rows lie at different places in memory; a batch steps the only busy one alone."""
    torch._dynamo.reset()
    eager, _ = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32)
    model, _ = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32, compile=True)
    cache, plain = make_cache(model, 4, WINDOW, 3), make_cache(eager, 4, WINDOW, 3)
    for i, row in enumerate((2, 0, 1, 2)):
        one, other = cache.row(row), plain.row(row)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            for token in range(40, 90):
                tokens = torch.tensor([[token]])
                assert (model(tokens, one) - eager(tokens, other)).abs().max() < 1e-4
    assert all(torch.allclose(ours, k, atol=1e-4) for ours, k in zip(cache.k, plain.k))
