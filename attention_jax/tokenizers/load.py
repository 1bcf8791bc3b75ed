"""Tokenizers from files: `load_tokenizer` looks at a path and chooses; `from_json` undoes `to_json`."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_jax.tokenizers.base import Tokenizer
from attention_jax.tokenizers.folder import FolderConfig, read_config, special_tokens
from attention_jax.tokenizers.gguf import gguf_tokenizer
from attention_jax.tokenizers.hugging_face import HuggingFaceTokenizer, read_backend
from attention_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from attention_jax.tokenizers.published import PublishedTokenizer, SpecialTokens, one_line, read_bytes
from attention_jax.tokenizers.sentence_piece import SentencePieceTokenizer, default_special_tokens
from attention_jax.tokenizers.tiktoken_ranks import (
    TiktokenTokenizer,
    published_special_tokens,
    read_ranks,
)  # fmt: skip

_JSON, _MODEL = "tokenizer.json", "tokenizer.model"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, or of one file.

    A folder's tokenizer.json is preferred to its tokenizer.model (SentencePiece or tiktoken ranks), and that
    to its only .gguf file; special tokens and the chat template come from the JSON files beside it. Nothing
    is downloaded, unpickled or run.

    Raises: ValueError of one line for a path without a tokenizer, and for files that are damaged or not
    supported.
    """
    path = Path(path)
    try:
        file = _file_of(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        return _read(file)
    except ValueError as error:
        raise ValueError(str(error) if str(file.parent) in str(error) else f"{file}: {error}"[:190]) from None


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder or file")
    for name in (_JSON, _MODEL):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{path}: it holds {len(found)} .gguf files: name one of them, such as {found[0].name}"
        )
    raise ValueError(f"{path}: it holds no {_JSON}, {_MODEL} or .gguf file")


def _read(file: Path) -> Tokenizer:
    with file.open("rb") as opened:
        start = opened.read(64)
    if start[:4] == b"GGUF" or file.suffix == ".gguf":
        return gguf_tokenizer(file)
    raw = read_bytes(file)
    if start.lstrip()[:1] == b"{":
        return _from_tokenizer_json(file, raw)
    config = read_config(file.parent)
    if start[:1] == b"\x0a":  # the first field of SentencePiece's protobuf
        return _sentencepiece(raw, config)
    if _is_ranks(start):
        return _tiktoken(raw, config)
    raise ValueError(f"{file}: it is none of {_JSON}, a SentencePiece model, tiktoken ranks and GGUF")


def _is_ranks(start: bytes) -> bool:
    """Whether a file begins with "base64 rank"."""
    fields = start.split(b"\n")[0].split()
    if len(fields) != 2 or not fields[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(fields[0], validate=True))
    except binascii.Error:
        return False


def _from_tokenizer_json(file: Path, raw: bytes) -> Tokenizer:
    try:
        text = raw.decode()
        own = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: it is damaged: {str(error)[:80]}") from None
    if "kind" in own:  # a run's
        return from_json(own)
    backend = read_backend(text)
    config = read_config(file.parent)
    _add_missing(backend, config)
    return HuggingFaceTokenizer(backend, special_tokens(config, backend.token_to_id))


def _add_missing(backend: Any, config: FolderConfig) -> None:
    """The tokens of added_tokens_decoder that tokenizer.json lacks, in the order of their ids."""
    for text, (i, special) in sorted(config.added.items(), key=lambda item: item[1][0]):
        if (backend.token_to_id(text)) is None:
            (backend.add_special_tokens if special else backend.add_tokens)([text])
        if (found := backend.token_to_id(text)) != i:
            raise ValueError(
                f"token {text[:40]!r} has id {found} in {_JSON}, but {i} in tokenizer_config.json"
            )


def _sentencepiece(raw: bytes, config: FolderConfig) -> SentencePieceTokenizer:
    plain = SentencePieceTokenizer(raw)
    known = _lookup(plain)
    for text, (i, _) in config.added.items():
        if known(text) is None and i < plain.vocab_size:
            raise ValueError(f"token {text[:40]!r} of tokenizer_config.json has the id {i} of another token")
    names = {text: i for text, (i, _) in config.added.items() if i >= plain.vocab_size}
    look_up = lambda text: names.get(text, known(text))  # noqa: E731
    special = special_tokens(config, look_up, default_special_tokens(raw))
    each = config.tokenizer.get("legacy") is not False
    return SentencePieceTokenizer(raw, names, special, prefix_after_special=each)


def _tiktoken(raw: bytes, config: FolderConfig) -> TiktokenTokenizer:
    ranks = read_ranks(raw)
    expression, published = published_special_tokens(len(ranks))
    names = {name: len(ranks) + i for i, name in enumerate(published)}
    if config.added:
        names = {text: i for text, (i, _) in config.added.items()}
    found = {name: names.get(name) for name in ("<|begin_of_text|>", "<|end_of_text|>")}
    stops = (
        names.get(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>")
    )
    default = SpecialTokens(
        *found.values(), tuple(i for i in stops if i is not None), add_bos=True, add_eos=False
    )
    return TiktokenTokenizer(ranks, expression, names, special_tokens(config, names.get, default))


def _lookup(tokenizer: PublishedTokenizer) -> Callable[[str], int | None]:
    def look_up(text: str) -> int | None:
        try:
            return tokenizer.token_id(text)
        except ValueError:
            return None

    return look_up


def from_json(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. ValueError for anything else."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if spec == {"kind": "bytes"}:
        return ByteTokenizer()
    if kind == "chars" and isinstance(spec.get("characters"), list):
        if all(isinstance(c, str) for c in spec["characters"]):
            return CharTokenizer(spec["characters"])
    if kind in _PUBLISHED:
        with one_line("it does not describe a tokenizer"):
            return _PUBLISHED[kind](spec, SpecialTokens.from_json(spec["special"]))
    raise ValueError("it does not describe a tokenizer")


_PUBLISHED: dict[str, Callable[[dict[str, Any], SpecialTokens], Tokenizer]] = {
    "hugging_face": lambda spec, special: HuggingFaceTokenizer.from_text(spec["tokenizer"], special),
    "sentencepiece": lambda spec, special: SentencePieceTokenizer(
        base64.b64decode(spec["model"], validate=True), spec["names"], special,
        prefix_after_special=spec["prefix_after_special"],
    ),
    "tiktoken": lambda spec, special: TiktokenTokenizer(
        {base64.b64decode(raw, validate=True): i for raw, i in spec["ranks"].items()},
        spec["expression"], spec["names"], special,
    ),
}  # fmt: skip


def dumps(tokenizer: Tokenizer) -> str:
    """The tokenizer as JSON text, plain ASCII."""
    return json.dumps(tokenizer.to_json()) + "\n"


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a run's tokenizer.json. ValueError in one line where it is missing or damaged."""
    path = Path(path)
    try:
        return from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the tokenizer {path} is damaged: {error}; restore it from a copy, or choose another run_dir"
        ) from None
