"""A model family's row: what its config.json means, and what its tensors are called.

Everything about a model comes from its Hugging Face config.json, nothing from its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from formats.files import read_json
from model import ModelConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3")
# What is read of a config.json: kind, least and greatest value (check_keys). The sizes'
# bounds keep their products within 64 bits; what a size has to be, the weights say.
COUNT, SIZE, POSITIVE = (int, 1, 2**16), (int, 1, 2**20), (float, 1e-6, 1e18)
SWITCH, OBJECT = (bool, 0, 1), (dict, {}, None)
SIZES = {"hidden_size": SIZE, "num_hidden_layers": COUNT, "num_attention_heads": COUNT,
         "intermediate_size": SIZE, "vocab_size": SIZE, "max_position_embeddings": (int, 1, 2**40)}
OPTIONAL = {"num_key_value_heads": COUNT, "head_dim": COUNT, "sliding_window": (int, 0, 2**40),
            "rms_norm_eps": (float, 1e-20, 1), "attention_bias": SWITCH, "mlp_bias": SWITCH,
            "tie_word_embeddings": SWITCH, "use_sliding_window": SWITCH,
            **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), OBJECT),
            "gpt_stream": (dict, {"quantization": (dict, {"layers": OBJECT}, None)}, None)}
ROPE = {"rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE, "original_max_position_embeddings": POSITIVE,
        "partial_rotary_factor": (float, 1, 1)}


def config_from_hf(hf: dict) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ValueError naming what is not supported."""
    architecture = hf.get("architectures") or "none given"
    architecture = architecture[0] if isinstance(architecture, list) else architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r:.80} is not supported; "
                         f"known: {', '.join(ARCHITECTURES)}")
    if (activation := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r:.80} is not supported; known: silu")
    check_keys(hf, SIZES | OPTIONAL, needed=SIZES)

    mistral, qwen2, qwen3 = (architecture.startswith(a) for a in ("Mistral", "Qwen2", "Qwen3"))
    dim, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads = hf.get("num_key_value_heads") or n_heads
    head_dim = hf.get("head_dim") or (128 if qwen3 else dim // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise ValueError(f"{n_heads} heads of size {head_dim} cannot share {n_kv_heads} "
                         "key-value heads: the heads must divide evenly and have an even size")
    bias = bool(hf.get("attention_bias")) and not mistral
    windowed = mistral or hf.get("use_sliding_window")
    eos = hf.get("eos_token_id")
    theta, scaling = read_rope(hf)
    return ModelConfig(
        dim=dim, n_layers=hf["num_hidden_layers"], n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, ffn_dim=hf["intermediate_size"], vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"], norm_eps=hf.get("rms_norm_eps") or 1e-6,
        rope_theta=theta, rope_scaling=scaling, qkv_bias=bias or qwen2,
        out_bias=bias and not qwen2, ffn_bias=bool(hf.get("mlp_bias", False)), qk_norm=qwen3,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        sliding_window=hf.get("sliding_window") if windowed else None,
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def read_rope(hf: dict) -> tuple[float, dict | None]:
    """(theta, scaling) of a config.json: newer files keep both in rope_parameters, older ones keep
    rope_theta at the top level and the rest, if any, in rope_scaling."""
    rope = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if key in hf}
    rope |= (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type {rope_type!r:.80} is not supported; "
                         f"known: {', '.join(ROPE_TYPES)}")
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings")}[rope_type]
    check_keys(rope, ROPE, needed)
    scaling = {"rope_type": rope_type, **{key: float(rope[key]) for key in needed}}
    if needed[1:] and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"low_freq_factor {rope['low_freq_factor']} is not below high_freq_factor")
    return float(rope.get("rope_theta") or 10000.0), scaling if needed else None


def check_keys(raw: dict, kinds: dict[str, tuple], needed: Iterable[str] = ()) -> None:
    """kinds has a type for each key, and the least and the greatest number, or the kinds of an
    object's keys; a float may be written as an integer, and None is as if the key were missing.
    Raises ValueError naming the key, the value, and what would be right."""
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
                    float: f"a number from {low} to {high}"}[kind]
            raise ValueError(f"{key} is {value!r:.80}; it must be {what}")


def eos_ids(path: Path) -> list[int]:
    """The end-of-sequence ids that a JSON file gives. Raises ValueError naming one that is none."""
    ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
        raise ValueError(f"{path}: eos_token_id is {wrong[0]!r:.80}; it must be a token's number, "
                         "or a list of them")
    return ids


# ------------------------------------------------------------------------------ names


def hf_parts(config: ModelConfig) -> dict[str, dict[str, int]]:
    """For each tensor of ours, the Hugging Face tensors that it stacks and the rows of each."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, ffn, vocab = config.dim, config.ffn_dim, config.vocab_size
    parts = {"embed.weight": {"model.embed_tokens.weight": vocab}}
    for i in range(config.n_layers):
        ours, hf = f"layers.{i}.", f"model.layers.{i}."
        linears = {
            "attention.qkv": (config.qkv_bias, {"self_attn.q_proj": q, "self_attn.k_proj": kv,
                                                "self_attn.v_proj": kv}),
            "attention.out": (config.out_bias, {"self_attn.o_proj": dim}),
            "feed_forward.gate_up": (config.ffn_bias, {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}),
            "feed_forward.down": (config.ffn_bias, {"mlp.down_proj": dim}),
        }
        for name, (bias, stacked) in linears.items():
            for kind in ("weight", "bias") if bias else ("weight",):
                parts[f"{ours}{name}.{kind}"] = {f"{hf}{n}.{kind}": r for n, r in stacked.items()}
        parts[ours + "attention_norm.weight"] = {hf + "input_layernorm.weight": dim}
        parts[ours + "ffn_norm.weight"] = {hf + "post_attention_layernorm.weight": dim}
        if config.qk_norm:
            for n in "qk":
                parts[f"{ours}attention.{n}_norm.weight"] = {
                    f"{hf}self_attn.{n}_norm.weight": config.head_dim}
    parts["norm.weight"] = {"model.norm.weight": dim}
    if not config.tied_embeddings:
        parts["output.weight"] = {"lm_head.weight": vocab}
    return parts
