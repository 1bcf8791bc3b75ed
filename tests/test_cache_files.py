"""States in files: the same bits come back, and a wrong or damaged file is refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_array_equal

from attention_jax.caches import (
    CacheOptions,
    LinearState,
    MemoryCache,
    RecurrentState,
    State,
    files,
    load,
    save,
    storable,
)
from attention_jax.masks import Dense, Predicate, SlidingWindow
from attention_jax.mixers import make_config
from attention_jax.model import ModelConfig, cache_bytes, fingerprint, init_params, init_state
from tests.mixers import CROSS, MIXERS

MODEL = "a" * 64


@storable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """A state of decoding, as generation has one."""

    caches: Any
    positions_B: jax.Array
    key: jax.Array
    width: int = dataclasses.field(metadata={"static": True})
    names: tuple = dataclasses.field(metadata={"static": True}, default=())


def config_of(*kinds, **options) -> ModelConfig:
    mixers = tuple(make_config(kind, num_heads=2, **more) for kind, more in kinds)
    sizes = {"vocab_size": 13, "d_model": 16, "num_layers": len(mixers), "mlp_width": 8}
    return ModelConfig(**sizes | options, mixers=mixers)


NSA = {"compress_block": 4, "compress_stride": 2, "select_block": 4, "select_count": 3, "window": 5}
HYBRID = config_of(
    ("softmax", {"mask": "(SlidingWindow(4) | Sinks(2)) & Causal()"}),
    ("nsa", NSA),
    ("forgetting", {}),
    ("gla", {}),
)


def random_like(state: Any, seed: int = 0) -> Any:
    """The state with random bits in every array that is not of floats, and normal numbers in the others."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=x.shape), x.dtype)
        if x.dtype == bool:
            return jnp.asarray(rng.random(x.shape) < 0.5)
        limits = jnp.iinfo(x.dtype)
        return jnp.asarray(rng.integers(limits.min, limits.max, x.shape, endpoint=True), x.dtype)

    return jax.tree.map(fill, state)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = (np.asarray(array).reshape(-1).view(np.uint8) for array in (x, y))
        assert_array_equal(x, y)


OPTIONS = {
    "plain": CacheOptions(),
    "bf16": CacheOptions(jnp.bfloat16, spare=2),
    "int8": CacheOptions(jnp.bfloat16, quantize="int8", residual=2),
    "int4": CacheOptions(jnp.float8_e4m3fn, quantize="int4"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_comes_back_with_the_same_bits(name, tmp_path):
    caches = random_like(init_state(HYBRID, 2, 20, cache=OPTIONS[name]))
    state = Decoding(
        caches, jnp.array([3, 4]), jax.random.split(jax.random.key(0), 2), 7, ("a", None, (1.5, True))
    )
    save(tmp_path / "state", state, model=MODEL)
    assert os.listdir(tmp_path) == ["state"]
    same(load(tmp_path / "state", model=MODEL), state)


def test_every_class_and_container_comes_back(tmp_path):
    ones = jnp.ones((2, 3, 1, 4))
    state = {
        "list": [RecurrentState.empty(2, 1, 3, 4), LinearState(ones, None, jnp.full((2, 1), -jnp.inf))],
        "tuple": (None, np.array([True, False]), jnp.float16(2)),
        "memory": MemoryCache.empty(2, 2, 3, dtype=jnp.bfloat16),
        "int": (jnp.arange(3, dtype=jnp.uint8), jnp.zeros((0, 2), jnp.int16)),
    }
    path = str(tmp_path / "state.safetensors")
    save(path, state, model=MODEL)
    same(load(path, model=MODEL), jax.tree.map(jnp.asarray, state))
    save(path, ones, model=MODEL)
    same(load(path, model=MODEL), ones)


@pytest.fixture
def saved(tmp_path):
    """The path of a state in a file, and the bytes of the file."""
    path = tmp_path / "state"
    save(path, random_like(init_state(HYBRID, 1, 8)), model=MODEL)
    return path, path.read_bytes()


def rewritten(path, change) -> None:
    """Write the file again with its tensors and description changed by `change(tensors, description)`."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    description = json.loads(metadata["attention_jax"])
    change(tensors, description)
    text = json.dumps(description)
    metadata = {"attention_jax": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    safetensors.numpy.save_file(tensors, path, metadata)


def refusal(path, model=MODEL) -> str:
    with pytest.raises(ValueError, match="^/") as error:
        load(path, model=model)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_state_of_another_model_is_refused(saved):
    text = refusal(saved[0], "b" * 64)
    assert text == f"state of model {MODEL}, not of {'b' * 64}: prefill again or load that model"


def test_truncated_files_are_refused(saved):
    path, content = saved
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (
        0,
        5,
        8,
        100,
        header - 1,
        header,
        header + 1,
        len(content) // 2 + header // 2,
        len(content) - 1,
    ):
        path.write_bytes(content[:size])
        assert refusal(path).startswith("damaged state: "), size
    path.write_bytes(content + b"\0")
    assert refusal(path).startswith("damaged state: ")


def test_a_flipped_bit_is_found_wherever_it_is(saved):
    """In the length, the header, the description and the tensors; never another error or another state."""
    path, content = saved
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(8), *rng.integers(8, header, 60), *rng.integers(header, len(content), 20)]:
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(flipped)
        assert refusal(path).startswith("damaged state: "), at


def test_sizes_are_compared_before_anything_is_allocated(saved):
    path, content = saved
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert "do not hold a header of 4611686018427387904" in refusal(path)
    huge = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "__metadata__": {}}
    )
    path.write_bytes(len(huge).to_bytes(8, "little") + huge.encode())
    assert refusal(path).startswith("damaged state: ")


def test_files_that_hold_something_else_are_refused(saved):
    path, _ = saved
    path.write_text("hello, this is no state at all")
    assert refusal(path).startswith("damaged state: ")
    safetensors.numpy.save_file({"x": np.ones(3)}, path)
    assert "the header is not one that caches.save writes" in refusal(path)
    text = b'{"x": {"dtype": "F32", "shape": [%s]}}' % (b"9" * 5000)  # more digits than Python reads
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "the header is not one that caches.save writes" in refusal(path)
    with pytest.raises(FileNotFoundError):
        load(path.with_name("absent"), model=MODEL)


WRONG = {
    "format": (lambda t, d: d.update(format=2), "state of format 2, expected 1: prefill again"),
    "missing": (lambda t, d: t.pop(next(iter(t))), "damaged state: tensor '.*' is missing"),
    "shape": (lambda t, d: d["tensors"][0].update(shape=[1]), "tensor '0 .*' has shape .*, not \\[1\\]"),
    "dtype": (lambda t, d: d["tensors"][0].update(dtype="int8"), "tensor '0 .*' has dtype F32, not int8"),
    "class": (
        lambda t, d: d["tree"]["list"][0].update({"class": "os.system"}),
        "holds a os.system, an unknown class: import its module first",
    ),
    "fields": (
        lambda t, d: d["tree"]["list"][0]["static"].pop("spare"),
        "holds a KVCache of another version, which differs in spare: prefill again",
    ),
    "tree": (lambda t, d: d.update(tree={"what": 1}), "the description is not one that caches.save writes"),
    "twice": (lambda t, d: d.update(tree={"list": [0, 0]}), "the description is not one that caches.save"),
    "model": (lambda t, d: d.update(model="z\n" * 9000), "state of model (z ){39}z, not of"),
    "index": (lambda t, d: d.update(tree=10**6), "the description is not one that caches.save writes"),
    "bytes": (lambda t, d: t[d["tensors"][0]["name"]].fill(0), "the tensors have another SHA-256"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_description_is_refused(name, saved):
    change, message = WRONG[name]
    rewritten(saved[0], change)
    text = refusal(saved[0])
    assert re.search(message, text), text


class Pair(NamedTuple):
    """A class that no file may hold, since it is not registered."""

    x: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Odd(State):
    """A state whose static field may be anything."""

    f: Any = dataclasses.field(metadata={"static": True})


def test_what_a_file_cannot_hold_is_refused_by_its_place(tmp_path):
    path = tmp_path / "state"
    x = jnp.ones(2)
    for state, message in (
        (
            {"a": [x, Pair(x)]},
            "save: /a/1 is a .*test_cache_files.Pair, which no file can hold: see caches.storable",
        ),
        ({"a": 3}, "save: /a is a builtins.int, which no file can hold"),
        ({"a": {1: x}}, "save: /a is a builtins.dict, which no file can hold"),
        ({"a": np.array([None])}, "save: /a has dtype object, which a file cannot hold"),
        ([Odd(print)], "save: the static field /0/f is a builtin_function_or_method, which no file can hold"),
    ):
        with pytest.raises(ValueError, match=message):
            save(path, state, model=MODEL)
    with pytest.raises(ValueError, match="save: /a is a jax"):
        jax.jit(lambda x: save(path, {"a": x}, model=MODEL))(x)
    for model in (None, "", 3):
        with pytest.raises(ValueError, match="model must be the fingerprint of the model, a string, got"):
            save(path, x, model=model)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace", "save_file"])
def test_an_error_while_writing_leaves_the_old_file(failing, saved, monkeypatch):
    path, content = saved

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files if failing == "save_file" else files.os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(path, jnp.ones(3), model=MODEL)
    monkeypatch.undo()
    assert path.read_bytes() == content and os.listdir(path.parent) == ["state"]


def test_a_float64_state_needs_x64(tmp_path):
    save(tmp_path / "state", np.ones(3), model=MODEL)
    assert "holds float64 numbers, which JAX would round: set jax_enable_x64" in refusal(tmp_path / "state")


def test_a_fingerprint_depends_on_every_option_and_parameter():
    config = config_of(("softmax", {}))
    params = init_params(config, jax.random.key(0))
    known = fingerprint(config, params)
    assert len(known) == 64 and set(known) <= set("0123456789abcdef")
    assert known == fingerprint(config_of(("softmax", {})), jax.tree.map(np.asarray, params))
    others = [
        fingerprint(dataclasses.replace(config, norm_eps=2e-5), params),
        fingerprint(dataclasses.replace(config, dtype="bfloat16"), params),
        fingerprint(config_of(("softmax", {"mask": SlidingWindow(4)})), params),
        fingerprint(config_of(("softmax", {"mask": Predicate(max)})), params),
        *(fingerprint(config_of(("softmax", {"mask": Dense(np.eye(2) > n)})), params) for n in (0, 1)),
        fingerprint(config, params | {"more": jnp.ones(1)}),
        fingerprint(config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)),
        fingerprint(config, init_params(config, jax.random.key(1))),
    ]
    embedding = params["embed"]["embedding"]
    flipped = embedding.at[3, 2].set(jnp.nextafter(embedding[3, 2], jnp.inf))
    others.append(fingerprint(config, params | {"embed": {"embedding": flipped}}))
    assert len({known, *others}) == len(others) + 1


@pytest.mark.parametrize(
    "scan, options", [(True, CacheOptions()), (False, CacheOptions(jnp.bfloat16, 2, "int8", 3))]
)
def test_the_size_of_every_state_is_known_beforehand(scan, options):
    mixers = tuple(case.config for case in MIXERS.values()) + (CROSS,)
    config = ModelConfig(
        vocab_size=7,
        d_model=32,
        num_layers=len(mixers),
        mixers=mixers,
        mlp_width=8,
        scan_layers=scan,
        dtype="bfloat16",
    )
    states = init_state(config, 3, 40, cache=options)
    assert cache_bytes(config, 3, 40, options) == tuple(state.nbytes for state in states)


def test_the_size_of_an_encoders_memory_is_known_beforehand():
    config = config_of(("cross", {}), ("softmax", {}))
    state, _ = init_state(config, 2, 8)
    memory = state.append(jnp.ones((2, 5, 2, 8)), jnp.ones((2, 5, 2, 8)), jnp.zeros((2, 5), jnp.int32))
    told = cache_bytes(config, 2, 8, memory_length=5)
    assert told == (memory.nbytes, cache_bytes(config, 2, 8)[1]) and cache_bytes(config, 2, 8)[0] == 0


def test_a_size_is_refused_as_a_state_is():
    linformer = ModelConfig(
        vocab_size=7,
        d_model=16,
        num_layers=1,
        causal=False,
        mixers=(make_config("linformer", num_heads=2, length=8, projected_length=4),),
    )
    with pytest.raises(ValueError, match="linformer has no state"):
        cache_bytes(linformer, 1, 8)
    with pytest.raises(ValueError, match="capacity 9 exceeds the 8 learned positions"):
        cache_bytes(config_of(("softmax", {}), max_positions=8), 1, 9)


def test_only_files_are_replaced(tmp_path):
    """A rename would put a file in the place of a device or a folder; a link keeps its place."""
    state = {"x": jnp.arange(3)}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name}: is a folder or a device, not a file"):
            save(tmp_path / name, state, model=MODEL)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save(tmp_path / "link", state, model=MODEL)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "file").is_symlink()
    assert_array_equal(load(tmp_path / "file", model=MODEL)["x"], [0, 1, 2])
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
