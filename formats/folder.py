"""Checkpoint folders: Hugging Face's and ours are read here, and ours are written.

Ours has Hugging Face's config.json with a key "gpt_stream", safetensors files with q/k/v and
gate/up stacked into one tensor each, and copies of the tokenizer's files. Rotary positions use
Hugging Face's layout, so rows keep their order. Tensors are memory-mapped: the disk is read when a
tensor is used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.checkpoint import (
    Checkpoint,
    check_not_ours_quantized,
    quantized_tensors,
    stack,
    stored_tensors,
)
from formats.config import (
    check_float,
    check_floats,
    check_tensors,
    config_from_hf,
    eos_ids,
    hf_parts,
    text_config,
)
from formats.files import atomic_write, first_line, read_json, write_json
from formats.published import read_published
from formats.tokenizer_config import TEMPLATE_FOLDER
from model import ModelConfig
from quantize import empty_model, stored_shapes

FILE_BYTES = 1 << 30  # of an output file, and so about the memory that converting takes
COPIED = ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "chat_template.json")
# Beside a language model, what sees pictures
PICTURES = ("vision_tower.", "multi_modal_projector.")


# ------------------------------------------------------------------------------ reading


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder holds, be it Hugging Face's, ours, or GPTQ's, AWQ's or
    compressed-tensors'. Raises ValueError naming the folder, and in it the file, key or tensor."""
    raw, config = read_config(folder)
    tensors = language_model(open_tensors(folder))
    check_layers(folder, config, tensors)
    try:
        raw, config = read_tie(raw, config, tensors)
        if "gpt_stream" in raw:
            if raw.get("quantization_config"):
                raise ValueError("config.json has both gpt_stream and quantization_config; one of "
                                 "them says how the weights are stored")
            quantization = (raw["gpt_stream"] or {}).get("quantization")
            blocks = our_blocks(tensors, config, quantization)
        elif raw.get("quantization_config"):
            quantization, blocks = read_published(raw, tensors, config)
        else:
            quantization, blocks = None, hf_blocks(tensors, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return Checkpoint(folder, raw, config, quantization, blocks)


def language_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the language model alone in a model that sees pictures, too, by the names that
    they have in one that does not; others as they are."""
    if not any(name.startswith(("language_model.", "model.language_model.")) for name in tensors):
        return tensors
    return {name.removeprefix("language_model.").replace("model.language_model.", "model."): tensor
            for name, tensor in tensors.items()
            if not name.removeprefix("model.").startswith(PICTURES)}


def read_tie(raw: dict, config: ModelConfig,
             tensors: dict[str, Tensor]) -> tuple[dict, ModelConfig]:
    """raw and config as the tensors ask for where the config ties the output to the embedding. As
    in transformers 5, two different tables are not tied, and a table that is only the output's
    becomes the embedding's, too. (Many files hold an equal copy.)"""
    embed, output = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not config.tied_embeddings or output is None:
        return raw, config
    if embed is None:
        tensors["model.embed_tokens.weight"] = output
        return raw, config
    if output.data_ptr() == embed.data_ptr() or torch.equal(output.to(embed.dtype), embed):
        return raw, config
    return {**raw, "tie_word_embeddings": False}, replace(config, tied_embeddings=False)


def our_blocks(tensors: dict[str, Tensor], config: ModelConfig,
               quantization: dict | None) -> dict[str, list[Tensor]]:
    """The tensors of a folder of ours, one block each. Raises ValueError naming one that is
    missing, misshapen or extra."""
    expected = stored_shapes(empty_model(config, quantization))
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, expected)
    for name in expected:
        if tensors[name].is_floating_point():  # integers: see layers.check_types
            check_float(name, tensors[name])
    return {name: [tensors[name]] for name in expected}


def hf_blocks(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, list[Tensor]]:
    """Hugging Face's tensors under our names. Raises ValueError naming one that is missing,
    misshapen, extra, or not in floating point."""
    parts = hf_parts(config)
    expected = {part: shape for each in parts.values() for part, shape in each.items()}
    check_floats(tensors, expected)
    return {name: [tensors[part] for part in each] for name, each in parts.items()}


def read_config(folder: Path) -> tuple[dict, ModelConfig]:
    """The raw config.json and what it means. The EOS ids are those of config.json and those of
    generation_config.json together. Raises ValueError naming the folder or the file."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if not path.exists():
        raise ValueError(f"{folder}: no config.json; a checkpoint folder has one")
    raw = text_config(read_json(path))
    gptq = read_json(folder / "quantize_config.json")  # of older tools; config.json's counts more
    if gptq and not raw.get("quantization_config"):
        raw["quantization_config"] = {"quant_method": "gptq", **gptq}
    ids = {*eos_ids(path), *eos_ids(folder / "generation_config.json")}
    try:
        return raw, config_from_hf({**raw, "eos_token_id": sorted(ids)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_layers(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless the weights have as many layers as the config says. This comes
    before an empty model is built, which a wrong number could make huge."""
    numbers = {found[1] for name in tensors if (found := re.search(r"\blayers\.(\d+)\.", name))}
    if len(numbers) != config.n_layers:
        raise ValueError(f"{folder / 'config.json'}: num_hidden_layers is {config.n_layers}; the "
                         f"weights have {len(numbers)} layers")


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name there, memory-mapped. As in transformers 5, a single
    file counts more than an index, and an index only says which files are read: of a tensor in two
    of them, the one in the later file, by name, counts. Raises ValueError naming a bad file."""
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / (stem + ending), folder / f"{stem}{ending}.index.json"
        if single.exists():
            files = [single.name]
        elif index.exists():
            files = read_index(index, ending)
        else:
            continue
        tensors = {}
        for name in files:
            tensors.update(open_file(folder / name))
        return tensors
    raise ValueError(f"{folder}: no weights; it needs model.safetensors or pytorch_model.bin, "
                     "or the index of several")


def read_index(path: Path, ending: str) -> list[str]:
    """The files that an index names. Raises ValueError for one outside the folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{path}: needs a "weight_map" from tensors to files')
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(ending):
            raise ValueError(f"{path}: {name!r} is not the name of a {ending} file in its folder")
    return sorted(set(weight_map.values()))


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped. A .bin file is unpickled without running code from
    it. Raises ValueError naming a file that is missing, damaged, or in an older form."""
    if not path.exists():
        raise ValueError(f"{path}: named by the index, but missing")
    try:
        if path.suffix == ".bin":
            return unpickle_tensors(path)
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a weights file: {first_line(error)}") from None


def unpickle_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, memory-mapped. Raises RuntimeError for a damaged one, and for one
    in the form from before PyTorch 1.6, which is a pickle as a whole."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise RuntimeError("no zip archive, as torch.save writes since PyTorch 1.6; save it "
                               "anew with a later one, or as model.safetensors")
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # a damaged file raises errors of many types
        raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
        raise RuntimeError("it holds other things than plain tensors by name")
    return tensors


def is_plain(tensor) -> bool:
    """Whether this is a tensor with every number in memory: not sparse, and not without data, as on
    PyTorch's meta device. One that is read with another sign has no bytes of its own, either."""
    return (isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and not tensor.is_neg() and not tensor.is_conj())


# ------------------------------------------------------------------------------ writing


def our_config(checkpoint: Checkpoint, quantization: dict | None,
               dtype: torch.dtype | None = None) -> dict:
    """The config.json of a folder of ours with this checkpoint's weights, for this quantization and
    dtype. dtype None keeps the one that is written there."""
    ours = checkpoint.raw.get("gpt_stream") or {}
    raw = {**checkpoint.raw, "gpt_stream": {**ours, "format": 1}}
    if quantization:
        raw["gpt_stream"]["quantization"] = quantization
    raw.pop("quantization_config", None)
    if dtype:
        raw.pop("torch_dtype", None)  # the older name of dtype
        raw["dtype"] = str(dtype).removeprefix("torch.")
    return raw


def write_converted(checkpoint: Checkpoint, out: Path, dtype: torch.dtype | None = None,
                    quantization: dict | None = None, advance=None) -> None:
    """Write a checkpoint as a folder of ours, whole or not at all.

    dtype None keeps the stored one, and quantization None the stored kinds. advance(count, total)
    is called after each tensor. Raises ValueError naming the tensor or the size."""
    check_not_ours_quantized(checkpoint)
    stored = quantization or checkpoint.quantization
    shapes = stored_shapes(empty_model(checkpoint.config, stored))  # raises for a wrong group size
    write_checkpoint(out, checkpoint.folder, our_config(checkpoint, stored, dtype),
                     converted_tensors(checkpoint, dtype, quantization), len(shapes), advance)


def converted_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None,
                      quantization: dict | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, as a folder of ours stores it."""
    if quantization:
        for name, tensor in quantized_tensors(checkpoint, quantization):
            yield name, in_dtype(name, tensor, dtype)
    else:
        for name, blocks in stored_tensors(checkpoint, dtype=dtype):
            yield name, stack([in_dtype(name, block, dtype) for block in blocks])


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A stored tensor in this dtype. Integers and their float32 scales stay as they are."""
    if dtype is None or not tensor.is_floating_point() or name.endswith(".scale"):
        return tensor
    return tensor.to(dtype)


def write_checkpoint(out: Path, source: Path, raw: dict, weights: Iterable[tuple[str, Tensor]],
                     total: int, advance=None) -> None:
    """Write a folder of ours, whole or not at all: raw as config.json, `total` weights, and copies
    of the tokenizer's files in `source`. Raises ValueError when `out` is not an empty or new
    folder."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        partial.mkdir(0o700)
        write_weights(partial, weights, total, advance)
        write_json(partial / "config.json", raw)
        templates = (path.relative_to(source) for path in source.glob(f"{TEMPLATE_FOLDER}/*.jinja"))
        for name in (*COPIED, *templates):
            if (source / name).exists():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, partial / name)


def check_out(out: Path) -> None:
    """Raises ValueError unless `out` is an empty folder or does not exist."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty folder")


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]], total: int,
                  advance=None) -> None:
    """Write weights as one safetensors file, or as several and their index."""
    files = {}  # file name -> its tensors' names
    for tensors in file_contents(weights, total, advance):
        file = f"model-{len(files) + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files[file] = list(tensors)
    if len(files) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
    else:
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def file_contents(weights: Iterable[tuple[str, Tensor]], total: int,
                  advance=None) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after another. It yields one dict again and again and clears it in
    between, so that one file's tensors are in memory at a time. Tensors that share memory, as those
    of a .bin file may, are copied, since safetensors writes none that do."""
    tensors = {}
    for count, (name, tensor) in enumerate(weights, 1):
        shared = any(shares_memory(tensor, other) for other in tensors.values())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
        if sum(t.nbytes for t in tensors.values()) >= FILE_BYTES:
            yield tensors
            tensors.clear()
        if advance:
            advance(count, total)
    if tensors:
        yield tensors


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
