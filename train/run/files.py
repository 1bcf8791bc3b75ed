"""Files and folders that are either old or new, never half-written, and their SHA-256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from attention_jax.disk import sync_to_disk

TEMPORARY = "tmp."  # a folder with such a name is not complete
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """A file or folder that did not fit the disk: `filename`, and in `strerror` the space, in one line."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def exists(path: Path) -> bool:
    """Whether there is a file or folder at `path`.

    OSError where that cannot be known (pathlib answers False to some of these), and for a dangling link.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            target = os.readlink(path)
            raise OSError(errno.ENOENT, f"it is a dangling link to {target}", str(path)) from None
        return False
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an OSError of writing names `path` if it names no file; a full disk is a DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            _raise_full(error, path)
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def _raise_full(error: OSError, path: Path, written: int | None = None) -> NoReturn:
    free = _megabytes(shutil.disk_usage(_existing(path)).free)
    needs = "" if written is None else f", more than {_megabytes(written)} are needed"
    what = (
        f"{os.strerror(error.errno)}; {free} are free{needs}: free some space and run the same command again"
    )
    raise DiskFullError(error.errno, what, str(path)) from None


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; after a crash or a failure it holds the old content or the new.

    DiskFullError, or another OSError, names the file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (Exception, KeyboardInterrupt):
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically. NaN and infinity are refused: JSON has neither."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path, size: int = 0) -> Iterator[Path]:
    """`with whole_folder(path) as temporary:` fills a folder that gets the name `path` when the block ends.

    A block that fails leaves `path` as it was and nothing else: what it had written is deleted, so that it
    holds no space. A process that is killed leaves a folder `tmp.NAME` beside it, which the next attempt
    deletes. The block ends with a file that holds `digests(temporary, sync=True)`: that call puts the other
    files on the disk. DiskFullError names `path`; size: the least number of bytes that it takes.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    delete(temporary)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            os.rename(temporary, path)
    except (Exception, KeyboardInterrupt) as error:
        written = max(size, _size(temporary))
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            _raise_full(error, path, written)
        raise
    with writing(path):
        sync_folder(path.parent)


def _size(folder: Path) -> int:
    """Bytes of the files below, as far as they can be seen."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def delete_folder(path: Path) -> None:
    """Delete a complete folder; it gets the name of an incomplete one before its first file is deleted."""
    if os.path.lexists(path):
        doomed = path.with_name(f"{TEMPORARY}deleted.{path.name}")
        delete(doomed)
        os.rename(path, doomed)
        delete(doomed)


def set_aside(path: Path) -> Path:
    """Rename `path` to the first free one of aside.NAME, aside.NAME.1, ...; the new path."""
    aside, number = path.with_name(f"aside.{path.name}"), 0
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"aside.{path.name}.{number}")
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


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
    """Relative name to SHA-256 of every file below, sorted; OSError at a link and at what cannot be read.

    sync: wait until the files and the folder's entries have reached the disk.
    """
    found = {}
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise OSError(errno.ELOOP, "is neither a file nor a folder", str(path))
        for name in files:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = _named(sha256, path)
            if sync:
                _named(sync_to_disk, path)
        if sync:
            sync_folder(Path(parent))
    return dict(sorted(found.items()))


def _named(function: Any, path: Path) -> Any:
    """`function(path)`; its OSError names the path, which that of a failing read does not."""
    try:
        return function(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _raise(error: OSError) -> NoReturn:
    """For os.walk, which otherwise leaves out a folder that it cannot read."""
    raise error


def sync_folder(path: Path) -> None:
    """Make the folder's entries survive a power failure."""
    sync_to_disk(path)


def same_file(path: Path, descriptor: int) -> bool:
    """Whether the file or folder at `path` is the one that is open as `descriptor`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise
        return False
