"""YAML and dotted overrides to a `RunConfig`, and back.

pydantic checks the plain dataclasses, strictly, and chooses among several by `kind`. What it finds is said
in one line, as a `ConfigError` that starts with the dotted path of the key and says what was probably meant.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from attention_jax.feed_forwards import FeedForwardConfig
from attention_jax.hints import hint, look_up, near
from attention_jax.masks import Mask, parse
from attention_jax.mixers import MixerConfig
from train.config import shipped, synonyms, yaml_text
from train.config.keys import default_of, expected, hints, item_type, kind_of, members, sections, words
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
    if "\0" in str(path):
        raise ConfigError(f"the configuration {str(path)!r}: a path must not hold the character U+0000")
    path = shipped.find(os.path.expanduser(path))
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
        text = json.dumps(_with_integers(raw, RunConfig))
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"the configuration is not of nested dicts, lists and scalars: {error}") from None
    try:
        config = _adapter(*MixerConfig.kinds().values(), *FeedForwardConfig.kinds().values()).validate_json(
            text
        )
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
        with path.open("rb") as file:
            data = file.read(yaml_text.MOST_CHARACTERS + 1)  # /dev/zero has no end
        if len(data) > yaml_text.MOST_CHARACTERS:
            raise ConfigError(
                f"{path}: a configuration has at most {yaml_text.MOST_CHARACTERS} bytes: shorten it"
            )
        text = data.decode("utf-8-sig")
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
    return _brief(repr(value) if isinstance(value, str) else yaml_text.scalar(value))


def _brief(text: str) -> str:
    """A text for a message, cut after 60 characters, on one line."""
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if text.isprintable() else repr(text)


def _with_integers(value: Any, annotation: Any) -> Any:
    """The value with whole numbers such as 1e3 as integers, where an integer is expected."""
    if isinstance(value, float) and int in members(annotation) and float not in members(annotation):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        below = item_type(annotation)
        return [_with_integers(item, below) for item in value] if below is not None else value
    if not isinstance(value, dict) or not (classes := sections(annotation)):
        return value
    cls = next((c for c in classes if kind_of(c) == value.get("kind")), classes[0])
    return {
        key: _with_integers(below, hints(cls)[key]) if key in hints(cls) else below
        for key, below in value.items()
    }


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
    kinds = [str(kind_of(cls)) for cls in sections(annotation)]
    choices = ", ".join(kinds)
    if "kind" not in node:
        return f"{_join(path, 'kind')} is missing; there are: {choices}"
    more = hint("kind" if annotation is MixerConfig else _last_name(path), node["kind"], kinds)
    return f"{_join(path, 'kind')}: there is no {_show(node['kind'])}; there are: {choices}{more}"


def _last_name(path: str) -> str:
    """The last part of a dotted path that is no number."""
    return next((name for name in reversed(path.split(".")) if not name.isdecimal()), "")


def _unknown(cls: type, key: str, path: str) -> ConfigError:
    """The error for an unknown key: another library's word, one of that name elsewhere, or one like it."""
    what = f"unknown key {_brief(_join(path, key))}"
    here = {name: _join(path, name) for name in hints(cls)}
    if (renamed := RENAMED.get(key)) in here:
        return ConfigError(f"{what}; it is {here[renamed]} now")
    if said := look_up(synonyms.KEYS, _last_name(path) + key) or look_up(synonyms.KEYS, key):
        return ConfigError(f"{what}; {said}")
    everywhere: dict[str, str] = {}
    for place in _all_keys(RunConfig, ""):
        everywhere.setdefault(place.rpartition(".")[2], place)
    del everywhere["kind"]  # every choice has one: that of a section without a choice is none of them
    places = [everywhere[key]] if key in everywhere else []
    places += [names[meant] for names in (here, everywhere) if (meant := near(key, names))]
    if places:
        return ConfigError(f"{what}; did you mean {places[0]}?")
    return ConfigError(f"{what}; the keys {f'of {path}' if path else 'at the top'} are {', '.join(here)}")


def _all_keys(cls: type, path: str) -> Iterator[str]:
    for name, annotation in hints(cls).items():
        yield _join(path, name)
        for section in sections(annotation):
            yield from _all_keys(section, _join(path, name))
        for section in sections(item_type(annotation)):
            yield from _all_keys(section, _join(path, name) + ".0")


_MOST_ERRORS = 1000  # of a configuration that are looked at; aliases can repeat a mistake many times

# Kinds of pydantic's errors that say more than that a type is wrong, the most telling first.
_TELLING = (
    "unexpected_keyword_argument",
    "union_tag_not_found",
    "union_tag_invalid",
    "missing",
    "value_error",
)


@functools.cache
def _adapter(*kinds: type) -> pydantic.TypeAdapter:
    """One per set of kinds: a schema holds the kinds that are registered when it is made."""
    del kinds
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
    errors = failure.errors(include_url=False, include_input=False)[:_MOST_ERRORS]
    mistakes = [_locate(error, raw) for error in errors]
    outer = {m.path[:at] for m in mistakes for at in range(len(m.path)) if m.path[at] == "."}
    inner = [m for m in mistakes if m.path not in outer]
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
    more = hint(_last_name(first.path), first.value, words(first.annotation), synonyms.VALUES)
    return f"{first.path}: expected {expected(first.annotation)}, got {_show(first.value)}{more}"


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
    if len(keys) > yaml_text.DEPTH:
        raise ConfigError(f"override {_brief(path)} is nested more than {yaml_text.DEPTH} levels deep")
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
