"""Other projects' ways to run a model of the same shape, to be timed beside ours.

Three run on transformers' own Llama modules with random weights, in our dtype: a prefill and a
step, eager or compiled; StreamingLLM (Xiao et al., 2023) as its authors run it; and static
batches. The fourth is gpt-fast, from its own folder.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clocks import seconds


def llama(config: dict, dtype: torch.dtype, device: torch.device):
    """transformers' model for the settings of a config.json."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--peer needs transformers: pip install transformers") from None
    settings = {k: v for k, v in config.items() if k != "architectures"}
    with torch.device(device):
        return transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**settings), dtype=dtype).eval()


def prefill_and_step(config: dict, dtype: torch.dtype, device: torch.device, compiled: bool,
                     length: int = 512) -> tuple[Callable, Callable]:
    """Two functions to time: a prefill of 128 tokens without a cache, and a decode step. Compiled,
    the step runs over a static cache of `length` tokens."""
    from transformers import DynamicCache, StaticCache
    model = llama(config, dtype, device)
    cache = (StaticCache(config=model.config, max_cache_len=length) if compiled
             else DynamicCache(config=model.config))
    mode = "reduce-overhead" if device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode) if compiled else model.forward
    past = {past_argument(model): cache}
    prompt, state = torch.full((1, 128), 7, device=device), {"position": 128}

    @torch.no_grad()
    def prefill() -> None:
        model(prompt, use_cache=True, logits_to_keep=1).logits[0, 0, 0].item()

    @torch.no_grad()
    def step() -> None:
        position = torch.tensor([state["position"]], device=device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        forward(token, use_cache=True, cache_position=position, position_ids=position[None],
                **past).logits[0, -1].argmax().item()
        state["position"] = 128 + (state["position"] - 127) % (length // 2)

    if not compiled:
        with torch.no_grad():
            model(prompt, use_cache=True, **past)
    for _ in range(3):
        step()
    return prefill, step


def past_argument(model) -> str:
    """The name that a model's forward has for its cache: `cache` from transformers 5.24 on."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def transformers_tokens(config: dict, dtype: torch.dtype, device: torch.device, length: int,
                        n_tokens: int) -> Callable[[], float]:
    """A function that returns the seconds of n_tokens compiled decode steps."""
    _, step = prefill_and_step(config, dtype, device, compiled=True, length=length)
    return lambda: seconds(lambda: [step() for _ in range(n_tokens)])


# ------------------------------------------------------------------------------ gpt-fast


def gpt_fast(folder: str, config: dict, dtype: torch.dtype, device: torch.device,
             quantize: str | None, length: int, n_tokens: int) -> Callable[[], float]:
    """A function that returns the seconds of n_tokens tokens of the gpt-fast in `folder`, in its
    own loop and compiled as its main does. Run it in a process of its own: gpt-fast's files have
    the names of ours."""
    generate, model = gpt_fast_model(folder, config, quantize, length)
    model = model.to_empty(device=device).to(dtype).eval()
    for weight in model.state_dict().values():
        if weight.ndim == 1:  # of a norm, or a scale
            weight.fill_(1e-2)
        elif weight.dtype == torch.int8:
            weight.random_(-127, 128)
        else:
            weight.normal_(std=0.02)
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=length)
    generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead",
                                              fullgraph=True)
    token, start = (torch.full(shape, n, dtype=torch.int32, device=device)
                    for shape, n in (((1, 1), 7), ((1,), length - n_tokens)))

    @torch.no_grad()
    def decode() -> None:  # as its main calls it
        ids, _ = generate.decode_n_tokens(model, token, start.clone(), n_tokens, temperature=0.8,
                                          top_k=200)
        torch.cat(ids).tolist()

    decode()
    return lambda: seconds(decode)


def gpt_fast_model(folder: str, config: dict, quantize: str | None, length: int) -> tuple:
    """(gpt-fast's module generate, its model on the meta device in the shape of a config.json)."""
    if not (Path(folder) / "generate.py").is_file():
        raise ValueError(f"{folder}: no generate.py; gpt-fast's folder has one")
    for name in ("model", "generate", "quantize", "tp"):
        sys.modules.pop(name, None)
    sys.modules["tokenizer"] = types.SimpleNamespace(get_tokenizer=None)  # needs more packages
    sys.path.insert(0, str(folder))
    generate, model = importlib.import_module("generate"), importlib.import_module("model")
    args = model.ModelArgs(
        block_size=length, vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"],
        n_local_heads=config["num_key_value_heads"], dim=config["hidden_size"],
        intermediate_size=config["intermediate_size"])
    with torch.device("meta"):
        empty = model.Transformer(args)
    if quantize:
        handler = importlib.import_module("quantize").WeightOnlyInt8QuantHandler
        empty = handler(empty).convert_for_runtime()
    return generate, empty


# ------------------------------------------------------------------------------ StreamingLLM

# This is what the paper's own implementation does, and what its speed depends on: keys are kept
# un-rotated; each token is appended with cat; at every token every key is rotated anew, at its
# place in the cache; what is evicted is cut out with cat. The loop over the layers is written out
# here, which spares it transformers' work around one, and the angles are computed once a step.


def streaming_past(model) -> list[tuple[Tensor, Tensor]]:
    """Each layer's un-rotated keys and its values, (1, kv_heads, n, D) each, with n = 0."""
    config, weight = model.config, model.lm_head.weight
    empty = weight.new_zeros(1, config.num_key_value_heads, 0, config.head_dim)
    return [(empty, empty)] * config.num_hidden_layers


def streaming_attention(layer: int, attention, x: Tensor, past: list,
                        angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """LlamaAttention of T new tokens x (B, T, dim), which see all n in the cache, themselves
    included; `angles` are those of the places 0 to n - 1 -> (B, T, dim)"""
    B, T, _ = x.shape
    q, k, v = (project(x).view(B, T, -1, attention.head_dim).transpose(1, 2)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    past_k, past_v = past[layer]
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)  # (B, kv_heads, n, D)
    past[layer] = k, v
    cos, sin = angles  # (1, n, D)
    q = q * cos[:, -T:] + rotate_half(q) * sin[:, -T:]  # (B, heads, T, D)
    k = k * cos + rotate_half(k) * sin
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
    scores = q @ k.transpose(2, 3) * attention.scaling  # (B, heads, T, n)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32)
    return attention.o_proj((weights.type_as(v) @ v).transpose(1, 2).reshape(B, T, -1))


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


@torch.no_grad()
def streaming_forward(model, past: list, tokens: Tensor) -> Tensor:
    """Logits (1, 1, V) after tokens (1, T), which are added to the past."""
    T, n = tokens.shape[1], past[0][0].shape[2] + tokens.shape[1]
    x = model.model.embed_tokens(tokens)  # (1, T, dim)
    angles = model.model.rotary_emb(x, torch.arange(n, device=x.device)[None])
    mask = None
    if T > 1:
        mask = torch.full((T, n), -torch.inf, dtype=x.dtype, device=x.device).triu(n - T + 1)
    for index, layer in enumerate(model.model.layers):
        normal = layer.input_layernorm(x)
        x = x + streaming_attention(index, layer.self_attn, normal, past, angles, mask)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[:, -1:]))


def evict(past: list, n_sink: int, recent: int, coming: int = 0) -> None:
    """Keep the sinks and the latest `recent` tokens, `coming` fewer to make room for new ones."""
    n = past[0][0].shape[2]
    if n + coming <= n_sink + recent:
        return
    start = min(n, max(n_sink, n - recent + coming))
    for i, layer in enumerate(past):
        past[i] = tuple(torch.cat([x[:, :, :n_sink], x[:, :, start:]], dim=2) for x in layer)


def streaming_turn(model, past: list, prompt_ids: list[int], max_new_tokens: int, n_sink: int,
                   window: int) -> Iterator[int]:
    """Yield a greedy answer. Room for the prompt and the whole answer is made at once; then the
    prompt is one forward and each token another. A query sees itself besides window - 1 others."""
    evict(past, n_sink, window - 1, len(prompt_ids) + max_new_tokens)
    tokens = torch.tensor([prompt_ids], device=model.device)
    for _ in range(max_new_tokens):
        tokens = streaming_forward(model, past, tokens).argmax(-1)  # (1, 1)
        evict(past, n_sink, window - 1)  # a turn may be longer than the room
        yield tokens.item()


# ------------------------------------------------------------------------------ static batches


def static_batches(config: dict, dtype: torch.dtype,
                   device: torch.device) -> Callable[[list[list[int]], int], None]:
    """A function to time: model.generate of several prompts, padded on the left, for as many tokens
    as the longest answer has."""
    model = llama(config, dtype, device)
    model.generation_config.eos_token_id = None  # random weights would end at random

    def generate_batch(prompts: list[list[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt_ids in enumerate(prompts):
            tokens[row, longest - len(prompt_ids):] = torch.tensor(prompt_ids)
            mask[row, longest - len(prompt_ids):] = 1
        ids = model.generate(tokens.to(device), attention_mask=mask.to(device), pad_token_id=0,
                             max_new_tokens=max_new_tokens, do_sample=False)
        assert len(ids[0].tolist()) == longest + max_new_tokens

    generate_batch([[7] * 32], 3)
    return generate_batch
