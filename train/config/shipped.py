"""The configurations that come with the package, found by name: `tiny` is configs/tiny.yaml."""

from __future__ import annotations

from pathlib import Path

import train
from attention_jax.hints import near

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
    """What to append to the message about a path that does not exist: the name that was probably meant."""
    known = names()
    wanted = path.with_suffix("").as_posix().removeprefix("configs/")
    by_stem = {name.rpartition("/")[2]: name for name in reversed(known)}
    if meant := near(wanted, known) or by_stem.get(near(wanted.rpartition("/")[2], by_stem) or ""):
        return f"; the configuration {meant} comes with the package"
    top = ", ".join(name for name in known if "/" not in name)
    return f"; the package brings {top}, mechanisms/NAME and mqar/NAME"
