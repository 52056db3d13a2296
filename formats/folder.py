"""Checkpoint folders: Hugging Face's, and ours, which are written here.

Ours has config.json (Hugging Face's, and a key "gpt_stream"), safetensors files with q/k/v and
gate/up stacked into one tensor each, and the tokenizer's files as they were. Rotary positions use
Hugging Face's layout, so no row moves. Tensors are memory-mapped: reading one costs nothing until
it is used.
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.config import config_from_hf, eos_ids, hf_parts
from formats.files import read_json, write_json, written_whole
from model import ModelConfig

FILE_BYTES = 1 << 30  # size of an output file, and so about the memory that converting takes
COPIED = ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


# ------------------------------------------------------------------------------ reading


def read_config(folder: Path) -> tuple[dict, ModelConfig]:
    """The raw config.json and what it means. generation_config.json may add more EOS ids.
    Raises ValueError naming the folder or the file."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if not path.exists():
        raise ValueError(f"{folder}: no config.json; a checkpoint folder has one")
    raw = read_json(path)
    if gptq := read_json(folder / "quantize_config.json"):  # where older tools kept it
        raw.setdefault("quantization_config", {"quant_method": "gptq", **gptq})
    ids = {*eos_ids(path), *eos_ids(folder / "generation_config.json")}
    try:
        config = config_from_hf({**raw, "eos_token_id": sorted(ids)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = len({m[1] for n in open_tensors(folder) if (m := re.search(r"\blayers\.(\d+)\.", n))})
    if layers != config.n_layers:  # before so many are built
        raise ValueError(f"{path}: num_hidden_layers is {config.n_layers}; the weights have "
                         f"{layers} layers")
    return raw, config


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, memory-mapped. Raises ValueError naming a bad file."""
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / (stem + ending), folder / f"{stem}{ending}.index.json"
        if index.exists():
            files = read_index(index, ending)
        elif single.exists():
            files = [single.name]
        else:
            continue
        tensors = {}
        for name in files:
            tensors.update(open_file(folder / name))
        return tensors
    raise ValueError(f"{folder}: no weights; it needs model.safetensors or pytorch_model.bin, "
                     "or the index of several")


def read_index(path: Path, ending: str) -> list[str]:
    """The files that an index names: plain names, since it may not reach outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{path}: needs a "weight_map" from tensors to files')
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(ending):
            raise ValueError(f"{path}: {name!r} is not the name of a {ending} file in its folder")
    return sorted(set(weight_map.values()))


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Nothing is ever unpickled into code."""
    if not path.exists():
        raise ValueError(f"{path}: named by the index, but missing")
    try:
        if path.suffix == ".bin":
            tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            if all(isinstance(tensor, Tensor) for tensor in dict(tensors).values()):
                return tensors
            raise RuntimeError("it holds other things than tensors")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: damaged or not a weights file: {reason}") from None


def read_weights(folder: Path, raw: dict, config: ModelConfig,
                 shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor of a checkpoint by our name, as the blocks of rows that it stacks: q, k and v of
    a Hugging Face one, which have to have these shapes (quantize.stored_shapes).
    Raises ValueError naming a missing, extra or misshapen tensor, before the first is yielded."""
    ours = {name: {name: shape[0]} for name, shape in shapes.items()}
    parts = ours if "gpt_stream" in raw else hf_parts(config)
    tensors = open_tensors(folder)
    check_tensors(folder, tensors, parts, shapes, config)
    for name, stacked in parts.items():
        yield name, [tensors[part] for part in stacked]


def check_tensors(folder: Path, tensors: dict[str, Tensor], parts: dict[str, dict[str, int]],
                  shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    for name, stacked in parts.items():
        for part, rows in stacked.items():
            expected = (rows, *shapes[name][1:])
            if part not in tensors:
                raise ValueError(f"{folder}: tensor {part} is missing")
            if tuple(tensors[part].shape) != expected:
                raise ValueError(f"{folder}: tensor {part} has shape {tuple(tensors[part].shape)}; "
                                 f"the config asks for {expected}")
            if part != name and not tensors[part].is_floating_point():  # ours may be integers
                raise ValueError(f"{folder}: tensor {part} holds {tensors[part].dtype}, no floats")
    used = {part for stacked in parts.values() for part in stacked}
    for extra in sorted(set(tensors) - used):
        # Two that old files carry and no model reads: a table that is computed, and a tied copy.
        if not (extra.endswith("rotary_emb.inv_freq")
                or extra == "lm_head.weight" and config.tied_embeddings):
            raise ValueError(f"{folder}: tensor {extra} does not belong to this architecture")


def stack(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


# ------------------------------------------------------------------------------ writing


def write_checkpoint(out: Path, source: Path, raw: dict, weights: Iterable[tuple[str, Tensor]],
                     total: int, progress=None) -> None:
    """Write a folder of ours, whole or not at all: raw as config.json, the weights, of which
    progress expects `total`, and the tokenizer's files of `source`. Raises ValueError when `out`
    holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as partial:
        partial.mkdir(0o700)
        files, waiting = {}, {}  # file name -> its tensors' names; tensors not yet written

        def write_waiting() -> None:
            file = f"model-{len(files) + 1:05}.safetensors"
            save_file(waiting, partial / file, metadata={"format": "pt"})
            files[file] = list(waiting)
            waiting.clear()

        for count, (name, tensor) in enumerate(weights, 1):
            waiting[name] = tensor.contiguous()
            if sum(t.nbytes for t in waiting.values()) >= FILE_BYTES:
                write_waiting()
            if progress:
                progress(count, total)
        if waiting:
            write_waiting()
        if len(files) == 1:
            (partial / "model-00001.safetensors").rename(partial / "model.safetensors")
        else:
            weight_map = {name: file for file, names in files.items() for name in names}
            write_json(partial / "model.safetensors.index.json", {"weight_map": weight_map})
        write_json(partial / "config.json", raw)
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
