"""The corpus: which files are read, which part of them is held out, and their hash.

The default corpus is the source of the Python standard library, read where it stands: about 12 MB on every
machine with Python. A document is a file.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import math
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its name relative to the corpus; the name decides whether it is held out."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order of their names."""

    source: str
    documents: tuple[Document, ...]
    skipped: int  # files without a character, or, in the standard library, not UTF-8

    def sha256(self) -> str:
        """SHA-256 of all names and contents, each preceded by its length."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name.encode("utf-8", "surrogateescape"), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()


def read(files: str | None) -> Corpus:
    """The corpus of a glob, or the standard library's for None.

    ValueError in one line: no match, a folder, unreadable, not UTF-8 (file and byte), empty.
    """
    return _standard_library() if files is None else _matching(files)


def split(corpus: Corpus, how: str, fraction: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(training, held-out) documents, the same ones on every machine with the same corpus.

    files: whole documents in the order of the SHA-256 of their names, each one taken that brings the
      held-out bytes closer to the fraction; those above a quarter of the held-out bytes only if the others
      do not suffice; at least one, and never all. An only document is split as by tail.
    tail: of the n concatenated characters, the first int((1 - fraction) n) train, the others are held out;
      the document in which the cut falls is split.
    """
    if how == "files" and len(corpus.documents) > 1:
        return _split_files(corpus.documents, fraction)
    return _split_tail(corpus.documents, fraction)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    documents, skipped = [], 0
    for path in sorted(_sources(root), key=lambda p: p.relative_to(root).as_posix()):
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            text = ""
        if text:
            documents.append(Document(path.relative_to(root).as_posix(), text))
        else:
            skipped += 1
    if not documents:
        raise ValueError(f"no Python source below {root}: set data.files to a glob of text files")
    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus(f"standard library of Python {version}", tuple(documents), skipped)


def _sources(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _matching(files: str) -> Corpus:
    pattern = os.path.expanduser(files)
    matches = sorted(set(glob.glob(pattern, recursive=True)))
    paths = [path for path in matches if not os.path.isdir(path)]
    if not paths:
        if matches:
            raise ValueError(f"data.files={files} is a folder: name its files, such as {files}/**/*.txt")
        raise ValueError(f"data.files={files} matches no file in {os.getcwd()}")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    texts = {os.path.relpath(os.path.abspath(path), root): _text(path) for path in paths}
    documents = tuple(Document(name, text) for name, text in sorted(texts.items()) if text)
    if not documents:
        what = paths[0] if len(paths) == 1 else f"every one of the {len(paths)} files of {files}"
        raise ValueError(f"data.files: {what} is empty")
    return Corpus(files, documents, len(paths) - len(documents))


def _text(path: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.files: {path} is not UTF-8 at byte {error.start} (0x{raw[error.start]:02x})"
        ) from None


def _split_files(documents: Sequence[Document], fraction: float):
    sizes = {document.name: len(document.text.encode()) for document in documents}
    target = fraction * sum(sizes.values())
    by_hash = sorted(sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    held: set[str] = set()
    held_bytes = 0
    for largest in (target / 4, math.inf):  # big files second: none should dominate the held-out loss
        for name in by_hash:
            closer = sizes[name] <= largest and held_bytes + sizes[name] / 2 < target
            if closer and name not in held and len(held) + 1 < len(documents):
                held.add(name)
                held_bytes += sizes[name]
    held = held or {min(by_hash, key=sizes.__getitem__)}
    return (
        tuple(document for document in documents if document.name not in held),
        tuple(document for document in documents if document.name in held),
    )


def _split_tail(documents: Sequence[Document], fraction: float):
    total = sum(len(document.text) for document in documents)
    room = int(total * round(1 - fraction, 12))  # 1 - 0.9 falls short of 0.1
    train, held = [], []
    for document in documents:
        cut = min(room, len(document.text))
        room -= cut
        for part, text in ((train, document.text[:cut]), (held, document.text[cut:])):
            if text:
                part.append(Document(document.name, text))
    return tuple(train), tuple(held)
