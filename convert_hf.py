"""Read checkpoints, and convert a Hugging Face one into ours.

    python convert_hf.py path/to/Llama-3.2-1B checkpoints/llama-3.2-1b --dtype bf16

Ours is a folder with config.json (Hugging Face's, and a key "gpt_stream"), safetensors files with
q/k/v and gate/up stacked into one tensor each, and the tokenizer's files as they were. Rotary
positions use Hugging Face's layout, so no row moves. Tensors are memory-mapped: reading one costs
nothing until it is used, and converting holds about one output file in memory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelConfig
from tokenizer import eos_ids, read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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
        config = ModelConfig.from_hf({**raw, "eos_token_id": sorted(ids)})
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


# ------------------------------------------------------------------------------ converting


def convert(source: Path, out: Path, dtype: torch.dtype | None = None, progress=None) -> None:
    """Write the checkpoint at `source` to the new folder `out`, whole or not at all. dtype None
    keeps the checkpoint's own; what others have quantized keeps its integers. Raises ValueError
    naming the file or the tensor."""
    from published import open_weights, read_quantization  # which read this file
    from quantize import empty_model, stored_shapes
    raw, config = read_config(source)
    if (raw.get("gpt_stream") or {}).get("quantization"):
        raise ValueError(f"{source}: is quantized; convert the original instead")
    quantization = read_quantization(source, raw, config)

    def weights():
        for name, blocks in open_weights(source, raw, config, quantization):
            tensor = stack(blocks)
            keep = dtype is None or not tensor.is_floating_point() or name.endswith(".scale")
            yield name, tensor if keep else tensor.to(dtype)

    ours = {"format": 1, **({"quantization": quantization} if quantization else {})}
    new = {**raw, "gpt_stream": ours}
    new.pop("quantization_config", None)
    if dtype:
        new.pop("torch_dtype", None)  # what older files call it
        new["dtype"] = str(dtype).removeprefix("torch.")
    total = len(stored_shapes(empty_model(config, quantization)))
    write_checkpoint(out, source, new, weights(), total, progress)


def write_checkpoint(out: Path, source: Path, raw: dict, weights: Iterable[tuple[str, Tensor]],
                     total: int, progress=None) -> None:
    """Write a folder of ours, whole or not at all: raw as config.json, the weights, of which
    progress expects `total`, and the tokenizer's files of `source`. Raises ValueError when `out`
    holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:  # a signal may come in any line
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
        os.umask(mask := os.umask(0o077))  # which can be read by setting it only
        for path in (partial, *partial.iterdir()):  # save_file and mkdir made them private
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        os.replace(partial, out)
    except (safetensors.SafetensorError, OSError) as error:  # a full disk is either
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main():
    from cli import plain_parser, progress, user_errors, wrote  # which reads this file
    parser = plain_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="type of the numbers; default: the checkpoint's own")
    with user_errors(parser):
        args = parser.parse_args()
        with progress("converting", "tensors") as show:
            convert(args.source, args.out, DTYPES.get(args.dtype), show)
        wrote(args.out)


if __name__ == "__main__":
    main()
