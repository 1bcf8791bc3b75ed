"""tokenizer.json: the format of the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from attention_jax.optional import need
from attention_jax.tokenizers.base import Pieces
from attention_jax.tokenizers.published import NO_SPECIAL_TOKENS, PublishedTokenizer, SpecialTokens, one_line

_WHAT = "a tokenizer of a published model"
_BLANK = "\u2581"  # SentencePiece's sign for a space


class HuggingFaceTokenizer(PublishedTokenizer):
    """A `tokenizers.Tokenizer`, from tokenizer.json or built from the vocabulary of another file.

    Args:
      backend: the `tokenizers.Tokenizer`. Its truncation and padding are switched off.
      special: what the model's other files say.

    Raises: ValueError for a decoder whose text of a token depends on the tokens around it.
    """

    kind = "hugging_face"

    def __init__(self, backend: Any, special: SpecialTokens = NO_SPECIAL_TOKENS):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self.backend = backend
        self._plain: Any = None  # the same, with special tokens in the text left as text
        added = backend.get_added_tokens_decoder()
        marked = frozenset(i for i, token in added.items() if token.special) | special.special_ids
        tokens = backend.get_vocab(with_added_tokens=True)
        super().__init__(_pieces(backend, tokens, marked), tokens, special)

    @classmethod
    def from_text(cls, text: str, special: SpecialTokens = NO_SPECIAL_TOKENS) -> HuggingFaceTokenizer:
        """The tokenizer of a tokenizer.json's text. ValueError of one line for a damaged one."""
        return cls(read_backend(text), special)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": self.backend.to_str(), "special": self.special.to_json()}

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        return self._backend(parse_special).encode(text, add_special_tokens=False).ids

    def _encode_framed(self, text: str, parse_special: bool) -> list[int]:
        return self._backend(parse_special).encode(text, add_special_tokens=True).ids

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _backend(self, parse_special: bool) -> Any:
        if parse_special:
            return self.backend
        if self._plain is None:
            self._plain = read_backend(self.backend.to_str())
            self._plain.encode_special_tokens = True
        return self._plain


def read_backend(text: str) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json's text. ValueError of one line for a damaged one."""
    tokenizers = need("tokenizers", _WHAT)
    with one_line("it is no tokenizer.json"):
        return tokenizers.Tokenizer.from_str(text)


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells bytes: printable Latin-1 itself, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


def _pieces(backend: Any, tokens: Mapping[str, int], special: frozenset[int]) -> Pieces:
    """The bytes of the tokens, by the decoder of the tokenizer."""
    decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    spell, lead, separator = _spelling(decoder)
    texts = {i: spell(token) for token, i in tokens.items()}
    return Pieces(texts, special & texts.keys(), lead, separator)


def _spelling(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], Any, bytes]:
    """How a token becomes bytes, what happens to leading spaces, and what stands between tokens."""
    if decoder is None:
        return str.encode, "keep", b" "
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), "keep", b""
    if kinds == ["Metaspace"]:
        blank, scheme = steps[0]["replacement"], steps[0].get("prepend_scheme", "always")
        return lambda token: token.replace(blank, " ").encode(), "keep" if scheme == "never" else "drop", b""
    known = all(_is_sentencepiece(step) for step in steps)
    if not known or kinds != [k for k in ("Replace", "ByteFallback", "Fuse", "Strip") if k in kinds]:
        raise ValueError(
            f"its decoder {' + '.join(kinds)} is not supported: ByteLevel and SentencePiece's are"
        )
    strips = "Strip" in kinds and steps[-1]["start"] == 1
    return _sentencepiece("ByteFallback" in kinds, "Replace" in kinds), "strip" if strips else "keep", b""


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": _BLANK} and step["content"] == " "
    if step["type"] == "Strip":
        return step["content"] == " " and step["start"] in (0, 1) and step["stop"] == 0
    return step["type"] in ("ByteFallback", "Fuse")


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    def spell(token: str) -> bytes:
        try:
            return bytes([alphabet[c] for c in token])
        except KeyError:  # an added token is written as it is
            return token.encode()

    return spell


def _sentencepiece(byte_fallback: bool, replace: bool) -> Callable[[str], bytes]:
    one_byte = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if byte_fallback else {}

    def spell(token: str) -> bytes:
        return one_byte.get(token) or (token.replace(_BLANK, " ") if replace else token).encode()

    return spell
