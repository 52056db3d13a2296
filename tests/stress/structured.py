"""Answers of random models at temperature 1.5 to random JSON Schemas: what ends by itself fits.

    python tests/stress/structured.py --schemas 1000 --first 7

Half of the schemas with sentencepiece's kind of tokenizer, half with a tokenizer.json, where one
is in the folder that --checkpoint names. The first answer that does not parse, or that jsonschema
finds wrong, ends this with its seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cli import add_checkpoint, plain_parser  # noqa: E402
from formats.files import read_json  # noqa: E402
from formats.hub import find  # noqa: E402
from helpers import TINY, random_model  # noqa: E402
from schemas import check_answers  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser, "smollm2")
    parser.add_argument("--schemas", type=int, default=1000, metavar="N", help="how many")
    parser.add_argument("--first", type=int, default=0, metavar="N",
                        help="the seed of the first schema")
    args = parser.parse_args()
    models = []
    for folder in (TINY, find(args.checkpoint)[0]):
        tokenizer, size = Tokenizer(folder), read_json(folder / "config.json")["vocab_size"]
        models.append((random_model(vocab_size=size, eos_ids=(tokenizer.eos_id,)), tokenizer))
    ended = 0
    for n, first in enumerate(range(args.first, args.first + args.schemas, 50)):
        seeds = list(range(first, min(first + 50, args.first + args.schemas)))
        ended += check_answers(*models[n % 2], seeds)
        print(f"{first + len(seeds) - args.first} schemas, {ended} answers ended, 0 wrong",
              flush=True)


if __name__ == "__main__":
    main()
