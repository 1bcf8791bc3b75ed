"""`delta_rule`: a linear recurrence that corrects what the state answers to a key.

    S_t = A_t S_{t-1} + beta_t k_t (v_t - (A_t S_{t-1})^T k_t)^T,   y_t = scale S_t^T q_t,   A_t = diag(a_t)

The state [H, M] first decays, then moves its answer to k_t by a share beta_t towards v_t: a step of gradient
descent on |S^T k_t - v_t|^2 / 2. Without decay this is DeltaNet (Yang et al. 2024, arXiv 2406.06484), with one
decay per head Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), with one per channel Kimi Delta Attention
(Kimi Team 2025, arXiv 2510.26692).
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.ops.arguments import per_token
from attention_jax.ops.delta_rule import chunked, quadratic, recurrent
from attention_jax.ops.delta_rule.common import Call

_IMPLEMENTATIONS = {
    "chunked": chunked.delta_rule,
    "recurrent": recurrent.delta_rule,
    "quadratic": quadratic.delta_rule,
}


def delta_rule(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTNM: jax.Array,
    beta_BTN: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state_BNHM: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
    return_state: bool = False,
    impl: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The outputs of the recurrence above, and the state after the last token.

    Args:
      q_BTNH, k_BTKH: queries and keys [batch, T, heads, H]. Each may have fewer heads than v, a divisor of
        N; consecutive heads of v then share one.
      v_BTNM: values [batch, T, N heads, M]; M may differ from H.
      beta_BTN: the share of the correction, in [0, 1]; up to 2 the state can also turn over what it holds
        along a key (Grazzi et al. 2024, arXiv 2411.12537). Any finite value is computed.
      log_decay: log a_t <= 0, [B, T, N] or per channel [B, T, N, H]; None: no decay. -inf forgets all.
      initial_state_BNHM: the state before the row's first token, whose document it belongs to; None: 0.
      segment_ids: int [B, T] or [T]; a token whose id differs from that of the token before it starts from
        a state of 0.
      positions: int [B, T] or [T], read for their sign alone: a slot with position < 0 or segment < 0 holds
        no token. It is never read, whatever it contains, leaves the state as it is and gives 0.
      scale: multiplies y.
      chunk_size: tokens that "chunked" takes at once, >= 1, best a power of two; None: 64.
      return_state: also return the state after the last token.
      impl: "chunked" (matrix products over chunks), "recurrent" (token by token), "quadratic" (all pairs, for
        inspection) or None, which chooses.

    Keys are taken as they are. With |k| <= 1 and beta <= 2 no step makes the state grow; longer keys may make
    it explode, as the formula says. Normalise them.

    Returns:
      y_BTNM in v's dtype, and with return_state (y_BTNM, state_BNHM). The state is float32 (float64 for
      float64 inputs), and so is all arithmetic. Differentiable in every array but ids and positions.

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together.
    """
    if impl is None:
        impl = "recurrent" if jnp.ndim(v_BTNM) == 4 and v_BTNM.shape[1] <= _RECURRENT_UP_TO else "chunked"
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(_IMPLEMENTATIONS)}")
    call = _checked_call(
        q_BTNH, k_BTKH, v_BTNM, beta_BTN, log_decay, initial_state_BNHM, segment_ids, positions, scale,
        chunk_size,
    )  # fmt: skip
    y_BTNM, state_BNHM = _IMPLEMENTATIONS[impl](call)
    return (y_BTNM, state_BNHM) if return_state else y_BTNM


# Rows up to this long run token by token: decoding is one.
_RECURRENT_UP_TO = 4


def _checked_call(q, k, v, beta, log_decay, state, segment_ids, positions, scale, chunk_size) -> Call:
    _check_shapes(q, k, v, beta, log_decay, state)
    if not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite Python number, got {scale!r}")
    if chunk_size is not None and not (isinstance(chunk_size, numbers.Integral) and chunk_size >= 1):
        raise ValueError(f"chunk_size must be an integer >= 1, got {chunk_size!r}")
    B, T, N, M = v.shape
    q, k, v, beta = map(jnp.asarray, (q, k, v, beta))
    wide = jnp.promote_types(v.dtype, jnp.float32)
    state = jnp.zeros((B, N, k.shape[3], M), wide) if state is None else jnp.asarray(state, wide)
    if log_decay is not None:
        # exp(-1e4) is 0 in every precision; sums of infinities are not safe.
        log_decay = jnp.maximum(jnp.asarray(log_decay), -1e4)
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    positions_BT = per_token("positions", positions, B, T)
    segments_BT = per_token("segment_ids", segment_ids, B, T)
    valid = [jnp.broadcast_to(ids >= 0, (B, T)) for ids in (positions_BT, segments_BT) if ids is not None]
    documents_BT = None
    if valid:
        valid_BT = functools.reduce(jnp.logical_and, valid)
        q, k, v, beta, log_decay = (
            x
            if x is None
            else jnp.where(jnp.expand_dims(valid_BT, range(2, x.ndim)), x, jnp.zeros((), x.dtype))
            for x in (q, k, v, beta, log_decay)
        )
        if segments_BT is not None:
            documents_BT = _documents(jnp.broadcast_to(segments_BT, (B, T)), valid_BT)
    return Call(q, k, v, beta, log_decay, state, documents_BT, scale=float(scale), chunk_size=chunk_size)


def _check_shapes(q, k, v, beta, log_decay, state) -> None:
    for name, x, axes in (("q", q, "BTNH"), ("k", k, "BTKH"), ("v", v, "BTNM"), ("beta", beta, "BTN")):
        if jnp.ndim(x) != len(axes) or 0 in jnp.shape(x):
            raise ValueError(f"{name} must be [{', '.join(axes)}] without empty axes, got {jnp.shape(x)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("log_decay", log_decay), ("state", state)):
        if x is not None and not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(f"{name} must be floating point, got {jnp.result_type(x)}")
    B, T, N, M = v.shape
    H = k.shape[3]
    if q.shape[:2] != (B, T) or k.shape[:2] != (B, T) or q.shape[3] != H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit [B,T,N,H], [B,T,K,H], [B,T,N,M]")
    for name, x in (("q", q), ("k", k)):
        if N % x.shape[2]:
            raise ValueError(f"{x.shape[2]} heads of {name} do not divide {N} heads of v (axis 2)")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if beta.shape != (B, T, N):
        raise ValueError(f"beta must be [B, T, N] = {(B, T, N)}, got {beta.shape}")
    if log_decay is not None and jnp.shape(log_decay) not in ((B, T, N), (B, T, N, H)):
        raise ValueError(
            f"log_decay must be [B, T, N] = {(B, T, N)} or [B, T, N, H] = {(B, T, N, H)}, "
            f"got {jnp.shape(log_decay)}"
        )
    if state is not None and jnp.shape(state) != (B, N, H, M):
        raise ValueError(f"initial_state must be [B, N, H, M] = {(B, N, H, M)}, got {jnp.shape(state)}")


def _documents(segments_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """How many documents started after the row's first token, up to each slot. int32 [B, T]"""
    T = segments_BT.shape[1]
    last_BT = jax.lax.cummax(jnp.where(valid_BT, jnp.arange(T), -1), axis=1)
    before_BT = jnp.pad(last_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :T]
    same_BT = jnp.take_along_axis(segments_BT, jnp.maximum(before_BT, 0), axis=1) == segments_BT
    starts_BT = valid_BT & (before_BT >= 0) & (same_BT == False)  # noqa: E712
    return jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)


implementations: Any = functools.partial(tuple, _IMPLEMENTATIONS)
