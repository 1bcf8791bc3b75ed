"""The metadata of a GGUF file, read with every count checked against the file's size.

`gguf.GGUFReader` maps the tensors too and believes the counts in the header: a damaged one costs all memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.optional import need

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | Path, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """The metadata of a GGUF file by key: numbers, strings, lists of strings, NumPy arrays of numbers.

    wanted: which keys are returned; the others are skipped. Raises: ValueError of one line for a file that is
    damaged, of another format or version.
    """
    path = Path(path)
    try:
        if not path.is_file() or not path.stat().st_size:  # an empty file cannot be mapped
            raise ValueError(f"{path}: {'no GGUF file: it is empty' if path.is_file() else 'no such file'}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, path).read(wanted)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


class _Header:
    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path, self._place = data, path, 0

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        gguf = need("gguf", "reading a GGUF file")
        magic, version = self._numbers("<II") if len(self._data) >= 8 else (0, 0)
        if magic != gguf.GGUF_MAGIC:
            raise self._damaged("no GGUF file")
        if version not in (2, 3):
            raise self._damaged(f"GGUF version {version} is not supported: 2 and 3 are, little-endian")
        _, count = self._numbers("<QQ")
        self._check("metadata keys", count, 13)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            (kind,) = self._numbers("<I")
            value = self._value(key, kind)
            if key in found:
                raise self._damaged(f"the metadata key {key[:60]!r} is there twice")
            found[key] = value if wanted(key) else None
        return {key: value for key, value in found.items() if wanted(key)}

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._numbers("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"the metadata key {key[:60]!r} has the unknown type {kind}")
        item, count = self._numbers("<IQ")
        if item == _STRING:
            self._check(f"strings of {key[:60]!r}", count, 8)
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:
            raise self._damaged(f"the metadata key {key[:60]!r} is an array of type {item}")
        dtype = np.dtype("<" + _SCALARS[item] if _SCALARS[item] != "?" else "?")
        self._check(f"numbers of {key[:60]!r}", count, dtype.itemsize)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _string(self) -> str:
        (size,) = self._numbers("<Q")
        self._check("bytes of a string", size, 1)
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise self._damaged("a string of its metadata is not UTF-8") from None

    def _numbers(self, form: str) -> tuple:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, size: int) -> bytes:
        part = self._data[self._place : self._place + size]
        if len(part) < size:
            raise self._damaged("it ends within its metadata")
        self._place += size
        return part

    def _check(self, what: str, count: int, size: int) -> None:
        if count * size > len(self._data) - self._place:
            raise self._damaged(f"it claims {count} {what}, more than its {len(self._data)} bytes hold")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}"[:190])
