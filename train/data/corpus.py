"""The corpus: which files are read, which part of them is held out, and their hash.

The default corpus is the source of the Python standard library, read where it stands: about 12 MB on every
machine with Python. A document is a file.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import math
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_STANDARD_LIBRARY = "standard library"

_DECOMPRESS = "decompress it first"
_CONVERT = "write its texts to a .txt file first (objective seq2seq: lines source<TAB>target)"
# Files whose bytes are not the text that they hold: what they are, and what to do.
_FORMATS = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".lz4", ".br"), ("compressed", _DECOMPRESS)),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), ("an archive", "unpack it first")),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), ("JSON", _CONVERT + ", such as by jq -r .text")),
    **dict.fromkeys((".csv", ".xlsx", ".xls", ".ods"), ("a table", _CONVERT)),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro"), ("a table", _CONVERT)),
    **dict.fromkeys((".tfrecord", ".array_record", ".sqlite", ".db", ".lmdb"), ("a database", _CONVERT)),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".bin", ".pt", ".pkl"), ("binary", _CONVERT)),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"), ("a typeset document", _CONVERT)),
}
_KINDS = {
    stat.S_ISFIFO: "a FIFO (a pipe)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


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

    def notes(self) -> list[str]:
        """What a user's files hold, or lack, that may surprise; files are read as they stand."""
        if self.source.startswith(_STANDARD_LIBRARY):
            return []
        marked = sum(document.text.startswith("\ufeff") for document in self.documents)
        crlf = sum("\r\n" in document.text for document in self.documents)
        found = {
            "empty, skipped": self.skipped,
            "start with a byte order mark (U+FEFF), which is kept": marked,
            "have CRLF line ends": crlf,
        }
        files = len(self.documents) + self.skipped
        return [f"{count} of {files} files: {what}" for what, count in found.items() if count]


def read(files: str | None) -> Corpus:
    """The corpus of a glob, or the standard library's for None.

    A name that exists is that file, also with characters of a glob, such as a[1].txt.
    ValueError in one line: no match, not a regular file, a format that is not plain text (by its suffix),
    unreadable, not UTF-8 (file and byte), a NUL byte, empty.
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
    return Corpus(f"{_STANDARD_LIBRARY} of Python {version}", tuple(documents), skipped)


def _sources(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _matching(files: str) -> Corpus:
    paths = _paths(files)
    for path in paths:
        _check_kind(path)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    texts = {os.path.relpath(os.path.abspath(path), root): _text(path) for path in paths}
    documents = tuple(Document(name, text) for name, text in sorted(texts.items()) if text)
    if not documents:
        what = paths[0] if len(paths) == 1 else f"every one of the {len(paths)} files of {files}"
        raise ValueError(f"data.files: {what} is empty")
    return Corpus(files, documents, len(paths) - len(documents))


def _paths(files: str) -> list[str]:
    """The files of a glob, without folders; ValueError if there are none."""
    pattern = os.path.expanduser(files)
    if os.path.lexists(pattern):
        matches = [pattern]
    else:
        matches = sorted(set(glob.glob(pattern, recursive=True)))
    paths = [path for path in matches if not os.path.isdir(path)]
    if not paths:
        if matches:
            what = "is a folder" if matches == [pattern] else "matches folders only"
            inside = os.path.join(files, "**", "*.txt")
            raise ValueError(f"data.files={files} {what}: name its files, such as {inside}")
        for folder in (Path(pattern), *Path(pattern).parents):
            if os.path.islink(folder) and not os.path.exists(folder):
                raise ValueError(
                    f"data.files={files}: {folder} is a link to {os.readlink(folder)}, which does not exist"
                )
        raise ValueError(f"data.files={files} matches no file in {os.getcwd()}")
    return paths


def _check_kind(path: str) -> None:
    """ValueError for what is not a regular file (reading a FIFO would wait forever), or is not text."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        link = path.rstrip("/")
        if os.path.islink(link):
            raise ValueError(
                f"data.files: {link} is a link to {os.readlink(link)}, which does not exist: repair it"
            ) from None
        raise ValueError(f"data.files: {path} does not exist any more") from None
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "not a regular file")
        raise ValueError(f"data.files: {path} is {kind}: write its text to a file first")
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _FORMATS:
        kind, remedy = _FORMATS[suffix]
        plain = kind == "JSON" or suffix == ".csv"
        raise ValueError(
            f"data.files: {path} is {kind} by its suffix {suffix}, and files are read as plain text: {remedy}"
            + (f"; or, to train on it as it stands, name it {os.path.basename(path)}.txt" if plain else "")
        )


def _text(path: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path}: {error.strerror}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError(
            f"data.files: {path} is UTF-16 or UTF-32 by its byte order mark: convert it, such as by "
            "iconv -f UTF-16 -t UTF-8"
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.files: {path} is not UTF-8 at byte {error.start} (0x{raw[error.start]:02x}): convert it, "
            "such as by iconv -f LATIN1 -t UTF-8"
        ) from None
    if (place := raw.find(0)) >= 0:
        raise ValueError(f"data.files: {path} has a NUL byte at byte {place}: it is not text; leave it out")
    return text


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
