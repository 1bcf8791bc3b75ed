"""A run's folder: whose it is, what made it, and that one process at a time writes to it.

The set-up writes config.yaml last, so a folder without it is not begun; result.json ends a run.

    config.yaml    the resolved configuration
    versions.json  package versions;  run.json: corpus hash, parameters
    data/          the tokenised snapshot of the corpus
    metrics.jsonl, tensorboard/, samples/, checkpoints/, loss.png, result.json
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from train import config as config_lib
from train.config import plain_yaml
from train.config.schema import MASKING_KEYS, RunConfig
from train.run.files import write_atomically, write_json

# Keys that may change between two starts: they alter no bit of parameters, optimiser, losses or data order.
FREE = ("run_dir", "log_every", "evaluation.sample_prompt", "evaluation.sample_tokens")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LOCK = "run.lock"
_MASKING = {f"data.{name}" for name in MASKING_KEYS}


class RunFolder:
    """`with RunFolder(path, config) as folder:` holds the folder's lock.

    Entering raises ValueError, and changes nothing, if the folder belongs to another configuration (the
    differing keys are named), to something else, or to a running process. Leaving before `begin` removes
    what the set-up made.
    """

    def __init__(self, path: Path, config: RunConfig):
        self.path = path.absolute()
        self._config = config
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self._check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} cannot be made: {error.strerror}") from None
        self._lock = _locked(self.path / _LOCK)
        try:
            self._check()  # again, now that nobody else writes
            if not self.begun:
                self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.begun:
            self._clear()
            (self.path / _LOCK).unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._lock)

    @property
    def begun(self) -> bool:
        """Whether the set-up was completed, now or in an earlier process."""
        return (self.path / "config.yaml").exists()

    def begin(self, facts: dict[str, Any]) -> list[str]:
        """Write config.yaml, versions.json and run.json (`facts`); notes on what changed if begun before.

        ValueError if a fact, such as the corpus hash, is not what it was.
        """
        notes = []
        versions = package_versions()
        if self.begun:
            for name, old in self._read("run.json").items():
                if facts.get(name) != old:
                    new = facts.get(name)
                    raise ValueError(f"{self.path}: {name} was {old}, is {new}: choose another run_dir")
            for name, old in self._read("versions.json").items():
                if versions.get(name) != old:
                    notes.append(f"{name} was {old} and is {versions.get(name)}: the last bits may differ")
        else:
            write_json(self.path / "run.json", facts)
        if notes or not self.begun:
            write_json(self.path / "versions.json", versions)
        write_atomically(self.path / "config.yaml", config_lib.dump_yaml(self._config))
        return notes

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        return self._read("result.json") if (self.path / "result.json").exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json: the run is finished."""
        write_json(self.path / "result.json", result)

    def _check(self) -> None:
        if self.begun:
            self._compare(plain_yaml.parse(_text(self.path / "config.yaml"), str(self.path / "config.yaml")))
        elif self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise ValueError(f"run_dir {self.path} is no run's folder and not empty: choose another run_dir")

    def _is_empty(self) -> bool:
        return (self.path / _LOCK).exists() or not any(self.path.iterdir())

    def _compare(self, saved: Any) -> None:
        old, new = _identity(saved), _identity(config_lib.to_dict(self._config))
        changes = [
            f"{key} {_show(old, key)} -> {_show(new, key)}"
            for key in sorted(old.keys() | new.keys())
            if (key in old, old.get(key)) != (key in new, new.get(key))
        ]
        if changes:
            more = f" and {len(changes) - 8} more" if len(changes) > 8 else ""
            raise ValueError(
                f"run_dir {self.path} was made by another config: {', '.join(changes[:8])}{more};"
                " choose another run_dir, or delete that one"
            )

    def _clear(self) -> None:
        """Remove what an unfinished set-up left: it may be another configuration's."""
        for name in ("data", "tmp.data", "run.json", "versions.json"):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(_text(self.path / name))
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path / name} is no JSON object: choose another run_dir")
        return value


def config_hash(config: RunConfig) -> str:
    """SHA-256 of all keys but the free ones."""
    text = json.dumps(_identity(config_lib.to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Python and the packages that decide a run's bits."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES}


def _locked(path: Path) -> int:
    """A descriptor that holds the lock until it is closed or the process dies."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"run_dir {path.parent} is in use by process {owner}: wait for it, or choose another run_dir"
            ) from None
        # The holder before us may have removed the file while leaving: then this lock locks nothing.
        if _same(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _identity(config: Any) -> dict[str, Any]:
    """The dotted keys that say which run it is."""
    flat = {key: value for key, value in _flat(config).items() if key not in FREE}
    if flat.get("data.task") is None:
        flat.pop("data.task", None)
    if flat.get("objective") == "masked_lm":
        return flat
    # Elsewhere these hold their defaults, and runs that were begun before they existed go on.
    return {key: value for key, value in flat.items() if key not in _MASKING}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted keys."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, below in items:
        flat |= _flat(below, f"{path}.{key}" if path else str(key))
    return flat


def _show(flat: dict[str, Any], key: str) -> str:
    return plain_yaml.scalar(flat[key]) if key in flat else "(absent)"
