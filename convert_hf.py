"""Convert a checkpoint of any known format into a folder of ours.

    python convert_hf.py path/to/Llama-3.2-1B checkpoints/llama-3.2-1b --dtype bf16
    python convert_hf.py model-q4_0.gguf checkpoints/model --quantize int4

Such a folder is loaded by memory mapping alone. Models that were published quantized keep their
integers (formats/published.py). Blocks of Q4_0 in a .gguf file keep theirs with --quantize int4
--group-size 32. Converting needs about as much memory as one output file.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cli import DTYPES, plain_parser
from formats.folder import open_checkpoint, write_converted
from formats.gguf import convert_gguf
from formats.hub import find
from quantize import GROUP_SIZES, MODES, asked_quantization
from terminal import progress, user_errors, wrote


def convert(source: Path, out: Path, dtype: torch.dtype | None = None,
            quantization: dict | None = None, advance=None) -> None:
    """Write the folder or .gguf file at `source` as a folder of ours, whole or not at all.

    dtype None keeps the checkpoint's own. quantization None keeps the stored one, or floating point
    for a .gguf file; quantize.asked_quantization makes others. Raises ValueError naming the file,
    the tensor or the size."""
    if source.suffix.lower() == ".gguf" and not source.is_dir():
        convert_gguf(source, out, dtype, quantization, advance)
    else:
        write_converted(open_checkpoint(source), out, dtype, quantization, advance)


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
        source = Path(args.name).expanduser()
        if source.suffix.lower() != ".gguf":
            source, _ = find(args.name)
        quantization = asked_quantization(args.quantize, args.group_size)
        with progress("converting", "tensors") as advance:
            convert(source, args.out, DTYPES.get(args.dtype), quantization, advance)
        wrote(args.out)


if __name__ == "__main__":
    main()
