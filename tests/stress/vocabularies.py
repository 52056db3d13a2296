"""llama.cpp's own vocabularies, and the ids that it says for some texts: are they ours?

    python tests/stress/vocabularies.py llama.cpp/models

The folder is models/ of a checkout of https://github.com/ggml-org/llama.cpp: each
ggml-vocab-NAME.gguf stands there beside NAME.gguf.inp, the texts, and NAME.gguf.out, the ids.
Vocabularies of kinds that aren't supported are named, with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from formats.gguf_file import read_gguf
from formats.gguf_tokenizer import write_tokenizer
from tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


def compare(path: Path) -> tuple[int, int]:
    """(texts with the same ids, all texts) of a vocabulary. Prints the texts that differ. Raises
    ValueError for a vocabulary that is refused."""
    texts = path.with_name(f"{path.name}.inp").read_bytes().decode().split(SEPARATOR)[:-1]
    lines = path.with_name(f"{path.name}.out").read_text().splitlines()
    expected = [[int(token_id) for token_id in line.split()] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), read_gguf(path)[0])
        vocabulary = Tokenizer(folder).vocabulary
    same = 0
    for text, theirs in zip(texts, expected, strict=True):
        ours = vocabulary.encode(text)
        same += ours == theirs
        if ours != theirs:
            print(f"  {text!r}: {ours}, not {theirs}")
    return same, len(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    all_same, paths = True, sorted(args.folder.glob("ggml-vocab-*.gguf"))
    if not paths:
        parser.error(f"{args.folder}: no ggml-vocab-*.gguf is there")
    for path in paths:
        if not path.with_name(f"{path.name}.out").exists():
            print(f"{path.name}: no ids beside it")
            continue
        try:
            same, texts = compare(path)
        except ValueError as error:
            print(f"{path.name}: refused: {error}")
            continue
        all_same = all_same and same == texts
        print(f"{path.name}: {same} of {texts} texts")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
