"""Safetensors written: the same bits come back, and an error leaves the folder as it was."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from numpy.testing import assert_array_equal

from attention_jax.pretrained.files import new_folder, open_folder, open_tensors, write_safetensors
from tests.tensor_files import arrays_of_every_dtype, bits, refused, specs_of, write

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shard_size", [5_000_000_000, 100])
def test_written_folders_hold_the_same_bits(tmp_path, shard_size):
    arrays = arrays_of_every_dtype()
    # Any order, from JAX, and not contiguous.
    order = list(arrays)[::-1]
    given = {name: np.array(arrays[name], order="F") for name in order} | {
        "BF16.w": jnp.asarray(arrays["BF16.w"])
    }
    write_safetensors(tmp_path / "a", specs_of(arrays), given.items(), shard_size=shard_size)

    tensors = open_tensors(tmp_path / "a")
    assert sorted(tensors.names()) == sorted(arrays) and tensors.metadata["format"] == "pt"
    for name, x in arrays.items():
        assert (tensors.shape(name), tensors.dtype(name)) == (x.shape, x.dtype)
        assert tensors.read(name).shape == x.shape and bits(tensors.read(name)) == bits(x), name

    # The format's own package reads the same, and every tensor begins at a multiple of its item size.
    found = {}
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    for shard in shards:
        text = shard.read_bytes()
        found |= dict(safetensors.deserialize(text))
        start = 8 + int.from_bytes(text[:8], "little")
        header = json.loads(text[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, described in header.items():
            assert (start + described["data_offsets"][0]) % arrays[name].dtype.itemsize == 0
    assert {name: bytes(each["data"]) for name, each in found.items()} == {
        n: bits(x) for n, x in arrays.items()
    }
    if shard_size == 100:
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
        assert all(
            shard.stat().st_size - 8 - int.from_bytes(shard.read_bytes()[:8], "little") <= 120
            for shard in shards
        )
        index = json.loads((tmp_path / "a" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
        assert index["weight_map"].keys() == arrays.keys()
    else:
        assert os.listdir(tmp_path / "a") == ["model.safetensors"]


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Reading takes the tensor, writing one array: 1 MiB each of 12."""
    shape, dtype, names = (512, 512), np.float32, [f"t{i}" for i in range(12)]
    spec = {name: jax.ShapeDtypeStruct(shape, dtype) for name in names}

    def peak(run) -> float:
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1] / 2**20
        finally:
            tracemalloc.stop()

    assert (
        peak(lambda: write_safetensors(tmp_path, spec, ((name, np.ones(shape, dtype)) for name in names)))
        < 1.2
    )
    tensors = open_folder(tmp_path)
    assert peak(lambda: [tensors.read(name).sum() for name in names]) < 1.2


def failures():
    a, b = np.ones(3, np.float32), np.ones(3, np.float16)
    yield ValueError, "'b' is float16.* its spec float32", [("a", a), ("b", b)]
    yield ValueError, r"'b' is float32'?\(2,\)", [("a", a), ("b", a[:2])]
    yield ValueError, "1 tensors did not come: 'b'", [("a", a)]
    yield ValueError, "'a' came twice", [("a", a), ("a", a)]
    yield ValueError, "'c' is not among the specs", [("c", a)]


@pytest.mark.parametrize("holds", [None, "config.json"])
def test_an_error_leaves_the_folder_as_it_was(tmp_path, holds, monkeypatch):
    folder, ready = tmp_path / "f", np.ones(3, np.float32)
    spec = {name: jax.ShapeDtypeStruct((3,), np.float32) for name in "ab"}
    if holds:
        folder.mkdir()
        (folder / holds).write_text("{}")
    before = sorted(tmp_path.rglob("*"))

    def unchanged():
        assert sorted(tmp_path.rglob("*")) == before

    for _, match, arrays in failures():
        refused(match, write_safetensors, folder, spec, arrays, shard_size=12)
        unchanged()

    def interrupted():
        yield "a", ready
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(folder, spec, interrupted())
    unchanged()

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A full disk while writing, and while the last file takes its name.
    for function in ("pwrite", "rename"):
        calls, usual = [], getattr(os, function)
        monkeypatch.setattr(
            os, function, lambda *a, c=calls, u=usual: (c.append(a), no_space() if len(c) > 1 else u(*a))[1]
        )
        with pytest.raises(OSError, match="No space"):
            write_safetensors(folder, spec, [("a", ready), ("b", ready)], shard_size=12)
        monkeypatch.undo()
        unchanged()
    write(folder, {"a": ready})
    refused("exists already: choose another", write, folder, {"a": ready * 2})
    assert_array_equal(open_folder(folder).read("a"), ready)


def test_specs_that_no_file_can_hold_are_refused(tmp_path):
    for name in ("", "__metadata__", "\ud800", 3):
        refused("cannot be the name", write, tmp_path / "f", {name: np.ones(1, np.float32)})
    refused("has dtype complex64: cast it", write, tmp_path / "f", {"a": np.ones(1, np.complex64)})
    refused("no tensors", write, tmp_path / "f", {})
    refused("shard_size must be a count", write, tmp_path / "f", {"a": np.ones(1)}, shard_size=0)
    assert not (tmp_path / "f").exists()


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    target.mkdir()
    with new_folder(target) as folder:
        write(folder, {"a": np.ones(1, np.float32)})
    assert os.listdir(tmp_path) == ["model"] and os.listdir(target) == ["model.safetensors"]
    assert target.stat().st_mode == tmp_path.joinpath("model").stat().st_mode
    with pytest.raises(ValueError, match="exists already"), new_folder(target):
        raise AssertionError("not reached")
    # One that is filled meanwhile is kept.
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "other") as folder:
        (folder / "new").write_text("")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "old").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["model", "other"] and os.listdir(tmp_path / "other") == ["old"]
