"""SentencePiece models (tokenizer.model of Llama 2, Gemma, T5, ...), for the `sentencepiece` package."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from attention_jax.optional import need
from attention_jax.tokenizers.base import Pieces
from attention_jax.tokenizers.published import (
    NO_SPECIAL_TOKENS,
    PublishedTokenizer,
    SpecialTokens,
    one_line,
    spans_of_pieces,
)  # fmt: skip

_BLANK = "\u2581"
# Field 3 of a model, its normalizer, with field 3, add_dummy_prefix, false: a message that is appended to
# another in protobuf's encoding overrides its fields.
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(PublishedTokenizer):
    """A SentencePiece model.

    Most models put a space in front of a text. It also precedes what follows a special token, as in the code
    that trained them, unless `prefix_after_special` is false (`"legacy": false` in tokenizer_config.json).

    Args:
      model: the file's bytes.
      names: special tokens to their ids, beside the model's control tokens; those of tokenizer_config.json.
      special: what the model's files say; bos and eos are the model's own where it says nothing.

    Raises: ValueError of one line for bytes that are no model.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        names: Mapping[str, int] | None = None,
        special: SpecialTokens = NO_SPECIAL_TOKENS,
        *,
        prefix_after_special: bool = True,
    ):
        self._model, self._names, self._prefixes_all = model, dict(names or {}), prefix_after_special
        self._first, self._later = _processor(model), _processor(model + _WITHOUT_PREFIX)
        read, count = self._first, self._first.get_piece_size()
        with one_line("sentencepiece refuses it"):
            spelled = {i: read.id_to_piece(i) for i in range(count)}
            control = {i for i in spelled if read.is_control(i) or read.is_unknown(i)}
            raws = {i: bytes([int(p[3:5], 16)]) if read.is_byte(i) else _raw(p) for i, p in spelled.items()}
        texts = raws | {i: name.encode() for name, i in self._names.items()}
        # The prefix of a text, if it has one, is what the two processors do differently.
        self._prefixed = read.encode("a") != self._later.encode("a")
        marked = frozenset(control) | frozenset(self._names.values()) | special.special_ids
        self._parsed = {spelled[i]: i for i in control if not read.is_unknown(i)} | self._names
        longest_first = sorted(filter(None, self._parsed), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        tokens = {piece: i for i, piece in spelled.items()} | self._names
        super().__init__(
            Pieces(texts, marked & texts.keys(), "strip" if self._prefixed else "keep"), tokens, special
        )

    def to_json(self) -> dict[str, Any]:
        model = base64.b64encode(self._model).decode()
        own = {"kind": self.kind, "model": model, "names": self._names}
        return own | {"prefix_after_special": self._prefixes_all, "special": self.special.to_json()}

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special or self._cut is None:
            return self._first.encode(text)
        ids: list[int] = []
        for index, part in enumerate(self._cut.split(text)):
            if index % 2:
                ids.append(self._parsed[part])
            elif part:
                ids += (self._first if self._prefixes_all or not index else self._later).encode(part)
        return ids

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self._encode(text, True)
        raws, parsed, after = [], set(self._parsed.values()), True
        for index, i in enumerate(ids):
            prefixed = self._prefixed and i not in parsed and after and (self._prefixes_all or not index)
            raws.append(self.pieces.texts[i].removeprefix(b" ") if prefixed else self.pieces.texts[i])
            after = i in parsed
        return ids, spans_of_pieces(text, raws)


def default_special_tokens(model: bytes) -> SpecialTokens:
    """The bos and eos that a model names; bos precedes a text, as in the models that use such files."""
    read = _processor(model)
    bos, eos = (i if i >= 0 else None for i in (read.bos_id(), read.eos_id()))
    stops = () if eos is None else (eos,)
    return SpecialTokens(bos, eos, stops, add_bos=bos is not None, add_eos=False)


def _processor(model: bytes) -> Any:
    sentencepiece = need("sentencepiece", "this tokenizer")
    with one_line("it is no SentencePiece model"):
        return sentencepiece.SentencePieceProcessor(model_proto=model)


def _raw(piece: str) -> bytes:
    return piece.replace(_BLANK, " ").encode()
