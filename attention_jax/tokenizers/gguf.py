"""The tokenizer in a GGUF file's metadata, built as a `tokenizers.Tokenizer`.

Kinds (`tokenizer.ggml.model`): gpt2, byte-level BPE with merges; llama, SentencePiece's BPE, whose merges
follow from the scores of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.gguf_header import read_metadata
from attention_jax.optional import need
from attention_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from attention_jax.tokenizers.published import SpecialTokens, one_line
from attention_jax.tokenizers.splits import Split, pre_tokenizer, split_of

_KEY = "tokenizer.ggml."
_BLANK = "\u2581"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of gguf.TokenType
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer in a GGUF file.

    Raises: ValueError of one line for a damaged file, one without a tokenizer, and a kind or pre-tokenizer
    that is not implemented.
    """
    metadata = read_metadata(path)
    try:
        return from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}"[:190]) from None


def from_metadata(metadata: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer in a GGUF file's metadata, as `read_metadata` returns them. ValueError as above."""
    tokens, types = _vocabulary(metadata)
    kind = _get(metadata, "model", str)
    if kind == "gpt2":
        split = split_of(metadata.get(_KEY + "pre"))
        backend, adds_bos = _byte_level(tokens, _get(metadata, "merges", list), split), split.adds_bos
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise ValueError(
            f"the tokenizer {str(kind)[:40]!r} ({_KEY}model) is not implemented: gpt2 and llama are"
        )
    _add_tokens(backend, tokens, types)
    return HuggingFaceTokenizer(backend, _special(metadata, tokens, types, adds_bos))


def _get(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    value = metadata.get(_KEY + name)
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
        raise ValueError(f"it has no {_KEY}{name}" if value is None else f"its {_KEY}{name} has a wrong type")
    return value


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    tokens = _get(metadata, "tokens", list)
    places: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if places.setdefault(token, i) != i:
            raise ValueError(f"its tokens {places[token]} and {i} are both {token[:40]!r}")
    types = metadata.get(_KEY + "token_type")
    types = np.ones(len(tokens), np.int32) if types is None else np.asarray(types)
    if types.shape != (len(tokens),):
        raise ValueError(f"it has {len(tokens)} tokens, but {types.size} token types")
    return tokens, types


def _byte_level(tokens: Sequence[str], merges: Sequence[str], split: Split) -> Any:
    tokenizers = need("tokenizers", "a tokenizer of a published model")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"its merge {wrong[0][:40]!r} is not a pair of tokens")
    with one_line("its merges and tokens do not fit"):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        model = tokenizers.models.BPE(vocabulary, pairs, ignore_merges=split.whole_words)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(split)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray) -> Any:
    tokenizers = need("tokenizers", "a tokenizer of a published model")
    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    prefix = bool(metadata.get(_KEY + "add_space_prefix", True)) and not gemma
    if gemma:  # its runs of spaces are written as spaces, and its merges are in the order of its tokens
        tokens = [_BLANK * len(token) if token.strip(" ") == "" else token for token in tokens]
        if len(set(tokens)) < len(tokens):
            raise ValueError("two of its tokens are the same run of spaces")
        scores = -np.arange(len(tokens), dtype=np.float64)
    else:
        scores = np.asarray(metadata.get(_KEY + "scores", ()), np.float64)
    if scores.shape != (len(tokens),):
        raise ValueError(f"it has {len(tokens)} tokens, but {scores.size} scores")
    unknown = next((tokens[i] for i in np.flatnonzero(types == _UNKNOWN)), None)
    merges = metadata.get(_KEY + "merges")
    pairs = merges_of(tokens, scores) if merges is None else [tuple(merge.split(" ")) for merge in merges]
    with one_line("its merges and tokens do not fit"):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        model = tokenizers.models.BPE(vocabulary, pairs, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    backend = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    # A space in front of the text and of what follows an added token, even before a space: so do llama.cpp
    # and SentencePiece. transformers' reading of such a file adds it at the start only, and not before a
    # space.
    steps = [tokenizers.normalizers.Prepend(_BLANK)] if prefix else []
    backend.normalizer = tokenizers.normalizers.Sequence(
        [*steps, tokenizers.normalizers.Replace(" ", _BLANK)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    spell = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*spell, *strip])
    return backend


def merges_of(tokens: Sequence[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: all pairs of tokens that make a token, best scores first."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-scores[i], -len(left), -len(right), i, ids[left], ids[right]))
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(merges)]


def _add_tokens(backend: Any, tokens: Sequence[str], types: np.ndarray) -> None:
    """Tokens that are found whole in a text: control tokens, which are special, and those of users."""
    added = need("tokenizers", "a tokenizer of a published model").AddedToken
    for kinds, special in (((_UNKNOWN, _CONTROL), True), ((_USER_DEFINED,), False)):
        found = [tokens[i] for i in np.flatnonzero(np.isin(types, kinds)) if tokens[i]]
        fresh = [added(token, normalized=False, special=special) for token in found]
        (backend.add_special_tokens if special else backend.add_tokens)(fresh)


def _special(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: np.ndarray, adds_bos: bool
) -> SpecialTokens:
    ids: dict[str, int] = {}
    for name in ("bos_token_id", *_STOPS):
        if (value := metadata.get(_KEY + name)) is not None:
            if type(value) is not int or not 0 <= value < len(tokens):
                raise ValueError(f"its {_KEY}{name} {str(value)[:20]} is none of its {len(tokens)} tokens")
            ids[name] = value
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("its tokenizer.chat_template is not text")
    return SpecialTokens(
        bos_id=ids.get("bos_token_id"),
        eos_id=ids.get("eos_token_id"),
        stop_ids=tuple(dict.fromkeys(ids[name] for name in _STOPS if name in ids)),
        special_ids=frozenset(np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist()),
        add_bos=bool(metadata.get(_KEY + "add_bos_token", adds_bos)),
        add_eos=bool(metadata.get(_KEY + "add_eos_token", False)),
        chat_template=template,
    )
