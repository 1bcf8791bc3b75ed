"""YAML 1.2 text to plain values and back, by ruamel.yaml: dicts, lists, text, numbers, booleans and null.

Numbers are decimal and booleans are `true` and `false`: `1e-4` is a number, `no` is text, and so are `010`,
`0x10` and `1_000`, which are then refused where a number is expected. `dumps` quotes so that `parse` reads
back the same.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

DEPTH = 50  #: how deep a configuration may nest; ours reach 7
MOST_CHARACTERS = 250_000  #: of a text; ours have 1,000
_VALUES = 10_000  #: values of a document with its aliases written out; ours have 300
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)\Z"
)


class ConfigError(ValueError):
    """A mistake in a configuration, described in one line."""


def parse(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises: ConfigError in one line with the source and, where there are several lines, the line and column.
    Also for what ruamel.yaml would accept: tags, infinities, more than `MOST_CHARACTERS`, `DEPTH` levels or
    `_VALUES` values.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{source}: a configuration has at most {MOST_CHARACTERS} characters: shorten it")
    try:
        _check(text)
        return _unshared(_yaml().load(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        several = mark is not None and "\n" in text.strip()
        place = f":{mark.line + 1}:{mark.column + 1}" if several else ""
        problem = error.problem or error.context
        if problem.startswith("but "):  # the second half of a sentence
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{source}{place}: {_one_line(problem)}") from None
    except ReaderError as error:
        before = text[: error.position].split("\n")
        place = f"{len(before)}:{len(before[-1]) + 1}"
        raise ConfigError(f"{source}:{place}: the character U+{error.character:04X} is not allowed") from None
    except YAMLError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def dumps(value: Any) -> str:
    """YAML text that `parse` reads back as an equal value."""
    return _dump(value, width=100)


def scalar(value: Any) -> str:
    """A value as one line of YAML, for help and messages."""
    return _dump(value, width=2**31, flow=True).removesuffix("\n").removesuffix("\n...")


_WORDS = re.compile(r"(?:~|null)?\Z"), re.compile(r"(?:true|false)\Z")


class _Resolver(VersionedResolver):
    """What plain text stands for: fewer types than YAML 1.2 has, whatever version the text declares."""

    @property
    def versioned_resolver(self) -> dict[str | None, list[tuple[str, re.Pattern]]]:
        """The tags to try by first character; None: for any, the first that matches counts."""
        kinds = zip(("null", "bool", "int", "float"), (*_WORDS, _INT, _FLOAT), strict=True)
        return {None: [(_TAG + kind, pattern) for kind, pattern in kinds]}


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> ScalarNode:
        # In single quotes line breaks are spread over lines and the rarer ones are altered.
        style = '"' if text.splitlines() not in ([], [text]) else None
        return self.represent_scalar(_TAG + "str", text, style=style)

    def represent_number(self, number: float) -> ScalarNode:
        # Readers of YAML 1.1 take 1e-05 for text, and 1.0e-05 for the number.
        node = self.represent_float(number)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e", 1)
        return node


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(float, _Representer.represent_number)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer = _Resolver, _Representer
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _dump(value: Any, width: int, flow: bool = False) -> str:
    yaml, stream = _yaml(), io.StringIO()
    yaml.width, yaml.default_flow_style = width, flow
    yaml.dump(value, stream)
    return stream.getvalue()


def _unshared(value: Any) -> Any:
    """A copy in which nothing that aliases share is shared: overrides change values in place."""
    if isinstance(value, dict):
        return {key: _unshared(below) for key, below in value.items()}
    return [_unshared(below) for below in value] if isinstance(value, list) else value


class _Open:
    """A mapping or list whose end has not been read yet."""

    def __init__(self, event: Event):
        self.anchor = event.anchor
        self.mapping = isinstance(event, MappingStartEvent)
        self.children = 0  #: direct ones, keys included
        self.keys: set[str] = set()
        self.values = 1  #: with everything below


def _check(text: str) -> None:
    """Raise for what ruamel.yaml accepts and a configuration must not hold, before anything is built.

    ruamel.yaml has no limit for aliases of aliases (a few lines can stand for more values than fit the
    memory), recurses for nested lists, and builds other types for tags.
    """
    anchors: dict[str, int | None] = {}  # the values of what each names; None: not complete yet
    stack: list[_Open] = []
    for event in _yaml().parse(text):
        if isinstance(event, MappingEndEvent | SequenceEndEvent):
            closed = stack.pop()
            values, anchor = closed.values, closed.anchor
        elif isinstance(event, AliasEvent):
            values, anchor = anchors.get(event.anchor, 1), None
            if _is_key(stack):
                _refuse(event, "a key must be text, got an alias")
            if values is None:
                _refuse(event, f"the alias *{event.anchor} is recursive: it stands inside of what it names")
        elif isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent):
            _check_node(event, stack)
            values, anchor = 1, event.anchor
        else:
            continue
        if anchor is not None:
            opening = isinstance(event, SequenceStartEvent | MappingStartEvent)
            anchors[anchor] = None if opening else values
        if isinstance(event, SequenceStartEvent | MappingStartEvent):
            stack.append(_Open(event))
        elif stack:
            stack[-1].children += 1
            stack[-1].values += values
            if stack[-1].values > _VALUES:
                _refuse(event, f"more than {_VALUES} values, aliases written out: a configuration has fewer")


def _check_node(event: Event, stack: list[_Open]) -> None:
    if event.ctag is not None:
        _refuse(event, f"type {str(event.ctag).removeprefix(_TAG)!r} is not supported: remove the tag")
    if len(stack) >= DEPTH:
        _refuse(event, f"nested more than {DEPTH} levels deep")
    if isinstance(event, ScalarEvent) and any("\ud800" <= character <= "\udfff" for character in event.value):
        _refuse(event, "text must not hold the code of a surrogate, which no encoding can write")
    number = isinstance(event, ScalarEvent) and event.implicit[0] and _FLOAT.match(event.value)
    if _is_key(stack):
        _check_key(event, stack[-1])
    elif number and (len(event.value) > 4000 or math.isinf(float(event.value))):
        _refuse(event, f"{event.value[:40]!r} is not a finite decimal number")


def _check_key(event: Event, mapping: _Open) -> None:
    if not isinstance(event, ScalarEvent):
        _refuse(event, "a key must be text, got a list or a mapping")
    if event.implicit[0] and any(pattern.match(event.value) for pattern in (*_WORDS, _FLOAT)):
        _refuse(event, f"a key must be text, got {event.value or 'nothing'}")
    if event.value in mapping.keys:
        _refuse(event, f"duplicate key {event.value!r}")
    mapping.keys.add(event.value)


def _is_key(stack: list[_Open]) -> bool:
    """Whether the next node is a mapping's key."""
    return bool(stack) and stack[-1].mapping and stack[-1].children % 2 == 0


def _refuse(event: Event, problem: str) -> None:
    raise ConstructorError(None, None, problem, event.start_mark)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
