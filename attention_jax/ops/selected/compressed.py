"""Where the blocks of native sparse attention's compressed branch stand: in rows, packed rows and streams.

Block i of a document covers its positions [i d, i d + l). The tokens of a document stand in a row, so that
slot - position is one number for each document.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.caches import KVCache


class Blocks(NamedTuple):
    """Compressed blocks to be computed: where their tokens stand, [B, C, l], and where they end.

    A block that is not complete has position -1.
    """

    tokens_BCl: jax.Array
    positions_BC: jax.Array


def blocks_of_plain_rows(B: int, T: int, l: int, d: int) -> Blocks:  # noqa: E741 (the paper's names)
    """The blocks of rows that are one document each, from position 0; at least one, complete or not."""
    starts_C = _range(max((T - l) // d + 1, 1)) * d
    tokens_Cl = starts_C[:, None] + _range(l)[None]
    ends_C = jnp.where(tokens_Cl[:, -1] < T, tokens_Cl[:, -1], -1)
    tokens_BCl = jnp.broadcast_to(jnp.minimum(tokens_Cl, T - 1), (B, *tokens_Cl.shape))
    return Blocks(tokens_BCl, jnp.broadcast_to(ends_C, (B, *ends_C.shape)))


def blocks_of_rows(positions_BT, segment_ids_BT: jax.Array | None, l: int, d: int):  # noqa: E741
    """The blocks of all documents of a row, one after another; d <= l, so T // d entries hold them.

    Also their segments beside the queries' (None without), and what to add to a block's number to get its
    entry, for the document of each query.
    """
    B, T = positions_BT.shape
    segments_BT = jnp.zeros((1, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    segments_BT = jnp.broadcast_to(segments_BT, (B, T))
    valid_BT = (positions_BT >= 0) & (segments_BT >= 0)
    last_T = jnp.minimum(_range(T) + l - 1, T - 1)
    # A document is contiguous: if a block's last token is where it should be, so are the others.
    starts_BT = (
        valid_BT
        & (positions_BT % d == 0)
        & valid_BT[:, last_T]
        & (positions_BT[:, last_T] == positions_BT + l - 1)
        & (segments_BT[:, last_T] == segments_BT)
    )
    entries = max(T // d, 1)
    order_BC = jnp.argsort(starts_BT == False, axis=1, stable=True)[:, :entries].astype(jnp.int32)  # noqa: E712
    begins_BC, found_BC, segments_BC = (
        jnp.take_along_axis(x, order_BC, axis=1) for x in (positions_BT, starts_BT, segments_BT)
    )
    ends_BC = jnp.where(found_BC, begins_BC + l - 1, -1)
    tokens_BCl = jnp.minimum(order_BC[..., None] + _range(l)[None, None], T - 1)
    # The last block that begins at or before a query is of its document, if it sees any block at all.
    newest_BT = jnp.maximum(jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) - 1, 0)
    shift_BT = jnp.take_along_axis(_range(entries)[None] - begins_BC // d, newest_BT, axis=1)
    segment_ids = None if segment_ids_BT is None else (segments_BT, segments_BC)
    return Blocks(tokens_BCl, ends_BC), segment_ids, shift_BT


def _range(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)


def completed_blocks(tail: KVCache, beside: KVCache, positions_BT, l: int, d: int):  # noqa: E741
    """The blocks that end within the new tokens, at slots of `beside` (tail, tokens), and their numbers."""
    T = positions_BT.shape[1]
    # A row without a new token begins at the capacity, where no block can end any more.
    begin_BT = jnp.where(positions_BT >= 0, positions_BT, tail.capacity)
    begin_B1 = begin_BT.min(1, keepdims=True)
    begin_slot_B1 = begin_BT.argmin(1, keepdims=True).astype(jnp.int32)
    first_slot_B1 = tail.positions_BS.shape[1] + begin_slot_B1 - begin_B1
    # Block i ends at i d + l - 1: from the first that ends at `begin` or later.
    number_BC = jnp.maximum((begin_B1 - (l - 1) + d - 1) // d, 0) + _range(-(-T // d))[None]
    wanted_BCl = number_BC[..., None] * d + _range(l)[None, None]
    slots_BCl = jnp.where(
        wanted_BCl < begin_B1[..., None], wanted_BCl % tail.ring, wanted_BCl + first_slot_B1[..., None]
    )
    slots_BCl = jnp.clip(slots_BCl, 0, beside.positions_BS.shape[1] - 1)
    rows_B11 = _range(positions_BT.shape[0])[:, None, None]
    complete_BC = (beside.positions_BS[rows_B11, slots_BCl] == wanted_BCl).all(-1)
    ends_BC = wanted_BCl[..., -1]
    fits_BC = complete_BC & (ends_BC < tail.capacity)
    return Blocks(slots_BCl, jnp.where(fits_BC, ends_BC, -1)), number_BC
