"""The header of a GGUF file: its metadata and what it says of its tensors.

It is read here, and not by the package `gguf`: its reader trusts the counts of the file, so that an array
that claims 2**60 numbers is a loop without end. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from attention_jax.hints import quoted

# The types of metadata by their number in the file.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Least bytes of a metadata entry (key length, type, value) and a tensor (name length, rank, type, offset).
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24


class Described(NamedTuple):
    """A tensor as the header claims it. shape: in the order of NumPy, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a GGUF file by key: numbers, strings, booleans, and lists of them.

    Raises: ValueError of one line for a file that is damaged, or of another format or version.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with path.open("rb") as opened:
            return GGUFHeader(opened, path, path.stat().st_size).metadata
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


class GGUFHeader:
    """The parsed header; lengths are compared with the bytes that are left before anything is allocated.

    metadata: by key. tensors: in the file's order. end: the place behind the header.
    """

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
        self.tensors = [self._described() for _ in range(tensors)]
        self.end = size - self._left

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

    def _described(self) -> Described:
        name, rank = self._string("a tensor's name"), self._number("I")
        if rank > 4:
            raise ValueError(f"{self._path}: {quoted(name)} claims {rank} axes, more than GGML's 4")
        sizes = struct.unpack(f"<{rank}Q", self._take(8 * rank))
        return Described(name, sizes[::-1], self._number("I"), self._number("Q"))
