"""Graphs for a GPU that is not there (fake_cuda.py), in a process of its own: facts as JSON.

    python tests/cuda_case.py KIND[,KIND...] ROWS TOKENS        what is compiled for an H100
    TRITON_INTERPRET=1 python tests/cuda_case.py KIND ROWS TOKENS[,TOKENS...]   and what it computes
"""

import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import fake_cuda  # noqa: E402, I001
import torch  # noqa: E402

from bench.models import random_model as bench_model  # noqa: E402
from helpers import random_model  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from layers import Int8Linear  # noqa: E402
from load import compile_model  # noqa: E402
from model import ModelConfig  # noqa: E402
from quantize import asked_quantization, quantize_int8  # noqa: E402

DEVICE = torch.device("cuda", 0)
LARGE = ModelConfig(dim=512, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=2048,
                    vocab_size=4096, max_seq_len=4096)
WEIGHT = 512 * 512  # elements of the smallest weight


def run_step(model, cache, tokens) -> fake_cuda.Compiled:
    last = None if tokens.shape[1] <= 8 else torch.zeros(1, dtype=torch.int64, device=DEVICE)
    try:
        with torch.no_grad():
            model(tokens, cache, last)
    except fake_cuda.Compiled as compiled:
        return compiled
    raise AssertionError("nothing was compiled")


def compiled_facts(kind: str, rows: int, n_tokens: int) -> dict:
    """Facts of a graph in bf16: a layer's kernels, and whether it is a CUDA graph."""
    with fake_cuda.mode, torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        model = bench_model(LARGE, DEVICE, torch.bfloat16,
                            asked_quantization(None if kind == "bf16" else kind, 32))
        cache = KVCache(LARGE, rows, 4, 508, 128, torch.bfloat16, DEVICE)
        compile_model(model, prefill=True)
        run_step(model, cache, torch.zeros(rows, n_tokens, dtype=torch.int64, device=DEVICE))
    call, code = fake_cuda.calls.pop(), fake_cuda.codes.pop()
    assert not fake_cuda.calls and not fake_cuda.codes
    layer = code[code.index("def auto_functionalized_subgraph_0"):code.index("def partition_0")]
    elements = [int(n) for n in re.findall(r"triton_poi\w*\.run\(.*?, (\d+), stream", layer)]
    return dict(call, skips=fake_cuda.skips, kernels=layer.count(".run("),
                library_calls=layer.count("extern_kernels.") + layer.count("torch.ops.aten."),
                copies_of_weights=sum(n >= WEIGHT for n in elements))


def small_model(kind: str):
    mixed = dict(kinds=("sliding", "full"), sliding_window=3, sliding_theta=100.0)
    model = random_model(head_dim=16, **mixed if kind == "mixed" else {}).eval()
    for block in model.layers if kind == "int8" else ():
        for parent, name in ((block.attention, "qkv"), (block.attention, "out"),
                             (block.feed_forward, "gate_up"), (block.feed_forward, "down")):
            layer = Int8Linear(getattr(parent, name).in_features,
                               getattr(parent, name).out_features, False)
            layer.load_state_dict(quantize_int8(getattr(parent, name).weight))
            setattr(parent, name, layer)
    return model


def fake_copy(tensor):
    """A fake tensor on the GPU with the numbers of one on the CPU."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    fake_cuda.set_numbers(fake, tensor)
    return fake


def computed_facts(kind: str, rows: int, steps: list[int]) -> dict:
    """How far steps of a small model in float32, as the kernels compute them, are from the same
    model on the CPU: the logits, and what is in the cache."""
    model, on_gpu = small_model(kind), small_model(kind)
    sizes = model.config, rows, 2, 4, max(steps)  # a ring that is written over after a few steps
    plain = KVCache(*sizes)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 64, (rows, n), generator=generator) for n in steps]
    expected = torch.cat([model(part, plain) for part in tokens], dim=1)
    with fake_cuda.mode:
        for module in on_gpu.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(fake_copy(weight), False)
            module._buffers.update({name: fake_copy(buffer)
                                    for name, buffer in module._buffers.items()
                                    if buffer is not None})
        cache = KVCache(*sizes, device=DEVICE)
        for tensor in (*cache.k, *cache.v, cache.length):
            fake_cuda.set_numbers(tensor, 0)
        for slots in cache.every_slot:
            fake_cuda.set_numbers(slots, list(range(len(slots))))
        compile_model(on_gpu)
        outputs = [run_step(on_gpu, cache, fake_copy(part)).outputs[0] for part in tokens]
    logits = torch.cat(outputs, dim=1)
    used = [geometry.n_used for geometry in 2 * cache.of_layer]  # of each layer's K, and of its V
    held = [fake_cuda.numbers(layer) for layer in cache.k + cache.v]
    cached = max((ours[:, :, :n] - theirs).abs().max().item()
                 for ours, theirs, n in zip(held, plain.k + plain.v, used))
    unused = max(ours[:, :, n:].abs().max().item() for ours, n in zip(held, used))
    return dict(logits=(logits - expected).abs().max().item(),
                largest=expected.abs().max().item(), cached=cached, unused=unused,
                slots=cache.k[0].shape[2] - used[0],
                length=fake_cuda.numbers(cache.length).tolist(),
                graphs=len(fake_cuda.codes), skips=fake_cuda.skips)


if __name__ == "__main__":
    kinds, rows = sys.argv[1].split(","), int(sys.argv[2])
    steps = [int(n) for n in sys.argv[3].split(",")]
    if fake_cuda.INTERPRETED:
        facts = {kind: computed_facts(kind, rows, steps) for kind in kinds}
    else:
        facts = {kind: compiled_facts(kind, rows, steps[0]) for kind in kinds}
    print(json.dumps(facts))
