"""Checkpoints: arrays written by orbax, with checksums, in folders that are complete or ignored.

A checkpoint is a folder step_00000500 of

    state/         parameters and optimiser state, as orbax writes them
    info.json      the run's configuration, its host state, and the path, dtype and shape of every array
    manifest.json  format number and the SHA-256 of every other file (orbax itself has no checksum)

A process that is killed at any moment loses no earlier checkpoint: a folder is filled under a name that
starts with `tmp.`, the manifest last, and renamed when complete; before it is deleted, it is renamed back.

A checkpoint of which a byte differs from its checksum is damaged: training goes on from the newest sound one
and keeps the damaged one under the name `aside.step_...`. One that cannot be read, because of permissions, a
disk or a mount, may be sound: nothing goes on without it. Nothing but `collect` deletes a checkpoint.

A checkpoint of an earlier format is verified as it is and then read with the paths that its arrays have now
(`train.run.migration`). Arrays are restored by path: the containers around them may change.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint.experimental.v1 as ocp

from train.run import files
from train.run.failure import orbax_errors
from train.run.files import TEMPORARY, delete, delete_folder, digests, whole_folder, write_json
from train.run.migration import FORMAT, check_format, migrate_path

_NAME = re.compile(r"step_(\d{8,})\Z")
_LEFTOVER = re.compile(rf"{re.escape(TEMPORARY)}(deleted\.)?step_\d{{8,}}\Z")
_MANIFEST_KEYS = {"format", "files", "sha256"}

Check = Callable[[dict[str, Any], Path], None]  # raises ValueError unless this info.json may be used


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the reason and the remedy in one line."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not those that were written; `what` says which one."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"damaged checkpoint: {what}; {remedy}")
        self.what = what


class UnreadableError(CheckpointError):
    """A checkpoint, perhaps a sound one, that the operating system cannot read."""


class Restored(NamedTuple):
    """What `Checkpoints.newest` found; `damaged` maps the steps after it to what is wrong with them."""

    step: int
    state: Any
    info: dict[str, Any]
    damaged: dict[int, str]


class Checkpoints:
    """The checkpoints in `folder`: the newest `keep`, and the one that `save` is given as the best."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; a folder without a manifest does not count.

        UnreadableError if the folder cannot be read. A checkpoint that cannot be read does count.
        """
        return [int(_NAME.match(name)[1]) for name in self._names() if self._has_manifest(name)]

    def path(self, step: int) -> Path:
        """The folder of a step, whether it exists or not."""
        return self.folder / f"step_{step:08d}"

    def incomplete(self) -> list[str]:
        """Names of step folders without a manifest: partly copied or deleted by hand."""
        return [name for name in self._names() if not self._has_manifest(name)]

    def _names(self) -> list[str]:
        try:
            entries = os.listdir(self.folder) if files.exists(self.folder) else []
        except OSError as error:
            raise _unreadable(self.folder, error, "mount it or correct its permissions") from None
        names = [name for name in entries if _NAME.match(name)]
        return sorted(names, key=lambda name: int(_NAME.match(name)[1]))

    def _has_manifest(self, name: str) -> bool:
        """Whether a step folder holds a manifest; True if that cannot be known: `restore` says why."""
        path = self.folder / name
        try:
            return files.exists(path) and _lexists(path / "manifest.json")
        except OSError:
            return True

    def save(self, step: int, state: Any, info: dict[str, Any], *, best: int | None = None) -> None:
        """Write the arrays of `state` and the JSON `info`, then `collect(best)`.

        When the manifest has been renamed into place the checkpoint is on the disk; an error before that
        leaves the earlier ones as they were. What has the step's name already, such as a folder without a
        manifest, is kept as `aside.step_...`. DiskFullError, or another OSError, names the checkpoint.
        """
        path = self.path(step)
        with files.writing(path):
            self.folder.mkdir(exist_ok=True)  # without parents: a run folder that was removed stays so
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with whole_folder(path, size) as temporary:
            with orbax_errors(path):
                ocp.save(temporary / "state", state)
            write_json(temporary / "info.json", {**info, "step": step, "leaves": _leaves(state)})
            manifest = {"format": FORMAT, "files": digests(temporary, sync=True)}
            manifest["sha256"] = _sha256(manifest)
            write_json(temporary / "manifest.json", manifest)
            if os.path.lexists(path):
                files.set_aside(path)
        self.collect(best)

    def collect(self, best: int | None) -> None:
        """Delete what killed processes left, and all steps but the newest `keep` and `best`."""
        self.clean()
        steps = self.steps()
        for step in steps:
            if step not in (*steps[-self.keep :], best):
                delete_folder(self.path(step))

    def clean(self) -> None:
        """Delete folders that a killed process was filling or deleting; the caller holds the run's lock."""
        if os.path.isdir(self.folder):
            for name in os.listdir(self.folder):
                if _LEFTOVER.match(name):
                    delete(self.folder / name)

    def set_aside(self, damaged: dict[int, str]) -> list[str]:
        """Rename damaged checkpoints (step to reason), so that they can be saved anew; notes on it."""
        notes = []
        for step, reason in sorted(damaged.items()):
            aside = files.set_aside(self.path(step))
            notes.append(f"damaged checkpoint of step {step} kept as checkpoints/{aside.name}: {reason}")
        return notes

    def newest(self, like: Any, check: Check) -> Restored:
        """The newest sound checkpoint, every byte verified; changes nothing.

        CheckpointError if there is none, or at the first one that is not damaged and cannot be used.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state, info = self.restore(step, like, check)
            except DamagedError as error:
                damaged[step] = error.what
            else:
                return Restored(step, state, info, damaged)
        first = next(iter(damaged.values()), "none is complete")
        raise CheckpointError(
            f"{self.folder} has no sound checkpoint: {first}; restore one from a copy, or start at step 0"
            " with --start-over, which keeps these files under another name"
        )

    def info(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step, after every byte of the checkpoint was verified; CheckpointError."""
        return self._verified(step)[0]

    def restore(self, step: int, like: Any, check: Check | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, info) of a step, every byte verified; `like` has the structure, shapes and dtypes.

        check: called with info and the checkpoint's path, before arrays are compared.
        CheckpointError names the damaged or unreadable file, or the leaf that differs, and what to do.
        """
        info, number = self._verified(step)
        if not isinstance(info.get("leaves"), dict):
            raise self._damaged(step, "its info.json lists no arrays")
        if check is not None:
            check(info, self.path(step))
        saved = {migrate_path(path, number): leaf for path, leaf in info["leaves"].items()}
        if len(saved) != len(info["leaves"]):
            raise self._damaged(step, "it has an array under both its old and its new name")
        self._compare(step, saved, _leaves(like))
        return _load(self.path(step) / "state", like, number), info

    def _verified(self, step: int) -> tuple[dict[str, Any], int]:
        """info.json and the format of a checkpoint of which every byte is what was written."""
        try:
            manifest = self._read(step, "manifest.json")
            number = manifest.get("format")
            if "sha256" in manifest and manifest["sha256"] != _sha256(manifest):
                raise self._damaged(step, f"{self.path(step) / 'manifest.json'} differs from its checksum")
            try:
                check_format(number)
            except ValueError as error:
                raise CheckpointError(
                    f"checkpoint {self.path(step)}: {error}{self._or_earlier(step)}"
                ) from None
            self._verify(step, manifest)
            info = self._read(step, "info.json")
        except DamagedError:
            if not os.path.lexists(self.path(step)):
                raise CheckpointError(
                    f"checkpoint {self.path(step)} was deleted while it was read: run the command again"
                ) from None
            raise
        if info.get("step") != step:
            raise CheckpointError(
                f"checkpoint {self.path(step)} was renamed: it is of step {info.get('step')}; give it"
                " the name of that step again"
            )
        return info, number

    def _verify(self, step: int, manifest: dict[str, Any]) -> None:
        path, expected = self.path(step), manifest.get("files")
        try:
            found = digests(path)
        except FileNotFoundError as error:
            raise self._damaged(step, f"{error.filename} is missing") from None
        except OSError as error:
            raise self._unreadable(step, error) from None
        found.pop("manifest.json", None)
        if not isinstance(expected, dict) or not manifest.keys() <= _MANIFEST_KEYS:
            raise self._damaged(step, f"{path / 'manifest.json'} is not a list of files")
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise self._damaged(step, f"{path / name} is missing")
            if name not in expected:
                raise self._damaged(step, f"{path / name} does not belong to it")
            if found[name] != expected[name]:
                raise self._damaged(step, f"{path / name} differs from its checksum")

    def _compare(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {self.path(step)} does not fit the model: {name} is"
                    f" {saved.get(name, 'absent')} in it and {wanted.get(name, 'absent')} here;"
                    " use the config and the version it was made with, or another run_dir"
                )

    def _read(self, step: int, name: str) -> dict[str, Any]:
        path = self.path(step) / name
        try:
            files.exists(self.path(step))  # a dangling link is not a missing file
            if path.is_symlink():
                raise OSError(errno.ELOOP, "is neither a file nor a folder", str(path))
            value = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            if error.filename == str(path):
                raise self._damaged(step, f"{path} is missing") from None
            raise self._unreadable(step, error) from None
        except OSError as error:
            raise self._unreadable(step, error, path) from None
        except ValueError:
            raise self._damaged(step, f"{path} is not valid JSON") from None
        if not isinstance(value, dict):
            raise self._damaged(step, f"{path} is not a JSON object")
        return value

    def _damaged(self, step: int, what: str) -> DamagedError:
        return DamagedError(what, f"restore it from a copy{self._or_earlier(step, 'use')}")

    def _unreadable(self, step: int, error: OSError, path: Path | None = None) -> UnreadableError:
        remedy = f"mount it or correct its permissions{self._or_earlier(step)}"
        return _unreadable(Path(error.filename or path or self.path(step)), error, remedy)

    def _or_earlier(self, step: int, do: str | None = None) -> str:
        earlier = [other for other in self.steps() if other < step]
        if not earlier:
            return ""
        return f", or {do or f'move {self.path(step)} to another place to use'} step {earlier[-1]}"


def _unreadable(path: Path, error: OSError, remedy: str) -> UnreadableError:
    reason = error.strerror or str(error)
    return UnreadableError(f"{path} cannot be read: {reason}; it may be sound: {remedy}")


def _lexists(path: Path) -> bool:
    """Whether there is something at `path`, be it a link to nothing; OSError where that cannot be known."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _sha256(manifest: dict[str, Any]) -> str:
    """The checksum of a manifest, of everything in it but the checksum."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _load(path: Path, like: Any, number: int) -> Any:
    """The arrays that orbax wrote to `path`, each at the place that its migrated path has in `like`."""
    wanted = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(like)}

    def place(keys, leaf):
        return wanted[migrate_path(_path(keys), number)]

    # orbax compares containers as well as leaves, so it is asked for the ones that it wrote.
    written = ocp.metadata(path).metadata
    loaded = ocp.load(path, jax.tree_util.tree_map_with_path(place, written))
    arrays = {
        migrate_path(_path(keys), number): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded)
    }
    state = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[_path(keys)], like)
    assert _leaves(state) == _leaves(like)
    return state


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _leaves(tree: Any) -> dict[str, str]:
    """Path of each leaf to its dtype and shape, such as float32[4,128]."""
    return {
        _path(keys): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for keys, x in jax.tree_util.tree_leaves_with_path(tree)
    }
