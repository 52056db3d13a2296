"""Convert a checkpoint of any format that is read into a folder of ours.

    python convert_hf.py path/to/Llama-3.2-1B checkpoints/llama-3.2-1b --dtype bf16
    python convert_hf.py model-q4_0.gguf checkpoints/model --quantize int4

It then loads by a memory mapping and nothing else. What others have quantized keeps its integers
(formats/published.py); of a .gguf file, blocks of Q4_0 do with --quantize int4 --group-size 32.
Converting holds about one output file in memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cli import DTYPES, plain_parser
from formats import gguf
from formats.folder import read_config, stack, write_checkpoint
from formats.hub import find
from formats.published import open_weights, read_quantization
from quantize import GROUP_SIZES, MODES, empty_model, quantization_of, store, stored_shapes
from terminal import progress, user_errors, wrote


def convert(source: Path, out: Path, dtype: torch.dtype | None = None, mode: str | None = None,
            group_size: int = 32, show=None) -> None:
    """Write the checkpoint folder at `source` to the new folder `out`, whole or not at all. dtype
    None keeps the checkpoint's own; what others have quantized keeps its integers, unless mode asks
    for int8 or int4. Raises ValueError naming the file, the tensor or the size."""
    raw, config = read_config(source)
    if (raw.get("gpt_stream") or {}).get("quantization") and not mode:
        raise ValueError(f"{source}: is quantized; convert the original instead")
    if mode:
        stored, quantization = None, quantization_of(raw, mode, group_size, source)
    else:
        stored = quantization = read_quantization(source, raw, config)
    shapes = stored_shapes(empty_model(config, quantization))  # refuses what cannot be

    def weights():
        for name, blocks in open_weights(source, raw, config, stored):
            whole = stack(blocks)
            parts = store(name, whole, quantization) if mode else {name: whole}
            for part, tensor in parts.items():
                keep = dtype is None or not tensor.is_floating_point() or part.endswith(".scale")
                yield part, tensor if keep else tensor.to(dtype)

    ours = {"format": 1, **({"quantization": quantization} if quantization else {})}
    new = {**raw, "gpt_stream": ours}
    new.pop("quantization_config", None)
    if dtype:
        new.pop("torch_dtype", None)  # what older files call it
        new["dtype"] = str(dtype).removeprefix("torch.")
    write_checkpoint(out, source, new, weights(), len(shapes), show)


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a folder, a .gguf file, smollm2, or "
                        "org/model[@revision] on the Hugging Face Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the numbers; default: the "
                        "checkpoint's own, or bf16 where that is a quantized type of GGUF's")
    parser.add_argument("--quantize", choices=MODES, help="quantize the weights")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=32,
                        help="columns of a weight that share an int4 scale")
    with user_errors(parser):
        args = parser.parse_args()
        dtype, path = DTYPES.get(args.dtype), Path(args.name).expanduser()
        with progress("converting", "tensors") as show:
            if args.name.lower().endswith(".gguf") and not path.is_dir():
                quantization = quantization_of({}, args.quantize, args.group_size, path)
                gguf.convert(path, args.out, dtype, quantization, show)
            else:
                convert(find(args.name)[0], args.out, dtype, args.quantize, args.group_size, show)
        wrote(args.out)


if __name__ == "__main__":
    main()
