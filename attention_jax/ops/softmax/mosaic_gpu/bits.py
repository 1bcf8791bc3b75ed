"""Masks that a kernel cannot compute: a bit per pair of tokens, 32 of the swept side to a word.

Boolean arrays, masks that look both positions up in an array (`Dense`), predicates not elementwise.
A word belongs to one token of the side that a thread block owns, so that a block of the other side is a
few vectors along the tile's rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu.config import WORD
from attention_jax.ops.tokens import positions_or_arange


def mask_bits(
    call: SoftmaxCall, table: bool, by_key: bool, own_pad: int, swept_pad: int
) -> jax.Array | np.ndarray:
    """int32 [b, n, words, own_pad]: bit i of word w is 1 where the pair with swept token 32 w + i is kept.

    table: `call.mask` is to be written out as well as `call.mask_BNTS`. by_key: keys are owned and queries
    swept. b and n are 1 where all batch rows or heads share the mask. Padding is hidden.
    """
    found = None if call.mask_BNTS is None else _not_folded(call.mask_BNTS)
    if table:
        kept = _written_out(call)
        found = kept if found is None else kept & found
    _, T, S, *_ = call.sizes
    xp = np if isinstance(found, np.ndarray) else jnp
    found = xp.broadcast_to(found, (*found.shape[:2], T, S))
    if not by_key:
        found = found.swapaxes(2, 3)
    b, n, swept, own = found.shape
    found = xp.pad(found, ((0, 0), (0, 0), (0, swept_pad - swept), (0, own_pad - own)))
    found = found.reshape(b, n, swept_pad // WORD, WORD, own_pad)
    if xp is np:
        octets = np.packbits(found, axis=3, bitorder="little")
        return np.ascontiguousarray(octets.swapaxes(3, 4)).view("<i4")[..., 0]
    place = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    words = (found.astype(jnp.uint32) << place).sum(3, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def _written_out(call: SoftmaxCall) -> jax.Array | np.ndarray:
    """[1 or B, 1, T, S]: what the call's Mask keeps; NumPy where positions are implicit."""
    _, T, S, *_ = call.sizes
    if call.q_positions_BT is None and call.k_positions_BS is None:
        return call.mask.dense(np.arange(T, dtype=np.int32), np.arange(S, dtype=np.int32))[None, None]
    q_BT, k_BS = positions_or_arange(call.q_positions_BT, T), positions_or_arange(call.k_positions_BS, S)
    return call.mask.dense(_not_folded(q_BT), _not_folded(k_BS))[:, None]


def _not_folded(x: jax.Array) -> jax.Array:
    """x, not known to XLA, which would pack a constant array while compiling, one bit after another."""
    return lax.optimization_barrier(x)


def any_and_all(
    mask_BNTS: jax.Array, T: int, S: int, q_block: int, k_block: int
) -> tuple[jax.Array, jax.Array]:
    """Boolean [b, query blocks, key blocks]: does any head keep a pair of the block, do all keep every one?

    A ragged block of queries may be full, one of keys may not.
    """
    mask = jnp.broadcast_to(_not_folded(mask_BNTS), (*mask_BNTS.shape[:2], T, S))

    def by_blocks(beyond_queries: bool) -> jax.Array:
        b, n = mask.shape[:2]
        padded = jnp.pad(
            jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, -S % k_block))),
            ((0, 0), (0, 0), (0, -T % q_block), (0, 0)),
            constant_values=beyond_queries,
        )
        return padded.reshape(b, n, -1, q_block, padded.shape[3] // k_block, k_block)

    return by_blocks(False).any((1, 3, 5)), by_blocks(True).all((1, 3, 5))
