"""Saved sessions: caches in one safetensors file, to go on exactly where they stood.

The tensors are the slots that hold something; everything else is JSON in the file's header.
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

from formats.files import check_target, written_whole
from kv_cache import KVCache

log = logging.getLogger("gpt_stream")
SESSION = "gpt_stream_session"  # the entry of the file's header that makes it a session


def save_session(path: str | Path, caches: dict[str, tuple], **facts) -> None:
    """Write caches to one safetensors file, whole or not at all, so that `load_session` goes on
    exactly where they stand.

    caches is {"model": (model, its cache)}, with {"draft": ...} beside it under speculation; the
    models only say who they are (model.fingerprint). The facts, anything JSON, are kept beside
    them. Raises ValueError or OSError naming the file."""
    path, tensors = check_target(path), {}
    for name, (model, cache) in caches.items():
        facts[name] = {**traits(model, cache), "length": cache.length.tolist(),
                       "overhang": cache.overhang}
        tensors.update(filled(name, cache, facts[name]["length"]))
    with written_whole(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={SESSION: json.dumps(facts)})


def load_session(path: str | Path, caches: dict[str, tuple], **expected) -> dict:
    """Put a saved session into caches like those it was saved from, in place; its facts, of which
    some are expected to be equal.

    A draft changes no token, only the speed: where the file has none that fits, its cache is left
    empty. Raises ValueError naming the file and what does not fit; nothing is changed then."""
    path = Path(path)
    facts, tensors = read_session(path)
    for what, ours in expected.items():
        if facts.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {facts.get(what)!r:.80}; here it is {ours!r}")
    check_fit(path, facts, tensors, "model", *caches["model"])  # before anything is changed
    check_ids(path, facts, caches["model"][0].config.vocab_size)
    for name, (model, cache) in caches.items():
        try:
            check_fit(path, facts, tensors, name, model, cache)
        except ValueError:
            cache.reset()
            continue
        length = facts[name]["length"]
        for tensor_name, slots in filled(name, cache, length).items():
            slots.copy_(tensors[tensor_name])
        cache.length.copy_(torch.tensor(length))
        cache.overhang = list(facts[name]["overhang"])
    return facts


def read_session(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What a session's header says, and its tensors, memory-mapped."""
    if not path.is_file():
        raise ValueError(f"{path}: no such session file")
    try:
        with open(path, "rb") as opened, safetensors.safe_open(
                same_file(path, opened.fileno()), framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(SESSION)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(header or "null")
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not a session file: {error}") from None
    if not isinstance(facts, dict) or "model" not in facts:
        raise ValueError(f"{path}: a safetensors file, but not a saved session")
    return facts, tensors


def same_file(path: Path, number: int) -> str:
    """A name of the file that is open under this number, whatever takes its path meanwhile:
    safe_open opens a name twice, and a save may come in between. The path, where there is none."""
    name = f"/dev/fd/{number}"
    return name if os.path.exists(name) else str(path)


def traits(model, cache: KVCache) -> dict:
    """What has to be equal where a session is saved and where it is loaded."""
    return {"dtype": str(cache.k[0].dtype).removeprefix("torch."),
            "model and quantization": model.fingerprint, "sink": cache.n_sink,
            "window": cache.window, "max_chunk": cache.max_chunk, "batch_size": cache.batch_size}


def filled(name: str, cache: KVCache, length: list[int]) -> dict[str, Tensor]:
    """Views of the slots that hold something when the rows have this length, as a file names them.
    What lies beyond, stale or un-written, is outside every window."""
    used = min(max(length), cache.n_sink + cache.ring)
    return {f"{name}.{kind}.{i}": layer[:, :, :used]
            for kind, layers in (("k", cache.k), ("v", cache.v)) for i, layer in enumerate(layers)}


def check_fit(path: Path, facts: dict, tensors: dict[str, Tensor], name: str, model,
              cache: KVCache) -> None:
    """Raises ValueError, naming the first difference, unless a saved cache fits this one."""
    saved = facts.get(name)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds no cache of a {name}")
    for what, ours in traits(model, cache).items():
        if saved.get(what) != ours:
            raise ValueError(f"{path}: its {what} is {str(saved.get(what))[:80]}; here it is "
                             f"{ours}")
    for what, most in (("length", 2**60), ("overhang", cache.max_chunk)):
        rows = saved.get(what)
        if not isinstance(rows, list) or len(rows) != cache.batch_size or not all(
                type(n) is int and 0 <= n <= most for n in rows):
            raise ValueError(f"{path}: damaged: {what} is {rows!r:.80}")
    for tensor_name, slots in filled(name, cache, saved["length"]).items():
        tensor = tensors.get(tensor_name)
        if tensor is None or (tensor.shape, tensor.dtype) != (slots.shape, slots.dtype):
            raise ValueError(f"{path}: damaged: {tensor_name} is missing or has another shape")


def check_ids(path: Path, facts: dict, vocab_size: int) -> None:
    """Raises ValueError unless the facts' tokens are some: the latest answer's last, and the one at
    most that a draft has not read."""
    last, unread = facts.get("last_id"), facts.get("unread") or []
    if not isinstance(unread, list) or len(unread) > 1 or not all(
            type(i) is int and 0 <= i < vocab_size for i in (*unread, 0 if last is None else last)):
        raise ValueError(f"{path}: damaged: last_id is {last!r:.80} and unread {unread!r:.80}")
