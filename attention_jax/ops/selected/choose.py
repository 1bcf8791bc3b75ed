"""Which blocks a query reads: importance from the compressed branch's probabilities, then the largest.

    p^slc_t[j] = sum_{m < l'/d} sum_{n < l/d} p^cmp_t[(l'/d) j + m - n]        (9)
    p'_t[j]    = sum of p^slc_t[j] over the query heads of a kv group          (10)
    I_t        = the n largest of p'_t, the first and the last two blocks always among them   (11)

Yuan et al. 2025 (arXiv 2502.11089). Compressed block i covers positions [i d, i d + l), selection block j
[j l', (j + 1) l'): a compressed probability counts once for each stretch of d tokens that the two share.
The paper writes the index as (l'/d) j - m - n, which is the same with blocks counted from one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attention_jax.dtypes import wider
from attention_jax.ops.dispatch import compiled_once
from attention_jax.ops.selected.common import chunk_length, over_chunks

# Bits kept of an importance's mantissa. Blocks that tie in exact arithmetic come out a few units in the last
# place apart, and differently so in every form of the computation; rounded they tie again, and of a tie the
# first block is taken.
_IMPORTANCE_BITS = 12


@functools.partial(
    compiled_once,
    static_argnames=(
        "scale",
        "compress_block",
        "compress_stride",
        "select_block",
        "select_count",
        "num_blocks",
    ),
)
def choose_blocks(
    q_BTNH: jax.Array,
    k_BCKH: jax.Array,
    lse_BTN: jax.Array,
    *,
    scale: float,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    select_count: int,
    num_blocks: int,
    q_positions: jax.Array,
    k_positions: jax.Array,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    shift_BT: jax.Array | None = None,
) -> jax.Array:
    """The blocks each query and kv head reads, int32 [B, T, K, min(select_count, num_blocks)]; -1 is none.

    Args:
      q_BTNH, k_BCKH: queries and compressed keys, as the compressed branch attended with them.
      lse_BTN: the log-sum-exp of that attention.
      scale: what multiplied q . k there.
      compress_block, compress_stride, select_block: l, d and l'; d divides both others.
      select_count: n, the forced blocks included.
      num_blocks: how many selection blocks the longest document may have.
      q_positions: [B, T]; < 0 holds no token and chooses nothing.
      k_positions: [B, C], the position of a compressed block's last token; < 0 is no block.
      segment_ids: ([B, T], [B, C]), or None: one document a row.
      shift_BT: compressed block i of the query's document is entry i + shift of C; None: i.

    Nothing here is differentiated.
    """
    B, T, N, _ = q_BTNH.shape
    C, K = k_BCKH.shape[1:3]
    wide_BCKH = wider(jax.lax.stop_gradient(k_BCKH))

    def body(rows):
        q, lse_BTN, q_pos, q_seg, shift = rows
        seen_BTC = (k_positions[:, None] <= q_pos[..., None]) & (k_positions[:, None] >= 0)
        if segment_ids is not None:
            seen_BTC &= q_seg[..., None] == segment_ids[1][:, None]
        q_BTKGH = wider(q).reshape(B, -1, K, N // K, q.shape[-1]) * scale
        s_BTKGC = jnp.einsum("btkgh,bckh->btkgc", q_BTKGH, wide_BCKH, precision="highest")
        s_BTKGC = s_BTKGC - lse_BTN.reshape(*s_BTKGC.shape[:-1], 1)
        p_BTKGC = jnp.where(seen_BTC[:, :, None, None], jnp.exp(s_BTKGC), 0.0)
        p_BTKC = _aligned(p_BTKGC.sum(3), shift)
        stretches = compress_block // compress_stride, select_block // compress_stride
        return _largest(_importance(p_BTKC, *stretches, num_blocks), q_pos // select_block, select_count)

    rows = (q_BTNH, lse_BTN, q_positions, None if segment_ids is None else segment_ids[0], shift_BT)
    length = chunk_length(T, B * N * C)
    return over_chunks(body, jax.lax.stop_gradient(rows), T, length)


def _aligned(p_BTKC: jax.Array, shift_BT: jax.Array | None) -> jax.Array:
    """Entry i becomes that of block i of the query's own document."""
    if shift_BT is None:
        return p_BTKC
    C = p_BTKC.shape[-1]
    index_BT1C = (jnp.arange(C, dtype=jnp.int32)[None, None] + shift_BT[..., None])[:, :, None]
    p_BTKC = jnp.take_along_axis(p_BTKC, jnp.clip(index_BT1C, 0, C - 1), axis=-1)
    return jnp.where((index_BT1C >= 0) & (index_BT1C < C), p_BTKC, 0.0)


def _importance(p_BTKC: jax.Array, a: int, r: int, J: int) -> jax.Array:
    """[B, T, K, J]: equation 9 for compressed blocks of `a` stretches and selection blocks of `r`."""
    right = max(0, J * r - p_BTKC.shape[-1])
    p = jnp.pad(p_BTKC, [(0, 0)] * 3 + [(a - 1, right)])
    stretch = sum(p[..., a - 1 - n : a - 1 - n + J * r] for n in range(a))
    return stretch.reshape(*stretch.shape[:-1], J, r).sum(-1)


def _largest(importance_BTKJ: jax.Array, own_BT: jax.Array, count: int) -> jax.Array:
    """The `count` most important blocks up to the query's own, which is `own_BT`."""
    j = jnp.arange(importance_BTKJ.shape[-1], dtype=jnp.int32)[None, None, None]
    own = own_BT[..., None, None]
    forced = (j == 0) | (j == own) | (j == own - 1)
    rounded = jax.lax.reduce_precision(importance_BTKJ, exponent_bits=8, mantissa_bits=_IMPORTANCE_BITS)
    score = jnp.where(j <= own, jnp.where(forced, jnp.inf, rounded), -jnp.inf)
    value, index = jax.lax.top_k(score, min(count, j.size))
    return jnp.where(value > -jnp.inf, index, -1).astype(jnp.int32)
