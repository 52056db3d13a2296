"""What a config.json means, and what a model's layers and tensors are called.

Everything about a model comes from its Hugging Face config.json, nothing from its name. Where a
setting stands in two places, the one that transformers 5 obeys counts, or the file is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.files import check_keys, read_json
from formats.rope import POSITIVE, SWITCH, read_ropes
from model import ModelConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
                 "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
                 "Gemma3ForCausalLM": "gemma3_text", "SmolLM3ForCausalLM": "smollm3",
                 "Phi3ForCausalLM": "phi3", "Olmo3ForCausalLM": "olmo3"}  # and their model_type
# What transformers takes for a key that is missing, and not for one that is null.
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
MISSING = {
    "LlamaForCausalLM": {}, "Qwen2ForCausalLM": QWEN, "Qwen3ForCausalLM": QWEN,
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Gemma3ForCausalLM": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
    "SmolLM3ForCausalLM": {"num_key_value_heads": 4, "no_rope_layer_interval": 4,
                           "rope_theta": 2e6, "tie_word_embeddings": True},
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "Olmo3ForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_local_base_freq": 5e5,
                         "sliding_window": 4096, "sliding_window_pattern": 4}}
# What an architecture's layers have whatever its config.json says: fields of ModelConfig.
TRAITS = {"Qwen3ForCausalLM": {"qk_norm": True}, "Phi3ForCausalLM": {"fused": True},
          "Gemma3ForCausalLM": {"qk_norm": True, "norms": "both", "norm_plus_one": True,
                                "activation": "gelu"},
          "Olmo3ForCausalLM": {"qk_norm": True, "norms": "after", "norm_all_heads": True}}
NEVER_NULL = ("query_pre_attn_scalar", "sliding_window_pattern", "no_rope_layer_interval")
LAYERED = ("Gemma3ForCausalLM", "Olmo3ForCausalLM")  # a rope for each of two kinds of layers
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh",)}
# Type, least and greatest value of each key of a config.json that is read (check_keys). The bounds
# of the sizes keep their products within 64 bits. The weights' shapes check the sizes themselves.
COUNT, SIZE, OBJECT = (int, 1, 2**16), (int, 1, 2**20), (dict, {}, None)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights in a file
SIZES = {"hidden_size": SIZE, "num_hidden_layers": COUNT, "num_attention_heads": COUNT,
         "intermediate_size": SIZE, "vocab_size": SIZE, "max_position_embeddings": (int, 1, 2**40)}
OPTIONAL = {"num_key_value_heads": COUNT, "head_dim": COUNT, "sliding_window": (int, 0, 2**40),
            "max_window_layers": (int, 0, 2**40), "layer_types": (list, None, None),
            "sliding_window_pattern": COUNT, "no_rope_layers": (list, None, None),
            "no_rope_layer_interval": COUNT, "query_pre_attn_scalar": POSITIVE,
            "rms_norm_eps": (float, 1e-20, 1), "attention_bias": SWITCH, "mlp_bias": SWITCH,
            "tie_word_embeddings": SWITCH, "use_sliding_window": SWITCH,
            **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), OBJECT),
            "gpt_stream": (dict, {"quantization": (dict, {"layers": OBJECT}, None)}, None)}
# Of a generation_config.json, what is read besides the EOS ids; and values that say nothing.
SUGGESTED = {"temperature": (float, 0, 1e9), "top_k": (int, 0, 2**40), "top_p": (float, 0, 1),
             "min_p": (float, 0, 1), "repetition_penalty": (float, 1e-3, 1e9)}
OFF = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}


def config_from_hf(hf: dict) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ValueError naming what is not supported."""
    hf = text_config(hf)
    architecture = read_architecture(hf)
    hf = MISSING[architecture] | hf
    check_keys(hf, SIZES | OPTIONAL, needed=[*SIZES, *(key for key in NEVER_NULL if key in hf)])
    qwen2, qwen3 = (architecture.startswith(name) for name in ("Qwen2", "Qwen3"))
    dim, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads = hf.get("num_key_value_heads") or n_heads
    head_dim = hf.get("head_dim") or (128 if qwen3 else dim // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise ValueError(f"{n_heads} heads of size {head_dim} cannot share {n_kv_heads} "
                         "key-value heads: the heads must divide evenly and have an even size")
    bias = bool(hf.get("attention_bias")) and not architecture.startswith(("Mistral", "Phi3"))
    eos = hf.get("eos_token_id")
    window, kinds = read_kinds(hf, architecture)
    fields = {**TRAITS.get(architecture, {}),
              **read_ropes(hf, architecture in LAYERED, architecture.startswith("Phi3"), window,
                           kinds, head_dim)}
    if architecture.startswith("Gemma"):
        fields |= dict(embed_scale=dim ** 0.5,
                       query_scale=(head_dim / hf["query_pre_attn_scalar"]) ** 0.5)
    return ModelConfig(
        dim=dim, n_layers=hf["num_hidden_layers"], n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, ffn_dim=hf["intermediate_size"], vocab_size=hf["vocab_size"],
        norm_eps=hf.get("rms_norm_eps") or 1e-6, qkv_bias=bias or qwen2,
        out_bias=bias and not qwen2,
        ffn_bias=architecture.startswith(("Llama", "SmolLM3")) and bool(hf.get("mlp_bias")),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        sliding_window=window, kinds=kinds,
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,), **fields)


def text_config(hf: dict) -> dict:
    """The config.json of the language model alone in one that sees pictures, too; others as they
    are."""
    if hf.get("architectures") != ["Gemma3ForConditionalGeneration"]:
        return hf
    check_keys(hf, {"text_config": OBJECT}, needed=["text_config"])
    both = {key: hf[key] for key in ("dtype", "torch_dtype", "eos_token_id", "quantization_config",
                                     "tie_word_embeddings", "gpt_stream") if key in hf}
    return {**hf["text_config"], **both, "architectures": ["Gemma3ForCausalLM"]}


def read_architecture(hf: dict) -> str:
    """The architecture's name. Raises ValueError naming one that is not supported, a model_type of
    another one, by which transformers goes, and what no module computes."""
    architecture = hf.get("architectures") or "none given"
    architecture = architecture[0] if isinstance(architecture, list) else architecture
    if architecture not in tuple(ARCHITECTURES):  # it may be anything
        raise ValueError(f"architecture {architecture!r:.80} is not supported; "
                         f"known: {', '.join(ARCHITECTURES)}")
    if (model_type := hf.get("model_type")) not in (None, ARCHITECTURES[architecture]):
        raise ValueError(f"model_type {model_type!r:.80} is not that of {architecture}: "
                         f"{ARCHITECTURES[architecture]}")
    known = ACTIVATIONS[TRAITS.get(architecture, {}).get("activation", "silu")]
    name = "hidden_activation" if "gelu" in known[0] else "hidden_act"
    if (activation := hf.get(name, known[0])) not in known:
        raise ValueError(f"{name} {activation!r:.80} is not supported; known: {known[0]}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if hf.get(key) and architecture.startswith("Gemma"):
            raise ValueError(f"{key} {hf[key]!r:.80} is not supported; models without it are")
    return architecture


def read_kinds(hf: dict, architecture: str) -> tuple[int | None, tuple[str, ...]]:
    """The sliding window that layers were trained with, None where none slides; and the kind of
    each layer (ModelConfig.kinds), () where all are alike."""
    if architecture.startswith(("Mistral", "Phi3")):  # all layers slide, or none does
        return hf.get("sliding_window"), ()
    if architecture.startswith("Llama"):  # which never slides, whatever its config says
        return None, ()
    if architecture.startswith("SmolLM3"):
        return None, read_unrotated(hf)
    n_layers, types = hf["num_hidden_layers"], hf.get("layer_types")
    if types is not None and (len(types) != n_layers or not all(
            kind in ("full_attention", "sliding_attention") for kind in types)):
        raise ValueError(f"layer_types must be full_attention or sliding_attention for each of "
                         f"{n_layers} layers")
    layered = architecture in LAYERED
    window = hf["sliding_window"] if layered or hf.get("use_sliding_window") else None
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    elif layered:  # every so many layers, one is full
        slides = [bool((i + 1) % hf["sliding_window_pattern"]) for i in range(n_layers)]
    else:
        first = (hf["max_window_layers"] or 0) if window is not None else n_layers
        slides = [i >= first for i in range(n_layers)]
    if any(slides) and not window:
        raise ValueError("layer_types has sliding_attention, but use_sliding_window or "
                         "sliding_window says that no layer slides")
    if all(slides) or not any(slides):
        return window if slides[0] else None, ()
    return window, tuple("sliding" if one else "full" for one in slides)


def read_unrotated(hf: dict) -> tuple[str, ...]:
    """The kind of each layer of a SmolLM3: of some, nothing is rotated."""
    n_layers, rotated, every = (hf.get(key) for key in (
        "num_hidden_layers", "no_rope_layers", "no_rope_layer_interval"))
    if rotated is None:
        rotated = [int((i + 1) % every != 0) for i in range(n_layers)]
    if len(rotated) < n_layers or not all(one in (0, 1) for one in rotated):
        raise ValueError(f"no_rope_layers must be 1, for rotary positions, or 0, for each of "
                         f"{n_layers} layers")
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
        raise ValueError("use_sliding_window is not supported in a SmolLM3; full attention is")
    kinds = tuple("full" if one else "unrotated" for one in rotated[:n_layers])
    return kinds if "unrotated" in kinds else ()


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
    fused: tuple[int, ...] = ()  # the rows of each part, where Hugging Face stacks them, too

    @property
    def rows(self) -> list[int]:
        return list(self.fused or self.parts.values())


def block_layers(config: ModelConfig) -> dict[str, Layer]:
    """The linear layers of one block by our names, in the order of computation."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, ffn = config.dim, config.ffn_dim
    layers = {
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
    if config.fused:
        for name, theirs in (("attention.qkv", "self_attn.qkv_proj"),
                             ("feed_forward.gate_up", "mlp.gate_up_proj")):
            rows = layers[name].rows
            layers[name] = layers[name]._replace(parts={theirs: sum(rows)}, fused=tuple(rows))
    return layers


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
    names = {
        "before": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        "after": {"attention_post_norm": "post_attention_layernorm",
                  "ffn_post_norm": "post_feedforward_layernorm"},
        "both": {"attention_norm": "input_layernorm",
                 "attention_post_norm": "post_attention_layernorm",
                 "ffn_norm": "pre_feedforward_layernorm",
                 "ffn_post_norm": "post_feedforward_layernorm"}}[config.norms]
    norms = {name: (theirs, config.dim) for name, theirs in names.items()}
    if config.qk_norm:
        q, k = (n if config.norm_all_heads else 1 for n in (config.n_heads, config.n_kv_heads))
        norms["attention.q_norm"] = ("self_attn.q_norm", q * config.head_dim)
        norms["attention.k_norm"] = ("self_attn.k_norm", k * config.head_dim)
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
