"""Types of options: how tyro reads a word of a command line, and what it answers to a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional as Positional
from tyro.constructors import PrimitiveConstructorSpec


def one(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    """The annotation of an option of one word, which `read` turns into a value, or ValueError says why not.

    metavar: what stands for the word in the help. None, where it is the default, is shown as `none`.
    """
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
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


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be an integer, got {text}") from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"must be an integer >= 1, got {text}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text}") from None


# A count is an integer >= 1.
Count = Annotated[int, one("N", _count)]
MaybeCount = Annotated[int | None, one("N", _count)]
Counts = Annotated[tuple[int, ...], many("N", _count)]
Integer = Annotated[int, one("N", _integer)]
MaybeInteger = Annotated[int | None, one("N", _integer)]
Integers = Annotated[tuple[int, ...], many("N", _integer)]
Number = Annotated[float, one("X", _number)]
MaybeNumber = Annotated[float | None, one("X", _number)]
MaybePath = Annotated[Path | None, one("PATH", Path)]
MaybeText = Annotated[str | None, one("TEXT", str)]
Configs = Annotated[tuple[str, ...], many("CONFIG", str)]
Overrides = Annotated[tuple[str, ...], many("KEY=VALUE", str)]


def words(metavar: str, known: Iterable[str] | Callable[[], Iterable[str]]) -> Any:
    """The annotation of a tuple of words out of some that are known, or that a function lists."""

    def read(text: str) -> str:
        there_are = list(known() if callable(known) else known)
        if text not in there_are:
            raise ValueError(f"there is no {text!r}; there are {', '.join(there_are)}")
        return text

    return Annotated[tuple[str, ...], many(metavar, read)]
