"""The dense form, for inspection: a decayed score of every pair of tokens.

    y_t = scale * (sum_{s <= t} P_ts v_s + q_t exp(L_t) S_0),   P_ts = sum_h q_th k_sh exp(L_tsh)
    L_tsh = sum_{s < j <= t} log a_jh,   L_th = sum_{j <= t} log a_jh

Sums of log decays start anew at every s, O(T^2) of them: nothing is subtracted, so nothing cancels and -inf
is like any other decay.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax.ops.decay_scan.common import DecayScanCall
from attention_jax.ops.recurrences import einsum, spread

# Elements of the largest temporary, [B, N, T, S] or [B, N, T, S, H]: 1 GiB in float32, and a backward
# keeps several such.
_MOST_ELEMENTS = 2**28


def unsupported(call: DecayScanCall) -> str | None:
    """Why this implementation cannot run the call."""
    B, T, N, H, _ = call.sizes
    vector = call.log_decay is not None and call.log_decay.ndim == 4
    elements = B * N * T * T * (H if vector else 1)
    if elements > _MOST_ELEMENTS:
        shape = "[B, N, T, T, H]" if vector else "[B, N, T, T]"
        return f"the weights {shape} are {elements} elements, more than {_MOST_ELEMENTS}"
    return None


def attend(call: DecayScanCall) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in call.out_dtype, state_BNHM)."""
    q_BNTH, k_BNSH, v_BNSM = (_by_head(call, x) for x in (call.q_BTNH, call.k_BTNH, call.v_BTNM))
    pairs_BNTSH, start_BNTH = _decays(call)
    p_BNTS = _scores(q_BNTH, k_BNSH, pairs_BNTSH)
    y_BNTM = einsum("bnts,bnsm->bntm", p_BNTS, v_BNSM)
    y_BNTM = call.scale * (y_BNTM + _from_state(q_BNTH, start_BNTH, call.state_BNHM))
    added_BNHM = einsum("bnsh,bnsm->bnhm", k_BNSH * pairs_BNTSH[:, :, -1], v_BNSM)
    state_BNHM = call.state_BNHM * start_BNTH[:, :, -1, :, None] + added_BNHM
    return jnp.moveaxis(y_BNTM, 1, 2).astype(call.out_dtype), state_BNHM


def weights(call: DecayScanCall) -> jax.Array:
    """W_BNTS: y_t is sum_s W_ts v_s and the part of the initial state. v is not read.

    With call.normalize W is divided by the denominator, the initial state's part of it included; where that
    is 0, W is 0.
    """
    q_BNTH, k_BNSH = (_by_head(call, x) for x in (call.q_BTNH, call.k_BTNH))
    pairs_BNTSH, start_BNTH = _decays(call)
    p_BNTS = _scores(q_BNTH, k_BNSH, pairs_BNTSH)
    if call.normalize:
        den_BNT1 = p_BNTS.sum(-1, keepdims=True) + _from_state(q_BNTH, start_BNTH, call.state_BNHM[..., -1:])
        some = den_BNT1 != 0
        p_BNTS = jnp.where(some, p_BNTS / jnp.where(some, den_BNT1, 1.0), 0.0)
    return call.scale * p_BNTS


def _by_head(call: DecayScanCall, x_BTNH: jax.Array) -> jax.Array:
    return jnp.moveaxis(spread(x_BTNH.astype(call.dtype), call.sizes[2], 2), 2, 1)


def _scores(q_BNTH, k_BNSH, pairs_BNTSH) -> jax.Array:
    """P [B, N, T, S]. The last axis of the decays is 1 where all channels decay alike."""
    if pairs_BNTSH.shape[-1] == 1:
        return einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH) * pairs_BNTSH[..., 0]
    return einsum("bnth,bnsh,bntsh->bnts", q_BNTH, k_BNSH, pairs_BNTSH)


def _from_state(q_BNTH, start_BNTH, state_BNHM) -> jax.Array:
    return einsum("bnth,bnhm->bntm", q_BNTH * start_BNTH, state_BNHM)


def _decays(call: DecayScanCall) -> tuple[jax.Array, jax.Array]:
    """exp(L_ts), 0 for hidden pairs, [1 or B, 1 or N, T, S, 1 or H], and exp(L_t), [.., T, 1 or H]."""
    _, T, N, _, _ = call.sizes
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    steps_BNTH = _log_decay(call, T, N)
    sums_BNTSH = jnp.cumsum(jnp.where((s < t)[..., None], steps_BNTH[:, :, :, None], 0.0), axis=2)
    pairs_BNTSH = jnp.where((s <= t)[..., None], jnp.exp(sums_BNTSH), 0.0)
    start_BNTH = jnp.exp(jnp.cumsum(steps_BNTH, axis=2))
    if call.run_BT is not None:
        run_BT = call.run_BT[:, None]
        same_BNTS = run_BT[..., :, None] == run_BT[..., None, :]
        pairs_BNTSH = jnp.where(same_BNTS[..., None], pairs_BNTSH, 0.0)
        start_BNTH = jnp.where((run_BT == 0)[..., None], start_BNTH, 0.0)
    return pairs_BNTSH, start_BNTH


def _log_decay(call: DecayScanCall, T: int, N: int) -> jax.Array:
    """[1 or B, 1 or N, T, 1 or H]."""
    log_decay = call.log_decay
    if log_decay is None:
        return jnp.zeros((1, 1, T, 1), call.dtype)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, T, log_decay.shape[0]))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    return jnp.moveaxis(spread(log_decay, N, 2), 2, 1)
