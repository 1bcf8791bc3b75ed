"""Files and folders that are either old or new, never half-written, and their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = "tmp."  # a folder with such a name is not complete


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an OSError of writing names `path` if it names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; after a crash it holds the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically. NaN and infinity are refused: JSON has neither."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`with whole_folder(path) as temporary:` fills a folder that gets the name `path` when the block ends.

    A block that fails, or a process that is killed, leaves `path` as it was and a folder `tmp.NAME` beside
    it, which the next attempt deletes. The block ends with a file that holds `digests(temporary, sync=True)`:
    that call puts the other files on the disk.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    delete(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    os.rename(temporary, path)
    sync_folder(path.parent)


def delete_folder(path: Path) -> None:
    """Delete a complete folder; it gets the name of an incomplete one before its first file is deleted."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY}deleted.{path.name}")
        delete(doomed)
        os.rename(path, doomed)
        delete(doomed)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, *, sync: bool = False) -> dict[str, str]:
    """Relative name to SHA-256 of every file below, sorted; OSError at a link.

    sync: wait until the files and the folder's entries have reached the disk.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise OSError(0, "is neither a file nor a folder", str(path))
        for name in files:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = sha256(path)
            if sync:
                _sync(path)
        if sync:
            sync_folder(Path(parent))
    return dict(sorted(found.items()))


def sync_folder(path: Path) -> None:
    """Make the folder's entries survive a power failure."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def same_file(path: Path, descriptor: int) -> bool:
    """Whether the file or folder at `path` is the one that is open as `descriptor`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
