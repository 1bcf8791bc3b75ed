"""Validation of config fields that take one of several values, or one of several configs selected by `kind`.

Configs built in Python get the same checks as configs read from YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from typing import Any, Literal, Union


class ByKind:
    """Annotation of a dataclass or a union of dataclasses that pydantic discriminates by the key `kind`.

    The library itself does not import pydantic: the schema is plain data.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        configs = typing.get_args(source) or (source,)
        choices = {config.kind: handler.generate_schema(config) for config in configs}
        return {"type": "tagged-union", "discriminator": "kind", "choices": choices}


def check_choices(config: Any) -> None:
    """Raise ValueError if a field's value is not one that its `Literal` lists, or not a number of its type.

    Integers may be NumPy's, and an integer stands for a float; booleans are no numbers, as in YAML.
    """
    for name, (expected, what, none) in _plain(type(config)).items():
        value = getattr(config, name)
        if (value is None and none) or (
            isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        ):
            continue
        raise ValueError(f"{name} must be {what}{' or None' if none else ''}, got {value!r}")
    for name, (words, others) in _choices(type(config)).items():
        value = getattr(config, name)
        if not (isinstance(value, others) or any(value is word or value == word for word in words)):
            raise ValueError(f"{name} must be one of {', '.join(map(str, words))}, got {value!r}")


_PLAIN = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
}


@functools.cache
def _plain(cls: type) -> dict[str, tuple[type, str, bool]]:
    """For each field with a number or a boolean: the accepted class, its name, and whether None is."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        members = typing.get_args(hints[field.name]) or (hints[field.name],)
        kinds = [m for m in members if m is not type(None)]
        if len(kinds) == 1 and kinds[0] in _PLAIN:
            found[field.name] = (*_PLAIN[kinds[0]], type(None) in members)
    return found


@functools.cache
def _choices(cls: type) -> dict[str, tuple[tuple[Any, ...], tuple[type, ...]]]:
    """For each field with a `Literal` type: its allowed values and the classes that the type also allows."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (Union, types.UnionType)
        members = typing.get_args(hint) if union else (hint,)
        words = [w for m in members if typing.get_origin(m) is Literal for w in typing.get_args(m)]
        if words:
            others = tuple(m for m in members if isinstance(m, type))
            found[field.name] = ((*words, None) if type(None) in others else tuple(words), others)
    return found
