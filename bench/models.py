"""The models that are timed: random weights of known shapes, or a checkpoint."""

from __future__ import annotations

import torch

from cli import DTYPES, load_arguments
from formats.config import config_from_hf
from kv_cache import KVCache
from load import check_device, finish, load, share_tied
from model import ModelConfig, Transformer
from quantize import asked_quantization, empty_model

SHAPES = {  # dim, layers, heads, KV heads, ffn, vocabulary, context, tied
    "135m": (576, 30, 9, 3, 1536, 49152, 8192, True),  # SmolLM2
    "160m": (768, 12, 12, 12, 2048, 32000, 2048, False),  # a draft
    "1.1b": (2048, 22, 32, 4, 5632, 32000, 2048, False),  # TinyLlama
    "1.2b": (2048, 16, 32, 8, 8192, 128256, 131072, True),  # Llama 3.2
    "7b": (4096, 32, 32, 32, 11008, 32000, 4096, False),  # Llama 2
    "8b": (4096, 32, 32, 8, 14336, 128256, 131072, False),  # Llama 3.1
}


def shape_config(shape: str) -> dict:
    """The config.json of one of SHAPES."""
    dim, layers, heads, kv_heads, ffn, vocab, context, tied = SHAPES[shape]
    return dict(architectures=["LlamaForCausalLM"], hidden_size=dim, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
                vocab_size=vocab, max_position_embeddings=context, tie_word_embeddings=tied)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype,
                 quantization: dict | None = None) -> Transformer:
    """A model as load makes it, with random weights."""
    model = empty_model(config, quantization)
    weights = {}
    for name, stored in model.state_dict().items():
        if stored.dtype in (torch.int8, torch.uint8):
            low, high = (-127, 128) if stored.dtype == torch.int8 else (0, 256)
            weights[name] = torch.randint(low, high, stored.shape, device=device,
                                          dtype=stored.dtype)
        elif name.endswith(".scale"):
            weights[name] = torch.full(stored.shape, 3e-4, device=device)
        else:
            weights[name] = torch.empty(stored.shape, dtype=dtype, device=device)
            weights[name].fill_(1) if stored.ndim == 1 else weights[name].normal_(std=0.02)
    share_tied(weights, config, 1)
    finish(model, weights, device)
    return model


def open_model(args) -> Transformer:
    """The model that the arguments name, not compiled."""
    if not args.shape:
        return load(args.checkpoint, **load_arguments(args))[0]
    if args.adapter:
        raise ValueError("--adapter goes with --checkpoint, not with --shape")
    return random_model(config_from_hf(shape_config(args.shape)), check_device(args.device),
                        DTYPES[args.dtype or "bf16"],
                        asked_quantization(args.quantize, args.group_size))


def peer_settings(args) -> tuple:
    """(config.json, dtype, device) of the model that peers.py makes; the config is None for a
    checkpoint."""
    config = shape_config(args.shape) if args.shape else None
    return config, DTYPES[args.dtype or "bf16"], check_device(args.device)


def sizes(cache: KVCache) -> dict:
    """A cache's sizes, for the printed record."""
    return dict(sink=cache.n_sink, window=cache.window, batch=cache.batch_size)
