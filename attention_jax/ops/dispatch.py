"""Which implementation of an op runs a call, with which config, and why each other one does not."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from attention_jax.hints import hint
from attention_jax.ops import sharded, varying


def runs_every_call(call: Any, config: Any = None) -> str | None:
    """The `unsupported` of an implementation without limits: None."""
    del call, config
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How to run a checked call, and whether to.

    `attend` and `unsupported` take (call), or (call, config) where the implementation has a config.
    """

    #: Computes the call.
    attend: Callable[..., Any]
    #: Why the implementation cannot run the call, or None.
    unsupported: Callable[..., str | None] = runs_every_call
    #: Why an implementation further down the table runs the call better, or None; takes the call alone.
    unwanted: Callable[[Any], str | None] = runs_every_call
    #: Its config, a frozen dataclass of tile sizes and the like; None where it has none.
    config: Any = None

    @property
    def run(self) -> Callable[[Any], Any]:
        """`attend` with the config: a function of a call whose arrays vary alike (`varying.aligned`)."""
        return self.attend if self.config is None else functools.partial(self.attend, config=self.config)

    def refusal(self, call: Any) -> str | None:
        """`unsupported` with the config."""
        return self.unsupported(call) if self.config is None else self.unsupported(call, self.config)


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


def compiled_once(function: Callable, **static: Any) -> Callable:
    """The function, which outside of `jax.jit` is compiled once per shapes and static arguments.

    JAX compiles a loop that runs by itself anew in every call; this comes from jit's cache, and so does its
    gradient. Within a program that is being traced the call becomes a part of it, as if it stood there.

    static: `static_argnums` or `static_argnames` of `jax.jit`.
    """
    compiled, inlined = jax.jit(function, **static), jax.jit(function, inline=True, **static)

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs))
        if not _hashable(treedef):
            # A bias of the user's with a static field that has no hash, which no cache can know again.
            return function(*args, **kwargs)
        return (inlined if any(map(_is_traced, leaves)) else compiled)(*args, **kwargs)

    return call


def _is_traced(x: Any) -> bool:
    """Whether x has no value yet. While a gradient is taken outside of jit, a tracer has one."""
    return isinstance(x, jax.core.Tracer) and x.to_concrete_value() is None


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _evaluate(implementation: Implementation, split: sharded.Shards | None, call: Any) -> Any:
    """What the implementation returns for the call, with `split` from each shard of it."""
    if split is None:
        return implementation.run(varying.aligned(call))
    return sharded.per_shard(implementation.run, call, split)


evaluate = compiled_once(_evaluate, static_argnums=(0, 1))


def choose(table: Mapping[str, Implementation], call: Any, impl: Any) -> Implementation:
    """The implementation that runs the call.

    table: the op's implementations by name, in order of preference.
    impl: a name, an instance of an implementation's config, or None: the first of the table that supports
      and wants the call. The implementations after it are not asked.

    Raises:
      ValueError: an unknown `impl`.
      NotImplementedError: the implementation asked for cannot run the call.
    """
    if impl is not None:
        return _asked_for(table, call, impl)[1]
    for implementation in table.values():
        # Preferences first: they compare sizes, while a refusal may need a trace.
        if implementation.unwanted(call) is None and implementation.refusal(call) is None:
            return implementation
    raise AssertionError("the last implementation of a table runs every call")


def explain_choice(table: Mapping[str, Implementation], call: Any, impl: Any) -> Explanation:
    """What `choose` returns for the same arguments, with the reason of every other implementation."""
    if impl is not None:
        name, _ = _asked_for(table, call, impl)
        return Explanation(name, {other: "not asked for" for other in table} | {name: "asked for by name"})
    chosen, reasons = None, {}
    for name, implementation in table.items():
        why_not = implementation.refusal(call) or implementation.unwanted(call)
        if chosen is None and why_not is None:
            chosen, reasons[name] = name, "runs it, first in the order of preference"
        else:
            reasons[name] = why_not or f"would run it; {chosen} comes first"
    assert chosen is not None
    return Explanation(chosen, reasons)


def _asked_for(table: Mapping[str, Implementation], call: Any, impl: Any) -> tuple[str, Implementation]:
    """The implementation that `impl` names or configures, and its name."""
    if isinstance(impl, str):
        name = impl if impl in table else None
    else:
        name = next(
            (n for n, x in table.items() if x.config is not None and type(x.config) is type(impl)), None
        )
    if name is None:
        configs = [type(x.config).__name__ for x in table.values() if x.config is not None]
        known = [*table, *configs]
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(known)}{hint('impl', impl, known)}")
    found = table[name] if isinstance(impl, str) else dataclasses.replace(table[name], config=impl)
    if why_not := found.refusal(call):
        raise NotImplementedError(f"impl={impl!r} cannot run this call: {why_not}")
    return name, found


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
