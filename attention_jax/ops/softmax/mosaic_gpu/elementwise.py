"""Functions of (batch row, head, q position, k position), traced on scalars and run on tiles in a kernel.

A mask's `keep`, a bias's `score` and the dropout hash are elementwise. Traced on scalars they are a jaxpr
without a shape, whose equations fall into three parts: what depends on neither position is computed once
per (batch row, head) outside the kernel; what depends on one position runs on a vector, one value per row or
column of the tile; the rest runs on the tile.

What depends on one position is *looked up*, computed outside the kernel as one int32 per token, where it
cannot run there (it indexes an array) or takes `LONG` equations: a vector is read in less time. A function
that indexes an array with both positions cannot run; `trace` returns why. Of a bias with leaves what depends
on a leaf of one token is looked up too, per head and in float32 (`bias.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

_LOWERED = frozenset(
    "add add_any sub mul div rem max min neg abs sign and or xor not eq ne lt le gt ge select_n "
    "convert_element_type shift_left shift_right_logical shift_right_arithmetic integer_pow square exp exp2 "
    "log tanh sqrt rsqrt clamp copy".split()
)
# Of arrays with one element these change the shape alone; on a scalar they are the identity.
_SHAPES = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy reduce_sum reshard".split())

LOG2E = math.log2(math.e)
LONG = 6
_READ = (bool, jnp.int32)  # types of what is looked up
_READ_BY_HEAD = (*_READ, jnp.float32)

Q, K = frozenset("q"), frozenset("k")
NEITHER: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """The jaxpr of a scalar function of (batch row, head, q position, k position, leaves, given numbers)."""

    outer: list  # equations that depend on neither position
    inner: list
    frontier: list  # what `inner` reads of `outer`, in order
    known: dict  # variables that depend on nothing, as NumPy scalars
    jaxpr: core.ClosedJaxpr
    looked: dict  # what `inner` reads that is looked up: variables, and the side Q or K of their position
    learned: frozenset  # of `frontier` and `looked` what is made from leaves of floats and has gradients
    given: dict  # numbers that the kernel has: variables, and what they depend on

    def reads(self, side: frozenset) -> int:
        """Numbers looked up per token of one side."""
        return sum(kind == side for kind in self.looked.values())

    @property
    def vectors(self) -> int:
        """Numbers looked up per token, of the side of which there are more."""
        return max(self.reads(side) for side in (Q, K))

    @property
    def constant(self) -> Any:
        """The value where it is the same for all arguments, else None."""
        (out,) = self.jaxpr.jaxpr.outvars
        if isinstance(out, core.Literal):
            return out.val
        return self.known.get(out)

    def scalars(self, B: int, N: int) -> list[jax.Array]:
        """What the kernel reads per (batch row, head): arrays [B, N], one for each frontier variable."""
        batch, head, *_ = self.jaxpr.jaxpr.invars

        def one(b, n):
            env = dict(zip(self.jaxpr.jaxpr.constvars, self.jaxpr.consts, strict=True)) | self.known
            env |= {batch: b, head: n}
            for eqn in self.outer:
                bind(eqn, env)
            found = [env[v].reshape(()) for v in self.frontier]
            return [x.astype(jnp.int32) if x.dtype == bool else x for x in found]

        b, n = jnp.arange(B, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(b, n)

    def look_up(self, side: frozenset, positions_BL: jax.Array) -> list[jax.Array]:
        """What the kernel reads per token of one side, Q or K: int32 arrays like its positions."""
        wanted = [v for v, kind in self.looked.items() if kind == side]
        jaxpr = self.jaxpr.jaxpr
        jaxpr = jaxpr.replace(outvars=wanted, debug_info=jaxpr.debug_info.with_unknown_names())
        function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, self.jaxpr.consts))

        def one(position):  # none of `wanted` depends on the other arguments
            zero = jnp.int32(0)
            return [x.reshape(()).astype(jnp.int32) for x in function(zero, zero, position, position)]

        return jax.vmap(jax.vmap(one))(positions_BL) if wanted else []

    def tile(
        self,
        scalars: Sequence[Any],
        q_pos: Any,
        k_pos: Any,
        shape: tuple[int, int],
        q_axis: int,
        looked: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
        given: Sequence[Any] = (),
    ) -> Any:
        """The function on a tile [queries, keys] (q_axis 0) or [keys, queries] (q_axis 1), in a kernel.

        q_pos, k_pos: functions that give vectors along their axes of the tile, called where they are needed.
        looked: the same of the tile's part of `look_up`, for queries and for keys; given: of `self.given`.
        """
        env: dict[Any, tuple[frozenset, Any]] = {
            v: (NEITHER, x.reshape(())[()]) for v, x in self.known.items()
        }
        for var, x in zip(self.frontier, scalars, strict=True):
            env[var] = (NEITHER, x != 0 if var.aval.dtype == bool else x)
        found = {Q: iter(looked[0]), K: iter(looked[1])}
        late = {var: next(found[kind]) for var, kind in self.looked.items()}
        late |= dict(zip(self.given, given, strict=True))
        _, _, q, k, *_ = self.jaxpr.jaxpr.invars
        late |= {q: q_pos, k: k_pos}
        kinds = self.looked | self.given | {q: Q, k: K}
        axes = {Q: q_axis, K: 1 - q_axis}

        def read(v):
            if isinstance(v, core.Literal):
                return NEITHER, np.asarray(v.val, v.aval.dtype)[()]
            if v in late and v not in env:
                x = late[v]()
                env[v] = (kinds[v], x != 0 if v.aval.dtype == bool else x)
            return env[v]

        for eqn in self.inner:
            args = [read(v) for v in eqn.invars]
            kind = frozenset().union(*(a for a, _ in args))
            size = shape if kind == Q | K else () if kind == NEITHER else (shape[axes[kind]],)
            if eqn.primitive.name in _SHAPES:
                env[eqn.outvars[0]] = args[0]
                continue
            values = [_spread(x, a, kind, size, axes) for a, x in args]
            env[eqn.outvars[0]] = (kind, _apply(eqn, values))
        kind, x = read(self.jaxpr.jaxpr.outvars[0])
        return _spread(x, kind, Q | K, shape, axes)


def trace(
    fn: Callable, what: str, look_up: bool = False, leaves: Sequence = (), given: Sequence = ()
) -> Traced | str:
    """`fn(batch, head, q_pos, k_pos, *leaves, *given)` of scalars, or why it cannot run in a kernel.

    look_up: the kernel reads `Traced.look_up`; without leaves nothing is looked up that differs by head.
    leaves: pairs (type, what it depends on) of arrays of which `fn` takes the slice for one pair of tokens.
    given: such pairs of numbers that the kernel hands to `Traced.tile`.
    """
    i32 = jax.ShapeDtypeStruct((), jnp.int32)
    more = [*leaves, *given]
    try:
        with jax.disable_jit():  # so that no equation is a call
            closed = jax.make_jaxpr(fn)(i32, i32, i32, i32, *(x for x, _ in more))
    except Exception as error:  # whatever a user's function does with traced scalars
        return f"{what} cannot be traced on scalars ({type(error).__name__})"
    jaxpr = closed.jaxpr
    batch, head, q, k, *rest = jaxpr.invars
    kinds = {v: NEITHER for v in (*jaxpr.constvars, batch, head)} | {q: Q, k: K}
    kinds |= {v: kind for v, (_, kind) in zip(rest, more, strict=True)}
    of_leaves, in_kernel = set(rest[: len(leaves)]), set(rest[len(leaves) :])
    learned = {v for v in of_leaves if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    handed = {v: kinds[v] for v in rest[len(leaves) :]}
    by_head, outside = {batch, head}, set()
    chains: dict[Any, frozenset] = {}  # the equations of the same one position behind a variable
    outer, inner, known = [], [], {}
    for i, eqn in enumerate(jaxpr.eqns):
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
        single, name = len(kind) == 1, eqn.primitive.name
        for made in (by_head, of_leaves, in_kernel, learned):
            if made.intersection(used) and not (made is learned and name == "stop_gradient"):
                made.update(eqn.outvars)
        if kind == NEITHER and not in_kernel.intersection(used):
            outer.append(eqn)
        elif look_up and single and of_leaves.intersection(used):
            outside.update(eqn.outvars)
        elif _runs(eqn) and all(v.aval.size == 1 for v in (*used, *eqn.outvars)):
            inner.append(eqn)
            if single:
                chains[eqn.outvars[0]] = frozenset([i]).union(*(chains.get(v, ()) for v in used))
        elif look_up and single and (leaves or not by_head.intersection(used)):
            outside.update(eqn.outvars)
        else:
            return f"{what} uses {name!r}, which this kernel cannot evaluate entry by entry"
    if look_up and not leaves:
        long = {v for v, chain in chains.items() if len(chain) >= LONG and v.aval.dtype in _READ}
        outside |= long - by_head
    # From the result backwards, so that what only a look-up needs does not run in the kernel.
    read = {v: None for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    needed = []
    for eqn in reversed(inner):
        if eqn.outvars[0] in read.keys() - outside:
            needed.append(eqn)
            read |= {v: None for v in eqn.invars if not isinstance(v, core.Literal)}
    looked = {v: kinds[v] for v in read if v in outside}
    frontier = [v for v in read if kinds[v] == NEITHER and v not in known and v not in in_kernel]
    found = frozenset(learned.intersection((*frontier, *looked)))
    readable = _READ_BY_HEAD if leaves else _READ
    if any(v.aval.dtype not in readable for v in (*looked, *found)):
        return f"{what} reads other numbers than {readable[-1].__name__}"
    return Traced(outer, needed[::-1], frontier, known, closed, looked, found, handed)


def _runs(eqn: Any) -> bool:
    """Whether Mosaic GPU lowers the equation, on jax 0.11 and 0.12."""
    name = eqn.primitive.name
    if name not in _LOWERED | _SHAPES:
        return False
    kind = eqn.invars[0].aval.dtype.kind
    if name == "integer_pow":
        return eqn.params["y"] > 1
    if name == "rem":
        return kind in "iu"
    if name in ("exp", "exp2", "log", "tanh", "sqrt", "rsqrt"):
        return eqn.invars[0].aval.dtype == jnp.float32
    return name != "select_n" or kind == "b"


def bind(eqn: Any, env: dict) -> None:
    """Evaluates an equation in an environment."""
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


def tanh(x: jax.Array, factor: float = 1.0) -> jax.Array:
    """tanh(x * factor) as 1 - 2 / (e^2x + 1), exact to 1e-7: the instruction of that name errs by 5e-4."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2E * factor)) + 1.0)


def _apply(eqn: Any, values: list) -> Any:
    name = eqn.primitive.name
    if name == "add_any":
        return lax.add(*values)
    if name == "tanh":
        return tanh(values[0])
    if name == "not" and values[0].dtype == bool:
        return values[0] == False  # noqa: E712 (Mosaic lowers no negation of booleans)
    if name == "convert_element_type":
        wanted = np.dtype(eqn.params["new_dtype"])
        return values[0] != 0 if wanted.kind == "b" else values[0].astype(wanted)
    return eqn.primitive.bind(*values, **eqn.params)
