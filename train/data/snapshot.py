"""The tokenised corpus in a run folder, so that a resumed run reads the same text as the first start.

    data/
      train.npy, validation.npy              token ids, in the smallest type that holds the vocabulary
      train_spans.npy, validation_spans.npy  int64 [2, D]: first token and number of pairs of each document
      *_sources.npy, *_sources_spans.npy     objective seq2seq: the sources' tokens; the first one and the
                                             number of each. Its documents above are the targets, one by one.
      tokenizer.json
      meta.json                              where it came from, sizes, and the SHA-256 of every other file

The folder is written under another name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax import tokenizers
from train.data.corpus import Document
from train.data.packing import Split
from train.run.files import digests, exists, sha256, whole_folder, write_json

FORMAT = 1
_SPLITS = ("train", "validation")
_SOURCES = ("train_sources", "validation_sources")
#: Every name that a snapshot's folder may hold.
FILES = {"tokenizer.json", "meta.json", ".meta.json.tmp"} | {
    f"{name}{part}.npy" for name in (*_SPLITS, *_SOURCES) for part in ("", "_spans")
}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of the folder; the token arrays are memory-mapped."""

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
    """The documents concatenated, with an end-of-document token before each and after the last.

    A document of n tokens has n + 1 pairs: the token before it predicts its first token, its last token
    predicts the next end of document. A tokenizer without that token gives n - 1 pairs, and the first token
    is never predicted.
    """
    boundary = tokenizer.end_of_document
    parts = [tokenizer.encode(document.text) for document in documents]
    lengths = np.array([part.size for part in parts], np.int64)
    extra = int(boundary is not None)
    starts = np.cumsum(lengths + extra) - lengths - extra
    tokens = np.empty(int(lengths.sum()) + (len(parts) + 1) * extra, token_type(tokenizer.vocab_size))
    for part, start in zip(parts, starts.tolist(), strict=True):
        if extra:
            tokens[start] = boundary
        assert _known(part, tokenizer), "ids outside the vocabulary"
        tokens[start + extra : start + extra + part.size] = part
    if extra:
        tokens[-1] = boundary
    return Split(tokens, starts, lengths + 2 * extra - 1)


def encode_sources(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> Split:
    """The texts concatenated, without end-of-document tokens; `counts` are their numbers of tokens."""
    parts = [tokenizer.encode(text) for text in texts]
    counts = np.array([part.size for part in parts], np.int64)
    tokens = np.concatenate(parts or [np.empty(0, np.int32)])
    assert _known(tokens, tokenizer), "ids outside the vocabulary"
    return Split(tokens.astype(token_type(tokenizer.vocab_size)), np.cumsum(counts) - counts, counts)


def _known(ids: np.ndarray, tokenizer: tokenizers.Tokenizer) -> bool:
    return ids.min(initial=0) >= 0 and ids.max(initial=0) < tokenizer.vocab_size


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write the folder, completely or not at all; `meta` gets the hashes."""
    with whole_folder(folder) as temporary:
        for name in (*_SPLITS, *_SOURCES):
            split = getattr(snapshot, name)
            if split is not None:
                _save(temporary / f"{name}.npy", split.tokens)
                _save(temporary / f"{name}_spans.npy", np.stack([split.starts, split.counts]))
        (temporary / "tokenizer.json").write_text(tokenizers.dumps(snapshot.tokenizer))
        meta = {"format": FORMAT, **snapshot.meta, "sha256": digests(temporary, sync=True)}
        meta["sha256_of_this"] = _sha256_of_meta(meta)
        write_json(temporary / "meta.json", meta)


def _save(path: Path, array: np.ndarray) -> None:
    """`np.save`, which to a file of the operating system writes by itself and then hides what it answers."""
    with open(path, "wb") as file:
        np.save(types.SimpleNamespace(write=file.write), array)


def check_corpus(run_dir: Path, snapshot: Snapshot) -> None:
    """ValueError if a run that has lost its snapshot was begun with another corpus than this new one's."""
    path = run_dir / "run.json"
    if exists(path):
        saved = json.loads(path.read_bytes()).get("corpus_sha256")
        if saved != snapshot.meta["corpus_sha256"]:
            raise ValueError(
                f"{run_dir / 'data'} is missing, and the corpus is not the one that the run began with: its"
                f" sha256 was {str(saved)[:16]}, is {snapshot.meta['corpus_sha256'][:16]}: restore the folder"
                " from a copy, or choose another run_dir"
            )


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, str]:
    """The verified tokenizer, and the SHA-256 of the corpus; ValueError as of `read`."""
    meta = _read_meta(folder / "meta.json")
    _verify(folder / "tokenizer.json", meta)
    return tokenizers.load(folder / "tokenizer.json"), meta["corpus_sha256"]


def read(folder: Path) -> Snapshot:
    """The verified snapshot. ValueError in one line names a file that is missing or damaged."""
    meta = _read_meta(folder / "meta.json")
    names = [name for name in (*_SPLITS, *_SOURCES) if f"{name}.npy" in meta["sha256"]]
    for name in [*(f"{name}{part}.npy" for name in names for part in ("", "_spans")), "tokenizer.json"]:
        _verify(folder / name, meta)
    splits = {}
    for name in names:
        # np.asarray: a plain view of the mapped file, which slices faster than np.memmap.
        tokens = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        splits[name] = Split(tokens, *np.load(folder / f"{name}_spans.npy"))
    return Snapshot(tokenizers.load(folder / "tokenizer.json"), meta=meta, **splits)


def _verify(path: Path, meta: dict[str, Any]) -> None:
    """ValueError if a file is missing, cannot be read or differs from its hash in meta.json."""
    try:
        intact = sha256(path) == meta["sha256"][path.name]
    except OSError as error:
        raise _unreadable(path, error) from None
    except KeyError:
        intact = False
    if not intact:
        raise _damaged(path, "is damaged: its SHA-256 is not the one in meta.json")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        stored = meta.pop("sha256_of_this")
        intact = stored == _sha256_of_meta(meta)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _damaged(path, "is damaged")
    if meta["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {meta['format']}, this version reads {FORMAT}: choose another run_dir"
        )
    return meta


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} {what}; restore the folder {path.parent} from a copy, or choose another run_dir"
    )


def _unreadable(path: Path, error: OSError) -> ValueError:
    if isinstance(error, FileNotFoundError) and not path.is_symlink():
        return _damaged(path, f"cannot be read: {error.strerror}")
    return ValueError(
        f"{path} cannot be read: {error.strerror}; it may be sound: mount it or correct its permissions"
    )


def _sha256_of_meta(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
