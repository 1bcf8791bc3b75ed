"""Tokenizers without a file: bytes, or the characters of a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from attention_jax.tokenizers import base
from attention_jax.tokenizers.base import Pieces


class ByteTokenizer:
    """UTF-8 bytes 0 ... 255, and the end-of-document token 256, which also starts a document."""

    kind = "bytes"
    vocab_size = 257
    end_of_document: int | None = 256
    pieces = Pieces({i: bytes([i]) for i in range(256)} | {256: b""}, frozenset({256}))

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text's UTF-8 bytes, without end-of-document. ValueError for a lone surrogate."""
        raw = base.checked_text(text).encode()
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD, end-of-document tokens are left out.

        ValueError for a negative id.
        """
        return base.decode(self, ids)

    def raw_bytes(self, ids: np.ndarray) -> bytes:
        """The bytes, without end-of-document tokens."""
        return ids[ids != self.end_of_document].astype(np.uint8).tobytes()

    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""
        return {"kind": self.kind}


class CharTokenizer:
    """The sorted characters of a corpus, ids 0 ... V - 1, without an end-of-document token."""

    kind = "chars"
    end_of_document: int | None = None

    def __init__(self, characters: Iterable[str]):
        self.characters = tuple(characters)
        if list(self.characters) != sorted(set(self.characters)) or any(len(c) != 1 for c in self.characters):
            raise ValueError("a character vocabulary holds single characters, sorted, each once")
        if not self.characters:
            raise ValueError("a character vocabulary needs at least one character")
        self.vocab_size = len(self.characters)
        self._points = np.array([ord(c) for c in self.characters], np.uint32)
        self.pieces = Pieces({i: c.encode("utf-8", "surrogatepass") for i, c in enumerate(self.characters)})

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharTokenizer:
        """The vocabulary of some texts."""
        return cls(sorted(set().union(*texts)))

    def encode(self, text: str) -> np.ndarray:
        """int32 ids. ValueError names a character that the vocabulary lacks."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if unknown.size:
            where = int(unknown[0])
            raise ValueError(
                f"character {text[where]!r} at {where} is not among the {self.vocab_size} characters "
                "of the training text"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text. ValueError for a negative id."""
        return base.decode(self, ids)

    def raw_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 bytes of the text."""
        return self._points[ids].tobytes().decode("utf-32-le").encode()

    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""
        return {"kind": self.kind, "characters": list(self.characters)}


def make(kind: str, texts: Iterable[str]) -> ByteTokenizer | CharTokenizer:
    """The tokenizer that a configuration names, for a corpus."""
    return ByteTokenizer() if kind == "bytes" else CharTokenizer.of(texts)
