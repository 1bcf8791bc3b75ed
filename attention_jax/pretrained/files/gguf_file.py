"""Tensors and metadata of a GGUF file; quantised tensors are dequantised to float32.

The header is read by `attention_jax.gguf_header`; the package `gguf` dequantises.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from attention_jax.gguf_header import GGUFHeader
from attention_jax.hints import quoted
from attention_jax.optional import need
from attention_jax.pretrained.files.reading import (
    MOST_BYTES,
    Box,
    File,
    Place,
    box_of,
    widths,
)

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": jnp.dtype(jnp.bfloat16)}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")
SUPPORTED = (*_PLAIN, *_QUANTISED)
# Numbers that are dequantised at once.
_AT_ONCE = 2**20


class _Stored(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    block: int  # numbers per block
    block_bytes: int
    offset: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        *rows, width = self.shape or (1,)
        return (*rows, width // self.block * self.block_bytes)


class GGUFTensors:
    """The tensors of a GGUF file, see `Tensors`; shapes are in the order of NumPy, the reverse of the file's.

    `metadata` has the file's keys (`general.architecture`, `llama.block_count`, ...), with numbers, strings,
    booleans and lists of them. A float32 of the file is the Python float of the same value.
    """

    def __init__(self, path: Path):
        self._file = File(path)
        self.path = path
        self._quants = need("gguf.quants", "reading GGUF files")
        self._kinds = need("gguf.constants", "reading GGUF files").GGMLQuantizationType
        with open(path, "rb") as opened:
            header = GGUFHeader(opened, path, self._file.size)
        self.metadata: Mapping[str, Any] = header.metadata
        self._stored = self._placed(header)

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        return _PLAIN.get(self._find(name).kind, np.dtype(np.float32))

    def kind(self, name: str) -> str:
        """GGML's name of the stored type, such as Q4_K."""
        return self._find(name).kind

    def read(self, name: str) -> np.ndarray:
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        stored = self._find(name)
        box = box_of(stored.shape, index)
        if stored.kind in _PLAIN:
            return self._file.read_box(Place(stored.shape, _PLAIN[stored.kind], stored.offset), box)
        return self._dequantised(stored, box)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise ValueError(f"{self.path}: no tensor {quoted(name)}: names() lists {len(self._stored)}")
        return self._stored[name]

    def _dequantised(self, stored: _Stored, box: Box) -> np.ndarray:
        """A box in float32, a few rows at a time, so that only the result is large."""
        ahead = ((0, 1),) if len(box) == 1 else ()  # then rows are the last axis but one
        *outer, (top, bottom), (start, stop) = *ahead, *box
        out = np.empty(widths((*outer, (top, bottom), (start, stop))), np.float32)
        if not out.size:
            return out.reshape(widths(box))
        # The last axis is widened to whole blocks.
        first, last = start // stored.block, -(-stop // stored.block)
        columns = (first * stored.block_bytes, last * stored.block_bytes)
        kept = slice(start - first * stored.block, stop - first * stored.block)
        place = Place((*widths(ahead), *stored.byte_shape), np.dtype(np.uint8), stored.offset)
        kind = self._kinds[stored.kind]
        rows = max(1, _AT_ONCE // ((last - first) * stored.block))
        for at in np.ndindex(out.shape[:-2]):
            before = tuple((low + i, low + i + 1) for (low, _), i in zip(outer, at, strict=True))
            for row in range(top, bottom, rows):
                among = (row, min(row + rows, bottom))
                blocks = self._file.read_box(place, (*before, among, columns))
                with np.errstate(all="ignore"):  # a scale may be infinite or not a number
                    numbers = self._quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), kind)
                out[at][among[0] - top : among[1] - top] = numbers[:, kept]
        return out.reshape(widths(box))

    def _placed(self, header: GGUFHeader) -> dict[str, _Stored]:
        """The tensors by name, inside the file and apart from one another."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**32 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {quoted(alignment)}, not a power of two")
        start = -(-header.end // alignment) * alignment
        stored: dict[str, _Stored] = {}
        for name, shape, kind, offset in header.tensors:
            if name in stored:
                raise ValueError(f"{self.path}: holds {quoted(name)} twice")
            stored[name] = self._one(name, shape, kind, start + offset)
            if offset % alignment:
                raise ValueError(f"{self.path}: {quoted(name)} lies at {offset}, no multiple of {alignment}")
        last, before = start, ""
        for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
            if tensor.offset < last:
                raise ValueError(f"{self.path}: {quoted(name)} overlaps {quoted(before)}")
            last, before = tensor.offset + math.prod(tensor.byte_shape), name
            if last > self._file.size:
                raise ValueError(
                    f"{self.path}: {quoted(name)} ends at {last} in a file of {self._file.size} bytes"
                )
        return stored

    def _one(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> _Stored:
        constants = need("gguf.constants", "reading GGUF files")
        try:
            kind = self._kinds(number)
        except ValueError:
            raise ValueError(f"{self.path}: {quoted(name)} has the unknown type {number}") from None
        if kind.name not in SUPPORTED:
            raise ValueError(
                f"{self.path}: {quoted(name)} is stored as {kind.name}: supported are {', '.join(SUPPORTED)}"
            )
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
        if 0 in shape or math.prod(shape) * 4 > MOST_BYTES:
            raise ValueError(f"{self.path}: {quoted(name)} claims the shape {quoted(shape)}")
        if (shape or (1,))[-1] % block:
            raise ValueError(
                f"{self.path}: {quoted(name)} of {kind.name} has rows of {shape}, not of {block}s"
            )
        return _Stored(kind.name, shape, block, block_bytes, offset)


def open_gguf(path: str | os.PathLike) -> GGUFTensors:
    """The tensors and the metadata of a GGUF file of version 2 or 3.

    Raises: ValueError for a file that is damaged, hostile, split or big-endian, and for a tensor of another
    type than those in `SUPPORTED`; ModuleNotFoundError without the package `gguf`.
    """
    return GGUFTensors(Path(path))
