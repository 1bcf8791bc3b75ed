"""Dense selected attention: the readable twin of every other implementation.

What a query sees becomes a boolean array [B, N, T, S]; the rest is softmax attention. Memory O(B N T S).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.ops.selected.common import SelectedCall
from attention_jax.ops.softmax import attention_weights, dot_product_attention


def attend(call: SelectedCall) -> jax.Array:
    """out_BTNM in q's dtype."""
    return dot_product_attention(call.q_BTNH, call.k_BSKH, call.v_BSKM, impl="reference", **_arguments(call))


def weights(call: SelectedCall) -> jax.Array:
    """The probabilities, float32 [B, N, T, S]; a row sums to 1, or to 0 where no key is seen."""
    return attention_weights(call.q_BTNH, call.k_BSKH, **_arguments(call))


def _arguments(call: SelectedCall) -> dict[str, Any]:
    """What makes the call one of softmax attention."""
    _, _, _, N, K, _, _ = call.sizes
    q_pos, k_pos = call.q_positions_BT, call.k_positions_BS
    block_BS = k_pos // call.block_size
    named_BTKS = (call.block_indices_BTKn[..., None] == block_BS[:, None, None, None]).any(-2)
    past_BTS = k_pos[:, None] <= q_pos[..., None]
    seen_BKTS = jnp.moveaxis(named_BTKS & past_BTS[:, :, None], 2, 1)
    return {
        "mask": jnp.repeat(seen_BKTS, N // K, axis=1),
        "scale": call.scale,
        "segment_ids": None if call.q_segments_BT is None else (call.q_segments_BT, call.k_segments_BS),
        "q_positions": q_pos,
        "k_positions": k_pos,
    }
