"""A bias cut in two: what a kernel evaluates per block, and what XLA evaluates before it.

`Bias.score` is traced on tiny shapes. What does not depend on both a query and a key (a slope looked up by
head, the sum of a row's gates) is evaluated for the whole call and becomes an operand of the kernel. The
rest must be elementwise: the kernel runs it on arrays that broadcast against its block, so that the
reshapes and broadcasts of the traced program mean nothing there. A bias whose rest is not elementwise (T5's
table of buckets) is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from attention_jax.biases import ArrayBias, Bias
from attention_jax.masks import Mask

# Lengths of the trace, distinct primes: the size of an axis identifies it.
_T, _S = 7, 11
_QUERY, _KEY = 1, 2
_BOTH = _QUERY | _KEY

_SHAPE_OPS = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "stop_gradient"}
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "convert_element_type", "div", "eq", "exp", "exp2", "ge", "gt",
    "integer_pow", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or",
    "pow", "rem", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sqrt", "square", "sub", "tanh", "xor",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """One value of a traced program.

    number: how many were made before it; traces of one program at two sizes agree in it.
    eqn: what made it, its output `result`; None for an input (`value` is its number) or a constant.
    depends: on queries, on keys. positions: on nothing but positions.
    """

    number: int
    inputs: tuple[_Node, ...]
    eqn: Any
    result: int
    value: Any
    shape: tuple[int, ...]
    depends: int
    positions: bool

    @property
    def inside(self) -> bool:
        """Evaluated in the kernel: what mixes queries and keys, and whatever is a function of positions."""
        if self.eqn is None:
            return self.positions
        return self.depends == _BOTH or (
            self.positions and self.eqn.primitive.name in _ELEMENTWISE | _SHAPE_OPS
        )

    @property
    def constant(self) -> bool:
        return self.eqn is None and not isinstance(self.value, int) and self.shape == ()


def _trace(fn: Any, shapes: list[Any], positions: set[int]) -> list[_Node]:
    """All values on the way to what fn returns, which comes last."""
    closed = jax.make_jaxpr(fn)(*shapes)
    nodes: list[_Node] = []

    def make(inputs, eqn, result, value, shape, positions):
        depends = _QUERY * (_T in shape) | _KEY * (_S in shape)
        depends = functools.reduce(lambda a, b: a | b.depends, inputs, depends)
        nodes.append(_Node(len(nodes), inputs, eqn, result, value, shape, depends, positions))
        return nodes[-1]

    def constant(x):
        return make((), None, 0, np.asarray(x) if jnp.ndim(x) == 0 else x, jnp.shape(x), jnp.ndim(x) == 0)

    def walk(jaxpr, consts, args):
        env = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))
        read = lambda x: env[x] if isinstance(x, core.Var) else constant(x.val)  # noqa: E731
        for eqn in jaxpr.eqns:
            args = tuple(map(read, eqn.invars))
            body = next(
                (eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None
            )
            if body is not None:
                found = walk(getattr(body, "jaxpr", body), getattr(body, "consts", ()), args)
            else:
                own = all(a.positions for a in args)
                found = [make(args, eqn, i, None, x.aval.shape, own) for i, x in enumerate(eqn.outvars)]
            env |= dict(zip(eqn.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    args = [make((), None, 0, i, x.shape, i in positions) for i, x in enumerate(jax.tree.leaves(shapes))]
    root = walk(closed.jaxpr, closed.consts, args)[0]
    return nodes if nodes[-1] is root else [*nodes, root]


def _inside(root: _Node) -> list[_Node]:
    """The nodes that the kernel evaluates, each after its inputs."""
    found: dict[_Node, None] = {}

    def visit(node):
        if node in found or not node.inside:
            return
        for x in node.inputs:
            visit(x)
        found[node] = None

    visit(root)
    return list(found)


def _cut(root: _Node) -> list[_Node]:
    """The nodes whose values the kernel is given."""
    if not root.inside:
        return [root]
    given = (x for node in _inside(root) for x in node.inputs if not x.inside and not x.constant)
    return list(dict.fromkeys(given))


def _refusal(root: _Node) -> str | None:
    """What stands in the way of evaluating it in a kernel."""
    for node in _inside(root):
        name = None if node.eqn is None else node.eqn.primitive.name
        if name is not None and name not in _ELEMENTWISE | _SHAPE_OPS:
            return f"{name} over queries and keys"
        if sum(n > 1 for n in node.shape) > 2:
            return f"an array {node.shape} per pair"
    if any(node.depends == _BOTH for node in _cut(root)):
        return "an array over queries and keys"
    return None


@functools.lru_cache(maxsize=256)
def mask_refusal(mask: Mask) -> str | None:
    """Why `mask.keep` cannot run in a kernel, or None."""
    shapes = [jax.ShapeDtypeStruct((_T, 1), jnp.int32), jax.ShapeDtypeStruct((1, _S), jnp.int32)]
    root = _trace(mask.keep, shapes, {0, 1})[-1]
    if found := _refusal(root):
        return found
    given = _cut(root)
    looked_up = next((node.eqn.primitive.name for node in given if node.eqn is not None), "a table")
    return looked_up if given else None


def _bias_shapes(bias: Bias, T: int, S: int) -> tuple[list[Any], Any]:
    """The leaves of a bias for one batch row of T queries and S keys, with heads and positions after them."""
    leaves, treedef = jax.tree.flatten(bias)
    shapes = []
    for leaf, axes in zip(leaves, bias.axes(), strict=True):
        shape = list(leaf.shape)
        for axis, size in zip(axes, (1, T, S), strict=True):
            if axis is not None and shape[axis] != 1:
                shape[axis] = size
        shapes.append(jax.ShapeDtypeStruct(tuple(shape), leaf.dtype))
    for shape in ((1,), (1, T), (1, S)):
        shapes.append(jax.ShapeDtypeStruct(shape, jnp.int32))
    return shapes, treedef


def _scorer(treedef: Any):
    def score(*args):
        *leaves, heads_N, q_pos_BT, k_pos_BS = args
        score = jax.tree.unflatten(treedef, leaves).score(heads_N, q_pos_BT, k_pos_BS)
        return score.astype(jnp.float32)

    return score


def _trace_bias(bias: Bias, T: int, S: int) -> list[_Node]:
    shapes, treedef = _bias_shapes(bias, T, S)
    return _trace(_scorer(treedef), shapes, {len(shapes) - 2, len(shapes) - 1})


def bias_refusal(bias: Bias) -> str | None:
    """Why a bias cannot run in a kernel, forward and backward."""
    if isinstance(bias, ArrayBias) and bias.array_BNTS.shape[2] > 1 and bias.array_BNTS.shape[3] > 1:
        return f"a dense bias {bias.array_BNTS.shape}, whose gradient is as large as the scores"
    found = _refusal(_trace_bias(bias, _T, _S)[-1])
    return found and f"{type(bias).__name__} needs {found} in a kernel"


@dataclasses.dataclass(frozen=True)
class Split:
    """A bias whose score is inside(outside(leaves), positions); see the module."""

    bias: Bias
    root: _Node

    @property
    def cut(self) -> list[_Node]:
        return _cut(self.root)

    @property
    def learned(self) -> list[int]:
        """Which of the cut's values may have a gradient."""
        if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(self.bias)):
            return []
        return [i for i, x in enumerate(self.cut) if _dtype(x) == jnp.float32 and not _stopped(x)]

    def outside(self, bias: Bias, N: int, q_pos_BT: jax.Array, k_pos_BS: jax.Array) -> list[jax.Array]:
        """The cut's values for the whole call, each [B or 1, N, T or 1, S or 1]."""
        leaves, treedef = jax.tree.flatten(bias)
        T, S = q_pos_BT.shape[1], k_pos_BS.shape[1]
        nodes = _trace_bias(bias, T, S)
        full = [nodes[x.number] for x in self.cut]
        axes = [x.batch if x.batch is not None and leaf.shape[x.batch] > 1 else None
                for leaf, x in zip(leaves, bias.axes(), strict=True)]  # fmt: skip
        rows = [*leaves, q_pos_BT, k_pos_BS]
        axes += [0 if x.shape[0] > 1 else None for x in (q_pos_BT, k_pos_BS)]

        def one(n, *row):
            *row, q_pos, k_pos = (
                x if a is None else jnp.expand_dims(x, a) for x, a in zip(row, axes, strict=True)
            )
            args = [*row, n.reshape(1), q_pos, k_pos]
            memo: dict[_Node, Any] = {}
            values = [_evaluate(node, args, memo) for node in full]
            return [
                x.reshape(T if small.depends & _QUERY else 1, S if small.depends & _KEY else 1)
                for x, small in zip(values, self.cut, strict=True)
            ]

        heads = jax.vmap(one, in_axes=(0, *[None] * len(rows)))
        numbers = jnp.arange(N, dtype=jnp.int32)
        if all(a is None for a in axes):
            return [x[None] for x in heads(numbers, *rows)]
        return jax.vmap(heads, in_axes=(None, *axes))(numbers, *rows)

    def inside(self, inputs: list[jax.Array], q_pos: jax.Array, k_pos: jax.Array) -> jax.Array:
        """The score of a block: all arguments broadcast against it, and so does the result."""
        env = dict(zip(self.cut, inputs, strict=True))
        first = len(jax.tree.leaves(self.bias)) + 1
        for node in _inside(self.root):
            if node.eqn is None:
                env[node] = node.value if node.constant else (q_pos, k_pos)[node.value - first]
                continue
            args = [x.value if x.constant else env[x] for x in node.inputs]
            if node.eqn.primitive.name in _SHAPE_OPS:
                env[node] = args[0]
                continue
            args = jnp.broadcast_arrays(*args)
            env[node] = node.eqn.primitive.bind(*args, **node.eqn.params)
        return env[self.root]


def _dtype(node: _Node) -> Any:
    return node.eqn.outvars[node.result].aval.dtype if node.eqn is not None else jnp.float32


def _stopped(node: _Node) -> bool:
    """Whether every way from a leaf to the value leads through a `stop_gradient`."""
    if node.eqn is None:
        return not isinstance(node.value, int)
    return node.eqn.primitive.name == "stop_gradient" or all(_stopped(x) for x in node.inputs)


def _evaluate(node: _Node, args: list[Any], memo: dict[_Node, Any]) -> Any:
    if node.eqn is None:
        return args[node.value] if isinstance(node.value, int) else node.value
    if node not in memo:
        found = node.eqn.primitive.bind(*(_evaluate(x, args, memo) for x in node.inputs), **node.eqn.params)
        memo[node] = found[node.result] if node.eqn.primitive.multiple_results else found
    return memo[node]


def split(bias: Bias) -> Split:
    """The bias cut in two; `bias_refusal` has found that it can be."""
    return Split(bias, _trace_bias(bias, _T, _S)[-1])
