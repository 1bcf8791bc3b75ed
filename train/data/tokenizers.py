"""Text to token ids and back: bytes, or the characters of a corpus.

Decoding gives U+FFFD for an id at or above the vocabulary size: a model may have more ids than its tokenizer.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes 0 ... 255, and the end-of-document token 256, which also starts a document."""

    kind = "bytes"
    vocab_size = 257
    end_of_document: int | None = 256

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text's UTF-8 bytes, without end-of-document. ValueError for a lone surrogate."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text is not valid Unicode") from None
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD, end-of-document tokens are left out.

        ValueError for a negative id.
        """
        stream = StreamDecoder(self)
        return "".join([stream.push(int(i)) for i in ids]) + stream.finish()

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
        known = self.characters
        return "".join([known[i] if _known(i, len(known)) else "\ufffd" for i in map(int, ids)])

    def raw_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 bytes of the text."""
        return self._points[ids].tobytes().decode("utf-32-le").encode()

    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""
        return {"kind": self.kind, "characters": list(self.characters)}


Tokenizer = ByteTokenizer | CharTokenizer


class StreamDecoder:
    """Decodes ids one by one; returns text as soon as its characters are complete.

    The concatenated pieces, with that of `finish()`, equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes; empty within a character of several bytes."""
        if isinstance(self._tokenizer, CharTokenizer):
            return self._tokenizer.decode([token])
        if not _known(token, self._tokenizer.vocab_size):
            return self.finish() + "\ufffd"
        if token == self._tokenizer.end_of_document:
            return self.finish()  # bytes before and after an end of document never form one character
        return self._utf8.decode(bytes([token]))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def make(kind: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer a configuration names, for a corpus."""
    return ByteTokenizer() if kind == "bytes" else CharTokenizer.of(texts)


def from_json(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. ValueError for anything else."""
    if spec == {"kind": "bytes"}:
        return ByteTokenizer()
    if isinstance(spec, dict) and spec.get("kind") == "chars" and isinstance(spec.get("characters"), list):
        if all(isinstance(c, str) for c in spec["characters"]):
            return CharTokenizer(spec["characters"])
    raise ValueError("it does not describe a tokenizer")


def dumps(tokenizer: Tokenizer) -> str:
    """The tokenizer as JSON text, plain ASCII."""
    return json.dumps(tokenizer.to_json()) + "\n"


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. ValueError in one line where it is missing or damaged."""
    path = Path(path)
    try:
        return from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(
            f"the tokenizer {path} is damaged: {error}; restore it from a copy, or choose another run_dir"
        ) from None


def _known(token: int, vocab_size: int) -> bool:
    if token < 0:
        raise ValueError(f"token id {token} is negative")
    return token < vocab_size
