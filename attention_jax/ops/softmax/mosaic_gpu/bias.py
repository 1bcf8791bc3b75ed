"""Biases that hold arrays: what a kernel reads of them, and their gradients.

    score(b, n, t, s) = inside(scalars[b, n], of queries[b, n, t], of keys[b, n, s], positions)

`Bias.score` is traced on scalars, its leaves cut to one pair of tokens. What needs no token or only one is
evaluated outside the kernels and differentiated by jax. `inside` runs on tiles, and so does its transpose,
which turns d score into a tile for each learned argument; the kernels sum those over keys or over queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from attention_jax.biases import Axes, Bias
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu.elementwise import NEITHER, K, Q, Traced, bind, trace
from attention_jax.ops.tokens import positions_or_arange, valid_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class TracedBias:
    """score: `Bias.score`. pulls: of each learned variable its gradient, from what was read and d score."""

    score: Traced
    pulls: dict[Any, Traced]

    @property
    def by_query(self) -> list[Traced]:
        """Gradients to be summed over keys: of scalars, then of what belongs to queries."""
        return [pull for v, pull in self.pulls.items() if self.score.looked.get(v) != K]

    @property
    def by_key(self) -> list[Traced]:
        """Gradients to be summed over queries."""
        return [pull for v, pull in self.pulls.items() if self.score.looked.get(v) == K]

    def read(self, call: SoftmaxCall) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """What the kernels read: scalars [B, N], of queries [1 or B, N, T], of keys [1 or B, N, S]."""
        B, _, _, N, *_ = call.sizes
        scalars = self._evaluate(call, self.score.frontier, NEITHER, jnp.zeros((1, 1), jnp.int32), None)
        scalars = [jnp.broadcast_to(x[..., 0], (B, N)) for x in scalars]
        found = []
        for side, positions, segments, length in (
            (Q, call.q_positions_BT, call.q_segments_BT, call.sizes[1]),
            (K, call.k_positions_BS, call.k_segments_BS, call.sizes[2]),
        ):
            wanted = [v for v, kind in self.score.looked.items() if kind == side]
            valid = valid_tokens(positions, segments)
            found.append(self._evaluate(call, wanted, side, positions_or_arange(positions, length), valid))
        return scalars, *found

    def gradient(self, call: SoftmaxCall, by_query: Sequence[jax.Array], by_key: Sequence[jax.Array]) -> Bias:
        """The bias's cotangent from the kernels' sums [B, N, T or more] and [B, N, S or more]."""
        leaves, treedef = jax.tree.flatten(call.bias)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

        def learned(chosen: list[jax.Array]) -> list[jax.Array]:
            mixed = list(leaves)
            for i, x in zip(floats, chosen, strict=True):
                mixed[i] = x
            scalars, of_q, of_k = self.read(dataclasses.replace(call, bias=treedef.unflatten(mixed)))
            by_side = sorted(self.score.looked, key=lambda v: self.score.looked[v] == K)
            values = (*scalars, *of_q, *of_k)
            values = dict(zip((*self.score.frontier, *by_side), values, strict=True))
            return [values[v] for v in self.pulls]

        values, pull = jax.vjp(learned, [leaves[i] for i in floats])
        sums = {Q: iter(by_query), K: iter(by_key)}
        found = []
        for v, value in zip(self.pulls, values, strict=True):
            kind = self.score.looked.get(v, NEITHER)
            x = next(sums[K if kind == K else Q])
            x = x.sum(2) if kind == NEITHER else x[..., : value.shape[2]]
            found.append(x.sum(0, keepdims=True) if value.shape[0] < x.shape[0] else x)
        (cotangents,) = pull(found)
        by_leaf = dict(zip(floats, cotangents, strict=True))
        return treedef.unflatten([by_leaf.get(i) for i in range(len(leaves))])

    def _evaluate(self, call, wanted, side, positions, valid) -> list[jax.Array]:
        """Variables that depend on one token of `side` or none, [1 or B, N, length]; 0 if it is invalid."""
        if not wanted:
            return []
        leaves, axes = jax.tree.leaves(call.bias), call.bias.axes()
        laid = [_lay(leaf, a, side) for leaf, a in zip(leaves, axes, strict=True)]
        jaxpr = self.score.jaxpr.jaxpr
        jaxpr = jaxpr.replace(outvars=list(wanted), debug_info=jaxpr.debug_info.with_unknown_names())
        function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, self.score.jaxpr.consts))

        def one(n, position, *cut):
            restored = [x.restore(y) for x, y in zip(laid, cut, strict=True)]
            found = function(jnp.int32(0), n, position, position, *restored)
            return [x.reshape(()) if x.dtype != bool else x.reshape(()).astype(jnp.int32) for x in found]

        own = 0 if positions.shape[0] > 1 else None
        tokens = jax.vmap(one, (None, 0, *(x.token for x in laid)))
        heads = jax.vmap(tokens, (0, None, *[None] * len(laid)))
        rows = [x.batch for x in laid]
        numbers = jnp.arange(call.sizes[3], dtype=jnp.int32)
        arrays = [x.array for x in laid]
        if own is None and all(x is None for x in rows):
            found = [x[None] for x in heads(numbers, positions[0], *arrays)]
        else:
            given = positions if own == 0 else positions[0]
            found = jax.vmap(heads, (None, own, *rows))(numbers, given, *arrays)
        if valid is None:
            return found
        return [jnp.where(valid[:, None], x, jnp.zeros((), x.dtype)) for x in found]


@dataclasses.dataclass(frozen=True)
class _Laid:
    """A leaf, the axes that are walked in front; batch, token: 0 where there is such an axis, else None."""

    array: jax.Array
    batch: int | None
    token: int | None
    restore: Callable[[jax.Array], jax.Array]


def _lay(leaf: jax.Array, axes: Axes, side: frozenset) -> _Laid:
    own = {Q: axes.query, K: axes.key}.get(side)
    for axis in (axes.query, axes.key):  # what depends on the other side is not wanted
        if axis is not None and axis != own:
            leaf = lax.slice_in_dim(leaf, 0, 1, axis=axis)
    walked = [axis for axis in (axes.batch, own) if axis is not None and leaf.shape[axis] > 1]
    front = range(len(walked))
    return _Laid(
        jnp.moveaxis(leaf, walked, front),
        0 if axes.batch in walked and axes.batch is not None else None,
        0 if own in walked and own is not None else None,
        lambda x: jnp.moveaxis(x[(None,) * len(walked)], front, walked),
    )


def trace_bias(bias: Bias) -> TracedBias | str:
    """The bias as kernels run it, forward and backward, or why they cannot."""
    name = f"bias {type(bias).__name__}"
    leaves, treedef = jax.tree.flatten(bias)
    types = []
    for leaf, axes in zip(leaves, bias.axes(), strict=True):
        one = tuple(1 if i in axes else n for i, n in enumerate(leaf.shape))
        kind = NEITHER
        for axis, side in ((axes.query, Q), (axes.key, K)):
            kind |= side if axis is not None and leaf.shape[axis] > 1 else NEITHER
        if kind == Q | K:
            return f"{name} holds an array {leaf.shape} over queries and keys"
        types.append((jax.ShapeDtypeStruct(one, leaf.dtype), kind))

    def score(b, n, q, k, *cut):
        found = treedef.unflatten(cut).score(n[None], q[None, None], k[None, None])
        return jnp.reshape(found, ()).astype(jnp.float32)

    traced = trace(score, name, look_up=bool(leaves), leaves=types)
    if isinstance(traced, str):
        return traced
    pulls = {}
    read = _read(traced)
    for v in sorted((v for v in read if v in traced.learned), key=lambda v: traced.looked.get(v) == K):
        pulls[v] = _pull(traced, read, v, f"the gradient of {name}")
        if isinstance(pulls[v], str):
            return pulls[v]
    return TracedBias(traced, pulls)


def _read(traced: Traced) -> dict[Any, frozenset]:
    """What a bias's score reads outside of its kernel, in the order in which it gets it there."""
    return {v: traced.looked.get(v, NEITHER) for v in (*traced.frontier, *traced.looked)}


def _pull(traced: Traced, read: dict[Any, frozenset], learned: Any, what: str) -> Traced | str:
    """d score, after all that was read, to the gradient of one of it, for one pair."""
    names = list(read)
    (out,) = traced.jaxpr.jaxpr.outvars

    def pull(b, n, q, k, *given):
        *values, d = given
        _, _, q_var, k_var, *_ = traced.jaxpr.jaxpr.invars
        env = {v: x.reshape(v.aval.shape) for v, x in zip(names, values, strict=True)}
        env |= traced.known | {q_var: q, k_var: k}

        def score(x):
            inner = env | {learned: x.reshape(learned.aval.shape)}
            for eqn in traced.inner:
                bind(eqn, inner)
            return inner[out].reshape(())

        return jax.vjp(score, env[learned].reshape(()))[1](d)[0]

    given = [(jax.ShapeDtypeStruct((), v.aval.dtype), kind) for v, kind in read.items()]
    given.append((jax.ShapeDtypeStruct((), jnp.float32), Q | K))
    found = trace(pull, what, given=given)
    assert isinstance(found, str) or not found.frontier, "a constant that is not folded"
    return found
