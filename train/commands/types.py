"""Types of options: how tyro reads a word of a command line, and what it answers to a wrong one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional as Positional
from tyro.constructors import PrimitiveConstructorSpec

from attention_jax.choices import LARGEST
from attention_jax.hints import near


def one(
    metavar: str, read: Callable[[str], Any], show: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec:
    """The annotation of an option of one word, which `read` turns into a value, or ValueError says why not.

    metavar: what stands for the word in the help. A default is shown by `show`, None as `none`.
    """
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else show(value)],
    )


def many(
    metavar: str, read: Callable[[str], Any], show: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec:
    """The annotation of a tuple of values, a word each; an empty default is shown as `none`."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar} ...",
        instance_from_str=lambda words: tuple(read(word) for word in words),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [show(item) for item in value] or ["none"],
    )


def _integer(text: str, least: int = -(2**32)) -> int:
    """An integer, also written as 1e3, of at most 32 bits."""
    what = "an integer" if least < 0 else f"an integer >= {least}"
    value = None
    if re.fullmatch(r"[-+]?[0-9]{1,20}", text):
        value = int(text)
    elif re.fullmatch(r"[-+]?[0-9.]{1,20}[eE]\+?[0-9]{1,2}", text):
        value = _whole(text)
    elif re.fullmatch(r"[-+]?[0-9]+", text):
        raise ValueError(f"must be at most {2**32 - 1}, got a number of {len(text)} digits")
    if value is None or value < least:
        raise ValueError(f"must be {what}, got {text}")
    if value > 2**32 - 1:  # a seed may have 32 bits
        raise ValueError(f"must be at most {2**32 - 1}, got {text}")
    return value


def _whole(text: str) -> int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def _count(text: str) -> int:
    value = _integer(text, 1)
    if value > LARGEST:
        raise ValueError(f"must be at most {LARGEST}, got {text}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, got {text}")
    return value


def _path(text: str) -> Path:
    """A path, with ~ and ~user for home folders."""
    if not text or "\0" in text:
        raise ValueError(f"must be a path, got {text!r}")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise ValueError(
            f"there is no home folder {text.partition('/')[0]}; write ./{text} for a folder of that name"
        )
    return Path(found)


def _unescaped(text: str) -> str:
    """The text with a newline for \\n, a tab for \\t and a backslash for two."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


# A count is an integer >= 1.
Count = Annotated[int, one("N", _count)]
MaybeCount = Annotated[int | None, one("N", _count)]
Counts = Annotated[tuple[int, ...], many("N", _count)]
Integer = Annotated[int, one("N", _integer)]
MaybeInteger = Annotated[int | None, one("N", _integer)]
Integers = Annotated[tuple[int, ...], many("N", _integer)]
Number = Annotated[float, one("X", _number)]
MaybeNumber = Annotated[float | None, one("X", _number)]
Folder = Annotated[Path, one("PATH", _path)]
MaybePath = Annotated[Path | None, one("PATH", _path)]
Escaped = Annotated[str, one("TEXT", _unescaped, _escaped)]
MaybeEscaped = Annotated[str | None, one("TEXT", _unescaped, _escaped)]
EscapedTexts = Annotated[tuple[str, ...], many("TEXT", _unescaped, _escaped)]
MaybeText = Annotated[str | None, one("TEXT", str)]
Configs = Annotated[tuple[str, ...], many("CONFIG", str)]
Overrides = Annotated[tuple[str, ...], many("KEY=VALUE", str)]


def words(metavar: str, known: Iterable[str] | Callable[[], Iterable[str]]) -> Any:
    """The annotation of a tuple of words out of some that are known, or that a function lists."""

    def read(text: str) -> str:
        there_are = list(known() if callable(known) else known)
        if text not in there_are:
            meant = near(text, there_are)
            more = f"; did you mean {meant}?" if meant else ""
            raise ValueError(f"there is no {text!r}; there are {', '.join(there_are)}{more}")
        return text

    return Annotated[tuple[str, ...], many(metavar, read)]
