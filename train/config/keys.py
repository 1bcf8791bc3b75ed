"""What a configuration key may hold, read from the dataclasses' annotations and comments."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import json
import textwrap
import tokenize
import types
import typing
from typing import Any

from attention_jax.kinds import is_family
from attention_jax.masks import Mask

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name to annotation, resolved, in order."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls)}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union or of a family of kinds; any other annotation is its own only one."""
    if is_family(annotation):
        return tuple(annotation.kinds().values())
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(itertools.chain.from_iterable(map(members, typing.get_args(annotation))))
    return (annotation,)


def sections(annotation: Any) -> list[type]:
    """The dataclasses that a mapping may stand for here, of every kind; masks are written as expressions."""
    return [m for m in members(annotation) if dataclasses.is_dataclass(m) and not issubclass(m, Mask)]


def item_type(annotation: Any) -> Any:
    """What a list holds here; None where no list is expected."""
    for member in members(annotation):
        if typing.get_origin(member) is tuple:
            return typing.get_args(member)[0]
    return None


def kind_of(cls: type) -> str | None:
    """The value of `kind` that chooses this dataclass; None where it has no kind."""
    return typing.get_args(hints(cls)["kind"])[0] if "kind" in hints(cls) else None


def default_of(cls: type, name: str) -> Any:
    """A field's default; dataclasses.MISSING where it has none."""
    spec = cls.__dataclass_fields__[name]
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def expected(annotation: Any) -> str:
    """The type in words, for an error: "an integer or null"."""
    words = []
    for member in members(annotation):
        if member is Mask:
            words.append("a mask expression")
        elif typing.get_origin(member) is typing.Literal:
            words += [json.dumps(value) for value in typing.get_args(member)]
        elif typing.get_origin(member) is tuple:
            words.append("a list")
        elif dataclasses.is_dataclass(member):
            words.append("a mapping of keys")
        elif not (member is str and Mask in members(annotation)):
            words.append(_WORDS[member])
    return " or ".join(dict.fromkeys(words))


def words(annotation: Any) -> list[str]:
    """The words that a value may be, where some are listed."""
    return [
        value
        for member in members(annotation)
        if typing.get_origin(member) is typing.Literal
        for value in typing.get_args(member)
    ]


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Field name to the text of its `#:` comment, above the field or behind it; inherited ones included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= _own_meanings(owner)
    return {name: found[name] for name in hints(cls) if name in found}


def _own_meanings(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0].body
    lines = {  # every source line of a field, to its name
        line: node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    found: dict[str, str] = {}
    above: list[str] = []
    comments = {
        token.start[0]: token.string[2:].strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.string.startswith("#:")
    }
    for line in range(1, max(lines, default=0) + 1):
        if line in lines:
            texts = [*above, comments.get(line, "")]
            found[lines[line]] = " ".join(filter(None, [found.get(lines[line], ""), *texts]))
            above = []
        elif line in comments:
            above.append(comments[line])
    return {name: text for name, text in found.items() if text}
