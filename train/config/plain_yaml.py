"""A small, unsurprising YAML: the JSON types with plain strings.

`1e-4` is a float (PyYAML reads a string), only `true` and `false` are booleans (`no` is text), numbers are
decimal (`010`, `0x10`, `1:30`, `1_000` are text, hence refused where a number is expected), keys are
unique text, and there are no other types. `dumps` quotes so that `parse` reads back the same.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)\Z"
)
_TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """A mistake in a configuration, told in one line."""


def parse(text: str, source: str) -> Any:
    """The value of a YAML text; ConfigError names the source, the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with fewer types
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and "\n" in text.strip() else ""
        raise ConfigError(f"{source}{line}: {_one_line(error.problem or error.context)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def dumps(value: Any) -> str:
    """YAML text that `parse` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def scalar(value: Any) -> str:
    """A value as one line of YAML, for help and messages."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _refuse(node: yaml.Node, problem: str) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def construct_unique(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(key_node, f"a key must be text, got {scalar(key)}")
            if key in result:
                _refuse(key_node, f"duplicate key {key!r}")
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        if node.value not in ("true", "false"):
            _refuse(node, f"{node.value!r} is neither true nor false")
        return node.value == "true"

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node)
        if _INT.match(text):
            return int(text)
        if not _FLOAT.match(text) or math.isinf(float(text)):
            _refuse(node, f"{text!r} is no finite decimal number")
        return float(text)

    def construct_any(self, node: yaml.Node) -> Any:
        _refuse(node, f"type {node.tag.removeprefix(_TAG)!r} is not understood")


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # In single quotes PyYAML spreads line breaks over lines and alters the rarer ones.
        style = '"' if text.splitlines() not in ([], [text]) else None
        return self.represent_scalar(_TAG + "str", text, style=style)


for _kind, _pattern, _first in (
    ("null", re.compile(r"(?:~|null)?\Z"), ["~", "n", ""]),
    ("bool", re.compile(r"(?:true|false)\Z"), ["t", "f"]),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)

for _kind, _construct in {
    "null": lambda loader, node: None,
    "bool": _Loader.construct_bool,
    "int": _Loader.construct_number,
    "float": _Loader.construct_number,
    "str": lambda loader, node: loader.construct_scalar(node),
    "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "map": _Loader.construct_unique,
}.items():
    _Loader.add_constructor(_TAG + _kind, _construct)
_Loader.add_constructor(None, _Loader.construct_any)
_Dumper.add_representer(str, _Dumper.represent_text)
