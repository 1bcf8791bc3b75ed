"""Files of byte-pair ranks, lines of "base64 rank", for the `tiktoken` package: tokenizer.model of Llama 3
and 4.

Such a file holds neither the expression that splits text into words nor the special tokens. Both follow from
the number of ranks for Llama 3 (128,000) and Llama 4 (200,000), and special tokens from a
tokenizer_config.json.
"""

from __future__ import annotations

import base64
import binascii
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
from attention_jax.tokenizers.splits import LLAMA3, O200K

_LONGEST = 400_000  # characters that tiktoken splits at once; more overflow its stack


class TiktokenTokenizer(PublishedTokenizer):
    """Byte-level BPE by ranks.

    Args:
      ranks: bytes of a token to its id.
      expression: how text is split into words before merging.
      names: special tokens to their ids.
      special: what the model's files say.

    Raises: ValueError for ranks that are not all bytes, or ids that occur twice.
    """

    kind = "tiktoken"

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        expression: str,
        names: Mapping[str, int],
        special: SpecialTokens = NO_SPECIAL_TOKENS,
    ):
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"byte {missing[0]} has no rank")
        texts = {i: raw for raw, i in ranks.items()} | {i: name.encode() for name, i in names.items()}
        if len(texts) != len(ranks) + len(names):
            raise ValueError("two of its tokens have the same id")
        self._ranks, self._expression, self._names = dict(ranks), expression, dict(names)
        with one_line("tiktoken refuses it"):
            tiktoken = need("tiktoken", "this tokenizer")
            self._encoding = tiktoken.Encoding(
                "published", pat_str=expression, mergeable_ranks=self._ranks, special_tokens=self._names
            )
        marked = frozenset(names.values()) | special.special_ids
        tokens = {raw.decode("utf-8", "replace"): i for raw, i in ranks.items()} | self._names
        super().__init__(Pieces(texts, marked & texts.keys()), tokens, special)

    def to_json(self) -> dict[str, Any]:
        ranks = {base64.b64encode(raw).decode(): i for raw, i in self._ranks.items()}
        return {
            "kind": self.kind, "ranks": ranks, "expression": self._expression, "names": self._names,
            "special": self.special.to_json(),
        }  # fmt: skip

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if len(text) > _LONGEST:
            raise ValueError(f"a text of {len(text)} characters is too long, at most {_LONGEST}: split it")
        allowed = set(self._names) if parse_special else set()
        with one_line("tiktoken cannot encode the text"):
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def _offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self._encode(text, True)
        return ids, spans_of_pieces(text, [self.pieces.texts[i] for i in ids])


def read_ranks(raw: bytes) -> dict[bytes, int]:
    """The ranks in a file's bytes. ValueError of one line for a damaged line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if key in ranks or value < 0:
            raise ValueError(
                f"line {number}: {'its token occurs twice' if key in ranks else 'its rank is negative'}"
            )
        ranks[key] = value
    return ranks


def published_special_tokens(ranks: int) -> tuple[str, list[str]]:
    """The expression and the special tokens, in order behind the ranks, of the published file with so many
    ranks.

    Raises: ValueError for another number.
    """
    if ranks == 128_000:
        return LLAMA3, _llama3_special_tokens()
    if ranks == 200_000:
        return O200K, _llama4_special_tokens()
    raise ValueError(
        f"its {ranks} ranks are of no known model (Llama 3: 128000, Llama 4: 200000): use its tokenizer.json"
    )


def _reserved(first: int, last: int, of: str = "") -> list[str]:
    return [f"<|{of}reserved_special_token_{i}|>" for i in range(first, last)]


def _llama3_special_tokens() -> list[str]:
    heads = ["<|start_header_id|>", "<|end_header_id|>"]
    first = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *_reserved(0, 2),
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
    ]
    return [*first, *heads, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>", *_reserved(2, 246)]


def _llama4_special_tokens() -> list[str]:
    def reserved(of: str, first: int, last: int) -> list[str]:
        return _reserved(first, last, of + "_")

    def marks(names: str) -> list[str]:
        return [f"<|{name}|>" for name in names.split()]

    tokens = marks(
        "begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step"
    )
    tokens += reserved("text_post_train", 0, 6) + marks("python_start python_end finetune_right_pad")
    tokens += reserved("text_post_train", 8, 69) + marks("image_start image_end")
    tokens += reserved("vision", 0, 2) + marks("tile_x_separator tile_y_separator")
    tokens += reserved("vision", 2, 6) + marks("image") + reserved("vision", 6, 7) + marks("patch")
    tokens += reserved("vision", 7, 1048) + reserved("reasoning", 0, 8)
    tokens += marks("reasoning_thinking_start reasoning_thinking_end")
    return tokens + _reserved(0, 2048 - len(tokens))
