"""The recurrence as it is written, one token after another: O(1) memory per token forward.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,   y_t = scale * q_t S_t

The backward keeps the state of every token; `chunked` does not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.ops import varying
from attention_jax.ops.decay_scan.common import DecayScanCall
from attention_jax.ops.recurrences import einsum, keep_state, spread


def attend(call: DecayScanCall) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in call.out_dtype, state_BNHM)."""
    return _scan(call)[:2]


def attend_and_keep(given: tuple[DecayScanCall, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """What `attend` returns, and the ring with the state before each token in its slot.

    given: (call, ring_BRNHM, slot_BT).
    """
    call, ring_BRNHM, slot_BT = given
    return _scan(call, ring_BRNHM, slot_BT)


def _scan(
    call: DecayScanCall, ring_BRNHM: jax.Array | None = None, slot_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(y_BTNM, state_BNHM, ring_BRNHM). The ring is carried along, so that each state is written once."""
    B, T, N, _, _ = call.sizes
    log_decay, run_BT = call.log_decay, call.run_BT
    tokens = {"q": call.q_BTNH, "k": call.k_BTNH, "v": call.v_BTNM}
    if log_decay is not None and log_decay.ndim > 1:
        tokens["log_decay"] = log_decay
    if run_BT is not None:
        tokens["run"] = jnp.broadcast_to(run_BT, (B, T))
    if ring_BRNHM is not None:
        tokens["slot"] = slot_BT
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)

    def step(carry, token):
        state_BNHM, run_B, ring_BRNHM = carry
        if ring_BRNHM is not None:
            ring_BRNHM = keep_state(ring_BRNHM, state_BNHM, token["slot"])
        q_BNH, k_BNH, v_BNM = (spread(token[x].astype(call.dtype), N, 1) for x in "qkv")
        if log_decay is not None:
            state_BNHM = _decay(token.get("log_decay", log_decay), N) * state_BNHM
        if run_BT is not None:
            same_B = token["run"] == run_B
            state_BNHM = jnp.where(same_B[:, None, None, None], state_BNHM, 0.0)
            run_B = token["run"]
        state_BNHM = state_BNHM + k_BNH[..., None] * v_BNM[..., None, :]
        y_BNM = call.scale * einsum("bnh,bnhm->bnm", q_BNH, state_BNHM)
        return (state_BNHM, run_B, ring_BRNHM), y_BNM.astype(call.out_dtype)

    start = (call.state_BNHM, None if run_BT is None else jnp.zeros(B, jnp.int32), ring_BRNHM)
    start = varying.like(call.q_BTNH, start)
    (state_BNHM, _, ring_BRNHM), y_TBNM = lax.scan(step, start, tokens)
    return jnp.moveaxis(y_TBNM, 0, 1), state_BNHM, ring_BRNHM


def _decay(log_decay: jax.Array, N: int) -> jax.Array:
    """exp of log decays [n], [B, n] or [B, n, H] as factors of the state, [1 or B, N, 1 or H, 1]."""
    if log_decay.ndim == 1:
        log_decay = log_decay[None]
    if log_decay.ndim == 2:
        log_decay = log_decay[..., None]
    return jnp.exp(spread(log_decay, N, 1))[..., None]
