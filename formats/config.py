"""What a config.json means, and what a model's layers and tensors are called.

Everything about a model comes from its Hugging Face config.json, nothing from its name. Where a
setting stands in two places, the one that transformers 5 obeys counts, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.files import read_json
from model import ModelConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
                 "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}  # and their model_type
# What transformers takes for a key that is missing, and not for one that is null.
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
MISSING = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": QWEN, "Qwen3ForCausalLM": QWEN,
           "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096}}
ROPE_TYPES = ("default", "linear", "llama3")
# Type, least and greatest value of each key of a config.json that is read (check_keys). The bounds
# of the sizes keep their products within 64 bits. The weights' shapes check the sizes themselves.
COUNT, SIZE, POSITIVE = (int, 1, 2**16), (int, 1, 2**20), (float, 1e-6, 1e18)
SWITCH, OBJECT = (bool, 0, 1), (dict, {}, None)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights in a file
SIZES = {"hidden_size": SIZE, "num_hidden_layers": COUNT, "num_attention_heads": COUNT,
         "intermediate_size": SIZE, "vocab_size": SIZE, "max_position_embeddings": (int, 1, 2**40)}
OPTIONAL = {"num_key_value_heads": COUNT, "head_dim": COUNT, "sliding_window": (int, 0, 2**40),
            "max_window_layers": (int, 0, 2**40), "layer_types": (list, None, None),
            "rms_norm_eps": (float, 1e-20, 1), "attention_bias": SWITCH, "mlp_bias": SWITCH,
            "tie_word_embeddings": SWITCH, "use_sliding_window": SWITCH,
            **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), OBJECT),
            "gpt_stream": (dict, {"quantization": (dict, {"layers": OBJECT}, None)}, None)}
ROPE = {"rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE, "original_max_position_embeddings": POSITIVE,
        "partial_rotary_factor": (float, 1, 1)}
# Of a generation_config.json, what is read besides the EOS ids; and values that say nothing.
SUGGESTED = {"temperature": (float, 0, 1e9), "top_k": (int, 0, 2**40), "top_p": (float, 0, 1),
             "min_p": (float, 0, 1), "repetition_penalty": (float, 1e-3, 1e9)}
OFF = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}


def config_from_hf(hf: dict) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ValueError naming what is not supported."""
    architecture = read_architecture(hf)
    hf = MISSING[architecture] | hf
    check_keys(hf, SIZES | OPTIONAL, needed=SIZES)
    mistral, qwen2, qwen3 = (architecture.startswith(a) for a in ("Mistral", "Qwen2", "Qwen3"))
    dim, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads = hf.get("num_key_value_heads") or n_heads
    head_dim = hf.get("head_dim") or (128 if qwen3 else dim // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise ValueError(f"{n_heads} heads of size {head_dim} cannot share {n_kv_heads} "
                         "key-value heads: the heads must divide evenly and have an even size")
    bias = bool(hf.get("attention_bias")) and not mistral
    eos = hf.get("eos_token_id")
    theta, scaling = read_rope(hf)
    return ModelConfig(
        dim=dim, n_layers=hf["num_hidden_layers"], n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, ffn_dim=hf["intermediate_size"], vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"], norm_eps=hf.get("rms_norm_eps") or 1e-6,
        rope_theta=theta, rope_scaling=scaling, qkv_bias=bias or qwen2,
        out_bias=bias and not qwen2, qk_norm=qwen3,
        ffn_bias=architecture.startswith("Llama") and bool(hf.get("mlp_bias")),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        sliding_window=read_window(hf, architecture),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def read_architecture(hf: dict) -> str:
    """The architecture's name. Raises ValueError naming one that is not supported, and a model_type
    of another one, by which transformers goes."""
    architecture = hf.get("architectures") or "none given"
    architecture = architecture[0] if isinstance(architecture, list) else architecture
    if architecture not in tuple(ARCHITECTURES):  # it may be anything
        raise ValueError(f"architecture {architecture!r:.80} is not supported; "
                         f"known: {', '.join(ARCHITECTURES)}")
    if (model_type := hf.get("model_type")) not in (None, ARCHITECTURES[architecture]):
        raise ValueError(f"model_type {model_type!r:.80} is not that of {architecture}: "
                         f"{ARCHITECTURES[architecture]}")
    if (activation := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r:.80} is not supported; known: silu")
    return architecture


def read_window(hf: dict, architecture: str) -> int | None:
    """The sliding window that a model was trained with; None where no layer has one. One window is
    for all layers here, so the layers without one have it, too."""
    if architecture.startswith("Mistral"):
        return hf["sliding_window"]
    if architecture.startswith("Llama"):  # which never slides, whatever its config says
        return None
    kinds, n_layers = hf.get("layer_types"), hf["num_hidden_layers"]
    if kinds is not None and (len(kinds) != n_layers or not all(
            kind in ("full_attention", "sliding_attention") for kind in kinds)):
        raise ValueError(f"layer_types must be full_attention or sliding_attention for each of "
                         f"{n_layers} layers")
    window = hf["sliding_window"] if hf.get("use_sliding_window") else None
    if kinds is not None and "sliding_attention" in kinds:
        if window is None:
            raise ValueError("layer_types has sliding_attention, but use_sliding_window or "
                             "sliding_window says that no layer slides")
        return window
    slides = kinds is None and (hf["max_window_layers"] or 0) < n_layers
    return window if slides else None


def read_rope(hf: dict) -> tuple[float, dict | None]:
    """(theta, scaling) of a config.json. Newer files keep both in rope_parameters; older ones keep
    rope_theta at the top level and the scaling, if any, in rope_scaling.

    As in transformers 5, a rope_scaling takes the place of all of rope_parameters, and what such an
    object says counts more than the top level, but for original_max_position_embeddings. A type
    that is not supported is refused wherever it stands."""
    either = [{key: value for key, value in (hf.get(name) or {}).items() if value is not None}
              for name in ("rope_scaling", "rope_parameters")]
    for rope_type in [each[key] for each in either for key in ("rope_type", "type") if key in each]:
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope type {rope_type!r:.80} is not supported; "
                             f"known: {', '.join(ROPE_TYPES)}")
    for key in [key for each in either for key, value in each.items() if isinstance(value, dict)]:
        raise ValueError(f"rope_parameters of {key!r:.80} alone are not supported; known: one rope "
                         "for all layers")
    rope = {key: hf.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope["original_max_position_embeddings"] = hf["max_position_embeddings"]
    rope |= either[0] or either[1]
    if (original := hf.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings")}[rope_type]
    check_keys(rope, ROPE, needed)
    scaling = {"rope_type": rope_type, **{key: float(rope[key]) for key in needed}}
    if needed[1:] and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"low_freq_factor {rope['low_freq_factor']} is not below high_freq_factor")
    return float(rope.get("rope_theta") or 10000.0), scaling if needed else None


def check_keys(raw: dict, kinds: dict[str, tuple], needed: Iterable[str] = ()) -> None:
    """Check the values of a JSON object. kinds gives each key's type with the least and the
    greatest number, or for an object the kinds of its own keys. A float may be written as an
    integer. A null counts as missing. Raises ValueError naming the key, the value, and what would
    be right."""
    for key, (kind, low, high) in kinds.items():
        value = raw.get(key)
        if value is None and key not in needed:
            continue
        fits = type(value) in ((int, float) if kind is float else (kind,))
        if fits and kind is dict:
            check_keys(value, low)
        elif not fits or kind in (int, float) and not low <= value <= high:
            what = {bool: "true or false", dict: "an object",
                    int: f"an integer from {low} to {high}",
                    float: f"a number from {low} to {high}", list: "a list"}[kind]
            raise ValueError(f"{key} is {value!r:.80}; it must be {what}")


def eos_ids(path: Path) -> list[int]:
    """The end-of-sequence ids that a JSON file gives. Raises ValueError naming one that is not a
    token's number."""
    ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
        raise ValueError(f"{path}: eos_token_id is {wrong[0]!r:.80}; it must be a token's number, "
                         "or a list of them")
    return ids


def suggested_sampling(path: Path) -> dict[str, float]:
    """The settings of sample.Sampling that a generation_config.json gives. As in transformers,
    do_sample false is greedy, whatever temperature stands beside it. Raises ValueError naming the
    file and a value that cannot be."""
    raw = read_json(path)
    try:
        check_keys(raw, SUGGESTED | {"do_sample": SWITCH})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    settings = {name: raw[name] for name in SUGGESTED if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        penalty = settings.get("repetition_penalty", 1.0)
        settings = {"temperature": 0.0, "repetition_penalty": penalty}
    return {name: value for name, value in settings.items() if value != OFF.get(name)}


# ------------------------------------------------------------------------------ names


class Layer(NamedTuple):
    """A linear layer, or the embedding: what it stacks, how ranks shard it, how it is quantized."""

    parts: dict[str, int]  # Hugging Face's layers that it stacks, and the rows of each
    columns: int
    bias: bool = False
    sharded: str = "outputs"  # what ranks split (tp.shard): heads, outputs of each part, or inputs
    int4: bool = True  # whether int4 applies to it; if not, it is int8 in an int4 model
    is_table: bool = False  # an embedding, which every rank holds whole
    tied_to: str | None = None  # the layer whose weight it shares; files store that one only


def block_layers(config: ModelConfig) -> dict[str, Layer]:
    """The linear layers of one block by our names, in the order of computation."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, ffn = config.dim, config.ffn_dim
    return {
        "attention.qkv": Layer(
            {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
            columns=dim, bias=config.qkv_bias, sharded="heads"),
        "attention.out": Layer(
            {"self_attn.o_proj": dim}, columns=q, bias=config.out_bias, sharded="inputs"),
        "feed_forward.gate_up": Layer(
            {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}, columns=dim, bias=config.ffn_bias),
        "feed_forward.down": Layer(
            {"mlp.down_proj": dim}, columns=ffn, bias=config.ffn_bias, sharded="inputs"),
    }


def model_layers(config: ModelConfig) -> dict[str, Layer]:
    """The embedding and every linear layer of a model, by our names."""
    layers = {"embed": Layer({"model.embed_tokens": config.vocab_size}, columns=config.dim,
                             int4=False, is_table=True)}
    for i in range(config.n_layers):
        for name, layer in block_layers(config).items():
            parts = {f"model.layers.{i}.{part}": rows for part, rows in layer.parts.items()}
            layers[f"layers.{i}.{name}"] = layer._replace(parts=parts)
    layers["output"] = Layer({"lm_head": config.vocab_size}, columns=config.dim, int4=False,
                             tied_to="embed" if config.tied_embeddings else None)
    return layers


def block_norms(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """The norms of one block by our names: Hugging Face's name and the size of each."""
    norms = {"attention_norm": ("input_layernorm", config.dim),
             "ffn_norm": ("post_attention_layernorm", config.dim)}
    if config.qk_norm:
        norms["attention.q_norm"] = ("self_attn.q_norm", config.head_dim)
        norms["attention.k_norm"] = ("self_attn.k_norm", config.head_dim)
    return norms


def hf_parts(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """The mapping of tensor names: for each tensor of ours that a file stores, the Hugging Face
    tensors that it stacks, in order, and the shape of each."""
    layers = model_layers(config)
    parts = layer_parts("embed", layers["embed"])
    for i in range(config.n_layers):
        for name in (f"layers.{i}.{name}" for name in block_layers(config)):
            parts |= layer_parts(name, layers[name])
        for name, (theirs, size) in block_norms(config).items():
            parts[f"layers.{i}.{name}.weight"] = {f"model.layers.{i}.{theirs}.weight": (size,)}
    parts["norm.weight"] = {"model.norm.weight": (config.dim,)}
    return parts | layer_parts("output", layers["output"])


def layer_parts(name: str, layer: Layer) -> dict[str, dict[str, tuple[int, ...]]]:
    """hf_parts of one layer: its weight, unless it is another layer's, and its bias, if any."""
    parts = {}
    if layer.tied_to is None:
        parts[f"{name}.weight"] = {f"{part}.weight": (rows, layer.columns)
                                   for part, rows in layer.parts.items()}
    if layer.bias:
        parts[f"{name}.bias"] = {f"{part}.bias": (rows,) for part, rows in layer.parts.items()}
    return parts


def layer_name(tensor: str, layers: dict[str, Layer]) -> str | None:
    """The layer that a stored tensor belongs to: layers.0.attention.qkv for its weight, bias and
    scale, also for those of one part that is stored apart (layers.0.attention.qkv.0.scale). None
    for the weight of a norm."""
    owner, _, _ = tensor.rpartition(".")
    if owner not in layers:
        owner, _, _ = owner.rpartition(".")
    return owner if owner in layers else None


def check_floats(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """check_tensors of weights in floating point. Raises ValueError also naming one of integers, or
    of fewer bits, which mean nothing without scales."""
    check_tensors({name: tensor.shape for name, tensor in found.items()}, expected)
    for name in expected:
        check_float(name, found[name])


def check_float(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor's dtype is one of FLOATS."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"tensor {name} holds {tensor.dtype}, no floats of 16, 32 or 64 bits")


def check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]],
                  asked_by: str = "the config") -> None:
    """Raises ValueError naming the first tensor that is missing, of another shape, or extra."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"tensor {name} is missing")
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"tensor {name} has shape {tuple(found[name])}; {asked_by} asks for "
                             f"{tuple(shape)}")
    for extra in sorted(set(found) - set(expected)):
        # Old files hold two tensors that no model reads: rotary frequencies, and a tied copy.
        if not extra.endswith("rotary_emb.inv_freq") and extra != "lm_head.weight":
            raise ValueError(f"tensor {extra} does not belong to this architecture")
