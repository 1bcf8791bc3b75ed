"""Safetensors files written tensor by tensor, and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from attention_jax.disk import allow_as_usual, sync_to_disk
from attention_jax.hints import quoted
from attention_jax.pretrained.files.hugging_face import INDEX, SINGLE
from attention_jax.pretrained.files.reading import DTYPES, MOST_JSON

_STORED = {dtype: stored for stored, dtype in DTYPES.items()}
# Bytes of an array that are made contiguous at once.
_AT_ONCE = 2**24


class Spec(Protocol):
    """Shape and dtype of an array to come, such as `jax.ShapeDtypeStruct`."""

    shape: tuple[int, ...]
    dtype: Any


class _Slot(NamedTuple):
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes that name when the block ends, and goes if it raises.

    Raises: ValueError where `path` is something else than an empty folder, which is not changed.
    """
    path = Path(path)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists already: choose another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        allow_as_usual(temporary)
        yield temporary
        sync_to_disk(temporary)
        # Replaces an empty folder, and fails on one that has been filled since.
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_to_disk(path.parent)


def write_safetensors(
    folder: str | os.PathLike,
    specs: Mapping[str, Spec],
    arrays: Iterable[tuple[str, Any]],
    *,
    shard_size: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write model.safetensors, or shards and their index, as transformers does; one array is held at a time.

    The files take their names when all of them are complete, the index last. An error leaves the folder as it
    was.

    Args:
      folder: made if missing. One that holds weights already is refused.
      specs: names to shapes and dtypes of all tensors, in the order of the shards.
      arrays: (name, NumPy or JAX array) in any order, each name once. Bits are written as they are: another
        dtype or shape than the spec's is refused, not converted.
      shard_size: the most bytes of a shard; a larger tensor has a shard of its own.
      metadata: strings of the header; {"format": "pt"}, which transformers expects, unless given.
    """
    folder = Path(folder)
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"write_safetensors: shard_size must be a count of bytes, got {shard_size!r}")
    shards = _shards(specs, shard_size)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(os.listdir(folder)):
        if name == INDEX or name.endswith(".safetensors"):
            raise ValueError(f"{folder / name}: exists already: choose another folder, or remove it")
    temporary = Path(tempfile.mkdtemp(prefix=".writing.", suffix=".tmp", dir=folder))
    moved: list[Path] = []
    try:
        slots = _begin(temporary, shards, dict(metadata or {"format": "pt"}))
        _fill(slots, arrays)
        paths = sorted({slot.path for slot in slots.values()})
        if len(paths) > 1:
            paths.append(_write_index(temporary / INDEX, slots))
        for path in paths:
            sync_to_disk(path)
        for path in paths:
            os.rename(path, folder / path.name)
            moved.append(folder / path.name)
        temporary.rmdir()
        sync_to_disk(folder)
    except BaseException:
        for path in reversed(moved):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder if made else temporary, ignore_errors=True)
        raise


def _shards(specs: Mapping[str, Spec], shard_size: int) -> list[dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """Checked shapes and dtypes by name, of one shard after the other."""
    if not specs:
        raise ValueError("write_safetensors: no tensors")
    shards: list[dict] = [{}]
    size = 0
    for name, spec in specs.items():
        if not isinstance(name, str) or name in ("", "__metadata__") or not _is_text(name):
            raise ValueError(f"write_safetensors: {quoted(name)} cannot be the name of a tensor")
        shape, dtype = tuple(map(int, spec.shape)), np.dtype(spec.dtype)
        if dtype not in _STORED:
            raise ValueError(
                f"write_safetensors: {quoted(name)} has dtype {dtype}: cast it to {', '.join(DTYPES)}"
            )
        more = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + more > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += more
    return shards


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _begin(folder: Path, shards: list[dict], metadata: dict[str, str]) -> dict[str, _Slot]:
    """Write the headers, and say where each tensor's bytes go."""
    slots: dict[str, _Slot] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        # Wide dtypes first: then every tensor begins at a multiple of its item size, which readers rely on.
        for tensor, (shape, dtype) in sorted(shard.items(), key=lambda item: -item[1][1].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[tensor] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MOST_JSON:
            raise ValueError(f"write_safetensors: a header of {len(text)} bytes: use a smaller shard_size")
        with open(folder / name, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for tensor, (shape, dtype) in shard.items():
            offset = 8 + len(text) + header[tensor]["data_offsets"][0]
            slots[tensor] = _Slot(folder / name, offset, shape, dtype)
    return slots


def _fill(slots: Mapping[str, _Slot], arrays: Iterable[tuple[str, Any]]) -> None:
    """Write every array to its place; ValueError unless each comes once, as it was announced."""
    written = set()
    for name, array in arrays:
        if name not in slots or name in written:
            problem = "came twice" if name in written else "is not among the specs"
            raise ValueError(f"write_safetensors: {quoted(name)} {problem}")
        slot = slots[name]
        if tuple(array.shape) != slot.shape or np.dtype(array.dtype) != slot.dtype:
            raise ValueError(
                f"write_safetensors: {quoted(name)} is {array.dtype}{quoted(tuple(array.shape))}, "
                f"its spec {slot.dtype}{quoted(slot.shape)}"
            )
        _write_array(slot, np.asarray(array))
        written.add(name)
        del array  # the next one may be made in its place
    if len(written) < len(slots):
        name = next(name for name in slots if name not in written)
        raise ValueError(
            f"write_safetensors: {len(slots) - len(written)} tensors did not come: {quoted(name)}"
        )


def _write_array(slot: _Slot, x: np.ndarray) -> None:
    """Write an array's bytes in C order; one that is laid out otherwise is copied a few rows at a time."""
    rows = x.reshape(1) if x.ndim == 0 else x
    whole = rows.flags.c_contiguous or not rows.size
    step = max(1, len(rows) if whole else _AT_ONCE * len(rows) // rows.nbytes)
    descriptor, offset = os.open(slot.path, os.O_WRONLY), slot.offset
    try:
        for row in range(0, len(rows), step):
            view = memoryview(np.ascontiguousarray(rows[row : row + step]).reshape(-1).view(np.uint8))
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)


def _write_index(path: Path, slots: Mapping[str, _Slot]) -> Path:
    size = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots.values())
    weights = {name: slots[name].path.name for name in sorted(slots)}
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=2) + "\n")
    return path
