"""Softmax attention of a few queries to a cache.

A cache holds the keys of a head one after another, [B, K, S, H], and gives them as the transposed view
[B, S, K, H]. Transposed back, they are read where they stand, by one matrix product per kv head for the
queries of its group: a step reads every key and value once. Hidden keys are read, too: a cache should not
have many more slots than tokens (`generate` lets its caches grow).

XLA's CPU backend copies what it slices before a product, so that reading a cache in blocks takes three times
as long as reading all of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.dtypes import wider
from attention_jax.ops.softmax.common import SoftmaxCall, platform
from attention_jax.ops.tokens import positions_or_arange, select_valid

_MOST_QUERIES = 16
_FULL = lax.Precision.HIGHEST


def unsupported(call: SoftmaxCall) -> str | None:
    """Why the call does not run here, or None."""
    return "dropout" if call.dropout_rate > 0 else None


def unwanted(call: SoftmaxCall) -> str | None:
    """Why another implementation runs the call better, or None."""
    T = call.sizes[1]
    if platform(call) != "cpu":
        return "its layout is that of caches on a CPU"
    if T > _MOST_QUERIES:
        return f"T = {T} > {_MOST_QUERIES}: it is for a few queries against a cache"
    if call.k_positions_BS is None:
        return "no k_positions, which a cache has"
    return None


def attend(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _attend(call)


@jax.custom_jvp
def _attend(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    v_BKSM = call.v_BSKM.swapaxes(1, 2)
    p_BKRS, l_BKR, lse_BTN = _probabilities(call, call.k_BSKH.swapaxes(1, 2))
    out_BTNM = _weighed(call, p_BKRS, l_BKR, v_BKSM)
    if call.k_valid_BS is not None:
        # A slot without a token may hold NaN or Inf, and 0 times these is NaN. To set it to 0 beforehand
        # would copy all values at every token.
        # A loop of no or one turn: XLA's CPU backend copies what a conditional reads.
        out_BTNM, _ = lax.while_loop(
            lambda now: (now[1] == 0) & (jnp.isfinite(now[0]).all() == False),  # noqa: E712
            # The selection depends on the turn, or XLA would move it in front of the loop.
            lambda now: (_weighed(call, p_BKRS, l_BKR, _present(call, v_BKSM, now[1] == 0)), now[1] + 1),
            (out_BTNM, jnp.int32(0)),
        )
    return out_BTNM.astype(call.q_BTNH.dtype), lse_BTN


@_attend.defjvp
def _attend_jvp(primals, tangents):
    return jax.jvp(_selected, primals, tangents)


def _selected(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    """The same with keys and values of slots without a token set to 0 first, for derivatives."""
    k_BKSH, v_BKSM = (_present(call, x.swapaxes(1, 2)) for x in (call.k_BSKH, call.v_BSKM))
    p_BKRS, l_BKR, lse_BTN = _probabilities(call, k_BKSH)
    return _weighed(call, p_BKRS, l_BKR, v_BKSM).astype(call.q_BTNH.dtype), lse_BTN


def _present(call: SoftmaxCall, x_BKSH: jax.Array, which: jax.Array | bool = True) -> jax.Array:
    """The array with 0 in slots without a token."""
    if call.k_valid_BS is None:
        return x_BKSH
    valid_BS = call.k_valid_BS & which
    return jnp.where(valid_BS[:, None, :, None], x_BKSH, jnp.zeros((), x_BKSH.dtype))


def _weighed(call: SoftmaxCall, p_BKRS: jax.Array, l_BKR: jax.Array, v_BKSM: jax.Array) -> jax.Array:
    """sum_s p_s v_s / l, float32 [B, T, N, M]."""
    B, T, _, N, _, _, M = call.sizes
    a_BKRM = _product(p_BKRS, v_BKSM, 2) / l_BKR[..., None]
    return a_BKRM.reshape(B, N, T, M).swapaxes(1, 2)


def _probabilities(call: SoftmaxCall, k_BKSH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(z - max z) [B, K, G T, S], its sum, at least 1 without a key, and the lse of all queries."""
    B, T, S, N, K, H, _ = call.sizes
    G = N // K
    q_BTNH = wider(select_valid(call.q_BTNH, call.q_valid_BT)) * call.scale
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    z_BNTS = _product(q_BKRH, k_BKSH, 3).reshape(B, N, T, S)
    kept_BNTS = _kept(call)
    z_BNTS = jnp.where(kept_BNTS, _exponents(call, z_BNTS), -jnp.inf)
    m_BNT = z_BNTS.max(-1)
    if call.sink_logits_N is not None:
        sinks_BNT = jnp.broadcast_to(call.sink_logits_N.astype(m_BNT.dtype)[None, :, None], m_BNT.shape)
        m_BNT = jnp.maximum(m_BNT, sinks_BNT)
    m_BNT = lax.stop_gradient(m_BNT)
    shift_BNT = jnp.where(m_BNT == -jnp.inf, 0.0, m_BNT)
    # The selection changes no value; it keeps an overflowing gradient of a hidden entry from 0 * Inf.
    p_BNTS = jnp.where(kept_BNTS, jnp.exp(z_BNTS - shift_BNT[..., None]), 0.0)
    l_BNT = p_BNTS.sum(-1)
    if call.sink_logits_N is not None:
        l_BNT = l_BNT + jnp.exp(sinks_BNT - shift_BNT)
    some_BNT = l_BNT > 0
    l_BNT = jnp.where(some_BNT, l_BNT, 1.0)
    lse_BNT = jnp.where(some_BNT, shift_BNT + jnp.log(l_BNT), -jnp.inf)
    return p_BNTS.reshape(B, K, G * T, S), l_BNT.reshape(B, K, G * T), lse_BNT.swapaxes(1, 2)


def _product(a_BKRC: jax.Array, b_BKSC: jax.Array, axis: int) -> jax.Array:
    """Products, in float32 or wider, over the last axis of a and an axis of b, for each row and kv head."""
    dimensions = (((3,), (axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(a_BKRC, wider(b_BKSC), dimensions, precision=_FULL)


def _kept(call: SoftmaxCall) -> jax.Array:
    """What may be seen, broadcastable to [B, N, T, S], with S as its last axis."""
    _, T, S, *_ = call.sizes
    q_pos_BT, k_pos_BS = (
        positions_or_arange(x, n) for x, n in ((call.q_positions_BT, T), (call.k_positions_BS, S))
    )
    kept = call.mask.dense(q_pos_BT, k_pos_BS)[:, None]
    if call.q_segments_BT is not None:
        kept = kept & (call.q_segments_BT[:, None, :, None] == call.k_segments_BS[:, None, None, :])
    for valid, axes in ((call.q_valid_BT, (1, 3)), (call.k_valid_BS, (1, 2))):
        if valid is not None:
            kept = kept & jnp.expand_dims(valid, axes)
    if call.mask_BNTS is not None:
        kept = kept & call.mask_BNTS
    return jnp.broadcast_to(kept, (*kept.shape[:2], T, S))


def _exponents(call: SoftmaxCall, z_BNTS: jax.Array) -> jax.Array:
    """Scores after the softcap and the bias."""
    _, T, S, N, *_ = call.sizes
    if call.softcap is not None:
        z_BNTS = call.softcap * jnp.tanh(z_BNTS / call.softcap)
    if call.bias is None:
        return z_BNTS
    positions = (positions_or_arange(x, n) for x, n in ((call.q_positions_BT, T), (call.k_positions_BS, S)))
    score = call.bias.score(call.head_ids(jnp.arange(N, dtype=jnp.int32)), *positions)
    return z_BNTS + score.astype(z_BNTS.dtype)
