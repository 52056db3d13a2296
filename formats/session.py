"""Saved sessions: caches in one safetensors file, from which a conversation continues exactly.

The tensors are the slots in use. Everything else is JSON in the file's header.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.files import atomic_write, check_target
from kv_cache import KVCache

log = logging.getLogger("gpt_stream")
SESSION = "gpt_stream_session"  # the entry of the file's header that makes it a session


def save_session(path: str | Path, caches: dict[str, tuple], **facts) -> None:
    """Write caches to one safetensors file, whole or not at all.

    caches is {"model": (model, its cache)} and, under speculation, {"draft": ...}. Of the models
    only the fingerprint is saved. facts are any JSON values; load_session returns them. Raises
    ValueError or OSError naming the file."""
    path, tensors = check_target(path), {}
    for name, (model, cache) in caches.items():
        facts[name] = {**cache_settings(model, cache), "length": cache.length.tolist(),
                       "overhang": cache.overhang}
        tensors.update(filled_slots(name, cache, facts[name]["length"]))
    with atomic_write(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={SESSION: json.dumps(facts)})


def load_session(path: str | Path, caches: dict[str, tuple], **expected) -> dict:
    """Fill caches, in place, with a saved session. They must be like those that were saved, and the
    facts given as `expected` must be equal. Returns the saved facts.

    A draft's cache stays empty if the file has none that fits: a draft changes the speed and no
    token. Raises ValueError naming the file and what does not fit, before anything is changed."""
    path = Path(path)
    facts, tensors = read_session(path)
    for what, ours in expected.items():
        if facts.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {facts.get(what)!r:.80}; here it is {ours!r}")
    check_cache_fits(path, facts, tensors, "model", *caches["model"])
    check_saved_ids(path, facts, caches["model"][0].config.vocab_size)
    for name, (model, cache) in caches.items():
        try:
            check_cache_fits(path, facts, tensors, name, model, cache)
        except ValueError:
            cache.reset()
            continue
        length = facts[name]["length"]
        for tensor_name, slots in filled_slots(name, cache, length).items():
            slots.copy_(tensors[tensor_name])
        cache.length.copy_(torch.tensor(length))
        cache.overhang = list(facts[name]["overhang"])
    return facts


def read_session(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """A session's facts and its tensors, memory-mapped. Raises ValueError naming a damaged file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such session file")
    try:
        with open(path, "rb") as opened, safetensors.safe_open(
                name_of_open_file(path, opened.fileno()), framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(SESSION)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(header or "null")
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not a session file: {error}") from None
    if not isinstance(facts, dict) or "model" not in facts:
        raise ValueError(f"{path}: a safetensors file, but not a saved session")
    return facts, tensors


def name_of_open_file(path: Path, descriptor: int) -> str:
    """A name for the file that this descriptor has open. safe_open opens a name twice, and a save
    may replace the path in between. Where the system has no such names, it is the path."""
    name = f"/dev/fd/{descriptor}"
    return name if os.path.exists(name) else str(path)


def cache_settings(model, cache: KVCache) -> dict:
    """What must be equal when a session is saved and when it is loaded."""
    return {"dtype": str(cache.k[0].dtype).removeprefix("torch."),
            "model and quantization": model.fingerprint, "sink": cache.n_sink,
            "window": cache.window, "max_chunk": cache.max_chunk, "batch_size": cache.batch_size}


def filled_slots(name: str, cache: KVCache, length: list[int]) -> dict[str, Tensor]:
    """Views of the slots in use when the rows have this length, by their names in a file. Slots
    beyond them are outside every window."""
    used = [min(max(length), geometry.n_used) for geometry in cache.of_layer]
    return {f"{name}.{kind}.{i}": layer[:, :, :used[i]]
            for kind, layers in (("k", cache.k), ("v", cache.v)) for i, layer in enumerate(layers)}


def check_cache_fits(path: Path, facts: dict, tensors: dict[str, Tensor], name: str, model,
                     cache: KVCache) -> None:
    """Raises ValueError naming the first difference between a saved cache and this one."""
    saved = facts.get(name)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds no cache of a {name}")
    for what, ours in cache_settings(model, cache).items():
        if saved.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {str(saved.get(what))[:80]}; here it is "
                             f"{ours}")
    for what, most in (("length", 2**60), ("overhang", cache.max_chunk)):
        rows = saved.get(what)
        if not isinstance(rows, list) or len(rows) != cache.batch_size or not all(
                type(n) is int and 0 <= n <= most for n in rows):
            raise ValueError(f"{path}: damaged: {what} is {rows!r:.80}")
    for tensor_name, slots in filled_slots(name, cache, saved["length"]).items():
        tensor = tensors.get(tensor_name)
        if tensor is None or (tensor.shape, tensor.dtype) != (slots.shape, slots.dtype):
            raise ValueError(f"{path}: damaged: {tensor_name} is missing or has another shape")


def check_saved_ids(path: Path, facts: dict, vocab_size: int) -> None:
    """Raises ValueError unless the saved token ids are in the vocabulary: the last one of the
    latest answer, and at most one that a draft has not read."""
    last, unread = facts.get("last_id"), facts.get("unread") or []
    if not isinstance(unread, list) or len(unread) > 1 or not all(
            type(i) is int and 0 <= i < vocab_size for i in (*unread, 0 if last is None else last)):
        raise ValueError(f"{path}: damaged: last_id is {last!r:.80} and unread {unread!r:.80}")
