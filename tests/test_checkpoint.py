"""Checkpoints: bits, retention, damage of every file, leftovers of a killed process, wrong shapes."""

import contextlib
import importlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.run.checkpoint import CheckpointError, Checkpoints


def state(seed=0):
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -0.0, np.inf, 1e-42, 3.0], np.float32)  # bits that arithmetic would change
    weights = {"kernel": jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32), "odd": jnp.asarray(odd)}
    half = jnp.asarray(rng.standard_normal(6), jnp.bfloat16)
    opt_state = (jnp.int32(seed), (), {"mu": weights["odd"]})
    return {"params": {"0": weights, "half": half}, "opt_state": opt_state}


def like(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints 5 and 10, for copying."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    saved = Checkpoints(folder, keep=2)
    saved.save(5, state(5), {"tokens": 50})
    saved.save(10, state(10), {"tokens": 100})
    return folder


@pytest.fixture
def copied(two_steps, store):
    shutil.copytree(two_steps, store.folder)
    return store


def message(call, *args):
    with pytest.raises(CheckpointError, match=r"\A[^\n]+\Z") as caught:
        call(*args)
    return str(caught.value)


def test_restores_the_same_bits(copied):
    for step in (5, 10):
        restored, info = copied.restore(step, like(state()))
        same(restored, state(step))
        assert info["tokens"] == 10 * step and info["step"] == step


def test_nothing_saved_is_no_step(store):
    assert store.steps() == [] and store.incomplete() == []
    store.collect(None)


def test_retention_keeps_the_newest_and_the_best(store):
    kept = []
    for step, best in [(1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)]:
        store.save(step, state(step), {}, best=best)
        kept.append(store.steps())
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]
    assert sorted(os.listdir(store.folder)) == [f"step_{step:08d}" for step in (5, 6, 7)]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_bit_is_found(copied):
    """One bit in the first, a middle and the last byte of every file, the manifest included."""
    files = files_of(copied.path(10))
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        for place in {0, len(good) // 2, len(good) - 1} if good else ():
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            error = message(copied.restore, 10, like(state()))
            assert str(copied.path(10)) in error and "delete" not in error
            assert error.endswith("restore it from a copy, or use step 5")
            if path.name != "manifest.json":
                assert str(path) in error
        path.write_bytes(good)
    copied.restore(10, like(state()))


def test_missing_truncated_and_foreign_files_are_named(copied):
    folder = copied.path(10)
    for path in files_of(folder):
        if path.name == "manifest.json":
            continue
        good = path.read_bytes()
        path.unlink()
        assert f"{path} is missing" in message(copied.restore, 10, like(state()))
        path.write_bytes(good[:-1] + b"" if good else b"x")
        assert f"{path} differs from its checksum" in message(copied.restore, 10, like(state()))
        path.write_bytes(good)
    extra = folder / "state" / "extra"
    extra.write_bytes(b"")
    assert f"{extra} does not belong to it" in message(copied.restore, 10, like(state()))


def test_links_are_refused(copied, tmp_path):
    victim = max(files_of(copied.path(10)), key=lambda path: path.stat().st_size)
    secret = tmp_path / "elsewhere"
    shutil.move(victim, secret)
    victim.symlink_to(secret)  # the same bytes, but not in the checkpoint
    assert str(victim) in message(copied.restore, 10, like(state()))


def test_the_only_checkpoint_has_no_earlier_one(copied):
    shutil.rmtree(copied.path(5))
    (copied.path(10) / "info.json").write_bytes(b"{}")
    error = message(copied.restore, 10, like(state()))
    assert error.endswith("restore it from a copy")


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_another_format_is_refused(copied, number):
    path = copied.path(10) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": number}))
    assert f"damaged checkpoint: {path} differs from its checksum" in message(
        copied.restore, 10, like(state())
    )
    del manifest["sha256"]  # as every version before it had one
    path.write_text(json.dumps({**manifest, "format": number}))
    error = message(copied.restore, 10, like(state()))
    assert (
        f"{copied.path(10)}: format is {number!r}, this version reads 1 to 2: use the version that" in error
    )
    assert error.endswith(f"or move {copied.path(10)} to another place to use step 5")


def test_a_leaf_that_does_not_fit_is_named(copied):
    def changed(**leaves):
        tree = state()
        tree["params"].update(leaves)
        return like(tree)

    for wanted, error in [
        (changed(half=jnp.zeros(6, jnp.float32)), "params/half is bfloat16[6] in it and float32[6] here"),
        (changed(half=jnp.zeros(7, jnp.bfloat16)), "params/half is bfloat16[6] in it and bfloat16[7] here"),
        (changed(more=jnp.zeros(1)), "params/more is absent in it and float32[1] here"),
        ({**like(state()), "opt_state": ()}, "opt_state/0 is int32[] in it and absent here"),
    ]:
        assert error in message(copied.restore, 10, wanted)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs on but the test."""


@pytest.mark.parametrize(
    "point",
    [
        "train.run.checkpoint.digests",
        "train.run.checkpoint.write_json",
        "train.run.files.sync_folder",
        "os.rename",
        "shutil.rmtree",
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_dying_anywhere_leaves_the_earlier_checkpoints(copied, monkeypatch, point, call):
    """Saving step 15, which deletes step 5, is cut off at the n-th call of each thing it does."""
    owner, _, name = point.rpartition(".")
    real, calls = getattr(importlib.import_module(owner), name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            if name == "rmtree":  # half-way through deleting
                files_of(args[0])[0].unlink()
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(point, dying)
    with contextlib.suppress(Killed):
        copied.save(15, state(15), {"tokens": 150})
    assert calls
    monkeypatch.undo()
    fresh = Checkpoints(copied.folder, keep=2)
    newest = fresh.steps()[-1]
    assert newest in (10, 15) and fresh.incomplete() == []
    for step in fresh.steps():  # a half-deleted one is none
        same(fresh.restore(step, like(state()))[0], state(step))
    fresh.collect(None)
    assert all(entry.startswith("step_") for entry in os.listdir(fresh.folder))
    fresh.save(15, state(15), {"tokens": 150})
    assert fresh.steps() == [10, 15]
    same(fresh.restore(15, like(state()))[0], state(15))


def test_a_step_without_manifest_does_not_count(copied):
    (copied.path(10) / "manifest.json").unlink()
    assert copied.steps() == [5] and copied.incomplete() == ["step_00000010"]
    held = {path.name: path.read_bytes() for path in files_of(copied.path(10))}
    copied.save(10, state(11), {})
    same(copied.restore(10, like(state()))[0], state(11))
    aside = copied.folder / "aside.step_00000010"
    assert {path.name: path.read_bytes() for path in files_of(aside)} == held
