"""What tests of tensor files share: writing, comparing bits, refusals, and GGUF files byte by byte."""

from __future__ import annotations

import re
import struct
from typing import Any

import jax
import numpy as np
import pytest

from attention_jax.pretrained.files import write_safetensors
from attention_jax.pretrained.files.reading import DTYPES


class Held(dict):
    """Tensors in memory by name, read as those of files are; `metadata` is that of the file."""

    def __init__(self, tensors, metadata=()):
        super().__init__(tensors)
        self.metadata = dict(metadata)

    def names(self):
        return list(self)

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype

    def read(self, name):
        return self[name]


def random_bits(rng, shape, dtype) -> np.ndarray:
    """Every bit pattern, NaNs with payloads among them."""
    size = int(np.prod(shape)) * dtype.itemsize
    bits = rng.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    return bits.view(dtype).reshape(shape)


def arrays_of_every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {f"{stored}.w": random_bits(rng, (3, 5), dtype) for stored, dtype in DTYPES.items()}
    return arrays | {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float16)}


def bits(x) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def specs_of(arrays: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


def write(folder, arrays: dict[str, np.ndarray], **options) -> None:
    write_safetensors(folder, specs_of(arrays), arrays.items(), **options)


def refused(match: str, call, *arguments, **options) -> None:
    """ValueError of one line that is short beside the path in it."""
    with pytest.raises(ValueError, match=match) as caught:
        call(*arguments, **options)
    message = re.sub(r"/\S*/", "", str(caught.value))
    assert "\n" not in message and len(message) < 200, message


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def value(kind: int, content: bytes) -> bytes:
    return struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes) -> bytes:
    return value(9, struct.pack("<IQ", kind, count) + content)


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int, rank: int | None = None) -> bytes:
    """Description of a tensor; dims in the order of the file, the last axis first."""
    rank = len(dims) if rank is None else rank
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


def gguf(
    metadata: list[tuple[str, bytes]],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    alignment: int = 32,
    **claims: Any,
) -> bytes:
    """A GGUF file; claims: magic, version, entry_count, tensor_count other than the true ones."""
    head = claims.get("magic", b"GGUF") + struct.pack("<I", claims.get("version", 3))
    head += struct.pack(
        "<QQ", claims.get("tensor_count", len(tensors)), claims.get("entry_count", len(metadata))
    )
    head += b"".join(string(key) + content for key, content in metadata) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data
