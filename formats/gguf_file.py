"""The layout of a GGUF file: its metadata, by key, and its tensors.

The package gguf reads these, too, but makes several numpy arrays of each value: of a vocabulary of
150,000 tokens that takes a hundred times as long.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats.files import import_optional

VERSIONS = (2, 3)  # which differ only in that the later one allows the other order of bytes
# The types of values: numbers, by their letters in the module struct, texts and lists.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
           10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


class GGUFTensor(NamedTuple):
    """A tensor in the file, memory-mapped. A vector has one number a row."""

    kind: int  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray  # (shape[0], bytes) uint8
    interleaved_heads: int = 0  # heads with llama.cpp's order of rows (split_halves); 0: none
    plus_one: bool = False  # a norm's weight, stored plus one


class Header:
    """Reads a file's values one after another. Raises ValueError where it is cut off."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it is cut off")
        return self.data[self.at - size:self.at]

    def number(self, letter: str) -> int | float | bool:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        """A value of the type that NUMBERS, TEXT or LIST say."""
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            kind, length = self.number("I"), self.number("Q")
            if kind not in NUMBERS:
                return [self.value(kind) for _ in range(length)]
            size = length * struct.calcsize("<" + NUMBERS[kind])
            return list(struct.unpack(f"<{length}{NUMBERS[kind]}", self.take(size)))
        if kind not in NUMBERS:
            raise ValueError(f"a value is of the unknown type {kind}")
        return self.number(NUMBERS[kind])


def read_gguf(path: Path) -> tuple[dict, dict[str, GGUFTensor]]:
    """A file's metadata and its tensors by name. Raises ValueError for a damaged file."""
    gguf = import_optional("gguf", "reading a GGUF file")
    try:
        data = np.memmap(path, mode="r")
        header = Header(data)
        if header.take(4) != b"GGUF":
            raise ValueError("its first bytes are not GGUF")
        if (version := header.number("I")) not in VERSIONS:
            other_order = version & 0xFFFF == 0
            raise ValueError("its bytes are in the other order" if other_order else
                             f"it is of version {version}; known: {VERSIONS}")
        n_tensors, n_values = header.number("Q"), header.number("Q")
        metadata = {}
        for _ in range(n_values):
            name, kind = header.text(), header.number("I")
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = header.value(kind)
        infos = [read_info(header) for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = math.ceil(header.at / alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"tensor {name} is there twice")
            tensors[name] = map_tensor(data, shape, gguf.GGMLQuantizationType(kind),
                                       start + offset, gguf.GGML_QUANT_SIZES)
        return metadata, tensors
    except OSError:  # missing or not readable
        raise
    except Exception as error:  # a damaged file raises errors of many types
        raise ValueError(f"damaged or not a GGUF file: {error}") from None


def read_info(header: Header) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape, type, and place behind the header."""
    name = header.text()
    dims = [header.number("Q") for _ in range(header.number("I"))]  # the innermost comes first
    return name, tuple(dims[::-1]), header.number("I"), header.number("Q")


def map_tensor(data: np.ndarray, shape: tuple[int, ...], kind: int, at: int,
               sizes: dict) -> GGUFTensor:
    """A tensor in the file. sizes has each type's numbers a block, and bytes a block."""
    block, block_bytes = sizes[kind]
    if shape[-1] % block:
        raise ValueError(f"a tensor has {shape[-1]} columns; {kind.name} stores blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if at + size > len(data):
        raise ValueError("it is cut off")
    return GGUFTensor(kind, shape, np.asarray(data[at:at + size]).reshape(shape[0], -1))
