"""YAML and dotted overrides to a `RunConfig`, and back.

pydantic checks the types of the plain dataclasses, strictly; the walk in front of it names unknown keys and
unknown kinds with the nearest known one. Every error is a one-line `ConfigError` that starts with the path
of the key.
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
from train.config import plain_yaml
from train.config.keys import default_of, expected, hints, item_type, kind_of, members, sections
from train.config.plain_yaml import ConfigError
from train.config.schema import RunConfig

__all__ = ["ConfigError", "dump_yaml", "from_dict", "load", "to_dict"]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The run a YAML file describes, with `key.path=value` overrides applied in order.

    `run_dir: null` becomes runs/NAME_OF_THE_FILE. ConfigError tells what is wrong.
    """
    raw = _read(Path(path))
    for override in overrides:
        _override(raw, override)
    config = from_dict(raw)
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=str(Path("runs") / Path(path).stem))
    return config


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """The config of plain dicts, lists and scalars; `from_dict(to_dict(config)) == config`."""
    _check_keys(RunConfig, raw, "")
    try:
        # JSON mode is strict about scalars, yet takes lists for tuples and mappings for dataclasses.
        config = _adapter().validate_json(json.dumps(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(_told(error, raw)) from None
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
    raise ConfigError(f"{path}: {mask} has no YAML, an array or a function is no text; choose a pattern")


def dump_yaml(config: RunConfig) -> str:
    """The whole config as YAML, every key written out; `load` reads back an equal one."""
    return plain_yaml.dumps(to_dict(config))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not UTF-8 at byte {error.start}") from None
    raw = plain_yaml.parse(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {_show(raw)}")
    return raw or {}


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else plain_yaml.scalar(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _choose(annotation: Any, node: dict[str, Any], path: str) -> type:
    """The dataclass that the mapping `node` stands for, by its `kind` where there are kinds."""
    known = {kind_of(cls): cls for cls in sections(annotation)}
    if None in known:
        return known[None]
    choices = ", ".join(known)
    if "kind" not in node:
        raise ConfigError(f"{_join(path, 'kind')} is missing; there are: {choices}")
    if not isinstance(node["kind"], str) or node["kind"] not in known:
        raise ConfigError(f"{_join(path, 'kind')}: there is no {_show(node['kind'])}; there are: {choices}")
    return known[node["kind"]]


def _check_keys(cls: type, node: dict[str, Any], path: str) -> None:
    """ConfigError for an unknown key or kind anywhere below; types are left to pydantic."""
    for key, value in node.items():
        if key not in hints(cls):
            raise _unknown(cls, key, path)
        for place, annotation, below in _mappings(hints(cls)[key], value, _join(path, key)):
            _check_keys(_choose(annotation, below, place), below, place)


def _mappings(annotation: Any, value: Any, path: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(path, annotation, node) of every mapping at a key, itself or in a list, that a section may be."""
    if isinstance(value, dict) and sections(annotation):
        yield path, annotation, value
    elif isinstance(value, list) and sections(item_type(annotation)):
        for index, item in enumerate(value):
            yield from _mappings(item_type(annotation), item, _join(path, index))


def _unknown(cls: type, key: str, path: str) -> ConfigError:
    """The error for an unknown key: a near one of its section, the like elsewhere, or the nearest."""
    everywhere: dict[str, str] = {}
    for place in _all_keys(RunConfig, ""):
        everywhere.setdefault(place.rpartition(".")[2], place)
    here = {name: _join(path, name) for name in hints(cls)}
    for names, cutoff in ((here, 0.6), (everywhere, 0.8), (here, 0.0)):
        near = difflib.get_close_matches(key, names, 1, cutoff)
        if near:
            break
    verb = "did you mean" if cutoff else "the nearest is"
    mark = "?" if cutoff else ""
    return ConfigError(f"unknown key {_join(path, key)}; {verb} {names[near[0]]}{mark}")


def _all_keys(cls: type, path: str) -> Iterator[str]:
    for name, annotation in hints(cls).items():
        yield _join(path, name)
        for section in sections(annotation):
            yield from _all_keys(section, _join(path, name))
        for section in sections(item_type(annotation)):
            yield from _all_keys(section, _join(path, name) + ".0")


@functools.cache
def _adapter() -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(RunConfig)


def _told(failure: pydantic.ValidationError, raw: dict[str, Any]) -> str:
    """The first error that is about what was written, in one line."""
    for error in failure.errors(include_url=False):
        located = _locate(error["loc"], raw)
        if located is None:
            continue  # pydantic also tries the members of a union that `kind` did not choose
        path, annotation, value = located
        if error["type"] == "missing":
            return f"{path} is missing: expected {expected(annotation)}"
        if error["type"] == "value_error":
            message = str(error["ctx"]["error"])
            first = re.match(r"\w+", message)
            own = first and any(first[0] in hints(cls) for cls in sections(annotation))
            return path + (("." if own else ": ") if path else "") + message
        return f"{path}: expected {expected(annotation)}, got {_show(value)}"
    raise AssertionError(f"no error of {failure} is about the input")


def _locate(loc: tuple[str | int, ...], raw: Any) -> tuple[str, Any, Any] | None:
    """(path, annotation, value) of a pydantic location, without the union tags; None: another kind's."""
    path, annotation, value = "", RunConfig, raw
    for step in loc:
        classes = {cls.__name__: cls for cls in sections(annotation)}
        if step in classes and isinstance(value, dict):
            annotation = classes[step]
            if kind_of(annotation) != value.get("kind"):
                return None
            continue
        if isinstance(step, int):
            annotation = item_type(annotation)
        elif classes and step in (fields := hints(next(iter(classes.values())))):
            annotation = fields[step]
        elif isinstance(value, dict) and classes:
            return None  # the tag of a scalar, where a mapping was written
        else:
            break  # the tag of a union of scalars: the message is about the key itself
        path = _join(path, step)
        value = value.get(step) if isinstance(value, dict) else value[step]
    return path, annotation, value


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in `raw`; what is absent on the way starts from the defaults."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {_show(override)} is no key.path=value")
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
        raise ConfigError(f"override {_join(path, name)}: {path} is no section, but {expected(annotation)}")
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
    return plain_yaml.parse(text, f"override {path}")
