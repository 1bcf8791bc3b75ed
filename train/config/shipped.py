"""The configurations that come with the package, found by name: `tiny` is configs/tiny.yaml."""

from __future__ import annotations

import difflib
from pathlib import Path

import train

# In a checkout a link to the folder `configs` beside the packages.
FOLDER = Path(train.__file__).parent / "configs"


def names() -> list[str]:
    """The names, such as `tiny` and `mechanisms/gla`."""
    paths = FOLDER.rglob("*.yaml")
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in paths)


def find(path: str | Path) -> Path:
    """The file that a path or a name stands for; a file that exists is preferred. The path itself if none."""
    path = Path(path)
    if not path.exists() and path.as_posix() in names():
        return FOLDER / f"{path.as_posix()}.yaml"
    return path


def hint(path: Path) -> str:
    """Which name comes nearest to a path that does not exist."""
    known = names()
    wanted = path.with_suffix("").as_posix().removeprefix("configs/")
    near = difflib.get_close_matches(wanted, known, 1, 0.0)
    return f"; the nearest configuration that comes with the package is {near[0]}" if near else ""
