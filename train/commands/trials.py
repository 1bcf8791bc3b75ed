"""Training runs of the commands that compare: each in a process and a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import shipped


def all_of(folder: str) -> list[Path]:
    """The configurations in a folder of those that come with the package."""
    return sorted((shipped.FOLDER / folder).glob("*.yaml"))


def train(config: Path, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `result.json` holds of the run in `folder`: trained now, resumed, or read if finished.

    The output of the training process goes to our own. ValueError: its exit status was not 0.
    """
    command = [sys.executable, "-m", "train", str(config), *overrides, f"run_dir={folder}"]
    print(f"{folder.name}:", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"{folder.name} ended with exit status {status}: {' '.join(command)}")
    return json.loads((folder / "result.json").read_text())


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the range behind it where there are several values."""
    text = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        text += f" [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    return text
