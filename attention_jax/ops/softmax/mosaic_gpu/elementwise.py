"""Functions of (batch row, head, q position, k position), traced on scalars and run on tiles in a kernel.

A mask's `keep`, a bias's `score` and the dropout hash are elementwise. Traced on scalars they are a jaxpr
without a shape, whose equations fall into three parts: what depends on neither position is computed once
per (batch row, head) outside the kernel; what depends on one position runs on a vector, one value per row or
column of the tile; the rest runs on the tile. Nothing that indexes an array can run there: `trace` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

_LOWERED = frozenset(
    "add sub mul div rem max min neg abs sign and or xor not eq ne lt le gt ge select_n convert_element_type "
    "shift_left shift_right_logical shift_right_arithmetic integer_pow square exp exp2 log tanh sqrt rsqrt "
    "clamp copy".split()
)
# Of arrays with one element these change the shape alone; on a scalar they are the identity.
_SHAPES = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy".split())

Q, K = frozenset("q"), frozenset("k")
NEITHER: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """The jaxpr of a scalar function of (batch row, head, q position, k position)."""

    outer: list  # equations that depend on neither position
    inner: list
    frontier: list  # what `inner` reads of `outer`, in order
    known: dict  # variables that depend on nothing, as NumPy scalars
    jaxpr: core.ClosedJaxpr

    @property
    def constant(self) -> Any:
        """The value where it is the same for all arguments, else None."""
        (out,) = self.jaxpr.jaxpr.outvars
        if isinstance(out, core.Literal):
            return out.val
        return self.known.get(out)

    def scalars(self, B: int, N: int) -> list[jax.Array]:
        """What the kernel reads per (batch row, head): arrays [B, N], one for each frontier variable."""
        batch, head, _, _ = self.jaxpr.jaxpr.invars

        def one(b, n):
            env = dict(zip(self.jaxpr.jaxpr.constvars, self.jaxpr.consts, strict=True)) | self.known
            env |= {batch: b, head: n}
            for eqn in self.outer:
                _bind(eqn, env)
            found = [env[v].reshape(()) for v in self.frontier]
            return [x.astype(jnp.int32) if x.dtype == bool else x for x in found]

        b, n = jnp.arange(B, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(b, n)

    def tile(
        self, scalars: Sequence[Any], q_pos: Any, k_pos: Any, shape: tuple[int, int], q_axis: int
    ) -> Any:
        """The function on a tile [queries, keys] (q_axis 0) or [keys, queries] (q_axis 1), in a kernel.

        q_pos, k_pos: vectors along their axes of the tile.
        """
        env: dict[Any, tuple[frozenset, Any]] = {
            v: (NEITHER, x.reshape(())[()]) for v, x in self.known.items()
        }
        for var, x in zip(self.frontier, scalars, strict=True):
            env[var] = (NEITHER, x != 0 if var.aval.dtype == bool else x)
        _, _, q, k = self.jaxpr.jaxpr.invars
        env[q], env[k] = (Q, q_pos), (K, k_pos)
        axes = {Q: q_axis, K: 1 - q_axis}

        def read(v):
            if isinstance(v, core.Literal):
                return NEITHER, np.asarray(v.val, v.aval.dtype)[()]
            return env[v]

        for eqn in self.inner:
            args = [read(v) for v in eqn.invars]
            kind = frozenset().union(*(a for a, _ in args))
            size = shape if kind == Q | K else (shape[axes[kind]],)
            if eqn.primitive.name in _SHAPES:
                env[eqn.outvars[0]] = args[0]
                continue
            values = [_spread(x, a, kind, size, axes) for a, x in args]
            env[eqn.outvars[0]] = (kind, _apply(eqn, values))
        kind, x = read(self.jaxpr.jaxpr.outvars[0])
        return _spread(x, kind, Q | K, shape, axes)


def trace(fn: Callable, what: str) -> Traced | str:
    """`fn(batch, head, q_pos, k_pos)` of scalars, or why it cannot run in a kernel."""
    i32 = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        with jax.disable_jit():  # so that no equation is a call
            closed = jax.make_jaxpr(fn)(i32, i32, i32, i32)
    except Exception as error:  # whatever a user's function does with traced scalars
        return f"{what} cannot be traced on scalars ({type(error).__name__})"
    jaxpr = closed.jaxpr
    kinds = {v: NEITHER for v in (*jaxpr.constvars, *jaxpr.invars[:2])}
    kinds |= {jaxpr.invars[2]: Q, jaxpr.invars[3]: K}
    outer, inner, frontier, known = [], [], {}, {}
    for eqn in jaxpr.eqns:
        used = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        if _equal_to_itself(eqn):  # `Full`
            value = np.asarray(True)
        elif all(v in known for v in used):
            value = _folded(eqn, known)
        else:
            value = None
        if value is not None:
            known[eqn.outvars[0]] = value
            kinds[eqn.outvars[0]] = NEITHER
            continue
        kind = frozenset().union(*(kinds[v] for v in used))
        kinds |= {v: kind for v in eqn.outvars}
        if kind == NEITHER:
            outer.append(eqn)
            continue
        name = eqn.primitive.name
        if name not in _LOWERED | _SHAPES or any(v.aval.size != 1 for v in (*used, *eqn.outvars)):
            return f"{what} uses {name!r}, which this kernel cannot evaluate entry by entry"
        inner.append(eqn)
        frontier |= {v: None for v in used if kinds[v] == NEITHER and v not in known}
    out = jaxpr.outvars[0]
    if not isinstance(out, core.Literal) and kinds[out] == NEITHER and out not in known:
        frontier |= {out: None}
    return Traced(outer, inner, list(frontier), known, closed)


def _bind(eqn: Any, env: dict) -> None:
    args = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
    out = eqn.primitive.bind(*args, **eqn.params)
    env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


_FOLDED = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "sign": np.sign, "abs": np.abs,
    "max": np.maximum, "min": np.minimum, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _equal_to_itself(eqn: Any) -> bool:
    a = eqn.invars[0]
    same = eqn.primitive.name == "eq" and not isinstance(a, core.Literal) and a is eqn.invars[1]
    return same and jnp.issubdtype(a.aval.dtype, jnp.integer)


def _folded(eqn: Any, known: dict) -> np.ndarray | None:
    """The value of an equation over constants, by NumPy: jax would run it on a device. None if too rare."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if out.size != 1 or name not in _SHAPES | {"convert_element_type"} | _FOLDED.keys():
        return None
    args = [np.asarray(v.val, v.aval.dtype) if isinstance(v, core.Literal) else known[v] for v in eqn.invars]
    with np.errstate(over="ignore"):
        value = _FOLDED[name](*args) if name in _FOLDED else args[0]
    return np.asarray(value, out.dtype).reshape(out.shape)


def _spread(x: Any, have: frozenset, want: frozenset, size: tuple[int, ...], axes: dict) -> Any:
    """A scalar or vector as the vector or tile that an operation needs."""
    if have == want:
        return x
    if have == NEITHER:
        return lax.broadcast(jnp.asarray(x), size)
    return lax.broadcast_in_dim(x, size, (axes[have],))


def _apply(eqn: Any, values: list) -> Any:
    name = eqn.primitive.name
    if name == "not" and values[0].dtype == bool:
        return values[0] == False  # noqa: E712 (Mosaic lowers no negation of booleans)
    if name == "convert_element_type":
        return values[0].astype(eqn.params["new_dtype"])
    return eqn.primitive.bind(*values, **eqn.params)
