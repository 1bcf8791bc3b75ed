"""What a tokenizer is, and the bytes of its tokens.

Decoding gives U+FFFD for an id that no token has: a model may have more ids than its tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np


class Decodes(Protocol):
    """What generation needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of some token ids."""
        ...


@dataclass(frozen=True)
class Pieces:
    """The bytes of every token, and how they make a text.

    texts: token id to UTF-8 bytes, of which a character may have some in one token and some in the next.
    special: ids that mark something and are no text. lead: what happens to spaces at the start of a text:
    "keep", "strip" one, or "drop" all of the first token. separator: bytes between two tokens.
    """

    texts: Mapping[int, bytes]
    special: frozenset[int] = frozenset()
    lead: Literal["keep", "strip", "drop"] = "keep"
    separator: bytes = b""


class Tokenizer(Decodes, Protocol):
    """Text to token ids and back; what the trainer needs of a tokenizer."""

    kind: str
    vocab_size: int  #: the largest id + 1
    end_of_document: int | None  #: the token that separates documents, None where there is none
    pieces: Pieces

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text, without tokens around it. ValueError for text that it cannot encode."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text, without special tokens. ValueError for a negative id."""
        ...

    def raw_bytes(self, ids: np.ndarray) -> bytes:
        """The bytes of the text, without special tokens."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""
        ...


class StreamDecoder:
    """Decodes ids one by one; returns text as soon as its characters are complete.

    The concatenated pieces, with that of `finish()`, equal `tokenizer.decode` of all ids. Bytes before and
    after a special token never form one character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._pieces, self._skip = tokenizer.pieces, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False

    def push(self, token: int) -> str:
        """The text that this id completes; empty within a character of several bytes."""
        pieces = self._pieces
        if token in pieces.special:
            before = self.finish()
            return (
                before if self._skip else before + self._utf8.decode(self.joined(pieces.texts[token]), True)
            )
        if not known(token, pieces.texts):
            before, self._begun = self.finish(), True
            return before + "\ufffd"
        return self._utf8.decode(self.joined(pieces.texts[token]))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def joined(self, raw: bytes) -> bytes:
        """The token's bytes, with what stands before them or falls away at the start of the text."""
        if self._begun:
            return self._pieces.separator + raw
        if raw or self._pieces.lead == "drop":
            self._begun = True
        if self._pieces.lead == "drop":
            return raw.replace(b" ", b"")
        return raw.removeprefix(b" ") if self._pieces.lead == "strip" else raw


def decode(tokenizer: Tokenizer, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """The text of ids. ValueError for a negative id."""
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    return "".join([stream.push(int(i)) for i in ids]) + stream.finish()


def known(token: int, texts: Mapping[int, bytes]) -> bool:
    """Whether a token has this id. ValueError for a negative id."""
    if token < 0:
        raise ValueError(f"token id {token} is negative")
    return token in texts


def checked_text(text: str) -> str:
    """The text. ValueError for a lone surrogate, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is not valid Unicode") from None
    return text
