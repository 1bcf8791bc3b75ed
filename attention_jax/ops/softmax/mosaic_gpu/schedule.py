"""What a block of rows visits, and in which order: block maps as arrays that a kernel reads.

A row is a block of queries (of keys in the transposed sweep), its columns the blocks of the other side. A row
lists its full blocks, which run without mask code, then its partial ones. Rows are ordered longest first, so
that the last wave of thread blocks is made of short ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.softmax.blocks import BlockMap, padded_tokens, runtime_map, static_map
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu.bits import any_and_all
from attention_jax.ops.tokens import positions_or_arange, valid_tokens

Array = Any  # NumPy for a static map, jax for one made at run time


@dataclasses.dataclass(frozen=True)
class Schedule:
    """rows int32 [b, n, 4]: (row, start, end of the full blocks, end) into items int32 [b, size].

    b is 1 where all batch rows share the lists.
    """

    rows: Array
    items: Array
    some_full: bool  # False where it is known while tracing that no block is full
    some_partial: bool


def schedule(block_map: BlockMap) -> Schedule:
    """The lists of a map's rows; `block_map.transpose` gives those of its columns."""
    xp = np if block_map.static else jnp
    full = block_map.any_kept & block_map.all_kept
    rank = xp.where(full, 0, xp.where(block_map.any_kept, 1, 2))
    order = xp.argsort(rank, axis=-1, stable=True).astype(xp.int32)
    full_count = full.sum(-1, dtype=xp.int32)
    count = block_map.any_kept.sum(-1, dtype=xp.int32)
    b, n, columns = rank.shape
    if block_map.static:
        starts = np.cumsum(count, axis=1, dtype=np.int32) - count
        items = order[np.arange(columns) < count[..., None]][None]
        items = np.pad(items, ((0, 0), (0, max(0, 1 - items.shape[1]))))  # a kernel takes no empty operand
    else:
        starts = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) * columns, (b, n))
        items = order.reshape(b, n * columns)
    rows = xp.stack(
        [xp.broadcast_to(xp.arange(n, dtype=xp.int32), (b, n)), starts, starts + full_count, starts + count],
        -1,
    )
    longest = xp.argsort(-count, axis=1, stable=True)
    rows = xp.take_along_axis(rows, longest[..., None], axis=1)
    if not block_map.static:
        return Schedule(rows, items, True, True)
    return Schedule(rows, items, bool(full_count.any()), bool((count > full_count).any()))


@dataclasses.dataclass(frozen=True)
class Side:
    """What a kernel reads per token of one side, int32 [1 or B, padded length]; None where implicit.

    An invalid slot has position -1 and a segment that equals none of the other side's.
    by_head: what the bias reads, int32 or float32 [1 or B, N, padded length].
    """

    positions: jax.Array | None
    segments: jax.Array | None
    looked: tuple[jax.Array, ...] = ()  # what the mask looks up with a position, computed outside the kernel
    by_head: tuple[jax.Array, ...] = ()

    @property
    def vectors(self) -> list[jax.Array]:
        return [*(x for x in (self.positions, self.segments) if x is not None), *self.looked, *self.by_head]


def sides(call: SoftmaxCall, T_pad: int, S_pad: int) -> tuple[Side, Side]:
    """The vectors of queries and keys. Both sides have the same ones; padding is invalid."""
    _, T, S, *_ = call.sizes
    given = call.q_positions_BT is not None or call.k_positions_BS is not None
    found = []
    for positions, segments, length, padded, none in (
        (call.q_positions_BT, call.q_segments_BT, T, T_pad, -2),
        (call.k_positions_BS, call.k_segments_BS, S, S_pad, -1),
    ):
        pad = ((0, 0), (0, padded - length))
        valid = valid_tokens(positions, segments)
        if segments is not None:
            segments, ok = jnp.broadcast_arrays(segments, valid)
            segments = jnp.pad(jnp.where(ok, segments, none), pad, constant_values=none)
        if given:
            positions, ok = jnp.broadcast_arrays(
                positions_or_arange(positions, length), True if valid is None else valid
            )
            positions = jnp.pad(jnp.where(ok, positions, -1), pad, constant_values=-1)
        found.append(Side(positions if given else None, segments))
    return found[0], found[1]


def block_map(call: SoftmaxCall, q_block: int, k_block: int) -> BlockMap:
    """Which blocks of [q_block, k_block] are empty, partial and full."""
    found = _by_positions(call, q_block, k_block)
    if call.mask_BNTS is None:
        return found
    any_kept, all_kept = any_and_all(call.mask_BNTS, *call.sizes[1:3], q_block, k_block)
    return BlockMap(found.any_kept & any_kept, found.all_kept & all_kept)


def _by_positions(call: SoftmaxCall, q_block: int, k_block: int) -> BlockMap:
    _, T, S, *_ = call.sizes
    if call.arange_positions:
        return static_map(call.mask, T, S, q_block, k_block)

    q = padded_tokens(call.q_positions_BT, call.q_segments_BT, T, T + -T % q_block)
    k = padded_tokens(call.k_positions_BS, call.k_segments_BS, S, S + -S % k_block)
    return runtime_map(call.mask, q, k, q_block, k_block)
