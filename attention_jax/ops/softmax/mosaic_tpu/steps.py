"""The TPU kernels' grids: one step per live block, as flat lists in scalar memory.

A kernel's last grid axis runs over steps; its index maps and its body read what the step is from int32
arrays that are there before the kernel starts (scalar prefetch). The forward goes through the live key
blocks of one query block after another, the backward through the live query blocks of one key block after
another. Empty blocks have no step, full ones run no mask code. Where the map is made at run time the lists
have room for every block, and the steps that are left over repeat the last one and do nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.softmax.blocks import BlockMap

Array = Any  # NumPy for a static map, jax for one made at run time

# What a step does, bits of `Steps.flags`.
FIRST = 1  # of the steps that share an accumulator
LAST = 2
FULL = 4  # all pairs of the block are kept
PARTIAL = 8  # some are
OPENS = 16  # backward: the first step of its query block, which zeroes dQ
CLOSES = 32  # backward: the last one, which writes dQ

LANES = 128


SCALAR_BYTES = 640 * 1024  # of 1 MiB of scalar memory, what lists may take
MAX_PARTS = 8  # sweeps of the backward over the keys, each with partial sums of dK and dV in HBM


def balanced(length: int, most: int) -> int:
    """The block that cuts `length` into the fewest parts <= most, a multiple of the 128 lanes."""
    return round_up(-(-length // -(-length // most)), LANES)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Steps:
    """Flat int32 lists, [rows * length] with one row for all batch rows or a row for each.

    q_blocks: the query block of the step; in the backward g * query blocks + query block for the g-th query
      head of the group.
    k_blocks: its key block.
    flags: what the step does.
    closing: backward: the query block that is written out at this step or next after it.
    """

    q_blocks: Array
    k_blocks: Array
    flags: Array
    closing: Array | None
    length: int

    @property
    def lists(self) -> tuple[Array, ...]:
        lists = (self.q_blocks, self.k_blocks, self.flags, self.closing)
        return tuple(x for x in lists if x is not None)


def forward_length(block_map: BlockMap) -> int:
    return _length(_forward_visits(block_map))


def forward_steps(block_map: BlockMap) -> Steps:
    """Rows are query blocks; every one has a step, for a row without a key must be written too."""
    xp = np if block_map.static else jnp
    visits = _forward_visits(block_map)
    _, nq, nk = visits.shape
    order, alive, count = _order(visits, xp)
    row, column = order // nk, order % nk
    flags = _ends(row, count, xp) + _kinds(block_map.any_kept, block_map.all_kept, order, xp)
    return _steps(row, column, flags * alive, None, xp)


def _forward_visits(block_map: BlockMap) -> Array:
    """Boolean [b, nq, nk]: blocks with a step, live ones and one for each row that has none."""
    xp = np if block_map.static else jnp
    any_kept = block_map.any_kept
    lonely = any_kept.any(2, keepdims=True) == False  # noqa: E712
    return any_kept | (lonely & (xp.arange(any_kept.shape[2]) == 0))


def backward_length(block_map: BlockMap, G: int, parts: int) -> int:
    return _length(_backward_visits(block_map, G, parts)[0])


def backward_steps(block_map: BlockMap, G: int, parts: int) -> Steps:
    """Rows are (part, key block): in each of `parts` equal parts of the G * nq query blocks, key blocks."""
    xp = np if block_map.static else jnp
    visits, any_kept, all_kept = _backward_visits(block_map, G, parts)
    b, _, nk, nr = visits.shape
    before = xp.cumsum(visits, 2) - visits
    opens = visits & (before == 0)
    closes = visits & (before == visits.sum(2, keepdims=True) - 1)
    order, alive, count = _order(visits.reshape(b, -1, nr), xp)
    row = order // nr
    q_block, k_block = row // nk * nr + order % nr, row % nk
    pick = lambda x: xp.take_along_axis(x.reshape(b, -1), order, 1)  # noqa: E731
    flags = (_ends(row, count, xp) + _kinds(any_kept, all_kept, order, xp) + OPENS * pick(opens)) * alive
    closing = (pick(closes) & alive).astype(np.int32)
    flags = flags + CLOSES * closing
    # The step at which the next query block closes, at or after each step; after the last: that one.
    steps = xp.arange(order.shape[1])
    at = xp.where(closing == 1, steps, order.shape[1])[:, ::-1]
    at = np.minimum.accumulate(at, 1) if xp is np else jax.lax.cummin(at, axis=1)
    at = xp.minimum(at[:, ::-1], count - 1)
    return _steps(q_block, k_block, flags, xp.take_along_axis(q_block, at, 1), xp)


def _backward_visits(block_map: BlockMap, G: int, parts: int) -> tuple[Array, Array, Array]:
    """(blocks with a step, some, every), [b, parts, nk, rows per part]."""
    xp = np if block_map.static else jnp

    def by_part(x):
        x = xp.tile(x.swapaxes(1, 2), (1, 1, G))  # [b, nk, G * nq]
        return x.reshape(*x.shape[:2], parts, -1).swapaxes(1, 2)

    any_kept, all_kept = by_part(block_map.any_kept), by_part(block_map.all_kept)
    nk, nr = any_kept.shape[2:]
    lonely_key = any_kept.any(3, keepdims=True) == False  # noqa: E712
    lonely_query = any_kept.any(2, keepdims=True) == False  # noqa: E712
    first_query, first_key = xp.arange(nr) == 0, (xp.arange(nk) == 0)[:, None]
    return any_kept | (lonely_key & first_query) | (lonely_query & first_key), any_kept, all_kept


def _length(visits: Array) -> int:
    return int(visits.sum()) if isinstance(visits, np.ndarray) else visits[0].size


def _order(visits: Array, xp: Any) -> tuple[Array, Array, Array]:
    """(the visited blocks of [b, rows, columns] in order, which steps are alive, their number [b, 1])."""
    flat = visits.reshape(visits.shape[0], -1)
    count = flat.sum(1, keepdims=True)
    if xp is np:
        order = np.flatnonzero(flat)[None]
        return order, np.ones_like(order), count
    order = jnp.argsort(flat == False, axis=1, stable=True)  # noqa: E712
    steps = jnp.arange(order.shape[1])[None]
    order = jnp.take_along_axis(order, jnp.minimum(steps, count - 1), 1)
    return order, (steps < count).astype(jnp.int32), count


def _ends(row: Array, count: Array, xp: Any) -> Array:
    """FIRST and LAST of the steps of a row."""
    edge = xp.ones((row.shape[0], 1), bool)
    change = row[:, 1:] != row[:, :-1]
    first = xp.concatenate([edge, change], 1)
    last = xp.concatenate([change, edge], 1) | (xp.arange(row.shape[1]) == count - 1)
    return FIRST * first + LAST * last


def _kinds(any_kept: Array, all_kept: Array, order: Array, xp: Any) -> Array:
    kinds = xp.where(all_kept & any_kept, FULL, PARTIAL) * any_kept
    return xp.take_along_axis(kinds.reshape(kinds.shape[0], -1), order, 1)


def _steps(q_blocks, k_blocks, flags, closing, xp) -> Steps:
    flat = [
        None if x is None else x.astype(np.int32).reshape(-1) for x in (q_blocks, k_blocks, flags, closing)
    ]
    return Steps(*flat, length=flags.shape[1])
