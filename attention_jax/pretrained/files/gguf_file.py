"""Tensors and metadata of a GGUF file; quantised tensors are dequantised to float32.

The header is read here, and not by the package `gguf`: its reader trusts the counts of the file, so that an
array that claims 2**60 numbers is a loop without end. The package dequantises. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from attention_jax.optional import need
from attention_jax.pretrained.files.reading import (
    MOST_BYTES,
    Box,
    File,
    Place,
    box_of,
    quoted,
    widths,
)

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": jnp.dtype(jnp.bfloat16)}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")
SUPPORTED = (*_PLAIN, *_QUANTISED)
# Numbers that are dequantised at once.
_AT_ONCE = 2**20
# The types of metadata by their number in the file.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Least bytes of a metadata entry (key length, type, value) and a tensor (name length, rank, type, offset).
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24


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
            header = _Header(opened, path, self._file.size)
            self.metadata: Mapping[str, Any] = header.metadata
            self._stored = header.stored

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


def open_gguf(path: str | os.PathLike) -> GGUFTensors:
    """The tensors and the metadata of a GGUF file of version 2 or 3.

    Raises: ValueError for a file that is damaged, hostile, split or big-endian, and for a tensor of another
    type than those in `SUPPORTED`; ModuleNotFoundError without the package `gguf`.
    """
    return GGUFTensors(Path(path))


class _Header:
    """The parsed header; lengths are compared with the bytes that are left before anything is allocated."""

    def __init__(self, opened: BinaryIO, path: Path, size: int):
        self._opened, self._path, self._left, self._size = opened, path, size, size
        if self._left < 24 or self._take(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        version = self._number("I")
        if version and not version & 0xFFFF:
            raise ValueError(f"{path}: a big-endian GGUF file: convert it to little-endian")
        if version not in (2, 3):
            raise ValueError(
                f"{path}: GGUF version {version}, supported are 2 and 3: convert the model again"
            )
        tensors, entries = self._number("Q"), self._number("Q")
        self._check(entries, _LEAST_ENTRY, "metadata entries")
        self._check(tensors, _LEAST_TENSOR, "tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise ValueError(f"{path}: metadata has {quoted(key)} twice")
            self.metadata[key] = self._value(self._number("I"), key)
        if (self.metadata.get("split.count") or 1) != 1:
            raise ValueError(f"{path}: one part of several: merge them with llama-gguf-split --merge")
        described = [self._described() for _ in range(tensors)]
        self.stored = self._placed(described, size - self._left)

    def _check(self, count: int, least: int, what: str) -> None:
        if count * least > self._left:
            raise ValueError(f"{self._path}: claims {count} {what}, and {self._left} bytes are left")

    def _take(self, count: int) -> bytes:
        self._check(count, 1, "bytes")
        taken = self._opened.read(count)
        if len(taken) != count:
            raise ValueError(f"{self._path}: changed while it was read: open it again")
        self._left -= count
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self, what: str) -> str:
        text = self._take(self._number("Q"))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}: {what} is not UTF-8: {quoted(text)}") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(quoted(key))
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"{self._path}: metadata {quoted(key)} has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._check(count, 8, f"strings in {quoted(key)}")
            return [self._string(quoted(key)) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(
                f"{self._path}: metadata {quoted(key)} is an array of the type {kind}: not supported"
            )
        width = struct.calcsize(f"<{_SCALARS[kind]}")
        self._check(count, width, f"numbers in {quoted(key)}")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * width)))

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type and offset of a tensor as the header claims them."""
        name, rank = self._string("a tensor's name"), self._number("I")
        if rank > 4:
            raise ValueError(f"{self._path}: {quoted(name)} claims {rank} axes, more than GGML's 4")
        sizes = struct.unpack(f"<{rank}Q", self._take(8 * rank))
        return name, sizes[::-1], self._number("I"), self._number("Q")

    def _placed(self, described: list, end: int) -> dict[str, _Stored]:
        """The tensors by name, inside the file and apart from one another."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**32 or alignment & (alignment - 1):
            raise ValueError(f"{self._path}: general.alignment is {quoted(alignment)}, not a power of two")
        start = -(-end // alignment) * alignment
        stored: dict[str, _Stored] = {}
        for name, shape, kind, offset in described:
            if name in stored:
                raise ValueError(f"{self._path}: holds {quoted(name)} twice")
            stored[name] = self._one(name, shape, kind, start + offset)
            if offset % alignment:
                raise ValueError(f"{self._path}: {quoted(name)} lies at {offset}, no multiple of {alignment}")
        last, before = start, ""
        for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
            if tensor.offset < last:
                raise ValueError(f"{self._path}: {quoted(name)} overlaps {quoted(before)}")
            last, before = tensor.offset + math.prod(tensor.byte_shape), name
            if last > self._size:
                raise ValueError(
                    f"{self._path}: {quoted(name)} ends at {last} in a file of {self._size} bytes"
                )
        return stored

    def _one(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> _Stored:
        constants = need("gguf.constants", "reading GGUF files")
        try:
            kind = constants.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{self._path}: {quoted(name)} has the unknown type {number}") from None
        if kind.name not in SUPPORTED:
            raise ValueError(
                f"{self._path}: {quoted(name)} is stored as {kind.name}: supported are {', '.join(SUPPORTED)}"
            )
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
        if 0 in shape or math.prod(shape) * 4 > MOST_BYTES:
            raise ValueError(f"{self._path}: {quoted(name)} claims the shape {quoted(shape)}")
        if (shape or (1,))[-1] % block:
            raise ValueError(
                f"{self._path}: {quoted(name)} of {kind.name} has rows of {shape}, not of {block}s"
            )
        return _Stored(kind.name, shape, block, block_bytes, offset)
