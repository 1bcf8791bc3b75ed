"""Files that are either old or new, never half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; after a crash it holds the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically. NaN and infinity are refused: they are no JSON."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync_folder(path: Path) -> None:
    """Make the folder's entries survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
