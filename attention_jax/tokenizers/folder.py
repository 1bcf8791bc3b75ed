"""What a model's folder says about its tokenizer beside the vocabulary.

tokenizer_config.json, special_tokens_map.json, generation_config.json and chat_template.jinja are read as
data: the code that `auto_map` names is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attention_jax.tokenizers.published import SpecialTokens, read_bytes

_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class FolderConfig(NamedTuple):
    """The contents of the three JSON files, empty where there is none, and the chat template."""

    tokenizer: dict[str, Any]
    special_map: dict[str, Any]
    generation: dict[str, Any]
    chat_template: str | None

    @property
    def added(self) -> dict[str, tuple[int, bool]]:
        """Tokens of `added_tokens_decoder`: text to id and whether it is special."""
        entries = self.tokenizer.get("added_tokens_decoder", {})
        if not isinstance(entries, dict):
            raise ValueError("tokenizer_config.json: added_tokens_decoder is no object")
        found = {}
        for key, entry in entries.items():
            if not key.isascii() or not key.isdigit() or not isinstance(entry, dict) or not _text(entry):
                raise ValueError(f"tokenizer_config.json: added_tokens_decoder has no token {key[:20]!r}")
            found[_text(entry)] = (int(key), bool(entry.get("special")))
        return found


def read_config(folder: Path) -> FolderConfig:
    """The files of a folder. ValueError of one line for a damaged one."""
    tokenizer, special_map, generation = (
        read_json(folder / name) if (folder / name).exists() else {} for name in _FILES
    )
    return FolderConfig(tokenizer, special_map, generation, _chat_template(folder, tokenizer))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError of one line where it is missing or damaged."""
    raw = read_bytes(path)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it is no JSON object")
    return found


def special_tokens(
    config: FolderConfig, id_of: Callable[[str], int | None], default: SpecialTokens | None = None
) -> SpecialTokens:
    """The special tokens that a folder's files name.

    id_of: the id of a token, None for one that the vocabulary lacks. default: what the vocabulary's own file
    says.
    Raises: ValueError for a token that the vocabulary lacks.
    """
    ids = {name: _token(config, f"{name}_token", id_of) for name in ("bos", "eos", "unk", "pad")}
    default = default or SpecialTokens()
    bos = ids["bos"] if ids["bos"] is not None else default.bos_id
    eos = ids["eos"] if ids["eos"] is not None else default.eos_id
    generation = config.generation
    if bos is None:
        bos = next(iter(_ids(generation, "bos_token_id")), None)
    stops = _ids(generation, "eos_token_id")
    if eos is None and stops:
        eos = stops[0]
    stop_ids = dict.fromkeys([*stops, *([] if eos is None else [eos]), *default.stop_ids])
    marked = {i for i in ids.values() if i is not None}
    marked |= {i for i, special in config.added.values() if special}
    extra = config.tokenizer.get("additional_special_tokens") or config.special_map.get(
        "additional_special_tokens"
    )
    marked |= {i for i in map(id_of, map(_text, extra if isinstance(extra, list) else [])) if i is not None}
    flags = {name: config.tokenizer.get(name) for name in ("add_bos_token", "add_eos_token")}
    given = any(isinstance(value, bool) for value in flags.values())
    return SpecialTokens(
        bos, eos, tuple(stop_ids), frozenset(marked) | default.special_ids,
        add_bos=bool(flags["add_bos_token"]) if given else default.add_bos,
        add_eos=bool(flags["add_eos_token"]) if given else default.add_eos,
        chat_template=config.chat_template,
    )  # fmt: skip


def _token(config: FolderConfig, name: str, id_of: Callable[[str], int | None]) -> int | None:
    """The id of a token that the files name; None where they name none."""
    for file, entries in zip(_FILES, (config.tokenizer, config.special_map), strict=False):
        if entries.get(name) is not None:
            text = _text(entries[name])
            token = id_of(text) if text else None
            if token is None:
                raise ValueError(f"{file}: {name} {str(text)[:40]!r} is no token of the vocabulary")
            return token
    return None


def _text(entry: Any) -> str:
    """A token's text, which files write as a string or as an object with content."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def _ids(generation: Mapping[str, Any], name: str) -> list[int]:
    value = generation.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"generation_config.json: {name} {str(value)[:40]} is no token id")
    return ids


def _chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """The source in chat_template.jinja, chat_template.json or tokenizer_config.json, "default" if named."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return read_bytes(path).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: it is not UTF-8") from None
    if (path := folder / "chat_template.json").exists():
        tokenizer = read_json(path)
    found = tokenizer.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{folder}: its chat_template is not text")
    return found
