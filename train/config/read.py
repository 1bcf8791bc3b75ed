"""YAML and dotted overrides to a `RunConfig`, and back.

pydantic checks the plain dataclasses, strictly, and chooses among several by `kind`. What it finds is said
in one line, as a `ConfigError` that starts with the dotted path of the key and names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from attention_jax.masks import Mask, parse
from attention_jax.mixers import mixer_kinds
from train.config import shipped, yaml_text
from train.config.keys import default_of, expected, hints, item_type, kind_of, members, sections
from train.config.schema import RunConfig
from train.config.yaml_text import ConfigError
from train.run.migration import FORMAT, RENAMED, migrate_config

__all__ = ["ConfigError", "dump_yaml", "from_dict", "load", "to_dict"]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The run that a YAML file describes, with `key.path=value` overrides applied in order.

    path: a file, or the name of a configuration that comes with the package, such as `tiny`.
    `run_dir: null` becomes runs/NAME_OF_THE_FILE. A run folder's config.yaml, with the `format` that it
    states or format 1, is such a file too. Raises: ConfigError, which names the mistake.
    """
    path = shipped.find(path)
    raw = read_yaml(path)
    try:
        raw = migrate_config(raw, absent=1 if _in_run_folder(path) else FORMAT)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        _override(raw, override)
    config = from_dict(raw)
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=str(Path("runs") / path.stem))
    return config


def _in_run_folder(path: Path) -> bool:
    """Whether this is the config.yaml that a run's set-up wrote, after versions.json."""
    return path.name == "config.yaml" and (path.parent / "versions.json").is_file()


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """The config of plain dicts, lists and scalars; `from_dict(to_dict(config)) == config`."""
    try:
        # JSON mode is strict about scalars, yet takes lists for tuples and mappings for dataclasses.
        config = _adapter(*mixer_kinds().values()).validate_json(json.dumps(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(_message(error, raw)) from None
    to_dict(config)  # early: a run folder could not hold what this refuses
    return config


def to_dict(config: Any, path: str = "") -> Any:
    """Plain dicts, lists and scalars; masks become their expressions.

    ConfigError names the key, below `path`, of a mask without one.
    """
    if isinstance(config, Mask):
        return _expression(config, path)
    if dataclasses.is_dataclass(config):
        values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: to_dict(value, _join(path, name)) for name, value in values}
    if isinstance(config, (tuple, list)):
        return [to_dict(item, _join(path, index)) for index, item in enumerate(config)]
    return config


def _expression(mask: Mask, path: str) -> str:
    try:
        if parse(str(mask)) == mask:
            return str(mask)
    except ValueError:
        pass
    raise ConfigError(
        f"{path}: {mask} cannot be written to YAML: it holds an array or a function; use one of the patterns"
    )


def dump_yaml(config: RunConfig) -> str:
    """The whole config as YAML, every key written out; `load` reads back an equal one."""
    return yaml_text.dumps(to_dict(config))


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file holds, not checked yet. ConfigError where it is no mapping or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        hint = shipped.hint(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not UTF-8 at byte {error.start}") from None
    raw = yaml_text.parse(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {_show(raw)}")
    return raw or {}


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml_text.scalar(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _choose(annotation: Any, node: dict[str, Any], path: str) -> type:
    """The dataclass that the mapping `node` stands for, by its `kind` where there are kinds."""
    known = {kind_of(cls): cls for cls in sections(annotation)}
    if None in known:
        return known[None]
    if not isinstance(node.get("kind"), str) or node["kind"] not in known:
        raise ConfigError(_no_kind(annotation, node, path))
    return known[node["kind"]]


def _no_kind(annotation: Any, node: dict[str, Any], path: str) -> str:
    """The message for a mapping without a `kind`, or with an unknown one."""
    choices = ", ".join(str(kind_of(cls)) for cls in sections(annotation))
    if "kind" not in node:
        return f"{_join(path, 'kind')} is missing; there are: {choices}"
    return f"{_join(path, 'kind')}: there is no {_show(node['kind'])}; there are: {choices}"


def _unknown(cls: type, key: str, path: str) -> ConfigError:
    """The error for an unknown key: a near one of its section, the like elsewhere, or the nearest."""
    everywhere: dict[str, str] = {}
    for place in _all_keys(RunConfig, ""):
        everywhere.setdefault(place.rpartition(".")[2], place)
    here = {name: _join(path, name) for name in hints(cls)}
    if (renamed := RENAMED.get(key)) in here:
        return ConfigError(f"unknown key {_join(path, key)}; it is {here[renamed]} now")
    for names, cutoff in ((here, 0.6), (everywhere, 0.8), (here, 0.0)):
        near = difflib.get_close_matches(key, names, 1, cutoff)
        if near:
            break
    verb = "did you mean" if cutoff else "the nearest is"
    end = "?" if cutoff else ""
    return ConfigError(f"unknown key {_join(path, key)}; {verb} {names[near[0]]}{end}")


def _all_keys(cls: type, path: str) -> Iterator[str]:
    for name, annotation in hints(cls).items():
        yield _join(path, name)
        for section in sections(annotation):
            yield from _all_keys(section, _join(path, name))
        for section in sections(item_type(annotation)):
            yield from _all_keys(section, _join(path, name) + ".0")


# Kinds of pydantic's errors that say more than that a type is wrong, the most telling first.
_TELLING = (
    "unexpected_keyword_argument",
    "union_tag_not_found",
    "union_tag_invalid",
    "missing",
    "value_error",
)


@functools.cache
def _adapter(*mixers: type) -> pydantic.TypeAdapter:
    """One per set of mixers: a schema holds the kinds that are registered when it is made."""
    del mixers
    return pydantic.TypeAdapter(RunConfig)


@dataclasses.dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors, at the key that it is about."""

    kind: str  #: pydantic's name of it
    path: str
    annotation: Any  #: what the key may hold
    value: Any  #: what was written there
    message: str  #: of a ValueError that a config raised


def _message(failure: pydantic.ValidationError, raw: dict[str, Any]) -> str:
    """One line about one mistake: an unknown key if there is one, since it may explain the others.

    pydantic tries every member of a union: an error about a key does not count beside one further in, and
    a wrong type does not count beside what the member of that type says.
    """
    errors = failure.errors(include_url=False)
    mistakes = [_locate(error, raw) for error in errors]
    inner = [m for m in mistakes if not any(other.path.startswith(f"{m.path}.") for other in mistakes)]
    first = min(inner, key=lambda m: _TELLING.index(m.kind) if m.kind in _TELLING else len(_TELLING))
    if first.kind == "unexpected_keyword_argument":
        section, _, key = first.path.rpartition(".")
        return str(_unknown(first.annotation, key, section))
    if first.kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_kind(first.annotation, first.value, first.path)
    if first.kind == "missing":
        return f"{first.path} is missing: expected {expected(first.annotation)}"
    if first.kind == "value_error":
        word = re.match(r"\w+", first.message)
        own = word and any(word[0] in hints(cls) for cls in sections(first.annotation))
        return first.path + (("." if own else ": ") if first.path else "") + first.message
    return f"{first.path}: expected {expected(first.annotation)}, got {_show(first.value)}"


def _locate(error: Any, raw: Any) -> _Mistake:
    """The mistake that an error is. Its location has the members of unions among the keys: they are left out.

    The annotation of an unknown key is the class of its section.
    """
    path, annotation, value = "", RunConfig, raw
    for step in error["loc"]:
        if isinstance(step, int) and isinstance(value, list):
            path, annotation, value = _join(path, step), item_type(annotation), value[step]
        elif isinstance(value, dict) and sections(annotation):
            classes = sections(annotation)
            cls = next((c for c in classes if kind_of(c) == value.get("kind")), classes[0])
            if step in hints(cls):
                path, annotation, value = _join(path, step), hints(cls)[step], value.get(step)
            elif step in value and step == error["loc"][-1]:
                path, annotation, value = _join(path, step), cls, value[step]
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    return _Mistake(error["type"], path, annotation, value, message)


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in `raw`; what is absent on the way starts from the defaults."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {_show(override)} is not of the form key.path=value")
    node: Any = raw
    annotation: Any = RunConfig
    for depth, name in enumerate(keys):
        key, below = _step(annotation, node, name, ".".join(keys[:depth]))
        if depth == len(keys) - 1:
            node[key] = _override_value(text, below, path)
            return
        if isinstance(node, dict) and node.get(key) is None:
            default = default_of(_choose(annotation, node, ""), key)
            node[key] = to_dict(default) if default not in (None, dataclasses.MISSING) else {}
        node, annotation = node[key], below


def _step(annotation: Any, node: Any, name: str, path: str) -> tuple[str | int, Any]:
    """(key or index, annotation below) for one step of an override's path."""
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise ConfigError(f"override {_join(path, name)}: {path} has the items 0 to {len(node) - 1}")
        return int(name), item_type(annotation)
    if not sections(annotation):
        raise ConfigError(
            f"override {_join(path, name)}: {path} has no keys below it: it is {expected(annotation)}"
        )
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: expected {expected(annotation)}, got {_show(node)}")
    # Where nothing is chosen yet, an override may choose: any kind's `kind` will do.
    choosing = name == "kind" and "kind" not in node
    cls = sections(annotation)[0] if choosing else _choose(annotation, node, path)
    if name not in hints(cls):
        raise _unknown(cls, name, path)
    return name, hints(cls)[name]


def _override_value(text: str, annotation: Any, path: str) -> Any:
    """YAML, but text is taken as written (`*.txt`, `ROMEO:`, `def `) unless quoted or null."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"override {path}: the value is not valid UTF-8") from None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if str in members(annotation) and text != "null" and not quoted:
        return text
    return yaml_text.parse(text, f"override {path}")
