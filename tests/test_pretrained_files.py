"""Safetensors folders read and tensors placed: the same bits; hostile files refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from numpy.testing import assert_array_equal

from attention_jax.pretrained.files import (
    open_folder,
    open_tensors,
    place,
    read_folder_json,
    reading,
)
from attention_jax.pretrained.files.reading import File, Place, box_of
from tests.tensor_files import arrays_of_every_dtype, bits, refused, write

ROOT = Path(__file__).parent.parent
INDEX = "model.safetensors.index.json"


def file_of(entries: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_files_of_the_safetensors_package_are_read(tmp_path):
    arrays = {
        name: x for name, x in arrays_of_every_dtype().items() if x.dtype.kind != "V" and "F8" not in name
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt", "by": "x"})
    tensors = open_folder(tmp_path)
    assert tensors.metadata == {"format": "pt", "by": "x"}
    assert {name: bits(tensors.read(name)) for name in tensors.names()} == {
        n: bits(x) for n, x in arrays.items()
    }
    assert_array_equal(open_tensors(tmp_path / "model.safetensors").read("F64.w"), arrays["F64.w"])


def test_slices_are_those_of_the_whole(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(reading, "_PAGE", 24)
    monkeypatch.setattr(reading, "_AT_ONCE", 100)
    x = rng.integers(0, 2**15, (4, 7, 3, 5)).astype("<i2")
    (tmp_path / "x").write_bytes(b"ahead" + bits(x))
    file = File(tmp_path / "x")
    for _ in range(150):
        axes = rng.integers(0, 5)
        shape = (*x.shape[4 - axes :],) if axes else ()
        whole = x.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        index = tuple(
            slice(None) if rng.random() < 0.4 else slice(*sorted(rng.integers(-n, n + 2, 2).tolist()))
            for n in shape[: rng.integers(0, axes + 1)]
        )
        got = file.read_box(Place(shape, x.dtype, 5), box_of(shape, index))
        assert_array_equal(got, whole[index], err_msg=f"{shape} {index}")
        assert got.flags.owndata or not got.size


def test_a_slice_reads_its_bytes_alone(tmp_path, monkeypatch):
    x = np.arange(8 * 4096, dtype=np.float32).reshape(8, 4096)
    write(tmp_path, {"x": x})
    tensors, count, preadv = open_folder(tmp_path), [], os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda d, views, at: count.append(len(views[0])) or preadv(d, views, at)
    )
    for index, least in (((slice(2, 4),), x[2:4].nbytes), ((slice(None), slice(0, 1024)), x.nbytes // 4)):
        count.clear()
        assert_array_equal(tensors.read_slice("x", index), x[index])
        assert sum(count) == least
    # Runs of a few bytes are not worth a call each.
    count.clear()
    assert_array_equal(tensors.read_slice("x", (slice(None), slice(2, 4))), x[:, 2:4])
    assert len(count) == 1


ONE = {"a": entry()}
HEADERS = {
    "short": (b"1234", "4 bytes are no safetensors"),
    "terabyte header": (file_of(ONE, b"x" * 8, length=2**40), "claims a header of 1099511627776"),
    "negative header": (file_of(ONE, b"x" * 8, length=2**64 - 1), "claims a header of 18446744073709551615"),
    "no JSON": (file_of(b'{"a": '), "is not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "is not JSON in UTF-8"),
    "deep JSON": (file_of(b"[" * 200_000), "is not JSON"),
    "no object": (file_of(b"[1, 2]"), "not a JSON object"),
    "NaN": (file_of(b'{"a": NaN}'), "holds NaN"),
    "long number": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "thousands of digits"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "past the end": (file_of(ONE, b"x" * 7), "'a' ends at"),
    "terabyte tensor": (file_of({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"x" * 8), "ends at"),
    "overflow": (file_of({"a": entry(shape=(2**62, 4), offsets=(0, 0))}), "claims the shape"),
    "overflow beside 0": (file_of({"a": entry(shape=(2**70, 0), offsets=(0, 0))}), "claims the shape"),
    "many axes": (file_of({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, b"x" * 4), "claims the shape"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12), "'b' overlaps"),
    "same bytes": (file_of({"a": entry(), "b": entry()}, b"x" * 8), "'b' overlaps"),
    "gap": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, b"x" * 20), "leaves a gap after byte 8"),
    "hidden end": (file_of(ONE, b"x" * 9), "1 bytes at its end"),
    "wrong size": (file_of({"a": entry(shape=(3,))}, b"x" * 8), "of shape .3. has 8 bytes"),
    "backwards": (file_of({"a": entry(offsets=(8, 0))}, b"x" * 8), "has -8 bytes"),
    "negative": (file_of({"a": entry(offsets=(-8, 0))}, b"x" * 8), "not lists of counts"),
    "negative shape": (file_of({"a": entry(shape=(-1, -2))}, b"x" * 8), "not lists of counts"),
    "no whole number": (file_of({"a": entry(shape=(2.0,))}, b"x" * 8), "not lists of counts"),
    "a boolean": (file_of({"a": entry(shape=(True, 2))}, b"x" * 8), "not lists of counts"),
    "unknown dtype": (file_of({"a": entry(dtype="F4")}, b"x" * 8), "has dtype 'F4'"),
    "no dtype": (file_of({"a": entry(dtype=["F32"])}, b"x" * 8), "has dtype"),
    "no entry": (file_of({"a": 3}), "not described by"),
    "more keys": (file_of({"a": entry() | {"x": 1}}, b"x" * 8), "not described by"),
    "twice": (
        file_of(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), b"x" * 8),
        "'a' twice",
    ),
    "metadata": (file_of({"__metadata__": {"a": 1}} | ONE, b"x" * 8), "not of strings"),
    "name": (file_of({"a\n" * 500: entry(dtype="F4")}, b"x" * 8), "has dtype 'F4'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused(tmp_path, case):
    content, match = HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        refused(match, open_folder, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def sharded(folder: Path) -> dict:
    """A folder of two shards, and its index."""
    write(folder, {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}, shard_size=16)
    return json.loads((folder / INDEX).read_text())


def test_an_index_agrees_with_its_shards(tmp_path):
    index = sharded(tmp_path)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index["weight_map"] == {"a": first, "b": second}

    def with_map(match, **changed):
        weights = {
            name: shard for name, shard in (index["weight_map"] | changed).items() if shard is not None
        }
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
        refused(match, open_folder, tmp_path)

    with_map("lacks 'c', which the index places there", c=first)
    with_map("holds 'b', for which the index names no shard", b=None, c=second)
    with_map("holds 'a', for which the index names 'model-00002", a=second, c=first)
    with_map("no such file: download it again", b="model-00003-of-00003.safetensors")
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes((tmp_path / second).read_bytes())
    for name in (
        "../outside.safetensors",
        str(outside),
        "sub/x.safetensors",
        "..\\outside.safetensors",
        "c:x.safetensors",
    ):
        with_map("expected a .safetensors of the folder", b=name)
    for name in ("pytorch_model.bin", ".x.safetensors", "a\n.safetensors", 3, ["x"]):
        with_map("expected a .safetensors of the folder", b=name)
    for text, match in (
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ("[]", "JSON object"),
    ):
        (tmp_path / INDEX).write_text(text)
        refused(match, open_folder, tmp_path)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"a": "{first}", "a": "{second}"}}}}')
    refused("'a' twice", open_folder, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(outside.read_bytes())
    refused("has both model.safetensors and", open_folder, tmp_path)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(tmp_path):
    write(tmp_path / "real", {"a": np.ones(4, np.float32)})
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "revision"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    os.rename(tmp_path / "real" / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_folder(snapshot).names() == ["a"]
    (snapshot / "config.json").write_text('{"a": [1, NaN]}')
    refused("config.json holds NaN", read_folder_json, snapshot, "config.json")
    (snapshot / "config.json").write_text('{"a": [1]}')
    assert read_folder_json(snapshot, "config.json") == {"a": [1]}
    refused("no such file", read_folder_json, snapshot, "tokenizer.json")
    (snapshot / "part").mkdir()
    (snapshot / "part" / "model.safetensors").symlink_to("../../../blobs/0123")
    assert open_folder(snapshot / "part").names() == ["a"]
    (tmp_path / "alias").symlink_to(snapshot)
    assert open_folder(tmp_path / "alias").names() == ["a"]
    link = tmp_path / "real" / "model.safetensors"
    link.symlink_to(blobs / "0123")
    refused("outside of the folder: copy", open_folder, tmp_path / "real")
    link.unlink(), link.symlink_to("model.safetensors")
    refused("no such file", open_folder, tmp_path / "real")
    link.unlink(), os.mkfifo(link)
    refused("not a file", open_folder, tmp_path / "real")


def test_folders_without_safetensors_say_what_to_do(tmp_path):
    refused("no such folder", open_folder, tmp_path / "x")
    refused("no such file or folder", open_tensors, tmp_path / "x")
    refused("has neither model.safetensors nor", open_folder, tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    refused("open its file 'x.gguf' by name", open_folder, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("'pytorch_model.bin', and pickles are not read: convert it", open_folder, tmp_path)
    refused("pickles are not read", open_tensors, tmp_path / "pytorch_model.bin")


def test_a_file_that_changes_is_refused(tmp_path):
    write(tmp_path, {"a": np.ones(4, np.float32)})
    tensors, path = open_folder(tmp_path), tmp_path / "model.safetensors"
    refused("no tensor 'b'", tensors.read, "b")
    refused("not a slice without a step", tensors.read_slice, "a", (slice(0, 4, 2),))
    refused("2 slices for shape", tensors.read_slice, "a", (slice(0, 4), slice(0, 1)))
    path.write_bytes(path.read_bytes()[:-1])
    refused("changed since it was opened", tensors.read, "a")


def test_tensors_are_placed(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    write(tmp_path, {"x": x, "d": x.astype(np.float64), "i": np.arange(3)})
    tensors = open_folder(tmp_path)
    assert_array_equal(place(tensors, "x"), x)
    assert place(tensors, "x", jax.devices()[0], dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert_array_equal(place(tensors, "d", dtype="float32"), x)
    refused("set jax_enable_x64", place, tensors, "d")
    refused("only floats are cast", place, tensors, "i", dtype=jnp.float32)


SHARDED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from attention_jax.pretrained.files import read_folder_json, open_folder, place
tensors, mesh = open_folder(sys.argv[1]), jax.make_mesh((4, 2), ("data", "model"))
x, reads = tensors.read("x"), []
read_slice = tensors.read_slice
tensors.read_slice = lambda name, index: reads.append(index) or read_slice(name, index)
SPECS = (("data", "model"), 8), (("data",), 4), ((None, "model"), 2), ((), 1), ((("model", "data"),), 8)
for spec, parts in SPECS:
    reads.clear()
    y = place(tensors, "x", jax.sharding.NamedSharding(mesh, jax.P(*spec)), dtype="bfloat16")
    assert y.sharding.spec == jax.P(*spec) and len(reads) == parts, (spec, reads)
    np.testing.assert_array_equal(y, x.astype("bfloat16"))
"""


def test_shardings_read_each_part_once(tmp_path):
    write(tmp_path, {"x": np.random.default_rng(3).normal(size=(16, 12)).astype(np.float32)})
    subprocess.run([sys.executable, "-c", SHARDED, tmp_path], check=True, cwd=ROOT, timeout=120)
