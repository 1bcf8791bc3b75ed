"""Block maps: which tiles of the score matrix are empty, full or partial, and lists of the live ones.

A tile of queries [q_lo, q_hi] and keys [k_lo, k_hi] is *full* when every pair is kept (no mask code runs),
*empty* when none is (it is never visited) and *partial* otherwise. `Mask.bounds` answers that by
arithmetic on the tile's extreme positions, so the map of 128k x 128k tokens costs milliseconds and never a
dense array. It depends on positions and segments only, never on values.

Implicit positions make the map static (NumPy, known while tracing). Given positions or segment ids make
it data: the same arithmetic on each tile's minimum and maximum over its valid slots, at run time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.masks import Mask
from attention_jax.ops.tokens import positions_or_arange, valid_tokens

Array = Any  # NumPy for a static map, jax for one made at run time


@dataclasses.dataclass(frozen=True)
class BlockCSR:
    """For each row i the blocks to visit: `items[b, starts[b, i] : stops[b, i]]`, int32.

    Compressed sparse rows, which may have unused room: a static map's are packed; in one made at run time
    each row has room for all columns and `stops` is traced. The leading axis is 1 where all batch rows
    share the map.
    """

    starts: Array
    stops: Array
    items: Array

    @property
    def empty(self) -> bool:
        """True where it is known while tracing that nothing is listed."""
        return self.items.shape[-1] == 0

    def row(self, batch: Array, i: Array) -> tuple[jax.Array, jax.Array]:
        """(start, stop) of row i of a batch row, traced scalars."""
        return _at(self.starts, batch, i), _at(self.stops, batch, i)

    def item(self, batch: Array, at: Array) -> jax.Array:
        return _at(self.items, batch, at)


def _at(x: Array, batch: Array, i: Array) -> jax.Array:
    starts = [jnp.int32(0 if x.shape[0] == 1 else batch), jnp.int32(i)]
    return jax.lax.dynamic_slice(jnp.asarray(x), starts, (1, 1), allow_negative_indices=False)[0, 0]


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Boolean [1 or B, query blocks, key blocks]: whether any pair of a block is kept, whether all are."""

    any_kept: Array
    all_kept: Array

    @property
    def static(self) -> bool:
        return isinstance(self.any_kept, np.ndarray)

    @property
    def transpose(self) -> BlockMap:
        """The map with key blocks as rows, for sweeps whose outer loop runs over keys."""
        return BlockMap(self.any_kept.swapaxes(1, 2), self.all_kept.swapaxes(1, 2))

    @property
    def full(self) -> BlockCSR:
        """Per row the blocks without mask code."""
        return csr(self.any_kept & self.all_kept)

    @property
    def partial(self) -> BlockCSR:
        """Per row the blocks whose entries must be masked one by one."""
        return csr(self.any_kept & (self.all_kept == False))  # noqa: E712


def csr(chosen: Array, names: Array | None = None) -> BlockCSR:
    """The chosen columns of each row of boolean [b, rows, columns], in ascending order.

    names: int32 of the same shape, what to list in place of the column's index.
    """
    b, n, columns = chosen.shape
    if isinstance(chosen, np.ndarray):
        counts = chosen.sum(-1, dtype=np.int32)
        names = np.broadcast_to(np.arange(columns, dtype=np.int32), chosen.shape) if names is None else names
        starts = np.cumsum(counts, axis=1, dtype=np.int32) - counts
        assert b == 1, "static maps are shared by all batch rows"
        return BlockCSR(starts, starts + counts, names[chosen].astype(np.int32)[None])
    counts = chosen.sum(-1, dtype=jnp.int32)
    items = jnp.argsort(chosen == False, axis=-1, stable=True).astype(jnp.int32)  # noqa: E712
    if names is not None:
        items = jnp.take_along_axis(names, items, axis=-1)
    starts = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) * columns, (b, n))
    return BlockCSR(starts, starts + counts, items.reshape(b, n * columns))


def static_map(mask: Mask, T: int, S: int, q_block: int, k_block: int) -> BlockMap:
    """The map for positions 0..T-1 and 0..S-1; the last blocks may be shorter than the others.

    A ragged key block is never full: whoever pads it to `k_block` must mask what lies past S.
    """
    # int32 as on a device, and twice as fast as int64; four positions must add up within it.
    dtype = np.int32 if max(T, S) < 2**29 else np.int64
    q_lo = np.arange(0, T, q_block, dtype=dtype)[:, None]
    k_lo = np.arange(0, S, k_block, dtype=dtype)[None]
    q_hi, k_hi = np.minimum(q_lo + q_block, dtype(T)) - 1, np.minimum(k_lo + k_block, dtype(S)) - 1
    shape = (q_lo.size, k_lo.size)
    any_kept, all_kept = (np.broadcast_to(x, shape)[None] for x in mask.bounds(q_lo, q_hi, k_lo, k_hi))
    return BlockMap(any_kept, all_kept & (k_hi - k_lo + 1 == k_block))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Padded positions, validity and segments [1 or B, L] of one side; `segments` may be None."""

    positions: jax.Array
    valid: jax.Array
    segments: jax.Array | None


def padded_tokens(
    positions: jax.Array | None, segments: jax.Array | None, length: int, padded: int
) -> Tokens:
    """The tokens of one side in `padded` slots; the slots after the first `length` hold none."""
    pad = ((0, 0), (0, padded - length))
    valid = valid_tokens(positions, segments)
    valid = jnp.ones((1, length), bool) if valid is None else valid
    segments = None if segments is None else jnp.pad(segments, pad, constant_values=-1)
    positions = jnp.pad(positions_or_arange(positions, length), pad, constant_values=-1)
    return Tokens(positions, jnp.pad(valid, pad), segments)


def runtime_map(mask: Mask, q: Tokens, k: Tokens, q_block: int, k_block: int) -> BlockMap:
    """The map for positions and segments that are data. L is a multiple of the block on both sides.

    A block that holds an invalid slot is never full; one that holds nothing else is empty.
    """
    q_lo, q_hi, q_any, q_all = _extent(q.positions, q.valid, q_block)
    k_lo, k_hi, k_any, k_all = _extent(k.positions, k.valid, k_block)
    q_axis, k_axis = (slice(None), slice(None), None), (slice(None), None, slice(None))
    any_kept, all_kept = mask.bounds(q_lo[q_axis], q_hi[q_axis], k_lo[k_axis], k_hi[k_axis])
    any_kept = any_kept & q_any[q_axis] & k_any[k_axis]
    all_kept = all_kept & q_all[q_axis] & k_all[k_axis]
    if q.segments is not None and k.segments is not None:
        a_lo, a_hi, *_ = _extent(q.segments, q.valid, q_block)
        b_lo, b_hi, *_ = _extent(k.segments, k.valid, k_block)
        any_kept = any_kept & (a_lo[q_axis] <= b_hi[k_axis]) & (b_lo[k_axis] <= a_hi[q_axis])
        all_kept = all_kept & (a_lo[q_axis] == b_hi[k_axis]) & (a_hi[q_axis] == b_lo[k_axis])
    return BlockMap(any_kept, all_kept & any_kept)


def _extent(x: jax.Array, valid: jax.Array, block: int) -> tuple[jax.Array, ...]:
    """Per block: min and max over valid slots, whether any is valid, whether all are. [b, blocks]"""
    x, valid = jnp.broadcast_arrays(x, valid)
    x, valid = (y.reshape(y.shape[0], -1, block) for y in (x, valid))
    limit = jnp.iinfo(jnp.int32).max
    any_valid, all_valid = valid.any(-1), valid.all(-1)
    lo = jnp.where(any_valid, jnp.where(valid, x, limit).min(-1), 0)
    hi = jnp.where(any_valid, jnp.where(valid, x, -1).max(-1), 0)
    return lo, hi, any_valid, all_valid
