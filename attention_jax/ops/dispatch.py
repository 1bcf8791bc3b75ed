"""Which implementation of an op runs a call, and why each other one does not."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from attention_jax.ops import varying


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How to run a checked call; `unsupported` and `unwanted` answer with a reason or None.

    An unwanted call would run, but an implementation further down the table does it better.
    """

    attend: Callable[[Any], tuple[jax.Array, jax.Array]]
    unsupported: Callable[[Any], str | None]
    unwanted: Callable[[Any], str | None] = lambda call: None

    def run(self, call: Any) -> Any:
        """`attend`, the arrays of the call made to vary over the same mesh axes."""
        return self.attend(varying.aligned(call))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call, forward and backward, and why each other one does not.

    shards: how a mesh splits the call, "" where none does.
    """

    chosen: str
    reasons: dict[str, str]
    shards: str = ""

    def __str__(self) -> str:
        rows = [f"{name:<16} {reason}" for name, reason in self.reasons.items()]
        return "\n".join([f"forward and backward: {self.chosen}", *rows, *filter(None, [self.shards])])


def choose(table: Mapping[str, Implementation], call: Any, impl: str | None) -> Explanation:
    """The named implementation, or the first of the table that runs the call and wants it."""
    if impl is not None:
        if impl not in table:
            raise ValueError(f"unknown impl {impl!r}; there are {', '.join(table)}")
        why_not = table[impl].unsupported(call)
        if why_not:
            raise NotImplementedError(f"impl={impl!r} cannot run this call: {why_not}")
        return Explanation(impl, {name: "not asked for" for name in table} | {impl: "asked for by name"})
    chosen, reasons = None, {}
    for name, implementation in table.items():
        why_not = implementation.unsupported(call) or implementation.unwanted(call)
        if chosen is None and why_not is None:
            chosen, reasons[name] = name, "runs it, first in the order of preference"
        else:
            reasons[name] = why_not or f"would run it; {chosen} comes first"
    assert chosen is not None
    return Explanation(chosen, reasons)


def explained(function: Callable, find: Callable[..., Explanation], args: tuple, kwargs: dict) -> Explanation:
    """find(**arguments of `function`) without computing; arrays may be ShapeDtypeStructs."""
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    # Shapes are traced; whatever is concrete stays as it is.
    shapes = {name: x for name, x in given.arguments.items() if _has_shape_only(x)}
    found = []

    def trace(shapes):
        found.append(find(**(given.arguments | shapes)))
        return 0

    jax.eval_shape(trace, shapes)
    return found[0]


def _has_shape_only(value: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))
