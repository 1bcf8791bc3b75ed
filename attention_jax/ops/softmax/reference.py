"""Dense softmax attention: the readable twin of every other implementation.

    out_t = sum_s P_ts v_s,   P = softmax over kept s of (softcap(q_t . k_s * scale) + bias_ts)

(Vaswani et al. 2017, arXiv 1706.03762.) Memory O(B N T S). Also the fastest form at small T S on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax.dtypes import wider
from attention_jax.ops.softmax.common import SoftmaxCall, dropout_keep
from attention_jax.ops.tokens import positions_or_arange, select_valid


def attend(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    B, T, S, N, K, _, M = call.sizes
    v_BSKM = wider(select_valid(call.v_BSKM, call.k_valid_BS))
    w_BNTS, lse_BNT = _probabilities(call)
    if call.dropout_rate > 0:
        rows_B, heads_N = call.row_ids(jnp.arange(B)), call.head_ids(jnp.arange(N))
        q_pos_BT = positions_or_arange(call.q_positions_BT, T)
        k_pos_BS = positions_or_arange(call.k_positions_BS, S)
        kept = dropout_keep(call.dropout_words, call.dropout_rate, rows_B, heads_N, q_pos_BT, k_pos_BS)
        w_BNTS = jnp.where(kept, w_BNTS / (1 - call.dropout_rate), 0.0)
    w_BKGTS = w_BNTS.reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskm->btkgm", w_BKGTS, v_BSKM, precision="highest")
    return out.reshape(B, T, N, M).astype(call.q_BTNH.dtype), lse_BNT.transpose(0, 2, 1)


def weights(call: SoftmaxCall) -> jax.Array:
    """P, the probabilities before dropout, float32 [B, N, T, S]; v is not read.

    A row sums to 1, to 1 minus the sink's share where there are sink logits, and to 0 where no key is seen.
    """
    return _probabilities(call)[0]


def _probabilities(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    """(P_BNTS, lse_BNT)."""
    B, T, S, N, K, H, _ = call.sizes
    heads_N = call.head_ids(jnp.arange(N))
    q_pos_BT = positions_or_arange(call.q_positions_BT, T)
    k_pos_BS = positions_or_arange(call.k_positions_BS, S)
    q_valid_BT, k_valid_BS = call.q_valid_BT, call.k_valid_BS
    q_BTNH = wider(select_valid(call.q_BTNH, q_valid_BT)) * call.scale
    k_BSKH = wider(select_valid(call.k_BSKH, k_valid_BS))

    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BNTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, precision="highest").reshape(B, N, T, S)
    if call.softcap is not None:
        s_BNTS = call.softcap * jnp.tanh(s_BNTS / call.softcap)
    if call.bias is not None:
        s_BNTS = s_BNTS + call.bias.score(heads_N, q_pos_BT, k_pos_BS).astype(s_BNTS.dtype)
    seen_BNTS = _kept(call, q_pos_BT, k_pos_BS, q_valid_BT, k_valid_BS)
    s_BNTS = jnp.where(seen_BNTS, s_BNTS, -jnp.inf)

    # The maximum only shifts the exponent, so no gradient flows through it; a row without a key (and
    # without a sink) keeps 0 there, so that -inf - -inf never appears.
    m_BNT1 = s_BNTS.max(-1, keepdims=True)
    if call.sink_logits_N is not None:
        sinks_1N11 = call.sink_logits_N.astype(s_BNTS.dtype)[None, :, None, None]
        m_BNT1 = jnp.maximum(m_BNT1, sinks_1N11)
    m_BNT1 = jax.lax.stop_gradient(jnp.where(m_BNT1 == -jnp.inf, 0.0, m_BNT1))
    p_BNTS = jnp.exp(s_BNTS - m_BNT1)
    l_BNT1 = p_BNTS.sum(-1, keepdims=True)
    if call.sink_logits_N is not None:
        l_BNT1 = l_BNT1 + jnp.exp(sinks_1N11 - m_BNT1)
    some_BNT1 = l_BNT1 > 0
    l_BNT1 = jnp.where(some_BNT1, l_BNT1, 1.0)
    lse_BNT = jnp.where(some_BNT1, m_BNT1 + jnp.log(l_BNT1), -jnp.inf)[..., 0]

    # The selection changes no value; it keeps an overflowing gradient of a hidden entry from 0 * Inf.
    w_BNTS = jnp.where(seen_BNTS, p_BNTS / l_BNT1, 0.0)
    return w_BNTS, lse_BNT


def _kept(call, q_pos_BT, k_pos_BS, q_valid_BT, k_valid_BS) -> jax.Array:
    """What may be seen, broadcastable to [B, N, T, S]."""
    kept = call.mask.dense(q_pos_BT, k_pos_BS)[:, None]
    if call.q_segments_BT is not None:
        kept = kept & (call.q_segments_BT[:, None, :, None] == call.k_segments_BS[:, None, None, :])
    if q_valid_BT is not None:
        kept = kept & q_valid_BT[:, None, :, None]
    if k_valid_BS is not None:
        kept = kept & k_valid_BS[:, None, None, :]
    if call.mask_BNTS is not None:
        kept = kept & call.mask_BNTS
    return kept
