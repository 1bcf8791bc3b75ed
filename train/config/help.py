"""The text of `python -m train --help`: every key, its type, default and meaning."""

from __future__ import annotations

import dataclasses
import functools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from attention_jax.masks import Mask
from train.config import to_dict, yaml_text
from train.config.keys import default_of, hints, item_type, kind_of, meanings, members, sections
from train.config.schema import RunConfig

WIDTH = 80

USAGE = """\
usage: python -m train CONFIG [key.path=value ...] [--print-config]
                       [--start-over] [--accept-environment]
       python -m train --help

Trains the language model that CONFIG describes: a YAML file, or the name of a
configuration that comes with the package, such as tiny. The same command again
resumes the run in its folder. Overrides take precedence over the file, later
ones over earlier ones. Their values are YAML; text needs no quotes. An item of
a list has its number in the path: model.mixers.0.num_heads=8.

  --print-config        print the whole configuration, with defaults, and exit
  --start-over          begin at step 0; what was trained so far is kept in the
                        run folder's before.1, before.2, ...
  --accept-environment  resume with other settings of jax than a checkpoint was
                        made with, which change random numbers, dtypes or the
                        precision of matrix products
  --help                print this text and exit

Exit status: 0 done; 2 a mistake in the command, the configuration or the data;
130 interrupted.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key as the help shows it."""

    path: str
    type: str
    default: str
    meaning: str | None


def keys() -> Iterator[Key]:
    """Every key of a configuration, sections before what they hold; list items are called N."""
    yield from _keys(RunConfig, "")


def help_text() -> str:
    """The whole text, at most `WIDTH` columns wide."""
    return "\n".join([USAGE, "Keys:", *_lines(RunConfig, "", {})]) + "\n"


def _keys(cls: type, path: str) -> Iterator[Key]:
    for key in _own_keys(cls, path):
        yield key
        annotation = hints(cls)[key.path.rpartition(".")[2]]
        for section, below in _sections_below(annotation, key.path):
            yield from _keys(section, below)


def _own_keys(cls: type, path: str) -> Iterator[Key]:
    for key in _described(cls):
        yield dataclasses.replace(key, path=f"{path}.{key.path}" if path else key.path)


@functools.cache
def _described(cls: type) -> tuple[Key, ...]:
    """The keys of a section by their names."""
    return tuple(
        Key(name, _type(annotation), _default(default_of(cls, name)), meanings(cls).get(name))
        for name, annotation in hints(cls).items()
    )


def _sections_below(annotation: Any, path: str) -> list[tuple[type, str]]:
    items = sections(item_type(annotation))
    return [(cls, path) for cls in sections(annotation)] + [(cls, f"{path}.N") for cls in items]


def _lines(cls: type, path: str, described_at: dict[type, str]) -> Iterator[str]:
    """The keys of a section and of those below; `described_at`: where each was first."""
    for key in _own_keys(cls, path):
        below = _sections_below(hints(cls)[key.path.rpartition(".")[2]], key.path)
        if below:
            yield ""
        head = f"  {key.path:<32}  {key.type}" + (f" = {key.default}" if key.default else "")
        yield from textwrap.wrap(head, WIDTH, subsequent_indent=" " * 36, break_long_words=False)
        yield from _wrapped(key.meaning or "", "      ")
        shown: list[type] = []
        if below and all(section in described_at for section, _ in below):
            yield from _wrapped(f"with the keys of {described_at[below[0][0]]} above", "      ")
            continue
        for section, place in below:
            described_at[section] = place
            kind = kind_of(section)
            if kind is not None:
                yield ""
                yield from _wrapped(f"{place}  with kind: {kind}.  {_summary(section)}", "  ")
                base = next((other for other in shown if _adds_nothing(section, other)), None)
                if base is not None:
                    yield f"      the keys of kind: {kind_of(base)}"
                    continue
            yield from _lines(section, place, described_at)
            shown.append(section)


def _adds_nothing(cls: type, base: type) -> bool:
    """Whether `cls` has the keys of `base`, `kind` apart, with the same defaults and meanings."""
    own, known = ([key for key in _described(section) if key.path != "kind"] for section in (cls, base))
    return own == known


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _type(annotation: Any) -> str:
    words: list[str] = []
    for member in members(annotation):
        if typing.get_origin(member) is typing.Literal:
            words += [str(value) for value in typing.get_args(member)]
        elif typing.get_origin(member) is tuple:
            words.append("list")
        elif member is Mask:
            words.append("mask")
        elif dataclasses.is_dataclass(member):
            words.append("section")
        elif member is type(None):
            words.append("null")
        elif not (member is str and Mask in members(annotation)):
            words.append(member.__name__)
    return " | ".join(dict.fromkeys(words))


def _default(value: Any) -> str:
    """A default as YAML; empty for sections, whose keys have their own, and for required keys."""
    if value is dataclasses.MISSING or (dataclasses.is_dataclass(value) and not isinstance(value, Mask)):
        return ""
    return yaml_text.scalar([_brief(item) for item in value] if isinstance(value, tuple) else to_dict(value))


def _brief(value: Any) -> Any:
    """A section as a dict of its `kind` and of what differs from the defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, Mask):
        return to_dict(value)
    return {
        name: _brief(getattr(value, name))
        for name in hints(type(value))
        if name == "kind" or getattr(value, name) != default_of(type(value), name)
    }
