"""Files that survive a power failure, with the permissions of ordinary ones."""

from __future__ import annotations

import os
from pathlib import Path


def sync_to_disk(path: str | os.PathLike) -> None:
    """Put a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_as_usual(path: str | os.PathLike) -> None:
    """Give a temporary file or folder, which is its owner's alone, the permissions of a new one."""
    mask = os.umask(0o022)
    os.umask(mask)
    os.chmod(path, (0o777 if Path(path).is_dir() else 0o666) & ~mask)
