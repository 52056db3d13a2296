"""The fields of a body that say nothing: labels, and what other servers' clients send by default.

A field is obeyed or refused, never ignored. So a field of OpenAI's API, vLLM, SGLang, TGI or
llama.cpp that is not supported here passes only with a value that asks for nothing, which NEUTRAL
lists. LABELS never ask for anything, as they only name a request, a client or a conversation, or
tune what is off.
"""

from __future__ import annotations

from typing import Any

LABELS = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",  # OpenAI
    "request_id", "rid", "guided_decoding_backend",  # vLLM, SGLang
    # llama.cpp's settings of samplers that NEUTRAL keeps off, and of its own cache
    "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "n_cache_reuse")
# Fields that are refused unless they ask for nothing. Null always asks for nothing.
NEUTRAL = {
    # OpenAI
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "prediction": (), "service_tier": ("auto", "default"), "verbosity": ("medium",),
    "web_search_options": (), "suffix": ("",), "best_of": (1,), "store": (False,),
    # vLLM
    "use_beam_search": (False,), "length_penalty": (1,), "priority": (0,),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (-1,),
    "prompt_logprobs": (), "allowed_token_ids": ([],), "bad_words": ([],), "documents": ([],),
    "chat_template": (), "mm_processor_kwargs": ({},), "guided_whitespace_pattern": (),
    "structural_tag": (), "logits_processors": ([],), "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,), "kv_transfer_params": ({},), "vllm_xargs": ({},),
    "cache_salt": (), "include_reasoning": (True, False), "early_stopping": (False,),
    # SGLang
    "regex": (), "ebnf": (), "no_stop_trim": (False,), "stop_regex": ([],), "lora_path": (),
    "session_params": (), "separate_reasoning": (True, False), "stream_reasoning": (True, False),
    "return_hidden_states": (False,), "custom_logit_processor": (), "custom_params": ({},),
    # TGI
    "typical_p": (1,), "watermark": (False,), "decoder_input_details": (False,),
    "return_full_text": (False,), "top_n_tokens": (0,), "truncate": (), "adapter_id": (),
    "tool_prompt": ("",), "guideline": ("",),
    # llama.cpp
    "cache_prompt": (True,), "id_slot": (-1,), "n_keep": (0, -1), "n_discard": (0,),
    "tfs_z": (1,), "mirostat": (0,), "dynatemp_range": (0,), "repeat_penalty": (1,),
    "repeat_last_n": (64, 0, -1), "penalize_nl": (False,), "xtc_probability": (0,),
    "dry_multiplier": (0,), "top_n_sigma": (-1, 0), "n_probs": (0,), "min_keep": (0,),
    "t_max_predict_ms": (0, -1), "post_sampling_probs": (False,), "return_tokens": (False,),
    "timings_per_token": (False,), "response_fields": ([],), "lora": ([],), "n_indent": (0,),
    "image_data": ([],), "reasoning_format": ("none", "auto"), "grammar": ("",),
    "parse_tool_calls": (True, False), "thinking_forced_open": (False,), "json_schema": (),
    # gateways in front of several servers
    "thinking": ({"type": "disabled"},), "provider": ({},), "transforms": ([],), "models": ([],),
    "extra_body": ({},), "safe_prompt": (False,)}
NEUTRAL_IN_MESSAGE = {
    "function_call": (), "refusal": ("",),
    "audio": (), "annotations": ([],), "reasoning_content": ("",), "reasoning": ("",),
    "reasoning_details": ([],), "provider_specific_fields": ({},), "prefix": (False,)}
# The kinds of part that are text, and the field that holds it.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
NEUTRAL_IN_PART = {"annotations": ([],), "logprobs": ([],)}


def asks_for_nothing(value: Any, neutral: tuple) -> bool:
    """Whether a field's value is null or one of the neutral ones. True is no 1 here, 1.0 is."""
    return value is None or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def without_labels(fields: dict, labels: tuple[str, ...] = LABELS) -> dict:
    return {name: value for name, value in fields.items() if name not in labels}


def join_text_parts(content: Any) -> Any:
    """A message's content as one text: a list of text parts is joined, anything else returned as it
    is. Raises ValueError for other parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            what = f"a part of type {kind[:40]!r}" if isinstance(kind, str) else "this"
            raise ValueError(f"{what} is not supported; every part must be {{'type': 'text', "
                             "'text': ...}; images, sounds and files are not supported")
        field = TEXT_PARTS[kind]
        if not isinstance(part.get(field), str):
            raise ValueError(f"a part of type {kind!r} needs {field!r}, a text")
        for name in part.keys() - {"type", field, "cache_control"}:
            if not asks_for_nothing(part[name], NEUTRAL_IN_PART.get(name, ())):
                raise ValueError(f"a text part's field {name[:40]!r} is not supported")
        texts.append(part[field])
    return "".join(texts)
