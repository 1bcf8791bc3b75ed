"""Biases: additive score terms as functions of (head, query position, key position).

A `Bias` is a pytree. Its leaves are of three kinds, told apart by `axes()`: parameters (shared by all
pairs), per-query leaves [B, T, ...] and per-key leaves [B, S, ...]. Implementations slice the leaves of a
block, call `score`, and differentiate that call, so a bias costs O(block) memory in every implementation
and its gradient is exact.

ALiBi: Press et al. 2022, "Train Short, Test Long" (arXiv 2108.12409).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
    """Which axis of a leaf runs over batch rows, queries and keys; None where it has no such axis."""

    batch: int | None = None
    query: int | None = None
    key: int | None = None


class Bias:
    """Base of all biases: frozen dataclasses registered as pytrees."""

    def axes(self) -> tuple[Axes, ...]:
        """One `Axes` per leaf, in `jax.tree.leaves` order."""
        return tuple(Axes() for _ in jax.tree.leaves(self))

    def check(self, sizes: tuple[int, int, int, int]) -> None:
        """ValueError where the bias does not fit scores of sizes (B, N, T, S)."""
        B, _, T, S = sizes
        for leaf, axes in zip(jax.tree.leaves(self), self.axes(), strict=True):
            for name, axis, size in zip(Axes._fields, axes, (B, T, S), strict=True):
                if axis is not None and leaf.shape[axis] not in (1, size):
                    raise ValueError(
                        f"{type(self).__name__}: a leaf {leaf.shape} has {leaf.shape[axis]} entries on its "
                        f"{name} axis {axis}, must be {size} or 1"
                    )

    def score(self, heads_N: jax.Array, q_pos_BT: jax.Array, k_pos_BS: jax.Array) -> jax.Array:
        """The bias of a block, float32, broadcastable to [B, N, T, S].

        heads_N: the global indices of the query heads of this block, int32 [n].
        q_pos_BT, k_pos_BS: the positions of this block, int32 [b, t] and [b, s] (b may be 1).
        Leaves have been sliced to the block by `slice_leaves`.
        """
        raise NotImplementedError


def slice_leaves(bias: Bias, *, batch=None, query=None, key=None) -> Bias:
    """The bias with its leaves cut to a block; each of batch, query, key is (start, size) or None.

    Starts may be traced. Axes of length 1 broadcast and are left alone.
    """
    leaves, treedef = jax.tree.flatten(bias)
    cut = []
    for leaf, axes in zip(leaves, bias.axes(), strict=True):
        for axis, window in zip(axes, (batch, query, key), strict=True):
            if axis is not None and window is not None and leaf.shape[axis] != 1:
                leaf = jax.lax.dynamic_slice_in_dim(leaf, *window, axis=axis)
        cut.append(leaf)
    return jax.tree.unflatten(treedef, cut)


def add_to_slices(total: Bias, block: Bias, *, batch=None, query=None, key=None) -> Bias:
    """The transpose of `slice_leaves`: `total` with `block` added where the slice was taken."""
    leaves, treedef = jax.tree.flatten(total)
    added = []
    for leaf, part, axes in zip(leaves, jax.tree.leaves(block), total.axes(), strict=True):
        starts = [0] * leaf.ndim
        for axis, window in zip(axes, (batch, query, key), strict=True):
            if axis is not None and window is not None and leaf.shape[axis] != 1:
                starts[axis] = window[0]
        old = jax.lax.dynamic_slice(leaf, starts, part.shape)
        added.append(jax.lax.dynamic_update_slice(leaf, old + part.astype(leaf.dtype), starts))
    return jax.tree.unflatten(treedef, added)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayBias(Bias):
    """A dense additive bias, an array broadcastable to [B, N, T, S], evaluated block by block."""

    array_BNTS: Any

    def axes(self):
        return (Axes(0, 2, 3),)

    def check(self, sizes):
        shape = self.array_BNTS.shape
        if len(shape) != 4 or any(n not in (1, size) for n, size in zip(shape, sizes, strict=False)):
            raise ValueError(f"ArrayBias {shape} does not broadcast to [B, N, T, S] = {sizes}")

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        array = self.array_BNTS
        if array.shape[1] != 1:
            array = jnp.take(array, heads_N, axis=1, mode="clip")
        return array.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ALiBi(Bias):
    """-slope(head) * |q_pos - k_pos|, the slopes fixed by the total number of heads."""

    num_heads: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.num_heads, int) and self.num_heads < 1:
            raise ValueError(f"ALiBi num_heads must be >= 1, got {self.num_heads}")

    def check(self, sizes):
        if sizes[1] != self.num_heads:
            raise ValueError(f"ALiBi is made for {self.num_heads} heads, the queries have {sizes[1]}")

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        slopes_N = jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)[heads_N]
        distance_BTS = jnp.abs(q_pos_BT[:, :, None] - k_pos_BS[:, None, :]).astype(jnp.float32)
        return -slopes_N[None, :, None, None] * distance_BTS[:, None]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The published slopes: 2^(-8 i / n) for n a power of two; any other count interleaves.

    For n heads with m the largest power of two <= n: the m slopes of m heads, then the first n - m of
    the odd-numbered slopes of 2m heads, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return tuple(slopes)
