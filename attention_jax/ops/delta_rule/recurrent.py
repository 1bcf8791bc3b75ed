"""The delta rule one token after another: the definition, and what decoding uses.

O(1) memory per token forward; a gradient through it keeps the state of every token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax.ops.delta_rule.common import DeltaRuleCall
from attention_jax.ops.recurrences import keep_state, spread


def attend(call: DeltaRuleCall) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in v's dtype, the last state_BNHM)."""
    return _scan(call)[:2]


def attend_and_keep(given: tuple[DeltaRuleCall, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """What `attend` returns, and the ring with the state before each token in its slot.

    given: (call, ring_BRNHM, slot_BT).
    """
    call, ring_BRNHM, slot_BT = given
    return _scan(call, ring_BRNHM, slot_BT)


def _scan(
    call: DeltaRuleCall, ring_BRNHM: jax.Array | None = None, slot_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(y_BTNM, state_BNHM, ring_BRNHM). The ring is carried along, so that each state is written once."""
    _, _, N, _, _ = call.sizes
    wide = call.state_BNHM.dtype
    starts_BT = None
    if call.run_BT is not None:
        starts_BT = jnp.diff(call.run_BT, axis=1, prepend=0) > 0

    def step(carry, token):
        state_BNHM, ring_BRNHM = carry
        q_BQH, k_BKH, v_BNM, beta_BN, log_decay_BNH, start_B, slot_B = token
        if ring_BRNHM is not None:
            ring_BRNHM = keep_state(ring_BRNHM, state_BNHM, slot_B)
        q_BNH, k_BNH = (spread(x.astype(wide), N, axis=1) for x in (q_BQH, k_BKH))
        if start_B is not None:
            state_BNHM = jnp.where(start_B[:, None, None, None], 0, state_BNHM)
        if log_decay_BNH is not None:
            state_BNHM = jnp.exp(log_decay_BNH.astype(wide))[..., None] * state_BNHM
        answer_BNM = jnp.einsum("bnh,bnhm->bnm", k_BNH, state_BNHM)
        change_BNM = beta_BN.astype(wide)[..., None] * (v_BNM.astype(wide) - answer_BNM)
        state_BNHM += k_BNH[..., None] * change_BNM[..., None, :]
        y_BNM = jnp.einsum("bnh,bnhm->bnm", call.scale * q_BNH, state_BNHM)
        return (state_BNHM, ring_BRNHM), y_BNM.astype(call.v_BTNM.dtype)

    tokens = (call.q_BTQH, call.k_BTKH, call.v_BTNM, call.beta_BTN, call.log_decay_BTNH, starts_BT, slot_BT)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state_BNHM, ring_BRNHM), y_TBNM = jax.lax.scan(step, (call.state_BNHM, ring_BRNHM), tokens)
    return jnp.moveaxis(y_TBNM, 0, 1), state_BNHM, ring_BRNHM
