"""Checkpoints: arrays written by orbax, with checksums, in folders that are complete or ignored.

A checkpoint is a folder step_00000500 of

    state/         parameters and optimiser state, as orbax writes them
    info.json      the run's configuration, its host state, and the path, dtype and shape of every array
    manifest.json  format number and the SHA-256 of every other file (orbax itself has no checksum)

A process that is killed at any moment loses no earlier checkpoint: a folder is filled under a name that
starts with `tmp.`, the manifest last, and renamed when complete; before it is deleted, it is renamed back.

A checkpoint of an earlier format is verified as it is and then read with the paths that its arrays have now
(`train.run.migration`). Arrays are restored by path: the containers around them may change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from train.run.files import TEMPORARY, delete, delete_folder, digests, whole_folder, write_json
from train.run.migration import FORMAT, check_format, migrate_path

_NAME = re.compile(r"step_(\d{8,})\Z")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the reason and the remedy in one line."""


class Checkpoints:
    """The checkpoints in `folder`: the newest `keep`, and the one that `save` is given as the best."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; a folder without a manifest does not count."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.match(entry.name) for entry in self.folder.iterdir()]
        steps = sorted(int(match[1]) for match in matches if match)
        return [step for step in steps if (self.path(step) / "manifest.json").exists()]

    def path(self, step: int) -> Path:
        """The folder of a step, whether it exists or not."""
        return self.folder / f"step_{step:08d}"

    def incomplete(self) -> list[str]:
        """Names of step folders without a manifest: partly copied or deleted by hand."""
        if not self.folder.is_dir():
            return []
        names = sorted(entry.name for entry in self.folder.iterdir() if _NAME.match(entry.name))
        return [name for name in names if not (self.folder / name / "manifest.json").exists()]

    def save(self, step: int, state: Any, info: dict[str, Any], *, best: int | None = None) -> None:
        """Write the arrays of `state` and the JSON `info`, then `collect(best)`.

        When the manifest has been renamed into place the checkpoint is on the disk; an error before that
        leaves the earlier ones as they were.
        """
        with whole_folder(self.path(step)) as temporary:
            ocp.save(temporary / "state", state)
            write_json(temporary / "info.json", {**info, "step": step, "leaves": _leaves(state)})
            manifest = {"format": FORMAT, "files": digests(temporary, sync=True)}
            write_json(temporary / "manifest.json", manifest)
            delete_folder(self.path(step))
        self.collect(best)

    def collect(self, best: int | None) -> None:
        """Delete incomplete folders of killed processes, and all steps but the newest `keep` and `best`."""
        if not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if entry.name.startswith(TEMPORARY):
                delete(entry)
        steps = self.steps()
        for step in steps:
            if step not in (*steps[-self.keep :], best):
                delete_folder(self.path(step))

    def info(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step; CheckpointError if it cannot be read."""
        return self._read(step, "info.json")

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, info) of a step, every byte verified; `like` has the structure, shapes and dtypes.

        CheckpointError names the damaged file, or the leaf that differs, and what to do.
        """
        manifest = self._read(step, "manifest.json")
        number = manifest.get("format")
        try:
            check_format(number)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.path(step)}: {error}, or {self._remedy(step)}") from None
        self._verify(step, manifest)
        info = self.info(step)
        if not isinstance(info.get("leaves"), dict):
            raise self._damaged(step, "its info.json lists no arrays")
        saved = {migrate_path(path, number): leaf for path, leaf in info["leaves"].items()}
        if len(saved) != len(info["leaves"]):
            raise self._damaged(step, "it has an array under both its old and its new name")
        self._compare(step, saved, _leaves(like))
        return _load(self.path(step) / "state", like, number), info

    def _verify(self, step: int, manifest: dict[str, Any]) -> None:
        path, expected = self.path(step), manifest.get("files")
        try:
            found = digests(path)
        except OSError as error:
            raise self._damaged(step, f"{error.filename}: {error.strerror}") from None
        found.pop("manifest.json", None)
        if not isinstance(expected, dict):
            raise self._damaged(step, f"{path / 'manifest.json'} lists no files")
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
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise self._damaged(step, f"{path}: {error.strerror}") from None
        except ValueError:
            raise self._damaged(step, f"{path} is not valid JSON") from None
        if not isinstance(value, dict):
            raise self._damaged(step, f"{path} is not a JSON object")
        return value

    def _damaged(self, step: int, what: str) -> CheckpointError:
        return CheckpointError(f"damaged checkpoint: {what}; {self._remedy(step)}")

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self.steps() if other < step]
        then = f"to resume from step {earlier[-1]}" if earlier else "to start again from step 0"
        return f"delete {self.path(step)} {then}"


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
