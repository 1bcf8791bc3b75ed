"""Tensors of a Hugging Face folder: model.safetensors, or model.safetensors.index.json and its shards.

Every header is checked whole before anything of it is used: https://huggingface.co/docs/safetensors.
Pickled weights are never read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.hints import quoted
from attention_jax.pretrained.files.reading import (
    DTYPES,
    MOST_BYTES,
    MOST_JSON,
    File,
    Place,
    box_of,
    read_json,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsTensors:
    """The tensors of one safetensors file, or of the shards of a folder; see `Tensors`."""

    def __init__(self, path: Path, shards: list[File], index: Mapping[str, str] | None, metadata: dict):
        self.path = path
        self._places: dict[str, tuple[File, Place]] = {}
        found = []
        for shard in shards:
            places, notes = read_header(shard)
            found.append(notes)
            for name, place in places.items():
                if index is not None and index.get(name) != shard.path.name:
                    other = quoted(index[name]) if name in index else "no shard"
                    raise ValueError(f"{shard.path}: holds {quoted(name)}, for which the index names {other}")
                self._places[name] = (shard, place)
        for name, shard_name in (index or {}).items():
            if name not in self._places:
                raise ValueError(f"{path / shard_name}: lacks {quoted(name)}, which the index places there")
        # A shard's own notes say nothing of the whole.
        agreed = {
            key: value for key, value in found[0].items() if all(notes.get(key) == value for notes in found)
        }
        self.metadata: Mapping[str, Any] = {**metadata, **agreed}

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> np.dtype:
        return self._find(name)[1].dtype

    def read(self, name: str) -> np.ndarray:
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        file, place = self._find(name)
        return file.read_box(place, box_of(place.shape, index))

    def _find(self, name: str) -> tuple[File, Place]:
        if name not in self._places:
            raise ValueError(f"{self.path}: no tensor {quoted(name)}: names() lists {len(self._places)}")
        return self._places[name]


def open_folder(folder: str | os.PathLike) -> SafetensorsTensors:
    """The tensors of a folder with model.safetensors, or with an index and its shards.

    A shard lies in the folder itself. A symbolic link may lead elsewhere only in the hub's own cache, from
    `snapshots/REVISION` to `blobs` beside `snapshots`.

    Raises: ValueError for a file that is missing, damaged, hostile or pickled, and for an index that does not
    agree with its shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    single, index = (os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    if single and index:
        raise ValueError(f"{folder}: has both {SINGLE} and {INDEX}: remove the one that is outdated")
    if single:
        return SafetensorsTensors(folder, [_shard(folder, SINGLE)], None, {})
    if not index:
        raise ValueError(f"{folder}: {_instead(folder)}")
    weights, metadata = _index(_shard(folder, INDEX))
    shards = [_shard(folder, name) for name in sorted(set(weights.values()))]
    return SafetensorsTensors(folder, shards, weights, metadata)


def open_safetensors(path: str | os.PathLike) -> SafetensorsTensors:
    """The tensors of one safetensors file, whatever its name."""
    return SafetensorsTensors(Path(path), [File(Path(path))], None, {})


def read_folder_json(folder: str | os.PathLike, name: str) -> dict[str, Any]:
    """The object of a folder's JSON file (config.json); links, repeated keys and size are checked."""
    file = _shard(Path(folder), name)
    return read_json(file, 0, file.size, name)


def _instead(folder: Path) -> str:
    """Why a folder without safetensors cannot be read, and what to do."""
    names = sorted(os.listdir(folder))
    missing = f"has neither {SINGLE} nor {INDEX}"
    for name in names:
        if name.endswith(_PICKLES):
            return f"{missing}, only {quoted(name)}, and pickles are not read: convert it to safetensors"
    for name in names:
        if name.endswith((".gguf", ".safetensors")):
            return f"{missing}: open its file {quoted(name)} by name"
    return missing


def _shard(folder: Path, name: str) -> File:
    """A file of a folder, ValueError where it is missing or a link leaves the folder."""
    path, home = folder / name, folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ValueError(f"{path}: no such file: download it again") from None
    caches = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if target.parent not in (home, *caches):
        raise ValueError(
            f"{path}: a link to {quoted(str(target))}, outside of the folder: copy the file here"
        )
    return File(path)


def _index(file: File) -> tuple[dict[str, str], dict[str, Any]]:
    """Tensor name to shard name, and the metadata, of an index."""
    index = read_json(file, 0, file.size, "the index")
    weights, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weights, dict) or not weights or not isinstance(metadata, dict):
        raise ValueError(f"{file.path}: the index has no weight_map from tensors to shards")
    for name, shard in weights.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise ValueError(
                f"{file.path}: {quoted(name)} lies in {quoted(shard)}: expected a .safetensors of the folder"
            )
    return weights, metadata


def _is_plain(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & {"/", "\\", ":"}
    )


def read_header(file: File) -> tuple[dict[str, Place], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises: ValueError unless the tensors cover the bytes after the header exactly, without gaps or overlaps.
    """
    path = file.path
    if file.size < 8:
        raise ValueError(f"{path}: {file.size} bytes are no safetensors file: download it again")
    length = int.from_bytes(file.read_bytes(0, 8), "little")
    if length > min(file.size - 8, MOST_JSON):
        raise ValueError(f"{path}: claims a header of {length} bytes in a file of {file.size}")
    header = read_json(file, 8, length, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: the header's __metadata__ is not of strings")
    start, end = 8 + length, 0
    places = {}
    entries = [(name, *_entry(path, name, entry)) for name, entry in header.items()]
    # An empty tensor lies before the one that begins at the same byte.
    for name, shape, dtype, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
        if begin != end:
            what = "overlaps another tensor" if begin < end else f"leaves a gap after byte {end}"
            raise ValueError(f"{path}: {quoted(name)} {what}")
        if stop > file.size - start:
            raise ValueError(f"{path}: {quoted(name)} ends at {start + stop} in a file of {file.size} bytes")
        places[name], end = Place(shape, dtype, start + begin), stop
    if end != file.size - start:
        raise ValueError(f"{path}: {file.size - start - end} bytes at its end belong to no tensor")
    return places, metadata


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, first byte and end of a tensor as its header claims them, consistent with one another."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {quoted(name)} is not described by dtype, shape and data_offsets")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in DTYPES:
        raise ValueError(f"{path}: {quoted(name)} has dtype {quoted(stored)}: known are {', '.join(DTYPES)}")
    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: shape and data_offsets of {quoted(name)} are not lists of counts")
    dtype, (begin, stop) = DTYPES[stored], offsets
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) * dtype.itemsize > MOST_BYTES:
        raise ValueError(f"{path}: {quoted(name)} claims the shape {quoted(shape)}")
    if stop - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: {quoted(name)} of shape {quoted(shape)} has {stop - begin} bytes")
    return tuple(shape), dtype, begin, stop
