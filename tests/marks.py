"""Which rows of a table run in `make test` and which with the slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest


class Row(NamedTuple):
    """A row of a table that holds one value."""

    value: Any
    slow: bool = False


def params(table: Mapping[str, Any] | Iterable[Any], slow: Callable[[Any], bool] | None = None) -> list:
    """A test's parameters, the slow ones marked: the names of a mapping's rows, or the rows of another table.

    slow: whether a row is slow; by default its field `slow`.
    """
    slow = (lambda row: row.slow) if slow is None else slow
    rows = table.items() if isinstance(table, Mapping) else ((row, row) for row in table)
    return [pytest.param(value, marks=pytest.mark.slow) if slow(row) else value for value, row in rows]
