"""What every file of tensors offers, and how parts of one are read.

Bytes are read with `preadv` into the array that is returned. With a memory map every page that was touched
counts as this process's memory, and a file that shrinks ends the process.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from attention_jax.hints import quoted

# A shorter contiguous run is read together with what lies beside it: one call costs as much as a page.
_PAGE = 4096
# Bytes that are read at once where only a part of them is kept.
_AT_ONCE = 2**24
# JSON of a header or an index: the limit of the safetensors format.
MOST_JSON = 100_000_000
# numpy counts bytes in a signed 64-bit number.
MOST_BYTES = 2**63 - 1
_LFS = b"version https://git-lfs"


class Tensors(Protocol):
    """Named tensors in files; opening reads headers only, and every read is one tensor or less.

    `metadata` is what the files say beside their tensors, in values of JSON. An unknown name is a ValueError.
    """

    metadata: Mapping[str, Any]

    def names(self) -> list[str]:
        """The names, in the files' order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives: the stored one, or float32 for quantised tensors."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, a new array."""
        ...

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]`, a new array. Bytes outside of the index are mostly not read.

        index: one slice without a step per axis, from the first axis on; axes without one are read whole.
        """
        ...


class Place(NamedTuple):
    """Where a tensor of plain numbers lies in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


Box = tuple[tuple[int, int], ...]


def box_of(shape: tuple[int, ...], index: slice | tuple[slice, ...]) -> Box:
    """(start, stop) of every axis of a tensor, from an index of slices."""
    slices = index if isinstance(index, tuple) else (index,)
    if len(slices) > len(shape):
        raise ValueError(f"read_slice: {len(slices)} slices for shape {shape}: give at most one per axis")
    for part in slices:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(
                f"read_slice: index {quoted(part)} is not a slice without a step: slice the result"
            )
    bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=False)]
    whole = [(0, size) for size in shape[len(slices) :]]
    return (*((start, max(start, stop)) for start, stop in bounds), *whole)


def widths(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


class File:
    """A regular file that is opened for each read; a read of a file that has changed is a ValueError."""

    def __init__(self, path: Path):
        self.path = path
        # Before it is opened: opening a pipe waits for its writer.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: not a file")
        self.size, self._identity = found.st_size, self._identify(found)
        if self.size >= len(_LFS) and self.read_bytes(0, len(_LFS)) == _LFS:
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself: run git lfs pull")

    @staticmethod
    def _identify(found: os.stat_result) -> tuple[int, ...]:
        return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev

    def read_bytes(self, offset: int, size: int) -> bytes:
        """Bytes of the file; the caller has compared offset and size with `self.size`."""
        out = np.empty(size, np.uint8)
        self.read_into([(out, offset)])
        return out.tobytes()

    def read_into(self, parts: Iterable[tuple[np.ndarray, int]]) -> None:
        """Fill contiguous arrays from the file's bytes at their offsets."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if self._identify(os.fstat(descriptor)) != self._identity:
                raise ValueError(f"{self.path}: changed since it was opened: open it again")
            for out, offset in parts:
                view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                    if not count:
                        raise ValueError(
                            f"{self.path}: ends at {offset + done}, read to {offset + len(view)}"
                        )
                    done += count
        finally:
            os.close(descriptor)

    def read_box(self, place: Place, box: Box) -> np.ndarray:
        """A box of a tensor in C order, read in contiguous runs of at least a page where there are such."""
        shape, dtype, offset = place
        size = widths(box)
        if not shape or 0 in size:
            out = np.empty(size, dtype)
            if not shape:
                self.read_into([(out, offset)])
            return out
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        # Axes after `axis` are read whole, so that its range is one run.
        axis = max((a for a in range(len(shape)) if size[a] != shape[a]), default=0)
        while axis > 0 and size[axis] * strides[axis] * dtype.itemsize < _PAGE:
            axis -= 1
        out, kept = np.empty(size, dtype), tuple(slice(*each) for each in box[axis + 1 :])
        direct = size[axis + 1 :] == shape[axis + 1 :]
        rows = size[axis] if direct else max(1, _AT_ONCE // (strides[axis] * dtype.itemsize))

        def parts() -> Iterator[tuple[np.ndarray, int]]:
            for outer in np.ndindex(*size[:axis]):
                for row in range(0, size[axis], rows):
                    part = out[outer][row : row + rows]
                    at = [start + more for (start, _), more in zip(box, (*outer, row), strict=False)]
                    first = sum(map(int.__mul__, at, strides))
                    read = part if direct else np.empty((len(part), *shape[axis + 1 :]), dtype)
                    yield read, offset + first * dtype.itemsize
                    if not direct:
                        part[...] = read[(slice(None), *kept)]

        self.read_into(parts())
        return out


def read_json(file: File, offset: int, size: int, what: str) -> dict[str, Any]:
    """A JSON object in a file; ValueError for repeated keys, NaN, and everything that is no object."""
    if size > MOST_JSON:
        raise ValueError(f"{file.path}: {what} of {size} bytes, more than {MOST_JSON}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{file.path}: {what} has {quoted(key)} twice")
            found[key] = value
        return found

    def no_number(text: str) -> Any:
        raise ValueError(f"{file.path}: {what} holds {text}, which is not JSON")

    text = file.read_bytes(offset, size)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{file.path}: {what} is not JSON in UTF-8: the file is damaged") from None
    except ValueError as error:
        if str(error).startswith(f"{file.path}: "):
            raise
        raise ValueError(f"{file.path}: {what} holds a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.path}: {what} is not a JSON object")
    return value


# Names of dtypes in safetensors files. Types of less than a byte (F4, F6) are not read.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    **{f"{kind.upper()}{8 * n}": np.dtype(f"<{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "F8_E8M0": jnp.dtype(jnp.float8_e8m0fnu),
}
