"""The delta rule over all pairs of tokens, for inspection: O(T^2) memory, with decays per channel O(T^2 H).

With G_ti = prod_{i < s <= t} diag(a_s) and u_t = beta_t (v_t - k_t^T S_t), what token t adds along its key,

    S_t = sum_{i <= t} G_ti k_i u_i^T + G_t0 S_0

so that the u are the solution of a unit lower triangular system, and y follows:

    u_t + beta_t sum_{i < t} (k_t . G_ti k_i) u_i = beta_t (v_t - (G_t0 k_t)^T S_0)
    y_t = scale (sum_{i <= t} (q_t . G_ti k_i) u_i + (G_t0 q_t)^T S_0)

Pairs of two documents do not see each other, and S_0 is seen by the first alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax.ops.delta_rule.common import DeltaRuleCall
from attention_jax.ops.recurrences import spread


def attend(call: DeltaRuleCall) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in v's dtype, the last state_BNHM)."""
    state_BNHM = call.state_BNHM
    q_BNTH, k_BNTH, beta_BNT1 = _by_head(call)
    v_BNTM = jnp.swapaxes(call.v_BTNM.astype(state_BNHM.dtype), 1, 2)
    between_BNTSH, before_BNTH, after_BNTH, whole_BNH = _decays(call)
    scores_BNTS, reads_BNTS = _pairs(q_BNTH, k_BNTH, beta_BNT1, between_BNTSH)
    held_BNTM = jnp.einsum("bnth,bnhm->bntm", before_BNTH * k_BNTH, state_BNHM)
    u_BNTM = _solve(scores_BNTS, beta_BNT1 * (v_BNTM - held_BNTM))
    y_BNTM = jnp.einsum("bnts,bnsm->bntm", reads_BNTS, u_BNTM)
    y_BNTM += jnp.einsum("bnth,bnhm->bntm", before_BNTH * q_BNTH, state_BNHM)
    state_BNHM = whole_BNH[..., None] * state_BNHM
    state_BNHM += jnp.einsum("bnth,bntm->bnhm", after_BNTH * k_BNTH, u_BNTM)
    return jnp.swapaxes(y_BNTM, 1, 2).astype(call.v_BTNM.dtype), state_BNHM


def weights(call: DeltaRuleCall) -> jax.Array:
    """W_BNTS: y_t is sum_s W_ts v_s and the part of the initial state. v and the state are not read."""
    q_BNTH, k_BNTH, beta_BNT1 = _by_head(call)
    scores_BNTS, reads_BNTS = _pairs(q_BNTH, k_BNTH, beta_BNT1, _decays(call)[0])
    # u is linear in v: the solutions for v the identity.
    identity_TS = jnp.eye(call.sizes[1], dtype=call.state_BNHM.dtype)
    return jnp.einsum("bnti,bnis->bnts", reads_BNTS, _solve(scores_BNTS, beta_BNT1 * identity_TS[None, None]))


def _by_head(call: DeltaRuleCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q times scale, k and beta with their heads in front, in the dtype of the computation."""
    N, wide = call.sizes[2], call.state_BNHM.dtype
    q_BNTH, k_BNTH = (
        jnp.swapaxes(spread(x.astype(wide), N, axis=2), 1, 2) for x in (call.q_BTQH, call.k_BTKH)
    )
    return call.scale * q_BNTH, k_BNTH, jnp.swapaxes(call.beta_BTN, 1, 2).astype(wide)[..., None]


def _pairs(q_BNTH, k_BNTH, beta_BNT1, between_BNTSH) -> tuple[jax.Array, jax.Array]:
    """beta_t (k_t . G_ti k_i), whose part below the diagonal counts, and scale * q_t . G_ti k_i."""
    scores_BNTS = beta_BNT1 * jnp.einsum("bnth,bnsh,bntsh->bnts", k_BNTH, k_BNTH, between_BNTSH)
    return scores_BNTS, jnp.einsum("bnth,bnsh,bntsh->bnts", q_BNTH, k_BNTH, between_BNTSH)


def _solve(scores_BNTS: jax.Array, right_BNTM: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(scores_BNTS, right_BNTM, lower=True, unit_diagonal=True)


def _decays(call: DeltaRuleCall) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """G between two tokens, from the row's start to a token, from a token to the row's end, and over the row.

    0 where no state passes: to an earlier token, or from one document to another. The axis of H has length 1
    where channels share a decay.
    """
    B, T, N, _, _ = call.sizes
    wide = call.state_BNHM.dtype
    if call.log_decay_BTNH is None:
        log_BNTH = jnp.zeros((B, N, T, 1), wide)
    else:
        log_BNTH = jnp.swapaxes(call.log_decay_BTNH, 1, 2).astype(wide)
    run_BT = jnp.zeros((B, T), jnp.int32) if call.run_BT is None else call.run_BT
    tokens = jnp.arange(T)
    # Sums of the terms themselves: a difference of two long sums would lose the short ones.
    later_TS = tokens[:, None] > tokens[None]
    sums_BNTSH = jnp.cumsum(jnp.where(later_TS[..., None], log_BNTH[:, :, :, None], 0), axis=2)
    past_TS = tokens[:, None] >= tokens[None]
    seen_BTS = past_TS[None] & (run_BT[:, :, None] == run_BT[:, None])
    between_BNTSH = jnp.where(seen_BTS[:, None, :, :, None], jnp.exp(sums_BNTSH), 0)
    first_B1T1 = (run_BT == 0)[:, None, :, None]
    before_BNTH = jnp.where(first_B1T1, jnp.exp(jnp.cumsum(log_BNTH, axis=2)), 0)
    return between_BNTSH, before_BNTH, between_BNTSH[:, :, -1], before_BNTH[:, :, -1]
