"""A CUDA device says what a CPU says, by replaying graphs, without waiting: nothing here runs
without one. (Whoever changes a test here and has none tries it with DEVICE = "cpu".)"""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import generate as generate_module
from draw import RowSampler, sample
from formats.session import load_session, save_session
from generate import decode, generate, load, make_cache, prefill, warm
from helpers import ONE_THREAD, ROOT, TINY, TORCHRUN, random_model
from kv_cache import KVCache
from layers import Int4Linear, Int8Linear
from load import compile_model
from oracle import Stream
from quantize import dequantize, quantize_int4, quantize_int8
from sample import Sampling
from speculate import Speculation
from streams import Batch, generate_batch
from test_errors import refused
from test_model import hf  # noqa: F401
from test_quantize import random_weight

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
DRAFT = TINY.parent / "tiny-draft"
WINDOW, CHUNK = 12, 16  # a ring of 27 slots, for what is held against the oracle
PROMPT = list(range(300, 350))
CUDA_GRAPHS = {"triton.cudagraph_or_error": True}  # a graph that cannot be one is an error


@pytest.fixture(scope="module", autouse=True)
def no_tuning():
    """Here and in the programs: the search for the fastest blocks takes minutes a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("load.TUNE", False)
        patch.setenv("GPT_STREAM_TUNE", "0")
        yield


def tokens_of(n, seed=0, rows=1):
    return torch.randint(0, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


def compiled_model(checkpoint):
    with torch._inductor.config.patch(CUDA_GRAPHS):
        model, _ = load(checkpoint, device=DEVICE, dtype=torch.float32, compile=True,
                        compile_prefill=True)
        warm(model, make_cache(model, 4, WINDOW))
    return model


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    counters.clear()
    return compiled_model(DRAFT)


@pytest.fixture(scope="module")
def eager():
    return load(DRAFT, device=DEVICE, dtype=torch.float32)[0]


# ------------------------------------------------------------------------------ the same logits


def logits_of(model, tokens):
    windowed, weight = model.config.sliding_window, model.norm.weight
    cache = KVCache(model.config, len(tokens), 0 if windowed else 4, windowed or 200, CHUNK,
                    weight.dtype, weight.device)
    chunks = tokens.to(weight.device).split(CHUNK, dim=1)
    return torch.cat([model(chunk, cache) for chunk in chunks], dim=1).cpu()


def test_logits_of_every_architecture_equal_the_cpus(hf):  # noqa: F811
    _, folder = hf
    tokens = torch.randint(0, 512, (2, 90), generator=torch.Generator().manual_seed(1))
    expected = logits_of(load(folder, device="cpu", dtype=torch.float32)[0], tokens)
    fp32 = logits_of(load(folder, device=DEVICE, dtype=torch.float32)[0], tokens)
    assert not torch.backends.cuda.matmul.allow_tf32  # which keeps 10 bits of 23
    assert (fp32 - expected).abs().max() < 1e-3
    bf16 = logits_of(load(folder, device=DEVICE, dtype=torch.bfloat16)[0], tokens)
    # bf16 keeps 8 bits: each rounding is up to 0.4 % off, the weights' and some twenty a layer,
    # which add up like a random walk. A wrong key or angle is off by 100 %.
    assert 1e-4 < (bf16 - expected).norm() / expected.norm() < 0.06


# ------------------------------------------------------------------------------ the same stream


@pytest.mark.parametrize("n_sink", [0, 4])
def test_the_compiled_stream_equals_the_paper_over_three_wraps_and_rollbacks(n_sink):
    """Every shape is compiled, recorded and replayed here, and the oracle sees any write that went
    to another place than the cache."""
    model = random_model()
    oracle = Stream(model, n_sink, WINDOW)
    model, tokens = model.to(DEVICE), tokens_of(400)[0].tolist()
    compile_model(model)
    cache = KVCache(model.config, 1, n_sink, WINDOW, CHUNK, device=DEVICE)
    plan = [(16, 3), (5, 0), (1, 0), (16, 15), (1, 1), (16, 16), (1, 0), (5, 5), (16, 8)] * 4
    with torch.no_grad(), torch._inductor.config.patch(CUDA_GRAPHS):
        for n_tokens, n_back in plan:
            part, tokens = tokens[:n_tokens], tokens[n_tokens:]
            expected = torch.stack([oracle.feed(t) for t in part])
            logits = model(torch.tensor([part], device=DEVICE), cache)[0].cpu()
            assert (logits - expected).abs().max() < 1e-3
            cache.rollback(n_back)
            oracle.rollback(n_back)
    assert cache.length.item() > n_sink + 3 * cache.of_layer[0].ring


def test_two_caches_in_turns_keep_their_own_writes(compiled, eager):
    """A graph holds the addresses that it was recorded with."""
    prompts, said = (PROMPT, PROMPT[::-1]), ([], [])
    caches = [make_cache(compiled, 4, WINDOW) for _ in prompts]
    streams = [generate(compiled, cache, prompt, 40, stop_ids=())
               for cache, prompt in zip(caches, prompts)]
    for pair in zip(*streams):
        for ids, token_id in zip(said, pair):
            ids.append(token_id)
    for ids, prompt in zip(said, prompts):
        assert ids == list(generate(eager, make_cache(eager, 4, WINDOW), prompt, 40,
                                    stop_ids=()))


def test_compiled_greedy_tokens_equal_eager(compiled, eager):
    options = dict(max_new_tokens=200, stop_ids=())
    assert list(generate(compiled, make_cache(compiled, 4, WINDOW), PROMPT * 6, **options)) == list(
        generate(eager, make_cache(eager, 4, WINDOW), PROMPT * 6, **options))


def test_a_rollback_between_compiled_calls(compiled):
    cache = make_cache(compiled, 4, WINDOW)
    prefill(compiled, cache, PROMPT)
    three, four = (torch.tensor([[t]], device=DEVICE) for t in (3, 4))
    with torch.no_grad():
        expected = compiled(three, cache)
        compiled(four, cache)
        cache.rollback(2)
        assert (compiled(three, cache) - expected).abs().max() < 1e-5
        assert (compiled(four, cache) - expected).abs().max() > 0.1


# ------------------------------------------------------------------------------ the decode loop


def test_nothing_is_compiled_after_warming_and_every_step_replays_a_graph(compiled, monkeypatch):
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay",
                        lambda graph: replays.append(graph) or replay(graph))
    cache, graphs = make_cache(compiled, 4, WINDOW), counters["stats"]["unique_graphs"]
    with (torch._dynamo.config.patch(error_on_recompile=True),
          torch._inductor.config.patch(CUDA_GRAPHS)):
        warm(compiled, cache)  # this cache's addresses are recorded
        replays.clear()
        for length in (1, 17, 300):
            cache.reset()
            list(generate(compiled, cache, [7] * length, max_new_tokens=20, stop_ids=()))
    assert len(replays) == 3 * 20 + 1 + 1 + 4  # tokens; chunks of 32, 32, and 128, 128, 32, 32
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"] and not counters["inductor"]["cudagraph_skips"]


def test_a_decode_step_never_waits_for_the_device(compiled, monkeypatch):
    """But where a token is read, which is the step before's."""
    def copy_to_host(tokens, start=generate_module.copy_to_host):
        read = start(tokens)

        def reading():
            torch.cuda.set_sync_debug_mode("default")
            ids = read()
            torch.cuda.set_sync_debug_mode("error")
            return ids

        return reading

    cache, token = make_cache(compiled, 4, WINDOW), torch.tensor([[7]], device=DEVICE)
    warm(compiled, cache)
    monkeypatch.setattr(generate_module, "copy_to_host", copy_to_host)
    row = RowSampler(1, compiled.config.vocab_size, DEVICE)
    row.begin(0, Sampling(0.8, 20, 0.95, seed=0), [])
    row.sample(compiled(token, cache))  # as generate does: then the settings are on the GPU
    try:
        for draw in (sample, row.sample):
            torch.cuda.set_sync_debug_mode("error")
            row.begin(0, Sampling(0.9, 20, 0.95, seed=1), [1, 2])  # which waits for nothing, too
            with pytest.raises(RuntimeError, match="synchroniz"):
                token.item()
            assert len(list(decode(compiled, cache, token, 30, (), draw))) == 30
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_speculation_says_what_greedy_says(compiled):
    target, eager_target = compiled_model(TINY), load(TINY, device=DEVICE, dtype=torch.float32)[0]
    options = dict(max_new_tokens=400, stop_ids=())
    plain = list(generate(eager_target, make_cache(eager_target, 4, WINDOW), PROMPT, **options))
    speculation = Speculation(compiled, make_cache(compiled, 4, WINDOW), 5)
    cache = make_cache(target, 4, WINDOW)
    warm(target, cache, speculation)
    assert list(generate(target, cache, PROMPT, speculation=speculation, **options)) == plain
    assert 0 < speculation.accepted < speculation.proposed
    assert int(cache.length) == len(PROMPT) + 400


def test_rows_of_a_batch_say_what_each_says_alone(compiled, eager):
    batch = Batch(compiled, 3, 4, WINDOW)
    list(generate_batch(compiled, [[0]], max_new_tokens=3, batch=batch))
    prompts, lengths = [[7 + n] * n for n in (1, 40, 17, 300, 5)], [30, 5, 40, 12, 25]
    events = list(generate_batch(compiled, prompts, max_new_tokens=lengths, stop_ids=(),
                                 batch=batch))
    for index, (prompt, n) in enumerate(zip(prompts, lengths)):
        alone = generate(eager, make_cache(eager, 4, WINDOW), prompt, n, stop_ids=())
        assert [token_id for stream, token_id in events if stream.index == index] == [*alone, None]


# ------------------------------------------------------------------------------ quantized weights


@pytest.mark.parametrize("K, group_size", [(576, 32), (576, 64), (4096, 32), (4096, 64),
                                           (4096, 128)])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_int4_equals_explicit_dequantization(K, group_size, tokens):
    parts, x = quantize_int4(random_weight(96, K), group_size), torch.randn(1, tokens, K)
    full = dequantize(parts).double()
    layer = Int4Linear(K, 96, False, group_size)
    layer.load_state_dict(parts)
    layer.to(DEVICE).pack(torch.bfloat16)
    y = layer(x.to(DEVICE, torch.bfloat16)).double().cpu()
    # As large as a row is, so large is what random numbers make of it. Scales, zeros and sums in
    # bf16 are off by some 0.5 % of that, nibbles in another order or a zero's sign by 100 %.
    error = (y - F.linear(x.bfloat16().double(), full)).abs()
    assert (error < 0.05 * full.norm(dim=1)).all()


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_int8_equals_explicit_dequantization(tokens):
    parts, x = quantize_int8(random_weight(96, 576)), torch.randn(1, tokens, 576)
    expected = F.linear(x.double(), dequantize(parts).double())
    layer = Int8Linear(576, 96, False)
    layer.load_state_dict(parts)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    with torch.no_grad():
        for y in (layer(x), torch.compile(layer, dynamic=False)(x)):
            assert (y.cpu() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_compiled_says_what_it_says_eager(quantize):
    """In bf16, which int4 needs here, a near-tie may fall either way: so logits are compared."""
    options = dict(device=DEVICE, dtype=torch.bfloat16, quantize=quantize)
    with torch._inductor.config.patch(CUDA_GRAPHS):
        models = [load(DRAFT, compile=compile, **options)[0] for compile in (False, True)]
        caches = [make_cache(model, 4, WINDOW) for model in models]
        for token_id in PROMPT[:30]:
            token = torch.tensor([[token_id]], device=DEVICE)
            with torch.no_grad():
                ours, expected = (model(token, cache).cpu()
                                  for model, cache in zip(models[::-1], caches[::-1]))
            assert (ours - expected).norm() < 0.06 * expected.norm()


# ------------------------------------------------------------------------------ sessions and errors


def test_a_saved_session_goes_on_in_another_cache(compiled, tmp_path):
    cache, other = (make_cache(compiled, 4, WINDOW) for _ in range(2))
    prefill(compiled, cache, PROMPT)
    prefill(compiled, other, PROMPT[::-1])
    save_session(tmp_path / "s", {"model": (compiled, cache)})
    load_session(tmp_path / "s", {"model": (compiled, other)})
    says, says_too = (list(generate(compiled, c, [5, 6], 60, stop_ids=()))
                      for c in (cache, other))
    assert says == says_too


def test_a_session_of_the_gpu_goes_on_on_the_cpu(compiled, tmp_path):
    on_cpu, _ = load(DRAFT, device="cpu", dtype=torch.float32)
    cache, other = make_cache(compiled, 4, WINDOW), make_cache(on_cpu, 4, WINDOW)
    prefill(compiled, cache, PROMPT)
    save_session(tmp_path / "s", {"model": (compiled, cache)})
    load_session(tmp_path / "s", {"model": (on_cpu, other)})
    assert list(generate(compiled, cache, [5, 6], 60, stop_ids=())) == list(
        generate(on_cpu, other, [5, 6], 60, stop_ids=()))


def test_out_of_memory_is_one_line(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}')
    refused("batch", "--prompts", tmp_path / "prompts.jsonl", "--batch", 10 ** 9, "--device",
            DEVICE, naming=["memory"])


def test_int4_in_another_dtype_than_bf16_is_refused():
    refused("generate", "--quantize", "int4", "--dtype", "fp32", "--device", DEVICE,
            naming=["int4", "--dtype bf16"])


def test_more_ranks_than_gpus_are_refused_in_one_line():
    ranks = torch.cuda.device_count() + 1
    run = subprocess.run([*TORCHRUN, "--nproc-per-node", str(max(ranks, 2)), "generate.py",
                          "--device", "cuda"], cwd=ROOT, env=ONE_THREAD, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode and run.stdout == ""
    [line] = [line for line in run.stderr.splitlines() if line.startswith("generate.py: error")]
    assert f"{max(ranks, 2)} processes on this machine need a GPU each" in line


def test_the_bare_command_compiled_and_quantized(tmp_path):
    """The whole program in a process of its own, as a user starts it."""
    for quantize in ([], ["--quantize", "int8"], ["--quantize", "int4"]):
        run = subprocess.run([*TORCHRUN[:1], "generate.py", "--compile", "--json", "--ignore-eos",
                              "--max-new-tokens", "300", "--device", DEVICE, *quantize], cwd=ROOT,
                             capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        record = json.loads(run.stdout)
        assert record["new_tokens"] == 300 and record["evicted"] > 0 and record["decode_tok_s"] > 0
