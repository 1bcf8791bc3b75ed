"""Dense selected attention: the readable twin of every other implementation.

What a query sees becomes a boolean array [B, N, T, S]; the rest is softmax attention. Memory O(B N T S).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax.ops.selected.common import SelectedCall
from attention_jax.ops.softmax import dot_product_attention


def attend(call: SelectedCall) -> jax.Array:
    """out_BTNM in q's dtype."""
    _, _, _, N, K, _, _ = call.sizes
    q_pos, k_pos = call.q_positions_BT, call.k_positions_BS
    block_BS = k_pos // call.block_size
    named_BTKS = (call.block_indices_BTKn[..., None] == block_BS[:, None, None, None]).any(-2)
    past_BTS = k_pos[:, None] <= q_pos[..., None]
    seen_BKTS = jnp.moveaxis(named_BTKS & past_BTS[:, :, None], 2, 1)
    segments = None if call.q_segments_BT is None else (call.q_segments_BT, call.k_segments_BS)
    return dot_product_attention(
        call.q_BTNH, call.k_BSKH, call.v_BSKM,
        mask=jnp.repeat(seen_BKTS, N // K, axis=1),
        scale=call.scale,
        segment_ids=segments,
        q_positions=q_pos,
        k_positions=k_pos,
        impl="reference",
    )  # fmt: skip
