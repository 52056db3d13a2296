"""A Llama-family transformer: Llama, Mistral, Qwen, Gemma 3, SmolLM3, Phi and OLMo 3 checkpoints.

Everything about a model comes from its Hugging Face config.json (formats/config.py), nothing from
its name. In order: the configuration, rotary positions, the modules from the smallest to the whole.

Shapes: B rows, T tokens of this call, S sink slots, R ring slots of the cache (see kv_cache.py),
D head_dim, G query heads that share one key-value head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
    rope_scaling: dict | None = None  # its rope_type (rope_frequencies) and factors
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None  # that layers were trained with, if any slides
    eos_ids: tuple[int, ...] = ()
    n_ranks: int = 1  # processes that share the model; heads and ffn_dim are then those of one
    # Of each layer, where they differ: "full" saw everything in training, "sliding" the sliding
    # window, and "unrotated" everything, without rotary positions.
    kinds: tuple[str, ...] = ()
    sliding_theta: float | None = None  # rope_theta of sliding layers, which have no rope_scaling
    rotary_dim: int | None = None  # the first so many elements of a head are rotated; None: all
    query_scale: float = 1.0  # of queries, besides 1 / sqrt(head_dim)
    norms: str = "before"  # attention and feed-forward, "after" them, or "both"
    norm_plus_one: bool = False  # norms multiply by 1 + their weight
    norm_all_heads: bool = False  # q/k norms are over all heads together
    fused: bool = False  # Hugging Face's files stack q, k and v as here, and gate and up
    activation: str = "silu"  # or "gelu", by its approximation with tanh
    embed_scale: float = 1.0

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer. Layers that are all alike are called full, even if they slide."""
        return self.kinds or ("full",) * self.n_layers

    @property
    def distinct_kinds(self) -> list[str]:
        return sorted(set(self.layer_kinds))

    @property
    def common_window(self) -> int | None:
        """The sliding window of a model all of whose layers slide."""
        return None if self.kinds else self.sliding_window


# ------------------------------------------------------------------------------ rotary positions


def rope_frequencies(config: ModelConfig, device=None, kind: str = "full") -> Tensor:
    """(D / 2,) float64, radians a position: RoFormer's theta^(-2i/D), scaled as the config says.
    D is the number of a head's elements that are rotated. A layer without rotary positions is one
    whose frequencies are zero."""
    D, scaling, theta = config.rotary_dim or config.head_dim, config.rope_scaling, config.rope_theta
    pair = torch.arange(D // 2, dtype=torch.float64, device=device)
    if kind == "unrotated":
        return torch.zeros_like(pair)
    if kind == "sliding":
        scaling, theta = None, config.sliding_theta or theta
    frequencies = theta ** (-2 * pair / D)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "longrope":  # each pair has a factor of its own
        return frequencies / torch.tensor(scaling["short_factor"], device=device).double()
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    # Fast pairs stay, slow ones are slowed, and between them there is a linear blend.
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":  # linear in the turns that a pair makes over that context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays = (original * frequencies / (2 * math.pi) - low) / (high - low)
    else:  # yarn: linear in the pair's number, between those that make so many turns
        first, last = (D * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
                       for turns in (scaling["beta_fast"], scaling["beta_slow"]))
        first, last = max(math.floor(first), 0), min(math.ceil(last), D - 1)
        stays = 1 - (pair - first) / max(last - first, 0.001)
    stays = stays.clamp(0, 1)
    return stays * frequencies + (1 - stays) * slowed


def all_frequencies(config: ModelConfig, device=None) -> Tensor:
    """(kinds, D / 2) float64: the frequencies of each of the config's distinct_kinds."""
    return torch.stack([rope_frequencies(config, device, kind) for kind in config.distinct_kinds])


def rope_amplitude(config: ModelConfig, kind: str) -> float:
    """What cosine and sine are multiplied by in layers of this kind."""
    scaled = kind == "full" and config.rope_scaling
    return config.rope_scaling.get("attention_factor", 1.0) if scaled else 1.0


def rope(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies both halves of a head by, for positions (B, T) int64: the cosine of
    every angle, and the sine, negative for the first half. Each is (B, T, 1, 2, D / 2) float32.

    The angle is computed in float64, since a stream has no last position: in float32 it would be
    wrong by 0.02 radians at position 10^6 and by 2 at 10^8."""
    angles = positions[:, :, None, None].double() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    cos, sin = torch.stack([cos, cos], dim=-2), torch.stack([-sin, sin], dim=-2)
    return materialize(cos.float()), materialize(sin.float())


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, heads, D) rotated by its positions' angles, in Hugging Face's half-split layout, in
    float32. What has no angle, at the end of a head, stays."""
    cos, sin = cos_sin
    n = 2 * cos.shape[-1]
    halves = x[..., :n].float().unflatten(-1, (2, -1))  # (B, T, heads, 2, n / 2)
    rotated = (halves * cos + halves.flip(-2) * sin).flatten(-2)
    return rotated if n == x.shape[-1] else torch.cat([rotated, x[..., n:].float()], dim=-1)


# ------------------------------------------------------------------------------ modules


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich), computed in float32."""

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (normal * (1 + self.weight.float())).type_as(x)
        return normal.type_as(x) * self.weight


def norm_if(wanted: bool, dim: int, config: ModelConfig) -> nn.Module:
    return RMSNorm(dim, config) if wanted else nn.Identity()


class Attention(nn.Module):
    """Grouped-query attention, over a sink+window cache or over the tokens of the call alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim, self.query_scale = config.head_dim, config.query_scale
        self.norm_all_heads = config.norm_all_heads
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv = Linear(config.dim, q_dim + 2 * kv_dim, bias=config.qkv_bias)
        self.out = Linear(q_dim, config.dim, bias=config.out_bias)
        self.q_norm, self.k_norm = (
            norm_if(config.qk_norm, dim if config.norm_all_heads else config.head_dim, config)
            for dim in (q_dim, kv_dim))

    def forward(self, x: Tensor, at: Step, k_cache: Tensor | None,
                v_cache: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, heads + 2 kv_heads, D)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.norm_all_heads:
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        else:
            q, k = self.q_norm(q), self.k_norm(k)  # (B, T, heads, D), (B, T, kv_heads, D)
        if self.query_scale != 1:
            q = q * self.query_scale
        q_recent, k = rotate(q, at.rope), rotate(k, at.rope)
        if k_cache is None:
            y = attend_causal(q_recent.type_as(v), k.type_as(v), v, at.mask)
        else:
            write(k_cache, at.slots, k)
            write(v_cache, at.slots, v)
            q_sink = rotate(q, at.sink_rope) if at.sink_rope else q_recent
            y = attend(q_sink, q_recent, k_cache, v_cache, at)
        return self.out(y.reshape(B, T, -1))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer): down(silu(gate(x)) * up(x)), gate and up in one matmul. Or GeGLU, with gelu
    in the place of silu."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, ffn_dim) each
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * up)


class Block(nn.Module):
    """One layer: attention, then the feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_ranks = config.n_ranks
        before, after = config.norms != "after", config.norms != "before"
        self.attention_norm = norm_if(before, config.dim, config)
        self.attention = Attention(config)
        self.attention_post_norm = norm_if(after, config.dim, config)
        self.ffn_norm = norm_if(before, config.dim, config)
        self.feed_forward = FeedForward(config)
        self.ffn_post_norm = norm_if(after, config.dim, config)

    @torch.compiler.nested_compile_region  # compiled once, called for every layer
    def forward(self, x: Tensor, at: Step, k_cache: Tensor | None,
                v_cache: Tensor | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), at, k_cache, v_cache)
        x = x + self.attention_post_norm(all_reduce(attended, self.n_ranks))
        y = self.feed_forward(self.ffn_norm(x))
        return x + self.ffn_post_norm(all_reduce(y, self.n_ranks))


@dataclass
class Step:
    """What a call's T tokens have in common in every layer of a kind, computed once a call."""

    rope: tuple[Tensor, Tensor]  # cosine and sine at the true positions, for keys and ring queries
    # At the positions at which sinks see queries. None: these are the queries' own.
    sink_rope: tuple[Tensor, Tensor] | None = None
    slots: Tensor | None = None  # (B, T) int64: where the new keys and values are stored
    # (B, T * G, n) float32: 0 where a query sees one of the n slots in use, else -inf. The G
    # queries of a token that share a key-value head have a row each. Without a cache it is (T, T),
    # or None where each token sees all before it.
    mask: Tensor | None = None
    n_sink: int = 0
    window: int = 0


def sequence_step(config: ModelConfig, kind: str, n_tokens: int, frequencies: Tensor) -> Step:
    """The Step of layers of this kind where whole sequences of n_tokens are read without a cache.
    frequencies are the kind's."""
    positions = torch.arange(n_tokens, device=frequencies.device)
    mask = None
    if kind == "sliding" and n_tokens > config.sliding_window:
        distance = positions[:, None] - positions  # (T, T)
        seen = (distance >= 0) & (distance < config.sliding_window)
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)
    return Step(rope(positions[None], frequencies, rope_amplitude(config, kind)), mask=mask)


class Transformer(nn.Module):
    """The whole model. `model(tokens, cache)` is the one call. It runs `step`, which
    load.compile_model compiles. A deep copy of a model is a model of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.fingerprint = "random"  # load.fingerprint: says in saved sessions which model it is
        self.suggested = {}  # settings of sample.Sampling for this model, which programs heed
        self.compiled = None  # load.compile_model: `step` as graphs of this model alone
        # On the meta device, PyTorch imports its compiler, for a second, to draw normal numbers and
        # to compute the frequencies.
        embed = torch.empty(config.vocab_size, config.dim)
        self.embed = nn.Embedding.from_pretrained(
            embed if embed.is_meta else embed.normal_(), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config)
        self.output = Linear(config.dim, -(-config.vocab_size // config.n_ranks), bias=False)
        frequencies = all_frequencies(config, "cpu").to(self.embed.weight.device)
        self.register_buffer("frequencies", frequencies, persistent=False)
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
        max_chunk (without a cache: above a window of all layers), or when the cache does not fit.
        """
        in_use = None
        if cache is not None:
            cache.check_fits(self.config, self.norm.weight)
            cache.extend(*tokens.shape)
            in_use = cache.in_use(tokens.shape[1])
        elif tokens.shape[1] > (self.config.common_window or math.inf):
            raise ValueError(f"{tokens.shape[1]} tokens without a cache are above the model's "
                             f"sliding window of {self.config.common_window}")
        if tokens.is_cuda:
            return self.run(tokens, cache, in_use, last)
        with timed_step((id(self), tokens.shape)):
            return self.run(tokens, cache, in_use, last)

    def run(self, tokens: Tensor, cache: KVCache | None, in_use: list[Tensor] | None,
            last: Tensor | None) -> Tensor:
        """Run `step`, or its graph where the model is compiled."""
        if self.compiled is None:
            return self.step(tokens, cache, in_use, last)
        return self.compiled(self, tokens, cache, in_use, last)

    def step(self, tokens: Tensor, cache: KVCache | None, in_use: list[Tensor] | None,
             last: Tensor | None) -> Tensor:
        """What `forward` computes, as one graph. in_use are the slots to attend to
        (KVCache.in_use)."""
        x, steps = self.begin(tokens, cache, in_use)
        for layer in range(self.config.n_layers):
            x = self.run_layer(layer, x, steps, cache)
        return self.finish(x, last)

    def step_in_parts(self, tokens: Tensor, cache: KVCache, last: Tensor | None,
                      must_pause: Callable[[], bool]) -> Iterator[Tensor | None]:
        """`forward`, eager and in parts: yields None between two layers where it must pause, and
        then the logits. So other rows can step in the middle of a long chunk."""
        cache.check_fits(self.config, self.norm.weight)
        cache.extend(*tokens.shape)
        x, steps = self.begin(tokens, cache, cache.in_use(tokens.shape[1]))
        for layer in range(self.config.n_layers):
            x = self.run_layer(layer, x, steps, cache)
            if must_pause():
                yield None
        yield self.finish(x, last)

    def begin(self, tokens: Tensor, cache: KVCache | None,
              in_use: list[Tensor] | None) -> tuple[Tensor, dict[str, Step]]:
        """The embedded tokens (B, T, dim), and what the layers of each kind have in common."""
        steps = self.steps_by_kind(tokens.shape[1], cache, in_use)
        if cache is not None:
            cache.length.add_(tokens.shape[1])  # in place: += would make it an output of the graph
        # draw.UNDRAWN is read as token 0: whoever reads the ids drops what follows.
        x = self.embed(tokens.clamp(min=0)).type_as(self.norm.weight)  # (B, T, dim)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        return x, steps

    def run_layer(self, layer: int, x: Tensor, steps: dict[str, Step],
                  cache: KVCache | None) -> Tensor:
        k, v = (None, None) if cache is None else (cache.k[layer], cache.v[layer])
        return self.layers[layer](x, steps[self.config.layer_kinds[layer]], k, v)  # (B, T, dim)

    def finish(self, x: Tensor, last: Tensor | None) -> Tensor:
        """The logits of the last layer's output (B, T, dim)."""
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last][:, None]  # (B, 1, dim)
        logits = self.output(self.norm(x))  # (B, T, this rank's part of the vocabulary)
        return all_gather(logits, self.config.n_ranks, self.config.vocab_size).float()

    def steps_by_kind(self, n_tokens: int, cache: KVCache | None,
                      in_use: list[Tensor] | None) -> dict[str, Step]:
        """The Step of each kind of layers, for the next n_tokens of each row."""
        config, steps = self.config, {}
        positions = None if cache is None else cache.positions(n_tokens)  # (B, T)
        for kind, frequencies in zip(config.distinct_kinds, self.frequencies):
            if cache is None:
                steps[kind] = sequence_step(config, kind, n_tokens, frequencies)
                continue
            geometry = cache.of_layer[config.layer_kinds.index(kind)]
            slots = in_use[cache.geometries.index(geometry)]
            mask = cache.mask(geometry, positions, slots)  # (B, T, n)
            groups, amplitude = config.n_heads // config.n_kv_heads, rope_amplitude(config, kind)
            # Until the window slides, sinks see queries at their own positions. An eager call knows
            # whether it does; a graph is for any number of slots.
            most = geometry.n_sink + geometry.window
            slides = torch.compiler.is_compiling() or len(slots) >= most
            sinks_at = cache.sink_positions(geometry, positions)
            steps[kind] = Step(
                rope=rope(positions, frequencies, amplitude),
                sink_rope=(rope(sinks_at, frequencies, amplitude)
                           if geometry.n_sink and slides else None),
                slots=materialize(cache.slots(geometry, positions)),
                mask=materialize(mask.repeat_interleave(groups, 1)),
                n_sink=geometry.n_sink, window=geometry.window)
        return steps
