"""A tokenizer as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attention_jax.tokenizers.base import Tokenizer
from attention_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from attention_jax.tokenizers.load import dumps, load_tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and what belongs to it; `load_tokenizer(folder)` is then the same tokenizer.

    Bytes and characters get a tokenizer.json that only this library reads. Raises: ValueError for a kind
    that has files of its own, which are copied instead, and where reading gives another tokenizer.
    """
    if tokenizer.kind in ("bytes", "chars"):
        (folder / "tokenizer.json").write_text(dumps(tokenizer))
        return
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"a tokenizer of kind {tokenizer.kind} is not written: copy its own files")
    special, names = tokenizer.special, tokenizer._special_texts()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    if special.add_bos is not None or special.add_eos is not None:
        config |= {"add_bos_token": bool(special.add_bos), "add_eos_token": bool(special.add_eos)}
    config["chat_template"] = special.chat_template
    generation = {"bos_token_id": special.bos_id, "eos_token_id": list(special.stop_ids) or None}
    (folder / "tokenizer.json").write_text(tokenizer.to_json()["tokenizer"])
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        given = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(given, indent=2) + "\n")
    if _essence(load_tokenizer(folder)) != _essence(tokenizer):
        raise ValueError(f"{folder}: the tokenizer that was written reads as another one")


def _essence(tokenizer: Any) -> tuple[Any, ...]:
    """What two tokenizers that are the same have in common."""
    special = tokenizer.special
    flags = bool(special.add_bos), bool(special.add_eos)
    ids = special.bos_id, special.eos_id, set(special.stop_ids), tokenizer.pieces.special
    return json.loads(tokenizer.to_json()["tokenizer"]), ids, flags, special.chat_template
