"""What tokenizers of published models share: special tokens, options of encoding, chats, spans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention_jax.tokenizers import base
from attention_jax.tokenizers.base import Pieces
from attention_jax.tokenizers.chat import ChatTemplate
from attention_jax.tokenizers.turns import Turn, turns_of

MOST_BYTES = 2**29  # of a file that is read whole; the largest published one has 35 MB


@dataclass(frozen=True)
class SpecialTokens:
    """What a model's files say about special tokens.

    bos_id, eos_id: those of the tokenizer. stop_ids: every token that ends an answer, that of
    generation_config.json among them. special_ids: tokens that are no text. add_bos, add_eos: whether
    `encode(add_special_tokens=True)` adds them; None leaves it to tokenizer.json. chat_template: Jinja
    source.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""
        return vars(self) | {"stop_ids": list(self.stop_ids), "special_ids": sorted(self.special_ids)}

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> SpecialTokens:
        """What `to_json` described. TypeError or ValueError for anything else."""
        spec = dict(spec)
        ids = [
            *spec["stop_ids"],
            *spec["special_ids"],
            *(spec[k] for k in ("bos_id", "eos_id") if spec[k] is not None),
        ]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError("it has a token id that is no number")
        return cls(
            **spec | {"stop_ids": tuple(spec["stop_ids"]), "special_ids": frozenset(spec["special_ids"])}
        )


NO_SPECIAL_TOKENS = SpecialTokens()


class EncodedChat(NamedTuple):
    """A rendered conversation: its text, int32 ids, and the turns with the spans of both."""

    text: str
    ids: np.ndarray
    turns: list[Turn]


class PublishedTokenizer(ABC):
    """A `Tokenizer` of a published model.

    Special tokens that are written in a text, such as <|im_end|>, become those tokens: `parse_special=False`
    encodes them as ordinary text, which is right for text of strangers. No whitespace in front of
    punctuation is removed after decoding, whatever `clean_up_tokenization_spaces` says: the text of the ids
    is returned.
    """

    kind: str

    def __init__(self, pieces: Pieces, tokens: Mapping[str, int], special: SpecialTokens):
        self.pieces, self.special, self._tokens = pieces, special, tokens
        self.vocab_size = max(pieces.texts, default=-1) + 1
        for name, token in (
            ("bos", special.bos_id),
            ("eos", special.eos_id),
            *(("eos", i) for i in special.stop_ids),
        ):
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"its {name} token {token} is outside the {self.vocab_size} tokens")
        self.bos_id, self.eos_id, self.stop_ids = special.bos_id, special.eos_id, special.stop_ids
        self.end_of_document = special.eos_id
        self._chat: ChatTemplate | None = None

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> np.ndarray:
        """int32 ids of a text.

        add_special_tokens: the tokens that the model expects around a text, such as bos. Texts of chat
        templates contain theirs. parse_special: whether special tokens written in the text are those tokens.
        Raises: ValueError for a lone surrogate.
        """
        base.checked_text(text)
        special = self.special
        if not add_special_tokens:
            ids = self._encode(text, parse_special)
        elif special.add_bos is None and special.add_eos is None:
            ids = self._encode_framed(text, parse_special)
        else:
            before = [special.bos_id] if special.add_bos and special.bos_id is not None else []
            after = [special.eos_id] if special.add_eos and special.eos_id is not None else []
            ids = [*before, *self._encode(text, parse_special), *after]
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text; bytes that are not UTF-8 and unknown ids become U+FFFD. ValueError for a negative id."""
        return base.decode(self, ids, skip_special_tokens=skip_special_tokens)

    def raw_bytes(self, ids: np.ndarray) -> bytes:
        """The bytes of the text, without special tokens. ValueError for an id of no token."""
        stream = base.StreamDecoder(self)
        texts, special = self.pieces.texts, self.pieces.special
        ids = [int(i) for i in ids]
        if unknown := [i for i in ids if i not in texts]:
            raise ValueError(f"token id {unknown[0]} is outside the tokenizer's {self.vocab_size} tokens")
        return b"".join([stream.joined(texts[i]) for i in ids if i not in special])

    def token_id(self, token: str) -> int:
        """The id of a token, as the tokenizer's file spells it. ValueError for one that it lacks."""
        if token not in self._tokens:
            raise ValueError(f"{token[:60]!r} is no token of this tokenizer")
        return self._tokens[token]

    def offsets(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """int32 ids of a text, and the characters [start, end) that each of them stands for."""
        ids, spans = self._offsets(base.checked_text(text))
        return np.array(ids, np.int32), spans

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. ValueError where its files have none."""
        if self._chat is None:
            if self.special.chat_template is None:
                raise ValueError("this model has no chat template: encode the text itself")
            self._chat = ChatTemplate(self.special.chat_template, **self._special_texts())
        return self._chat

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> EncodedChat:
        """A conversation as the model's chat template renders it, with the place of every turn.

        messages: dicts with role and content. variables: tools, documents, and others that the template
        reads.
        Raises: ValueError of one line for messages that the template refuses.
        """
        turns = turns_of(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, **variables
        )
        text = turns.text
        ids, spans = self.offsets(text)
        starts = np.array([start for start, _ in spans], np.int64)
        return EncodedChat(text, ids, [turn.with_tokens(starts) for turn in turns.turns])

    def _special_texts(self) -> dict[str, str | None]:
        """The variables bos_token and eos_token of a chat template."""
        names = {i: token for token, i in self._tokens.items() if i in (self.bos_id, self.eos_id)}
        return {"bos_token": names.get(self.bos_id), "eos_token": names.get(self.eos_id)}

    def _encode_framed(self, text: str, parse_special: bool) -> list[int]:
        """Ids with the tokens around them that the file itself describes."""
        return self._encode(text, parse_special)

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The argument of `from_json`."""


def spans_of_pieces(text: str, raws: Sequence[bytes]) -> list[tuple[int, int]]:
    """The characters [start, end) of pieces that together are the text; pieces can share a character."""
    place, ends = 0, np.cumsum([len(c.encode()) for c in text])
    if b"".join(raws) != text.encode():
        raise ValueError(
            "this tokenizer changes the text (Unicode normalization): its tokens have no place in it"
        )
    spans = []
    for raw in raws:
        start = int(np.searchsorted(ends, place, "right"))
        place += len(raw)
        spans.append((start, max(start, int(np.searchsorted(ends, place, "left")) + 1) if raw else start))
    return spans


def read_bytes(path: Path) -> bytes:
    """A file's bytes. ValueError of one line where it is missing, no file, or too large."""
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{path}: {size} bytes are more than a tokenizer has, at most {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """Errors of a library that reads a file, a panic of Rust among them, as a ValueError of one line."""
    try:
        yield
    except (ModuleNotFoundError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # PanicException is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())
        what = f"{type(error).__name__}: {said}" if isinstance(error, LookupError | TypeError) else said
        raise ValueError(f"{where}: {what or type(error).__name__}"[:190]) from None
