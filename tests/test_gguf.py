"""GGUF files: numbers, shapes and metadata as the format defines them, hostile files refused in one line."""

from __future__ import annotations

import struct
import tracemalloc
from functools import partial

import gguf as package
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.pretrained.files import gguf_file, open_gguf, open_tensors, place
from tests.tensor_files import array, bits, gguf, refused, string, tensor, value

# Number in the file, numbers per block, bytes per block.
KINDS = {"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q8_0": (8, 32, 34)}
KINDS |= {"Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}


def half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def nibbles(block: bytes) -> list[int]:
    """The low halves of all bytes, then the high ones."""
    return [b & 15 for b in block] + [b >> 4 for b in block]


def q4_k(block: bytes) -> list[float]:
    d, dmin, packed, quants = half(block, 0), half(block, 2), block[4:16], block[16:]
    numbers = []
    for j in range(8):
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4
            least = packed[j + 4] >> 4 | (packed[j] >> 6) << 4
        some = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        numbers += [d * scale * (b >> 4 if j % 2 else b & 15) - dmin * least for b in some]
    return numbers


def q6_k(block: bytes) -> list[float]:
    low, high, scales, d = (
        block[:128],
        block[128:192],
        struct.unpack_from("<16b", block, 192),
        half(block, 208),
    )
    numbers = []
    for n in range(256):
        group, quarter, i = n // 128, n % 128 // 32, n % 32
        lower = low[64 * group + 32 * (quarter % 2) + i]
        lower = lower >> 4 if quarter >= 2 else lower & 15
        upper = high[32 * group + i] >> 2 * quarter & 3
        numbers.append(d * scales[n // 16] * ((lower | upper << 4) - 32))
    return numbers


def reference(kind: str, block: bytes) -> list[float]:
    """The numbers of a block in float64, from ggml's definition of its type."""
    d = half(block, 0)
    if kind == "Q8_0":
        return [d * q for q in struct.unpack_from("<32b", block, 2)]
    if kind == "Q4_0":
        return [d * (q - 8) for q in nibbles(block[2:])]
    if kind == "Q4_1":
        return [d * q + half(block, 2) for q in nibbles(block[4:])]
    if kind == "Q5_0":
        fifth = int.from_bytes(block[2:6], "little")
        return [d * ((q | (fifth >> i & 1) << 4) - 16) for i, q in enumerate(nibbles(block[6:]))]
    return q4_k(block) if kind == "Q4_K" else q6_k(block)


def random_blocks(rng, kind: str, count: int) -> bytes:
    """Random bytes, with finite scales of both signs."""
    _, _, size = KINDS[kind]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for at in {"Q6_K": [208], "Q4_1": [0, 2], "Q4_K": [0, 2]}.get(kind, [0]):
        blocks[:, at : at + 2] = rng.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def file_of(path, kinds: dict[str, tuple[int, tuple[int, ...], bytes]], metadata=()):
    """Write tensors: name to number of the type, NumPy shape, bytes."""
    described, data = [], b""
    for name, (number, shape, content) in kinds.items():
        data += b"\0" * (-len(data) % 32)
        described.append(tensor(name, shape[::-1], number, len(data)))
        data += content
    path.write_bytes(gguf(list(metadata), described, data))
    return open_gguf(path)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_dequantised_as_the_format_defines(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 1024)
    rng, (number, block, size) = np.random.default_rng(0), KINDS[kind]
    shape = (2, 3, 4 * block)
    content = random_blocks(rng, kind, 24)
    tensors = file_of(tmp_path / "x.gguf", {"first": (0, (3,), bytes(12)), "w": (number, shape, content)})
    want = [reference(kind, content[at : at + size]) for at in range(0, len(content), size)]
    want = np.array(want).reshape(shape)

    got = tensors.read("w")
    assert got.dtype == tensors.dtype("w") == np.float32 and tensors.shape("w") == shape
    assert tensors.kind("w") == kind
    # Two products and a sum of float32 numbers; the terms of a difference are at most this large.
    assert_allclose(got, want, rtol=0, atol=3 * 2**-24 * np.abs(want).max())
    assert_array_equal(got.astype(np.float32), got)

    for index in (
        (slice(1, 2),),
        (slice(None), slice(1, 3), slice(block, 3 * block)),
        (slice(None), slice(2, 3), slice(block - 1, block + 1)),
        (slice(0, 2), slice(0, 3), slice(5, 6)),
        (slice(0, 0),),
        (slice(None), slice(None), slice(7, 7)),
    ):
        assert_array_equal(tensors.read_slice("w", index), got[index])
    assert_array_equal(place(tensors, "w", jax.devices()[0]), got)


def test_a_slice_dequantises_its_rows_alone(tmp_path, monkeypatch):
    content = random_blocks(np.random.default_rng(1), "Q8_0", 64)
    tensors = file_of(tmp_path / "x.gguf", {"w": (8, (32, 64), content), "v": (8, (64,), content[: 2 * 34])})
    whole, seen, dequantize = tensors.read("w"), [], package.quants.dequantize
    assert_array_equal(tensors.read("v"), whole[0])
    assert_array_equal(tensors.read_slice("v", (slice(31, 40),)), whole[0, 31:40])
    monkeypatch.setattr(
        package.quants, "dequantize", lambda x, kind: seen.append(x.size) or dequantize(x, kind)
    )
    assert_array_equal(tensors.read_slice("w", (slice(3, 5), slice(40, 50))), whole[3:5, 40:50])
    assert seen == [2 * 34]


def test_plain_types_keep_their_bits(tmp_path):
    rng = np.random.default_rng(2)
    contents = {
        name: rng.integers(0, 256, size, np.uint8).tobytes()
        for name, size in (("f", 60), ("h", 30), ("b", 30))
    }
    scalar = np.array(7, np.float32)
    tensors = file_of(
        tmp_path / "x.gguf",
        {"f": (0, (3, 5), contents["f"]), "h": (1, (3, 5), contents["h"]), "b": (30, (3, 5), contents["b"]),
         "one": (0, (), bits(scalar))},
    )  # fmt: skip
    assert [tensors.dtype(n).name for n in "fhb"] == ["float32", "float16", "bfloat16"]
    for name, content in contents.items():
        assert bits(tensors.read(name)) == content and tensors.read(name).shape == (3, 5)
        assert (
            bits(tensors.read_slice(name, (slice(1, 2),)))
            == content[len(content) // 3 :][: len(content) // 3]
        )
    assert tensors.read("one") == scalar and tensors.read("one").shape == ()
    refused("no tensor 'x'", tensors.read, "x")


def test_metadata_is_plain_values(tmp_path):
    numbers = {
        0: ("B", 255),
        1: ("b", -128),
        2: ("H", 65535),
        3: ("h", -5),
        4: ("I", 2**32 - 1),
        5: ("i", -(2**31)),
    }
    numbers |= {6: ("f", 0.5), 7: ("?", True), 10: ("Q", 2**64 - 1), 11: ("q", -(2**63)), 12: ("d", 0.1)}
    metadata = [(f"n{kind}", value(kind, struct.pack(f"<{code}", x))) for kind, (code, x) in numbers.items()]
    metadata += [
        (f"a{kind}", array(kind, 2, struct.pack(f"<2{code}", x, x))) for kind, (code, x) in numbers.items()
    ]
    metadata += [
        ("text", value(8, string("größe"))),
        ("words", array(8, 3, string("a") + string("") + string("é"))),
    ]
    metadata += [("none", array(8, 0, b"")), ("split.count", value(2, b"\1\0"))]
    found = file_of(tmp_path / "x.gguf", {}, metadata).metadata
    want = {f"n{kind}": x for kind, (_, x) in numbers.items()} | {
        f"a{kind}": [x, x] for kind, (_, x) in numbers.items()
    }
    want |= {"text": "größe", "words": ["a", "", "é"], "none": [], "split.count": 1}
    assert found == want and {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in want.items()}


def test_files_of_the_gguf_package_are_read(tmp_path):
    rng, path = np.random.default_rng(3), str(tmp_path / "x.gguf")
    x = rng.normal(size=(6, 64)).astype(np.float32)
    writer = package.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["<s>", "a"])
    writer.add_custom_alignment(64)
    writer.add_tensor("x", x)
    writer.add_tensor("h", x.astype(np.float16))
    q8 = package.quants.quantize(x, package.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", q8, raw_dtype=package.GGMLQuantizationType.Q8_0)
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )

    tensors = open_tensors(path)
    read = package.GGUFReader(path)
    assert tensors.names() == [each.name for each in read.tensors] == ["x", "h", "q"]
    assert_array_equal(tensors.read("x"), x)
    assert_array_equal(tensors.read("h"), x.astype(np.float16))
    assert tensors.shape("q") == x.shape and np.abs(tensors.read("q") - x).max() < 0.02
    mine = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    assert tensors.metadata == mine


ONE, DATA = tensor("a", (32,), 8, 0), b"\0" * 34
Q = partial(struct.pack, "<Q")
HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "magic": (gguf([], [ONE], DATA, magic=b"GGML"), "not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "version 1": (gguf([], [ONE], DATA, version=1), "GGUF version 1, supported are 2 and 3"),
    "version 4": (gguf([], [ONE], DATA, version=4), "GGUF version 4"),
    "version 0": (gguf([], [ONE], DATA, version=0), "GGUF version 0"),
    "big-endian": (gguf([], [ONE], DATA, version=3 << 24), "big-endian"),
    "entries": (gguf([], [ONE], DATA, entry_count=2**60), "claims 1152921504606846976 metadata entries"),
    "tensors": (gguf([], [ONE], DATA, tensor_count=2**60), "claims 1152921504606846976 tensors"),
    "tensors beyond the end": (gguf([], [ONE], DATA, tensor_count=4), "claims 4 tensors"),
    "key length": (
        gguf([], [Q(2**60) + bytes(8)], entry_count=1, tensor_count=0),
        "claims 1152921504606846976 bytes",
    ),
    "string length": (gguf([("k", value(8, Q(2**60)))], [], DATA), "claims 1152921504606846976 bytes"),
    "bytes": (gguf([("k", array(0, 2**60, b""))], [ONE], DATA), "claims 1152921504606846976 numbers in 'k'"),
    "strings": (
        gguf([("k", array(8, 2**60, b""))], [ONE], DATA),
        "claims 1152921504606846976 strings in 'k'",
    ),
    "arrays": (gguf([("k", array(9, 2**60, b""))], [ONE], DATA), "'k' is an array of the type 9"),
    "type": (gguf([("k", value(13, b""))], [ONE], DATA), "'k' has the unknown type 13"),
    "element type": (gguf([("k", array(77, 1, b""))], [ONE], DATA), "'k' is an array of the type 77"),
    "key twice": (gguf([("k", value(0, b"\0"))] * 2, [ONE], DATA), "metadata has 'k' twice"),
    "no UTF-8": (gguf([("k", value(8, string(b"\xff")))], [ONE], DATA), "'k' is not UTF-8"),
    "split": (gguf([("split.count", value(2, b"\2\0"))], [ONE], DATA), "one part of several: merge"),
    "alignment": (gguf([("general.alignment", value(4, b"\3\0\0\0"))], [ONE], DATA), "not a power of two"),
    "no alignment": (gguf([("general.alignment", value(4, bytes(4)))], [ONE], DATA), "not a power of two"),
    "alignment's type": (
        gguf([("general.alignment", value(8, string("32")))], [ONE], DATA),
        "not a power of two",
    ),
    "name twice": (gguf([], [ONE, ONE], DATA), "holds 'a' twice"),
    "axes": (gguf([], [tensor("a", (1,), 0, 0, rank=2**31)], DATA), "claims 2147483648 axes"),
    "numbers": (gguf([], [tensor("a", (2**62, 2**62), 0, 0)], DATA), "claims the shape"),
    "no numbers": (gguf([], [tensor("a", (0, 2**60), 0, 0)], DATA), "claims the shape"),
    "terabytes": (gguf([], [tensor("a", (2**40,), 0, 0)], DATA), "'a' ends at 4398046511"),
    "offset": (gguf([], [tensor("a", (32,), 8, 2**60)], DATA), "ends at 115292150460684"),
    "not aligned": (gguf([], [tensor("a", (1,), 0, 4)], DATA), "lies at 4, no multiple of 32"),
    "overlap": (gguf([], [ONE, tensor("b", (1,), 0, 32)], b"\0" * 68), "'b' overlaps 'a'"),
    "cut": (gguf([], [ONE], DATA[:-1]), "'a' ends at"),
    "row": (gguf([], [tensor("a", (16, 2), 8, 0)], DATA), r"Q8_0 has rows of \(2, 16\), not of 32s"),
    "quantised scalar": (gguf([], [tensor("a", (), 8, 0)], DATA), "not of 32s"),
    "unsupported": (
        gguf([], [tensor("a", (256,), 10, 0)], b"\0" * 84),
        "'a' is stored as Q2_K: supported are F32",
    ),
    "integers": (gguf([], [tensor("a", (1,), 26, 0)], DATA), "'a' is stored as I32"),
    "unknown": (gguf([], [tensor("a", (1,), 999, 0)], DATA), "'a' has the unknown type 999"),
    "name": (gguf([], [tensor("a\n" * 999, (1,), 999, 0)], DATA), "has the unknown type 999"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path, case):
    content, match = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        refused(match, open_gguf, tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path):
    whole = gguf([("k", array(8, 1, string("word"))), ("n", value(4, bytes(4)))], [ONE], DATA)
    for size in range(len(whole)):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        refused("not a GGUF file|claims|ends at", open_gguf, tmp_path / "x.gguf")
