"""A run's folder: the configuration it belongs to, its versions, and a lock for one process at a time.

The set-up writes config.yaml last: a folder without it was not set up. A folder with result.json is
finished.

    config.yaml    the resolved configuration of the first start
    versions.json  package versions;  run.json: corpus hash, parameters
    data/          the tokenised snapshot of the corpus
    metrics.jsonl, tensorboard/, samples/, checkpoints/, loss.png, result.json
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from train import config as config_lib
from train.config import yaml_text
from train.config.schema import RunConfig
from train.run.failure import RunError
from train.run.files import same_file, write_atomically, write_json
from train.run.migration import FORMAT, config_hash_of_format_1, flatten, migrate_config

# Keys that may change between two starts: parameters, optimiser state, losses and data order do not depend
# on them.
FREE = (
    "run_dir",
    "log_every",
    "evaluation.sample_prompt",
    "evaluation.sample_tokens",
    "optimizer.max_consecutive_skips",
    "checkpoint.minutes",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LOCK = "run.lock"


class RunFolder:
    """`with RunFolder(path, config) as folder:` holds the folder's lock.

    Entering raises ValueError, and changes nothing, if the folder was made by another configuration (the
    message names the keys that differ), is not a run folder, or is in use by a running process. Leaving
    before `begin` removes what the set-up wrote.
    """

    def __init__(self, path: Path, config: RunConfig):
        self.path = path.absolute()
        self._config = config
        self._lock: int | None = None
        self._place: os.stat_result | None = None

    def __enter__(self) -> RunFolder:
        self._check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} cannot be made: {error.strerror}") from None
        self._lock = _locked(self.path / _LOCK)
        self._place = os.stat(self.path)
        try:
            self._check()  # again, now that nobody else writes
            if not self.begun:
                self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._in_place() and not self.begun:
            self._clear()
            (self.path / _LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._lock)

    def still_there(self) -> None:
        """RunError if the folder is no longer the one that was entered: what is written would be lost."""
        if not self._in_place():
            raise RunError(
                f"run_dir {self.path} was removed or replaced during training: the run stops, because nothing"
                " that it saves would be kept; the same command starts it again"
            )

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), self._place)
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def begun(self) -> bool:
        """Whether the set-up was completed, now or in an earlier process."""
        return (self.path / "config.yaml").exists()

    def begin(self, facts: dict[str, Any]) -> list[str]:
        """Write config.yaml, versions.json and run.json (`facts`), or return notes on what changed since.

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
                    notes.append(
                        f"{name} was {old} and is {versions.get(name)}: results may differ in the last bits"
                    )
        else:
            write_json(self.path / "run.json", facts)
        if notes or not self.begun:
            write_json(self.path / "versions.json", versions)
        if not self.begun:
            write_atomically(self.path / "config.yaml", yaml_text.dumps(saved_keys(self._config)))
        return notes

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        return self._read("result.json") if (self.path / "result.json").exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json: the run is finished."""
        write_json(self.path / "result.json", result)

    def _check(self) -> None:
        if self.begun:
            differing = differences(_read_keys(self.path), self._config, self.path / "config.yaml")
            if differing:
                more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
                raise ValueError(
                    f"run_dir {self.path} was made by another config: {', '.join(differing[:8])}{more};"
                    " choose another run_dir, or delete this one"
                )
        elif self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise ValueError(f"run_dir {self.path} is neither empty nor a run folder: choose another run_dir")

    def _is_empty(self) -> bool:
        return (self.path / _LOCK).exists() or not any(self.path.iterdir())

    def check_checkpoint(self, info: dict[str, Any], path: Path) -> None:
        """ValueError if the checkpoint at `path`, whose info.json is given, is another configuration's."""
        if "config" in info:
            differing = differences(info["config"], self._config, path)
        else:
            made = config_hash_of_format_1(_read_keys(self.path))
            differing = [] if info["config_sha256"] == made else ["its hash differs"]
        if differing:
            raise ValueError(
                f"checkpoint {path} was made by another config ({differing[0]}): delete it, or choose another"
                " run_dir"
            )

    def _clear(self) -> None:
        """Remove what an unfinished set-up wrote: it may be of another configuration."""
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
            raise ValueError(
                f"{self.path / name} is not a JSON object: restore it from a copy, or choose another run_dir"
            )
        return value


def saved_config(folder: Path) -> RunConfig:
    """The configuration in a run folder's config.yaml, of any known format; ValueError if unreadable."""
    return _migrated(_read_keys(folder), folder / "config.yaml")


def saved_keys(config: RunConfig) -> dict[str, Any]:
    """The configuration as config.yaml and a checkpoint's info.json hold it; see `differences`."""
    return {"format": FORMAT, **config_lib.to_dict(config)}


def differences(saved: dict[str, Any], config: RunConfig, place: Path) -> list[str]:
    """The keys in which a saved configuration, of any known format, differs, as "key old -> new".

    A key that the saved configuration lacks has its default. ValueError names `place` if the saved keys are
    not a valid configuration.
    """
    old, new = (flatten(config_lib.to_dict(c)) for c in (_migrated(saved, place), config))
    return [
        f"{key} {_show(old, key)} -> {_show(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE and (key in old, old.get(key)) != (key in new, new.get(key))
    ]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a run's numbers."""
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
        if same_file(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_keys(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    keys = yaml_text.parse(_text(path), str(path))
    if not isinstance(keys, dict):
        raise ValueError(
            f"{path} is not a mapping of keys: restore it from a copy, or choose another run_dir"
        )
    return keys


def _migrated(keys: dict[str, Any], place: Path) -> RunConfig:
    try:
        return config_lib.from_dict(migrate_config(keys))
    except ValueError as error:
        raise ValueError(f"the configuration in {place} cannot be read: {error}") from None


def _show(flat: dict[str, Any], key: str) -> str:
    return yaml_text.scalar(flat[key]) if key in flat else "(absent)"
