"""Training runs of the commands that compare: each in a process and a folder of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.config import shipped
from train.signals import NUMBERS, Stopped, handlers


def all_of(folder: str) -> list[Path]:
    """The configurations in a folder of those that come with the package."""
    return sorted((shipped.FOLDER / folder).glob("*.yaml"))


def train(config: Path, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `result.json` holds of the run in `folder`: trained now, resumed, or read if finished.

    The output of the training process goes to our own, and it gets the signals that we get, so that it saves
    what it has done. `Stopped`: a signal ended it. ValueError: its exit status was not 0.
    """
    command = [sys.executable, "-m", "train", str(config), *overrides, f"run_dir={folder}"]
    print(f"{folder.name}:", flush=True)
    with forwarded() as (children, arrived):
        with subprocess.Popen(command) as process:
            children.append(process)
            status = process.wait()
    for number in (*arrived, *NUMBERS):
        if arrived or status in (128 + number, -number):
            raise Stopped(number, f"{folder.name} goes on with the same command")
    if status:
        raise ValueError(f"{folder.name} ended with exit status {status}: {' '.join(command)}")
    return json.loads((folder / "result.json").read_text())


@contextlib.contextmanager
def forwarded() -> Iterator[tuple[list[subprocess.Popen], list[int]]]:
    """(processes, signals): in the block these processes get the signals of this one, which are recorded.

    A terminal signals the whole group, so that a process may get one twice: `train.signals` expects that.
    """
    children: list[subprocess.Popen] = []
    arrived: list[int] = []

    def handle(number: int, _: object) -> None:
        arrived.append(number)
        for process in children:
            process.send_signal(number)

    with handlers(handle):
        yield children, arrived


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the range behind it where there are several values."""
    text = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        text += f" [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    return text
