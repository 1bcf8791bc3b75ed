"""A run's folder: the configuration it belongs to, its versions, and a lock for one process at a time.

The set-up writes config.yaml last: a folder that holds nothing but files of a set-up, and not this one, was
not set up. A folder with result.json is finished.

    config.yaml    the resolved configuration of the first start
    versions.json  `train.run.environment.record`;  run.json: corpus hash, parameters
    data/          the tokenised snapshot of the corpus
    published/     with init_from: config.json and tokenizer of a published model
    progress.json  the step of the newest checkpoint that was saved
    metrics.jsonl, tensorboard/, samples/, checkpoints/, loss.png, result.json
    before.N/      what an earlier start had written when the run was started over
    run.lock       locked by the process that trains
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from train import config as config_lib
from train.config import yaml_text
from train.config.schema import RunConfig
from train.data import snapshot
from train.run import environment
from train.run.failure import RunError
from train.run.files import delete, exists, same_file, write_atomically, write_json, writing
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
_LOCK = "run.lock"
# What a set-up writes before config.yaml.
_SET_UP = ("data", "tmp.data", "published", "run.json", "versions.json", ".run.json.tmp",
           ".versions.json.tmp", ".config.yaml.tmp")  # fmt: skip
# What training writes, which is put aside when a run is started over; progress.json last.
_TRAINED = ("checkpoints", "metrics.jsonl", "tensorboard", "samples", "loss.png", "result.json",
            "progress.json")  # fmt: skip


class RunFolder:
    """`with RunFolder(path, config) as folder:` holds the folder's lock.

    Entering raises ValueError, and changes nothing, if the folder was made by another configuration (the
    message names the keys that differ), is not a run folder, has lost its config.yaml, or is in use by a
    running process. Leaving before `begin` removes what the set-up wrote.

    start_over: put what was trained so far into before.N and begin at step 0.
    accept_environment: use a checkpoint that was made with other settings of jax.
    """

    def __init__(
        self, path: Path, config: RunConfig, *, start_over: bool = False, accept_environment: bool = False
    ):
        self.path = path.absolute()
        self._config = config
        self._start_over, self._accept_environment = start_over, accept_environment
        self._lock: int | None = None
        self._new = False
        self._notes: list[str] = []

    def __enter__(self) -> RunFolder:
        self._check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} cannot be made: {error.strerror}") from None
        self._lock = _locked(self.path / _LOCK)
        try:
            self._check()  # again, now that nobody else writes
            self._new = not self.begun
            if self._new:
                self._clear()
            else:
                delete(self.path / "tmp.data")
                if self._start_over:
                    self._set_aside()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._new and self._in_place():
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
                f" that it saves would be kept; put the folder, with its {_LOCK}, back, and the same command"
                " goes on from the newest checkpoint in it"
            )

    def _in_place(self) -> bool:
        """Whether the lock that this process holds still is run_dir's: one system call for both."""
        return same_file(self.path / _LOCK, self._lock)

    @property
    def begun(self) -> bool:
        """Whether the set-up was completed, now or in an earlier process."""
        return not self._new and _there(self.path / "config.yaml")

    def begin(self, facts: dict[str, Any]) -> list[str]:
        """Write config.yaml, versions.json and run.json (`facts`), or return notes on what changed since.

        ValueError if a fact, such as the corpus hash, is not what it was.
        """
        notes, now = self._notes, environment.record()
        if self._new:
            write_json(self.path / "run.json", facts)
            write_json(self.path / "versions.json", now)
            write_atomically(self.path / "config.yaml", yaml_text.dumps(saved_keys(self._config)))
            self._new = False
            return notes
        for name, old in self._read("run.json").items():
            if facts.get(name) != old:
                new = facts.get(name)
                raise ValueError(f"{self.path}: {name} was {old}, is {new}: choose another run_dir")
        saved = self._read("versions.json")
        for name, change in environment.differences(saved, now).items():
            much = " in the last bits" if name in environment.LAST_BITS else ""
            notes.append(f"{name} {change}: results may differ{much}")
        if saved != now:
            write_json(self.path / "versions.json", now)
        return notes

    def reached(self, step: int) -> None:
        """Record that the checkpoint of a step is on the disk; see `check_start`."""
        write_json(self.path / "progress.json", {"checkpoint": step})

    def check_start(self, newest: int | None) -> list[str]:
        """Notes, if an earlier checkpoint than the last one that was saved is the newest here.

        ValueError if a checkpoint was saved and none is here (newest None), as after an unmounted volume.
        """
        saved, source = self._saved_step()
        if saved is None or (newest is not None and newest >= saved):
            return []
        if newest is not None:
            return [f"the checkpoint of step {saved} was saved last; the newest sound one here is {newest}"]
        raise ValueError(
            f"{self.path / 'checkpoints'} has no complete checkpoint, but {source} says that one of step"
            f" {saved} was saved: mount or restore the folder, or start at step 0 with --start-over, which"
            " keeps the metrics under another name"
        )

    def _saved_step(self) -> tuple[int | None, str]:
        """The step of a checkpoint that was saved, and the file that says so."""
        if exists(self.path / "progress.json"):
            return self._read("progress.json").get("checkpoint"), "progress.json"
        # A folder of an earlier version. The row of a step is written before its checkpoint.
        from train.run.metrics import read_rows  # imports TensorBoard's writer, which loading does without

        every = min(self._config.checkpoint.every, self._config.steps)
        last = max((row["step"] for row in read_rows(self.path / "metrics.jsonl")), default=0)
        saved = (last - 1) // every * every
        return (saved, "metrics.jsonl") if saved > 0 else (None, "")

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        return self._read("result.json") if (self.path / "result.json").exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json: the run is finished."""
        write_json(self.path / "result.json", result)

    def _check(self) -> None:
        if not _there(self.path):
            return
        if _there(self.path / "config.yaml"):
            differing = differences(_read_keys(self.path), self._config, self.path / "config.yaml")
            if differing:
                more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
                raise ValueError(
                    f"run_dir {self.path} was made by another config: {', '.join(differing[:8])}{more};"
                    " choose another run_dir"
                )
            return
        if not self.path.is_dir():
            raise ValueError(f"run_dir {self.path} is a file: choose another run_dir")
        names = set(os.listdir(self.path))
        if names & {*_TRAINED, "before.1"} and names & {_LOCK, "run.json", "versions.json"}:
            raise ValueError(
                f"run_dir {self.path} was trained in and has lost its config.yaml: restore it from a copy"
                " (each checkpoint's info.json holds the configuration, too), or choose another run_dir"
            )
        if names and not (_LOCK in names and names <= {_LOCK, *_SET_UP} and self._data_is_ours()):
            raise ValueError(f"run_dir {self.path} is neither empty nor a run folder: choose another run_dir")

    def _data_is_ours(self) -> bool:
        folder = self.path / "data"
        return not _there(folder) or (folder.is_dir() and snapshot.FILES >= set(os.listdir(folder)))

    def check_checkpoint(self, info: dict[str, Any], path: Path, corpus_sha256: str) -> None:
        """ValueError unless the checkpoint at `path`, whose info.json is given, is one of this run.

        Its configuration, its corpus and the settings of jax that change random numbers are compared.
        """
        check_checkpoint(info, path, self._config, self.path, corpus_sha256)
        changes = environment.differences(info.get("versions", {}), environment.record())
        refused = [f"{name} {changes[name]}" for name in environment.SETTINGS if name in changes]
        if refused and not self._accept_environment:
            raise ValueError(
                f"checkpoint {path} was made with other settings: {', '.join(refused)}; set them as they"
                " were, or resume with other random numbers, dtypes or precision by --accept-environment"
            )

    def _clear(self) -> None:
        """Remove what an unfinished set-up wrote: it may be of another configuration."""
        for name in _SET_UP:
            delete(self.path / name)

    def _set_aside(self) -> None:
        """Move what was trained to the first free before.N."""
        found = [name for name in _TRAINED if _holds_something(self.path / name)]
        if not found:
            return
        number = 1
        while os.path.lexists(self.path / f"before.{number}"):
            number += 1
        aside = self.path / f"before.{number}"
        aside.mkdir()
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(self.path / "versions.json", aside)
        for name in found:
            os.rename(self.path / name, aside / name)
        self._notes.append(f"starting over: {', '.join(found)} moved to {aside}")

    def _read(self, name: str) -> dict[str, Any]:
        return _json_object(self.path / name)


def recorded_corpus(folder: Path) -> str | None:
    """The SHA-256 of the corpus that a run began with; ValueError if run.json cannot be read."""
    return _json_object(folder / "run.json").get("corpus_sha256")


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


def check_checkpoint(
    info: dict[str, Any], path: Path, config: RunConfig, folder: Path, corpus_sha256: str
) -> None:
    """ValueError unless the checkpoint at `path`, whose info.json is given, has this config and corpus.

    folder: the run folder, of whose config.yaml checkpoints of format 1 hold a hash.
    """
    if isinstance(info.get("config"), dict):
        differing = differences(info["config"], config, path)
    else:
        made = config_hash_of_format_1(_read_keys(folder))
        differing = [] if info.get("config_sha256") == made else ["its hash differs"]
    if differing:
        raise ValueError(
            f"checkpoint {path} was made by another config ({differing[0]}): restore the run's own"
            " config.yaml and checkpoints, or choose another run_dir"
        )
    if info.get("corpus_sha256") != corpus_sha256:
        raise ValueError(
            f"checkpoint {path} was trained on another corpus: its sha256 is"
            f" {str(info.get('corpus_sha256'))[:16]}, that of the run is {corpus_sha256[:16]}: restore the"
            " run's own data and checkpoints, or choose another run_dir"
        )


def _locked(path: Path) -> int:
    """A descriptor that holds the lock until it is closed or the process dies."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with writing(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"run_dir {path.parent} is in use by process {owner}: wait for it, or choose another run_dir"
            ) from None
        # The holder before us may have removed the file while leaving: then this lock locks nothing.
        if same_file(path, descriptor):
            with writing(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)


def _there(path: Path) -> bool:
    """`exists`, whose OSError becomes a ValueError of one line."""
    try:
        return exists(path)
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be used: {error.strerror}") from None


def _holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder that is not empty: an empty one may be a mount point."""
    return os.path.lexists(path) and not (path.is_dir() and not os.listdir(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: restore it from a copy, or choose another run_dir") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: restore it from a copy, or choose another run_dir")
    return value


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
