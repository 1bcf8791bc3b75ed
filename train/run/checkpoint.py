"""Checkpoints: arrays through orbax, everything around them so that SIGKILL at any moment loses nothing.

A checkpoint is a folder step_00000500 of

    state/         parameters and optimiser state, as orbax writes them
    info.json      what identifies the run, and its host state
    manifest.json  format number and the SHA-256 of every other file (orbax itself has no checksum)

It is made under a name that starts with `tmp.`, the manifest last, and renamed when complete; it is deleted
by renaming it back first. So a name without `tmp.` is always complete, and what a killed process left over
is recognised by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from train.run.files import sync_folder, write_json

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})\Z")
_TEMPORARY = "tmp."


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, told in one line with the remedy."""


class Checkpoints:
    """The checkpoints in `folder`: the newest `keep` of them, and one more that is called the best."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. A folder without a manifest is none."""
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
        temporary = self.folder / f"{_TEMPORARY}{self.path(step).name}"
        _delete(temporary)
        temporary.mkdir(parents=True)
        ocp.save(temporary / "state", state)
        write_json(temporary / "info.json", {**info, "step": step, "leaves": _leaves(state)})
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": _digests(temporary, sync=True)})
        self._discard(self.path(step))
        os.rename(temporary, self.path(step))
        sync_folder(self.folder)
        self.collect(best)

    def collect(self, best: int | None) -> None:
        """Delete what killed processes left over, and all but the newest `keep` steps and step `best`."""
        if not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if entry.name.startswith(_TEMPORARY):
                _delete(entry)
        steps = self.steps()
        for step in steps:
            if step not in (*steps[-self.keep :], best):
                self._discard(self.path(step))

    def info(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step; CheckpointError if it cannot be read."""
        return self._read(step, "info.json")

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, info) of a step, every byte verified; `like` has the structure, shapes and dtypes.

        CheckpointError names the damaged file, or the leaf that differs, and what to do.
        """
        manifest = self._read(step, "manifest.json")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.path(step)} has format {manifest.get('format')}, this version reads"
                f" {FORMAT}: resume it with the version that wrote it, or {self._remedy(step)}"
            )
        self._verify(step, manifest)
        info = self.info(step)
        self._compare(step, info["leaves"], _leaves(like))
        state = ocp.load(self.path(step) / "state", like)
        assert _leaves(state) == _leaves(like)
        return state, info

    def _verify(self, step: int, manifest: dict[str, Any]) -> None:
        path, expected = self.path(step), manifest.get("files")
        try:
            found = _digests(path)
        except OSError as error:
            raise self._damaged(step, f"{error.filename}: {error.strerror}") from None
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
            raise self._damaged(step, f"{path} is no JSON") from None
        if not isinstance(value, dict):
            raise self._damaged(step, f"{path} is no JSON object")
        return value

    def _damaged(self, step: int, what: str) -> CheckpointError:
        return CheckpointError(f"damaged checkpoint: {what}; {self._remedy(step)}")

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self.steps() if other < step]
        then = f"to resume from step {earlier[-1]}" if earlier else "to start again from step 0"
        return f"delete {self.path(step)} {then}"

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; it stops being one before its first file goes."""
        if path.exists():
            doomed = path.with_name(f"{_TEMPORARY}deleted.{path.name}")
            _delete(doomed)
            os.rename(path, doomed)
            _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _leaves(tree: Any) -> dict[str, str]:
    """Path of each leaf to its dtype and shape, such as float32[4,128]."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _digests(folder: Path, *, sync: bool = False) -> dict[str, str]:
    """Relative name to SHA-256 of every file below, the manifest apart; OSError at a link."""
    digests = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise OSError(0, "is neither a file nor a folder", str(path))
        for name in files:
            path = Path(parent, name)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if sync:
                    os.fsync(file.fileno())
            digests[path.relative_to(folder).as_posix()] = digest
        if sync:
            sync_folder(Path(parent))
    digests.pop("manifest.json", None)
    return dict(sorted(digests.items()))
