"""Validation of config fields: their types, the range of their numbers, and values out of a few words.

Configs built in Python get the same checks as configs read from YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Any, Literal, Union

from attention_jax.hints import hint

#: The largest integer of a config: jax counts steps, positions and the elements of an axis in int32.
LARGEST = 2**31 - 1
#: float32's largest number and its smallest normal one: below it, XLA may compute with 0.
_FLOAT_MAX, _FLOAT_MIN = float(2**128 - 2**104), 2.0**-126
#: The largest dropout rate: with more, fewer than one value in a hundred is left to learn from.
_MOST_DROPOUT = 0.99


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

    Integers may be NumPy's, and an integer stands for a float; booleans are no numbers, as in YAML. A number
    must also be one that the computation can hold: see `check_number`.
    """
    for name, (expected, what, none) in _plain(type(config)).items():
        value = getattr(config, name)
        if value is None and none:
            continue
        if not isinstance(value, expected) or (expected is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} must be {what}{' or None' if none else ''}, got {value!r}")
        if expected is not bool:
            check_number(name, value)
    for name, (words, others) in _choices(type(config)).items():
        value = getattr(config, name)
        if not (isinstance(value, others) or any(value is word or value == word for word in words)):
            known = ", ".join(map(str, words))
            raise ValueError(f"{name} must be one of {known}, got {value!r}{hint(name, value, words)}")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError for an integer beyond int32, or a float beyond float32's normal numbers."""
    if isinstance(value, numbers.Integral):
        most = 2**32 - 1 if name.endswith("seed") else LARGEST  # seeds are uint32
        if abs(value) > most:
            raise ValueError(f"{name} must be an integer of 32 bits, at most {most}, got {shown(value)}")
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if abs(value) > _FLOAT_MAX:
        raise ValueError(f"{name} must be at most {_FLOAT_MAX:.3g}, the largest of float32, got {value}")
    if 0 < abs(value) < _FLOAT_MIN:
        least = f"{_FLOAT_MIN:.3g}, the smallest normal number of float32"
        raise ValueError(f"{name} must be 0 or at least {least}, got {value}")


def check_between(
    config: Any, name: str, low: float, high: float, why: str, *, zero: bool = False, signed: bool = False
) -> None:
    """Raise ValueError unless a numeric field is None or in [low, high]; `why` is the reason for the limits.

    zero: 0 is allowed as well. signed: the limits are those of the magnitude.
    """
    value = getattr(config, name)
    if value is None or (zero and value == 0):
        return
    if not low <= (abs(value) if signed else value) <= high:
        what = "0, or " if zero else ""
        what += "of a magnitude " if signed else ""
        raise ValueError(f"{name} must be {what}from {low:g} to {high:g}, got {shown(value)}: {why}")


def check_epsilon(config: Any, name: str) -> None:
    """Raise ValueError unless an epsilon is 0 or can make a difference beside what it is added to."""
    why = "it must not replace what it is added to, nor vanish beside it"
    check_between(config, name, 1e-12, 1, why, zero=True)


def check_dropout(rate: float, name: str = "dropout") -> None:
    """Raise ValueError unless the dropout rate leaves something to learn from."""
    if not 0 <= rate <= _MOST_DROPOUT:
        raise ValueError(
            f"{name} must be in [0, {_MOST_DROPOUT}], got {rate}: it is the fraction that is set to 0"
        )


def shown(value: Any) -> str:
    """A number for a message: one of more than 20 digits rounded."""
    if isinstance(value, numbers.Integral) and abs(value) >= 10**20:
        digits = len(str(abs(value))) if abs(value) < 10**400 else None
        return f"a number of {digits} digits" if digits else "a number of more than 400 digits"
    return str(value)


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
