"""What a config.json says of rotary positions: a base, a scaling, the share of a head.

A scaling is kept as model.rope_frequencies takes it. Where a setting stands in two places, the one
that transformers 5 obeys counts, or the file is refused.
"""

from __future__ import annotations

import math

from formats.files import check_keys

POSITIVE, SWITCH = (float, 1e-6, 1e18), (bool, 0, 1)  # bounds for check_keys
ROPE_TYPES = {name: name for name in ("default", "linear", "dynamic", "llama3", "yarn")}
PHI_ROPE_TYPES = {"default": "default",
                  **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}  # as transformers has it
ROPE = {"rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE, "original_max_position_embeddings": (float, 2, 1e18),
        "beta_fast": POSITIVE, "beta_slow": POSITIVE, "attention_factor": POSITIVE,
        "mscale": POSITIVE, "mscale_all_dim": POSITIVE, "truncate": SWITCH,
        "short_factor": (list, None, None)}


def read_ropes(hf: dict, layered: bool, is_phi: bool, window: int | None, kinds: tuple[str, ...],
               head_dim: int) -> dict:
    """The fields of a ModelConfig that say how positions are rotated, and max_seq_len: the context
    that was trained with these frequencies. layered: the architecture has a rope for each of two
    kinds of layers, as window and kinds say. Raises ValueError naming what is not supported."""
    fields = {"max_seq_len": hf["max_position_embeddings"]}
    if layered:
        (theta, scaling, _), (sliding_theta, sliding_scaling, _) = map(read_rope, layered_ropes(hf))
        if window and sliding_scaling:
            raise ValueError(f"rope type {sliding_scaling['rope_type']!r} of sliding_attention is "
                             "not supported; known: default")
        if window and not kinds:  # all layers slide
            return {**fields, "rope_theta": sliding_theta}
        if kinds:
            fields["sliding_theta"] = sliding_theta
        return {**fields, "rope_theta": theta, "rope_scaling": scaling}
    theta, scaling, share = read_rope(hf, PHI_ROPE_TYPES if is_phi else ROPE_TYPES)
    rotary_dim = int(head_dim * share)
    if scaling and scaling["rope_type"] == "longrope":
        # Above this context it has other frequencies, which no stream needs.
        original = int(scaling["original_max_position_embeddings"])
        fields["max_seq_len"] = min(fields["max_seq_len"], original)
        factors = scaling["short_factor"]
        if len(factors) != rotary_dim // 2 or not all(
                type(one) in (int, float) and one > 0 for one in factors):
            raise ValueError(f"short_factor must be {rotary_dim // 2} positive numbers, one for "
                             "each pair of rotated elements")
    if rotary_dim % 2:
        raise ValueError(f"partial_rotary_factor {share} rotates {rotary_dim} of a head's "
                         f"{head_dim} elements; it must be an even number of them")
    if rotary_dim < head_dim:
        fields["rotary_dim"] = rotary_dim
    return {**fields, "rope_theta": theta, "rope_scaling": scaling}


def layered_ropes(hf: dict) -> tuple[dict, dict]:
    """A config.json with a rope for each of two kinds of layers as two, each with one: that of the
    layers that see everything, and that of those that slide. As in transformers 5, a rope_scaling
    is the former's."""
    own = hf.get("rope_parameters") or {}
    for kind, rope in own.items():
        if kind not in ("full_attention", "sliding_attention") or not isinstance(rope, dict | None):
            raise ValueError(f"rope_parameters has {kind!r:.80}; it must be an object with "
                             "full_attention and sliding_attention")
    alone = {**hf, "rope_scaling": None, "original_max_position_embeddings": None}
    full = {**(own.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    return ({**alone, "rope_parameters": full},
            {**alone, "rope_parameters": own.get("sliding_attention"),
             "rope_theta": hf.get("rope_local_base_freq")})


def read_rope(hf: dict, known: dict[str, str] = ROPE_TYPES) -> tuple[float, dict | None, float]:
    """(theta, scaling, the share of a head that is rotated) of a config.json. Newer files keep them
    in rope_parameters; older ones keep rope_theta at the top level and the scaling, if any, in
    rope_scaling. known are the types that the architecture may have, and what each means.

    As in transformers 5, a rope_scaling takes the place of all of rope_parameters, and what such an
    object says counts more than the top level, but for original_max_position_embeddings. A type
    that is not supported is refused wherever it stands."""
    either = [{key: value for key, value in (hf.get(name) or {}).items() if value is not None}
              for name in ("rope_scaling", "rope_parameters")]
    for rope_type in [each[key] for each in either for key in ("rope_type", "type") if key in each]:
        if rope_type not in tuple(known):  # it may be anything
            raise ValueError(f"rope type {rope_type!r:.80} is not supported; "
                             f"known: {', '.join(known)}")
    for key in [key for each in either for key, value in each.items() if isinstance(value, dict)]:
        raise ValueError(f"rope_parameters of {key!r:.80} alone are not supported; known: one rope "
                         "for all layers")
    rope = {key: hf.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope["original_max_position_embeddings"] = hf["max_position_embeddings"]
    rope |= either[0] or either[1]
    if (original := hf.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    rope_type = known[rope.get("rope_type", rope.get("type", "default"))]
    needed = {"linear": ("factor",), "longrope": ("short_factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings")}.get(rope_type, ())
    share = (float, 1e-6, 1) if known is PHI_ROPE_TYPES else (float, 1, 1)
    check_keys(rope, {**ROPE, "partial_rotary_factor": share}, needed)
    theta = float(rope.get("rope_theta") or 10000.0)
    scaling = read_scaling(rope, rope_type, needed, theta, hf["max_position_embeddings"])
    return theta, scaling, rope.get("partial_rotary_factor") or 1.0


def read_scaling(rope: dict, rope_type: str, needed: tuple[str, ...], theta: float,
                 context: int) -> dict | None:
    """The rope_scaling of a ModelConfig. A dynamic scaling begins above the trained context, which
    no stream reaches. yarn and longrope also have an attention_factor (model.rope_amplitude)."""
    if rope_type in ("default", "dynamic"):
        return None
    scaling = {"rope_type": rope_type, **{key: rope[key] if key == "short_factor" else
                                          float(rope[key]) for key in needed}}
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"low_freq_factor {rope['low_freq_factor']} is not below high_freq_factor")
    if rope_type in ("linear", "llama3"):
        return scaling
    original = float(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or context / original)
    scaling["original_max_position_embeddings"] = original
    if rope_type == "yarn":  # Peng et al., 2023
        check_keys({"rope_theta": theta}, {"rope_theta": (float, 2, 1e18)})
        if rope.get("truncate") is False:
            raise ValueError("truncate False of yarn is not supported; True is")
        scaling |= {"factor": factor, "beta_fast": float(rope.get("beta_fast") or 32),
                    "beta_slow": float(rope.get("beta_slow") or 1)}
        both = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
        above, below = (0.1 * scale * math.log(max(factor, 1)) + 1
                        for scale in (both if all(both) else (1, 0)))
        attention_factor = above / below
    else:
        attention_factor = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    scaling["attention_factor"] = float(rope.get("attention_factor") or attention_factor)
    return scaling
