"""The tokenised corpus of a run folder, so that a resume reads what the first start read.

    data/
      train.npy, validation.npy              token ids, in the smallest type that holds the vocabulary
      train_spans.npy, validation_spans.npy  int64 [2, D]: first token and number of pairs of each document
      *_sources.npy, *_sources_spans.npy     objective seq2seq: the sources' tokens; the first one and the
                                             number of each. Its documents above are the targets, one by one.
      tokenizer.json
      meta.json                              where it came from, sizes, and the SHA-256 of every other file

The folder is written under another name and renamed when complete: it is whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data import tokenizers
from train.data.corpus import Document
from train.data.packing import Split
from train.run.files import sync_folder

FORMAT = 1
_SPLITS = ("train", "validation")
_SOURCES = ("train_sources", "validation_sources")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the folder holds; the token arrays are mapped, not read."""

    tokenizer: tokenizers.Tokenizer
    train: Split
    validation: Split
    meta: dict[str, Any]
    train_sources: Split | None = None
    validation_sources: Split | None = None


def token_type(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds every id below `vocab_size`."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"a vocabulary of {vocab_size} ids exceeds the {2**31} of int32")


def encode(documents: Sequence[Document], tokenizer: tokenizers.Tokenizer) -> Split:
    """The documents end to end, a mark in front of each and one at the end where the tokenizer has one.

    With a mark a document of n tokens has n + 1 pairs: the mark in front predicts its first token, its
    last token predicts the next mark. Without, it has n - 1, and its first token is never predicted.
    """
    mark = tokenizer.end_of_document
    parts = [tokenizer.encode(document.text) for document in documents]
    lengths = np.array([part.size for part in parts], np.int64)
    marked = int(mark is not None)
    starts = np.cumsum(lengths + marked) - lengths - marked
    tokens = np.empty(int(lengths.sum()) + (len(parts) + 1) * marked, token_type(tokenizer.vocab_size))
    for part, start in zip(parts, starts.tolist(), strict=True):
        if marked:
            tokens[start] = mark
        assert part.min(initial=0) >= 0 and part.max(initial=0) < tokenizer.vocab_size
        tokens[start + marked : start + marked + part.size] = part
    if marked:
        tokens[-1] = mark
    return Split(tokens, starts, lengths + 2 * marked - 1)


def encode_sources(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> Split:
    """The texts end to end, without marks; `counts` are the numbers of their tokens."""
    parts = [tokenizer.encode(text) for text in texts]
    counts = np.array([part.size for part in parts], np.int64)
    tokens = np.concatenate(parts or [np.empty(0, np.int32)])
    assert tokens.min(initial=0) >= 0 and tokens.max(initial=0) < tokenizer.vocab_size
    return Split(tokens.astype(token_type(tokenizer.vocab_size)), np.cumsum(counts) - counts, counts)


def write(folder: Path, snapshot: Snapshot) -> None:
    """Make the folder, whole or not at all; `meta` gets the hashes."""
    temporary = folder.with_name(f"tmp.{folder.name}")
    if temporary.exists():  # left by a process that was killed
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    for name in (*_SPLITS, *_SOURCES):
        split = getattr(snapshot, name)
        if split is None:
            continue
        _write(temporary / f"{name}.npy", lambda file, a=split.tokens: np.save(file, a))
        spans = np.stack([split.starts, split.counts])
        _write(temporary / f"{name}_spans.npy", lambda file, a=spans: np.save(file, a))
    tokenizer = tokenizers.dumps(snapshot.tokenizer).encode()
    _write(temporary / "tokenizer.json", lambda file: file.write(tokenizer))
    hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    meta = {"format": FORMAT, **snapshot.meta, "sha256": hashes}
    meta["sha256_of_this"] = _sha256_of_meta(meta)
    _write(temporary / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode() + b"\n"))
    sync_folder(temporary)
    os.rename(temporary, folder)
    sync_folder(folder.parent)


def read(folder: Path) -> Snapshot:
    """The verified snapshot. ValueError in one line names a file that is missing or damaged."""
    meta = _read_meta(folder / "meta.json")
    names = [name for name in (*_SPLITS, *_SOURCES) if f"{name}.npy" in meta["sha256"]]
    for name in [*(f"{name}{part}.npy" for name in names for part in ("", "_spans")), "tokenizer.json"]:
        path = folder / name
        try:
            intact = _sha256(path) == meta["sha256"][name]
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error.strerror}") from None
        if not intact:
            raise _damaged(path, "is damaged: its SHA-256 is not the one in meta.json")
    splits = {}
    for name in names:
        # np.asarray: a plain view of the mapped file, which slices faster than np.memmap.
        tokens = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        splits[name] = Split(tokens, *np.load(folder / f"{name}_spans.npy"))
    return Snapshot(tokenizers.load(folder / "tokenizer.json"), meta=meta, **splits)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        stored = meta.pop("sha256_of_this")
        intact = stored == _sha256_of_meta(meta)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _damaged(path, "is damaged")
    if meta["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {meta['format']}, this program reads {FORMAT}: start a new run_dir"
        )
    return meta


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; restore the folder {path.parent} from a copy or start a new run_dir")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_meta(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write(path: Path, save: Any) -> None:
    with open(path, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
