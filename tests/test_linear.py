"""Every product of the table, in every column, against float64: odd sizes, one token to a chunk."""

import re

import pytest
import torch

import linear
from helpers import TINY
from layers import Linear
from linear import cpu_kind

ROOT = TINY.parent.parent
PROCESSORS = linear.CPUS.split()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = (1, 2, 7, 8, 9, 16, 17, 130)
# (N, K): one row, odd sizes, sizes that divide by nothing, several parts of in_parts.
SHAPES = [(1, 5), (33, 67), (96, 64), (1030, 1031)]


def layer_of(N, K, dtype, bias=True):
    generator = torch.Generator().manual_seed(N + K)
    layer = Linear(K, N, bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return layer.requires_grad_(False)


def is_product(y, x, layer_or_weight, bias=None):
    """Whether y is x W^T + b as sums in float32 give it: off by less than a rounding of y to its
    dtype, and some roundings of float32 of the largest that the terms may add up to."""
    weight = layer_or_weight.double()
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    rounding = 2 * torch.finfo(y.dtype).eps * exact.abs()  # of the product, then of adding the bias
    rounding = rounding + torch.finfo(y.dtype).eps * (0 if bias is None else bias.double().abs())
    assert y.shape == exact.shape
    return bool(((y.double() - exact).abs() <= rounding + 2e-6 * terms).all())


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager model", "compiled model"])
def test_every_layout_and_number_of_tokens_equals_float64(processor, dtype, compiled, monkeypatch):
    """Eager calls of the layer as an eager model and as a compiled one has it, small or large."""
    monkeypatch.setenv("GPT_STREAM_CPU", processor)
    for large in (1 << 60, 0):
        monkeypatch.setattr(linear, "LARGE", large)
        for N, K in SHAPES:
            layer = layer_of(N, K, dtype)
            weight = layer.weight.clone()
            layer.pack(compiled)
            for tokens in TOKENS:
                x = torch.randn(1, tokens, K, generator=torch.Generator().manual_seed(tokens))
                assert is_product(layer(x.to(dtype)), x.to(dtype), weight, layer.bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_batch_and_a_transposed_input_are_inputs_too(dtype, monkeypatch):
    monkeypatch.setenv("GPT_STREAM_CPU", "avx2")
    layer = layer_of(33, 67, dtype)
    whole = torch.randn(5, 9, 140, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (whole[1:4, ::3, 3:70], whole[..., :67].transpose(0, 1), whole[:1, :1, ::2][..., :67]):
        assert is_product(layer(x), x, layer.weight, layer.bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_has_gradients_on_every_processor(dtype, monkeypatch):
    x, layer = torch.randn(1, 40, 67).to(dtype), layer_of(33, 67, dtype)
    layer.weight.requires_grad_()
    gradients = []
    for processor in PROCESSORS:
        monkeypatch.setenv("GPT_STREAM_CPU", processor)
        layer.weight.grad = None
        layer(x).sum().backward()
        gradients.append(layer.weight.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("processor", [p for p in PROCESSORS if p != "amx"])  # it has avx512's rows
@pytest.mark.parametrize("x_shape", [(1, 1), (1, 7), (2, 6), (1, 40)], ids=str)
def test_every_layout_equals_float64_in_a_graph(processor, x_shape, monkeypatch):
    """All kinds of weight and sizes in one graph, so that little is compiled. (A bias after a
    library's product is a kernel to compile, so one size has one.)"""
    monkeypatch.setenv("GPT_STREAM_CPU", processor)
    cases = {}
    for large in (1 << 60, 0):
        monkeypatch.setattr(linear, "LARGE", large)
        for dtype in DTYPES:
            for N, K in SHAPES[:3]:
                layer = layer_of(N, K, dtype, bias=N == 33)
                x = torch.randn(*x_shape, K, generator=torch.Generator().manual_seed(N)).to(dtype)
                weight = layer.weight.clone()
                layer.pack(compiled=True)
                cases[layer.layout, dtype, N] = layer, weight, x  # small and large may be one
    cases = list(cases.values())
    torch._dynamo.reset()
    run = torch.compile(lambda xs: [layer(x) for (layer, *_), x in zip(cases, xs)],
                        fullgraph=True, dynamic=False)
    for (layer, weight, x), y in zip(cases, run([x for *_, x in cases])):
        assert is_product(y, x, weight, layer.bias), (layer, x.dtype)


# ------------------------------------------------------------------------------ the processor


def test_every_processor_has_a_layout_and_products_for_every_kind(monkeypatch):
    for processor in PROCESSORS:
        monkeypatch.setenv("GPT_STREAM_CPU", processor)
        for kind in {kind for kind, *_ in linear.ROW}:
            for compiled in (False, True):
                for size in (1, linear.LARGE):
                    weight = torch.empty(size, dtype=torch.uint8)
                    layout = linear.layout_of(kind, weight, compiled)
                    assert len(linear.ROW[kind, processor, layout][1]) == 2 * len(linear.TOKENS) + 2


def test_a_graph_takes_the_processor_for_a_constant():
    @torch.compiler.assume_constant_result
    def constant():
        pass

    assert constant.__dict__ and constant.__dict__ == cpu_kind.__dict__


def test_an_environment_variable_says_which_processor(monkeypatch):
    monkeypatch.delenv("GPT_STREAM_CPU", raising=False)
    assert cpu_kind() in PROCESSORS
    monkeypatch.setenv("GPT_STREAM_CPU", "generic")
    assert cpu_kind() == "generic"
    monkeypatch.setenv("GPT_STREAM_CPU", "sse")
    with pytest.raises(ValueError, match="GPT_STREAM_CPU is 'sse'; it is one of avx2, avx512"):
        cpu_kind()


def test_nothing_else_asks_about_the_processor():
    """So that every column of the table runs everywhere."""
    asks = re.compile(r"bf16_supported|get_cpu_capability|cpuinfo|_is_(amx|avx|vnni)|cpu_vec_isa|"
                      r"platform\.(processor|machine)|get_capabilities")
    found = [(path.name, line.strip()) for folder in (".", "formats", "server", "examples", "bench")
             for path in (ROOT / folder).glob("*.py") for line in path.read_text().splitlines()
             if asks.search(line)]
    assert {name for name, _ in found} == {"linear.py"} and len(found) == 2, found


# ------------------------------------------------------------------------------ on a GPU


def as_a_gpu_packs(nibbles, tiles):
    """Nibbles (N, K) in the layout of PyTorch's int4 kernel for CUDA, an element at a time: for 8
    rows and 16 * tiles columns, thread t holds row t // 4, and of each pair of tiles the bytes
    t % 4, t % 4 + 4, ... of two columns; in an int32 lie the even columns, then the odd ones."""
    N, K = nibbles.shape
    packed = torch.zeros(N // 8, K // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for row in range(N):
        for column in range(K):
            block, inside = divmod(column, 16 * tiles)
            pair, byte = divmod(inside // 2, 16)
            place = byte // 4 + 4 * (column % 2)
            thread = row % 8 * 4 + byte % 4
            packed[row // 8, block, thread, pair] |= int(nibbles[row, column]) << 4 * place
    return (packed - (packed >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_int4_is_unpacked_from_the_layout_of_a_gpu(tiles):
    nibbles = torch.randint(0, 16, (16, 256), generator=torch.Generator().manual_seed(0))
    packed = as_a_gpu_packs(nibbles, tiles)
    assert torch.equal(linear.unpack_gpu_int4(packed), nibbles.to(torch.uint8))
    scale, zero = torch.rand(16, 8), torch.randn(16, 8)
    both = torch.stack([scale, zero], dim=-1).transpose(0, 1)  # (K / g, N, 2)
    weight = ((nibbles.unflatten(1, (8, 32)) - 8) * scale[..., None] + zero[..., None]).flatten(1)
    x = torch.randn(2, 40, 256)
    assert is_product(linear.gpu_int4_chunk(x, packed, 32, both), x, weight)


def test_int8_on_a_gpu_equals_float64():
    x, weight = torch.randn(3, 5, 64), torch.randint(-127, 128, (33, 64)).to(torch.int8)
    scale, groups = torch.rand(33), torch.rand(33, 2)
    zero = torch.randint(-9, 9, (33, 2)).to(torch.int16)
    assert is_product(linear.gpu_int8(x, weight, scale), x, weight * scale[:, None])
    grouped = (weight.unflatten(1, (2, 32)) - zero[..., None]) * groups[..., None]
    assert is_product(linear.gpu_grouped(x, weight, groups, zero), x, grouped.flatten(1))
