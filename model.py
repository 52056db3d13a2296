"""A Llama-family transformer: Llama, Mistral, Qwen2 and Qwen3 checkpoints in one file.

Everything about a model comes from its Hugging Face config.json (formats/config.py), nothing from
its name. In order: the configuration, rotary positions, the modules from the smallest to the whole.

Shapes: B rows, T tokens of this call, S sink slots, R ring slots of the cache (see kv_cache.py),
D head_dim, G query heads that share one key-value head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend, attend_causal
from kv_cache import KVCache, write
from layers import Linear
from linear import ROWS, materialize
from threads import timed_step
from tp import all_gather, all_reduce

# ------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model. Lengths are in tokens, sizes in elements."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int  # the context that the model was trained on
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # rope_type "linear" or "llama3" and its factors
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None  # the window that the model was trained with, if it has one
    eos_ids: tuple[int, ...] = ()
    n_ranks: int = 1  # processes that share the model; heads and ffn_dim are then those of one


# ------------------------------------------------------------------------------ rotary positions


def rope_frequencies(config: ModelConfig, device=None) -> Tensor:
    """(D / 2,) float64, radians a position: RoFormer's theta^(-2i/D), scaled as the config says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = config.rope_theta ** (-exponents / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    # llama3: fast pairs stay, slow ones are slowed. Between them the frequency is a linear blend
    # in the number of turns that the pair makes over the original context.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * slowed


def rope(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, each (B, T, 1, D / 2) float32, for positions (B, T) int64.

    The angle is computed in float64, since a stream has no last position: in float32 it would be
    wrong by 0.02 radians at position 10^6 and by 2 at 10^8."""
    angles = positions[:, :, None, None].double() * frequencies
    return materialize(angles.cos().float()), materialize(angles.sin().float())


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, heads, D) by its positions' angles, in Hugging Face's half-split layout."""
    cos, sin = cos_sin
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


# ------------------------------------------------------------------------------ modules


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normal.type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention, over a sink+window cache or over the tokens of the call alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv = Linear(config.dim, q_dim + 2 * kv_dim, bias=config.qkv_bias)
        self.out = Linear(q_dim, config.dim, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, at: Step, k_cache: Tensor | None,
                v_cache: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, heads + 2 kv_heads, D)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        q, k = self.q_norm(q), self.k_norm(k)  # (B, T, heads, D), (B, T, kv_heads, D)
        q_recent, k = rotate(q, at.rope), rotate(k, at.rope)
        if k_cache is None:
            y = attend_causal(q_recent, k, v)
        else:
            write(k_cache, at.slots, k)
            write(v_cache, at.slots, v)
            q_sink = rotate(q, at.sink_rope) if at.sink_rope else q_recent
            y = attend(q_sink, q_recent, k_cache, v_cache, at)
        return self.out(y.reshape(B, T, -1))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer): down(silu(gate(x)) * up(x)), gate and up in one matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, ffn_dim) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_ranks = config.n_ranks
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    @torch.compiler.nested_compile_region  # compiled once, called for every layer
    def forward(self, x: Tensor, at: Step, k_cache: Tensor | None,
                v_cache: Tensor | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), at, k_cache, v_cache)
        x = x + all_reduce(attended, self.n_ranks)
        return x + all_reduce(self.feed_forward(self.ffn_norm(x)), self.n_ranks)


@dataclass
class Step:
    """What a call's T tokens have in common in every layer, computed once a call."""

    rope: tuple[Tensor, Tensor]  # cosine and sine at the true positions, for keys and ring queries
    # At the positions at which sinks see queries. None: these are the queries' own.
    sink_rope: tuple[Tensor, Tensor] | None = None
    slots: Tensor | None = None  # (B, T) int64: where the new keys and values are stored
    # (B, T * G, n) float32: 0 where a query sees one of the n slots in use, else -inf. The G
    # queries of a token that share a key-value head have a row each.
    mask: Tensor | None = None
    n_sink: int = 0
    window: int = 0


class Transformer(nn.Module):
    """The whole model. `model(tokens, cache)` is the one call. It runs `step`, which
    load.compile_model compiles. A deep copy of a model is a model of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.fingerprint = "random"  # load.fingerprint: says in saved sessions which model it is
        self.suggested = {}  # settings of sample.Sampling for this model, which programs heed
        self.compiled = None  # load.compile_model: `step` as graphs of this model alone
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, -(-config.vocab_size // config.n_ranks), bias=False)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.tie()

    def tie(self) -> None:
        """Make the output projection's weight the embedding's, where the config ties them. A weight
        that is packed, quantized or one rank's shard has another layout and stays untied."""
        if (self.config.tied_embeddings and self.config.n_ranks == 1
                and isinstance(self.output, Linear) and self.output.layout == ROWS):
            self.output.weight = self.embed.weight

    def __getstate__(self) -> dict:
        """The state of a copy, which is eager until it is compiled itself."""
        return {**self.__dict__, "compiled": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.tie()  # a packed output projection was copied in rows, so it can be tied again

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                last: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) float32 for tokens (B, T) int64.

        With a cache, the tokens continue its rows and each row's length grows by T. Without one
        they are whole sequences from position 0. With `last` (B,) int64, the logits are those of
        one index of each row: (B, 1, vocab_size). Raises ValueError when T is above the cache's
        max_chunk (without a cache: above the sliding window), or when the cache does not fit."""
        in_use = None
        if cache is not None:
            cache.check_fits(self.config, self.norm.weight)
            cache.extend(*tokens.shape)
            in_use = cache.in_use(tokens.shape[1])
        elif tokens.shape[1] > (self.config.sliding_window or math.inf):
            raise ValueError(f"{tokens.shape[1]} tokens without a cache are above the model's "
                             f"sliding window of {self.config.sliding_window}")
        if tokens.is_cuda:
            return self.run(tokens, cache, in_use, last)
        with timed_step((id(self), tokens.shape)):
            return self.run(tokens, cache, in_use, last)

    def run(self, tokens: Tensor, cache: KVCache | None, in_use: Tensor | None,
            last: Tensor | None) -> Tensor:
        """Run `step`, or its graph where the model is compiled."""
        if self.compiled is None:
            return self.step(tokens, cache, in_use, last)
        return self.compiled(self, tokens, cache, in_use, last)

    def step(self, tokens: Tensor, cache: KVCache | None, in_use: Tensor | None,
             last: Tensor | None) -> Tensor:
        """What `forward` computes, as one graph. in_use (n,) int64 are the slots to attend to
        (KVCache.in_use)."""
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            at = Step(rope(positions, self.frequencies))
        else:
            positions = cache.positions(tokens.shape[1])  # (B, T)
            groups = self.config.n_heads // self.config.n_kv_heads
            # An eager call knows whether the window slides yet; a graph is for any number of slots.
            slides = torch.compiler.is_compiling() or len(in_use) >= cache.n_sink + cache.window
            sinks_at = cache.sink_positions(positions)
            at = Step(rope=rope(positions, self.frequencies),
                      sink_rope=rope(sinks_at, self.frequencies) if slides else None,
                      slots=materialize(cache.slots(positions)),
                      mask=materialize(cache.mask(positions, in_use).repeat_interleave(groups, 1)),
                      n_sink=cache.n_sink, window=cache.window)
            cache.length.add_(tokens.shape[1])  # in place: += would make it an output of the graph
        # draw.UNDRAWN is read as token 0: whoever reads the ids drops what follows.
        x = self.embed(tokens.clamp(min=0)).type_as(self.norm.weight)  # (B, T, dim)
        for layer, block in enumerate(self.layers):
            k, v = (None, None) if cache is None else (cache.k[layer], cache.v[layer])
            x = block(x, at, k, v)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last][:, None]  # (B, 1, dim)
        logits = self.output(self.norm(x))  # (B, T, this rank's part of the vocabulary)
        return all_gather(logits, self.config.n_ranks, self.config.vocab_size).float()
