"""Biases: additive score terms as functions of (head, query position, key position).

A `Bias` is a pytree with three kinds of leaves, which `axes()` distinguishes: parameters (shared by all
pairs), per-query leaves [B, T, ...] and per-key leaves [B, S, ...]. An implementation slices the leaves of
each block, calls `score`, and differentiates that call. A bias therefore takes O(block) memory in every
implementation, and its gradient is exact.

ALiBi: Press et al. 2022, "Train Short, Test Long" (arXiv 2108.12409).
T5's relative bias: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.choices import check_between, check_choices
from attention_jax.dtypes import wider


class Axes(NamedTuple):
    """The indices of a leaf's batch, query and key axes; None for an axis that the leaf does not have."""

    batch: int | None = None
    query: int | None = None
    key: int | None = None


class Bias:
    """Base class of all biases. Subclasses are frozen dataclasses registered as pytrees."""

    def axes(self) -> tuple[Axes, ...]:
        """One `Axes` per leaf, in `jax.tree.leaves` order."""
        return tuple(Axes() for _ in jax.tree.leaves(self))

    def check(self, sizes: tuple[int, int, int, int]) -> None:
        """Raise ValueError if the bias does not fit scores of sizes (B, N, T, S)."""
        B, _, T, S = sizes
        for leaf, axes in zip(jax.tree.leaves(self), self.axes(), strict=True):
            for name, axis, size in zip(Axes._fields, axes, (B, T, S), strict=True):
                if axis is not None and leaf.shape[axis] not in (1, size):
                    raise ValueError(
                        f"{type(self).__name__}: a leaf of shape {leaf.shape} has size {leaf.shape[axis]} on "
                        f"its {name} axis {axis}; it must be {size} or 1"
                    )

    def score(self, heads_N: jax.Array, q_pos_BT: jax.Array, k_pos_BS: jax.Array) -> jax.Array:
        """The bias of a block, float32, broadcastable to [B, N, T, S].

        heads_N: the global indices of the query heads of this block, int32 [n].
        q_pos_BT, k_pos_BS: the positions of this block, int32 [b, t] and [b, s] (b may be 1).
        The caller has already sliced the leaves to the block with `slice_leaves`.
        """
        raise NotImplementedError


def slice_leaves(bias: Bias, *, batch=None, query=None, key=None) -> Bias:
    """The bias with its leaves sliced to a block; each of batch, query, key is (start, size) or None.

    Starts may be traced. Axes of length 1 broadcast and are not sliced.
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
    """The transpose of `slice_leaves`: `total` with `block` added at the location of the slice."""
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
            raise ValueError(f"ArrayBias of shape {shape} does not broadcast to [B, N, T, S] = {sizes}")

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        array = self.array_BNTS
        if array.shape[1] != 1:
            array = jnp.take(array, heads_N, axis=1, mode="clip")
        return wider(array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ALiBi(Bias):
    """-slope(head) * |q_pos - k_pos|, with slopes determined by the total number of heads.

    scale, max_exponent: those of `alibi_slopes`. rounding: with bfloat16, to which r rounds, slope m and
    position p enter as scale * r(r(m / scale) r(p)), and keys after the query have a bias > 0.
    dtype: of the scores; float64 beside queries of that dtype.
    """

    num_heads: int = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True}, default=1.0)
    max_exponent: float = dataclasses.field(metadata={"static": True}, default=8.0)
    rounding: Literal["bfloat16"] | None = dataclasses.field(metadata={"static": True}, default=None)
    dtype: Any = dataclasses.field(metadata={"static": True}, default=jnp.dtype(jnp.float32))

    def __post_init__(self):
        if not isinstance(self.num_heads, numbers.Integral) or isinstance(self.num_heads, bool):
            raise ValueError(
                f"ALiBi takes the number of query heads, an integer, got {type(self.num_heads).__name__}"
            )
        if self.num_heads < 1:
            raise ValueError(f"ALiBi num_heads must be >= 1, got {self.num_heads}")
        _check_slopes(self)

    def check(self, sizes):
        if sizes[1] != self.num_heads:
            raise ValueError(
                f"ALiBi has num_heads {self.num_heads}, but the queries have {sizes[1]} heads: use "
                f"ALiBi({sizes[1]})"
            )

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        if self.rounding is not None:
            q_BNT, k_BNS = (self._rounded(heads_N, at) for at in (q_pos_BT, k_pos_BS))
            return self.scale * (k_BNS[:, :, None] - q_BNT[..., None])
        slopes_N = jnp.asarray(self._slopes(), self.dtype)[heads_N]
        # abs of floats is free on a GPU, where it is a modifier of the following multiplication.
        distance_BTS = jnp.abs((q_pos_BT[:, :, None] - k_pos_BS[:, None, :]).astype(self.dtype))
        return -slopes_N[None, :, None, None] * distance_BTS[:, None]

    def _rounded(self, heads_N: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """slope * position without the scale, rounded to bfloat16, [B, N, T]."""
        slopes = alibi_slopes(self.num_heads, max_exponent=self.max_exponent)
        slopes_N = _to_bfloat16(jnp.asarray(slopes, self.dtype))[heads_N]
        positions_BT = _to_bfloat16(positions_BT.astype(self.dtype))
        return _to_bfloat16(slopes_N[None, :, None] * positions_BT[:, None])

    def _slopes(self) -> tuple[float, ...]:
        return alibi_slopes(self.num_heads, scale=self.scale, max_exponent=self.max_exponent)


def _to_bfloat16(x: jax.Array) -> jax.Array:
    """x rounded to bfloat16, in its own dtype. XLA may drop a conversion there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def alibi_slopes(num_heads: int, *, scale: float = 1.0, max_exponent: float = 8.0) -> tuple[float, ...]:
    """scale times the slopes 2^(-e i / n), i = 1 .. n, if the number of heads n is a power of two.

    e is `max_exponent`; the published slopes have e = 8 and scale 1. For any other n, with m the largest
    power of two <= n: the m slopes of m heads, followed by the first n - m odd-numbered slopes of 2m heads,
    as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-max_exponent * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-max_exponent * i / (2 * power)) for i in range(1, 2 * (num_heads - power) + 1, 2)]
    return tuple(scale * slope for slope in slopes)


@dataclasses.dataclass(frozen=True)
class ALiBiConfig:
    """Options of ALiBi."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["alibi"] = "alibi"  #: the bias
    scale: float = 1.0  #: multiplies the slopes; Falcon-RW has 1 / sqrt(head_dim)
    max_exponent: float = (
        8.0  #: the last of n heads has the slope scale 2^-max_exponent; MPT's alibi_bias_max
    )
    rounding: Literal["bfloat16"] | None = (
        None  #: round slope * position to it, as Falcon-RW does; null: exact
    )

    def __post_init__(self):
        check_choices(self)
        _check_slopes(self)

    def of(self, num_heads: int, dtype: Any = jnp.float32) -> ALiBi:
        """The ALiBi of so many heads."""
        return ALiBi(num_heads, float(self.scale), float(self.max_exponent), self.rounding, jnp.dtype(dtype))


def _check_slopes(bias: ALiBi | ALiBiConfig) -> None:
    for name in ("scale", "max_exponent"):
        value = getattr(bias, name)
        if not 0 < value < math.inf:
            raise ValueError(f"ALiBi {name} must be finite and > 0, got {value}")


@dataclasses.dataclass(frozen=True)
class T5:
    """Options of T5's relative position bias: a learned score per head and bucket of relative positions."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["t5"] = "t5"  #: the bias
    buckets: int = 32  #: rows of each layer's table, even; if bidirectional, half of them are for later keys
    max_distance: int = 128  #: all distances >= this share the last bucket
    #: separate buckets for keys after the query; null: only if the layer's mask is not causal
    bidirectional: bool | None = None

    def __post_init__(self):
        check_choices(self)
        if self.buckets < 4 or self.buckets % 2:
            raise ValueError(f"T5 buckets must be even and >= 4, got {self.buckets}")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"T5 max_distance must exceed buckets / 2 = {self.buckets // 2}, got {self.max_distance}"
            )
        check_between(self, "buckets", 4, 1024, "a bucket is a row of the table, and far ones are rare")
        check_between(self, "max_distance", 3, 2**20, "a table has an entry for each distance below it")

    def over(self, causal: bool) -> T5:
        """A copy with `bidirectional` resolved: its own value, or `not causal` if that is None."""
        known = not causal if self.bidirectional is None else self.bidirectional
        return dataclasses.replace(self, bidirectional=known)

    def of(self, table: Any) -> T5Bias:
        """The T5Bias with the given table [buckets, N]."""
        assert self.bidirectional is not None, "call `over` first"
        return T5Bias(table, self.bidirectional, self.max_distance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Bias(Bias):
    """table[bucket(q_pos - k_pos), head]; `table` is float [buckets, N].

    With n buckets per direction and e = n // 2, a distance 0 <= d < e has bucket d, and a distance d >= e has
    bucket min(n - 1, e + floor(ln(d / e) / ln(max_distance / e) * (n - e))). Keys after the query use the
    second half of the buckets if `bidirectional`, else distance 0.
    """

    table: Any
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True}, default=128)

    def check(self, sizes):
        shape = self.table.shape
        if len(shape) != 2 or shape[1] != sizes[1]:
            raise ValueError(f"T5Bias table must be [buckets, {sizes[1]}], one column per head, got {shape}")
        if not jnp.issubdtype(self.table.dtype, jnp.floating):
            raise ValueError(f"T5Bias table must be floating point, got {self.table.dtype}")
        side = shape[0] // 2 if self.bidirectional else shape[0]
        if side < 2 or (self.bidirectional and shape[0] % 2):
            need = "an even number >= 4" if self.bidirectional else ">= 2"
            raise ValueError(f"T5Bias buckets must be {need}, got a table with {shape[0]} rows")
        if self.max_distance <= side // 2:
            raise ValueError(f"T5Bias max_distance must exceed {side // 2}, got {self.max_distance}")

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        side = self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]
        distance_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :]
        past_BTS = jnp.abs(distance_BTS) if self.bidirectional else jnp.maximum(distance_BTS, 0)
        nearest_BTS = jnp.minimum(past_BTS, self.max_distance)
        bucket_BTS = jnp.asarray(_t5_buckets(side, self.max_distance)).at[nearest_BTS].get(mode="clip")
        if self.bidirectional:
            bucket_BTS = bucket_BTS + jnp.where(distance_BTS < 0, side, 0)
        table_RN = wider(jnp.take(self.table, heads_N, axis=1, mode="clip"))
        return jnp.swapaxes(table_RN.T.at[:, bucket_BTS].get(mode="clip"), 0, 1)


def t5_boundaries(side: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each of the buckets 1 .. side - 1 of one direction, in ascending order.

    side: the number of buckets per direction. Bucket e + i (e = side // 2) starts at the first d with
    (d / e)^(side - e) >= (max_distance / e)^i. The comparison is evaluated in integers, so that rounding of a
    logarithm cannot move a distance across a boundary.
    """
    exact = side // 2
    rest = side - exact

    def reached(distance: int, i: int) -> bool:
        return distance**rest * exact**i >= max_distance**i * exact**rest

    starts = list(range(1, exact + 1))
    for i in range(1, rest):
        low, high = starts[-1], max_distance
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle, i) else (middle + 1, high)
        starts.append(low)
    return tuple(starts)


@functools.cache
def _t5_buckets(side: int, max_distance: int) -> np.ndarray:
    """The buckets of the distances 0 .. max_distance, int32 [max_distance + 1]."""
    starts = np.array(t5_boundaries(side, max_distance))
    return np.searchsorted(starts, np.arange(max_distance + 1), side="right").astype(np.int32)


def check(bias: Bias, sizes: tuple[int, int, int, int] = (2, 4, 12, 16)) -> None:
    """Raise ValueError, in one line, if the score of a block is not that block of the whole score.

    Implementations slice the leaves where `axes()` says and call `score` with the positions and heads of a
    block; a leaf whose axis is not named is given whole, with wrong numbers. sizes: (B, N, T, S), at least 2
    each, of which the leaves are. Positions are drawn, so that a score that counts slots is found, too.

    Raises: ValueError; TypeError for what is not a `Bias` registered as a pytree.
    """
    if not isinstance(bias, Bias):
        raise TypeError(f"check takes a Bias, got {type(bias).__name__}")
    name = type(bias).__name__
    leaves = jax.tree.leaves(bias)
    if any(leaf is bias for leaf in leaves):
        raise TypeError(f"{name} is not a pytree: write @jax.tree_util.register_dataclass above the class")
    if min(sizes) < 2:
        raise ValueError(f"sizes (B, N, T, S) must be >= 2 each, got {sizes}")
    if len(bias.axes()) != len(leaves):
        raise ValueError(f"{name}: axes() has {len(bias.axes())} entries for {len(leaves)} leaves")
    for leaf, axes in zip(leaves, bias.axes(), strict=True):
        named = [axis for axis in axes if axis is not None]
        if len(set(named)) != len(named) or any(not 0 <= axis < leaf.ndim for axis in named):
            raise ValueError(f"{name}: {axes} are not different axes of a leaf of shape {leaf.shape}")
    bias.check(sizes)
    B, N, T, S = sizes
    rng = np.random.default_rng(0)
    q_pos_BT, k_pos_BS = (rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1) for n in (T, S))

    def score(at: tuple[slice, slice, slice, slice]) -> np.ndarray:
        b, n, t, s = (range(size)[part] for size, part in zip(sizes, at, strict=True))
        cut = slice_leaves(bias, **{
            key: (r[0], len(r)) for key, r in zip(("batch", "query", "key"), (b, t, s), strict=True)
        })  # fmt: skip
        shape = (len(b), len(n), len(t), len(s))
        try:
            found = cut.score(
                jnp.array(n), jnp.array(q_pos_BT[at[0], at[2]]), jnp.array(k_pos_BS[at[0], at[3]])
            )
            found = jnp.broadcast_to(found, shape)
        except (TypeError, ValueError) as error:
            text = str(error).partition("\n")[0]
            raise ValueError(f"{name}: score of a block of sizes {shape} fails: {text}") from None
        if found.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(f"{name}: score must be float32 or float64, got {found.dtype}")
        return np.asarray(found)

    whole_BNTS = score(tuple(slice(0, size) for size in sizes))
    # Blocks of one shape, so that each operation is compiled twice at most.
    halves = [(slice(0, size // 2), slice(size - size // 2, size)) for size in sizes]
    for at in itertools.product(*halves):
        if not np.allclose(score(at), whole_BNTS[at], rtol=1e-5, atol=1e-6, equal_nan=True):
            b, n, t, s = (f"{part.start}..{part.stop - 1}" for part in at)
            raise ValueError(
                f"{name}: score of the block of batch rows {b}, heads {n}, queries {t}, keys {s} is not that "
                "part of the whole score: name every axis in axes(), and use the heads and positions given"
            )
