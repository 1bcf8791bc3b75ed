"""`delta_rule`: a linear recurrence that corrects what the state answers to a key.

    S_t = A_t S_{t-1} + beta_t k_t (v_t - (A_t S_{t-1})^T k_t)^T,   y_t = scale S_t^T q_t,   A_t = diag(a_t)

The state [H, M] first decays, then moves its answer to k_t by a share beta_t towards v_t: a step of gradient
descent on |S^T k_t - v_t|^2 / 2. Without decay this is DeltaNet (Yang et al. 2024, arXiv 2406.06484), with
one decay per head Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), with one per channel Kimi Delta
Attention (Kimi Team 2025, arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.dtypes import accumulator
from attention_jax.ops.arguments import finite_number, is_array
from attention_jax.ops.delta_rule import chunked, quadratic, recurrent
from attention_jax.ops.delta_rule.chunked import ChunkedDeltaConfig
from attention_jax.ops.delta_rule.common import DeltaRuleCall
from attention_jax.ops.dispatch import Explanation, Implementation, compiled_once, explained
from attention_jax.ops.recurrences import (
    check_decays,
    checked_past,
    document_runs,
    explain_call,
    run_call,
    with_chunk_size,
)
from attention_jax.ops.tokens import per_token, select_valid, valid_tokens


def _many_tokens(call: DeltaRuleCall) -> str | None:
    T = call.sizes[1]
    return None if T == 1 else f"T = {T} > 1: one step per token, and a backward that keeps every state"


# In order of preference. Forward and backward of a call always run in the same implementation.
_IMPLEMENTATIONS = {
    "recurrent": Implementation(recurrent.attend, unwanted=_many_tokens),
    "chunked": Implementation(chunked.attend, config=ChunkedDeltaConfig()),
    "quadratic": Implementation(quadratic.attend, unwanted=lambda call: "O(T^2)"),
}
_KEEPING = Implementation(recurrent.attend_and_keep)


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
    past_states: tuple[jax.Array, jax.Array] | None = None,
    impl: str | ChunkedDeltaConfig | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
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
      chunk_size: tokens of a chunk in the chunked form, best a power of two; by default that of
        `ChunkedDeltaConfig`. The other forms have no chunks.
      return_state: also return the state after the last token.
      past_states: (ring_BRNHM, slot_Bn), with return_state: also return the ring with S_{T-n} ... S_{T-1} in
        its places slot_Bn, int [B, n]; those >= R are dropped. The last n slots then run token by token.
      impl: "recurrent" (token by token), "chunked" (products of matrices, a state per group of chunks kept
        for the backward), "quadratic" (all pairs, for inspection), a `ChunkedDeltaConfig`
        ("chunked" with these sizes), or None, which chooses; see `explain`.

    Keys are taken as they are. With |k| <= 1 and beta <= 2 no step makes the state grow; longer keys may make
    it explode, as the formula says. Normalise them.

    Returns:
      y_BTNM in v's dtype, or (y_BTNM, state_BNHM float32), or with past_states also ring_BRNHM. Slots without
      a token give 0 and pass no gradient. Everything is computed in float32 (float64 if q, k and v are).

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together; a concrete log_decay > 0 or NaN.
    """
    call, valid_BT = _checked_call(
        q_BTNH, k_BTKH, v_BTNM, beta_BTN, log_decay, initial_state_BNHM, segment_ids, positions, scale,
    )  # fmt: skip
    past = checked_past(past_states, call, return_state)
    table = with_chunk_size(_IMPLEMENTATIONS, chunk_size, impl)
    # A state is a long sum: an accelerator's default of fewer bits would add up.
    with jax.default_matmul_precision("highest"):
        y_BTNM, *states = run_call(table, impl, _KEEPING, call, past)
    y_BTNM = select_valid(y_BTNM, valid_BT)
    return (y_BTNM, *states) if return_state else y_BTNM


def delta_weights(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    beta_BTN: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """W [B, N, T, T] with which `delta_rule` adds values, y_t = sum_s W_ts v_s, for inspection.

    The arguments are the op's, and so are the ValueErrors. W is signed, float32 (float64 if q and k are),
    includes `scale` and is differentiable. The part of y that an initial state gives is not included.
    """
    # Values of 0 that fit; where k or beta has other axes, the checks refuse them.
    fits = jnp.ndim(k_BTKH) == 4 and jnp.ndim(beta_BTN) == 3
    v_BTNM = jnp.zeros((*k_BTKH.shape[:2], beta_BTN.shape[2], 1), k_BTKH.dtype) if fits else k_BTKH
    call, _ = _checked_call(q_BTNH, k_BTKH, v_BTNM, beta_BTN, log_decay, None, segment_ids, positions, scale)
    with jax.default_matmul_precision("highest"):
        return _weights(call)


_weights = compiled_once(quadratic.weights)


def explain(*args, impl: str | ChunkedDeltaConfig | None = None, **kwargs) -> Explanation:
    """What `delta_rule` would run for the same arguments; arrays may be ShapeDtypeStructs."""

    def find(*, impl, return_state, past_states, chunk_size, **given):
        call = _checked_call(*given.values())[0]
        past = checked_past(past_states, call, return_state)
        return explain_call(with_chunk_size(_IMPLEMENTATIONS, chunk_size, impl), impl, call, past)

    return explained(delta_rule, find, args, kwargs | {"impl": impl})


def _checked_call(
    q, k, v, beta, log_decay, state, segment_ids, positions, scale
) -> tuple[DeltaRuleCall, jax.Array | None]:
    """The call, and which slots hold a token, boolean [1 or B, T], or None where all do."""
    _check_shapes(q, k, v, beta, log_decay, state)
    # NumPy's float64 is float32 to JAX unless 64 bits are on.
    q, k, v, beta = map(jnp.asarray, (q, k, v, beta))
    dtype = _check_dtypes(q, k, v, beta, log_decay, state)
    B, T, N, M = v.shape
    segments_BT = per_token("segment_ids", segment_ids, B, T)
    positions_BT = per_token("positions", positions, B, T)
    valid_BT = valid_tokens(positions_BT, segments_BT)
    if log_decay is not None:
        check_decays(log_decay, valid_BT)
        # exp(-1e4) is 0 in every precision, and sums of it are finite, which those of -inf are not.
        log_decay = jnp.maximum(jnp.asarray(log_decay, dtype), -1e4)
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    runs_BT = None if segments_BT is None else document_runs(segments_BT, valid_BT)
    call = DeltaRuleCall(
        *(select_valid(x, valid_BT) for x in (q, k, v, beta)),
        select_valid(log_decay, valid_BT),
        jnp.zeros((B, N, k.shape[3], M), dtype) if state is None else jnp.asarray(state),
        None if runs_BT is None else jnp.broadcast_to(runs_BT, (B, T)),
        scale=finite_number("scale", scale),
    )
    return call, valid_BT


def _check_dtypes(q, k, v, beta, log_decay, state) -> Any:
    """The dtype of the computation; ValueError where dtypes do not fit."""
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    given = {"q": q, "beta": beta, "log_decay": log_decay, "initial_state_BNHM": state}
    for name, x in given.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    dtype = accumulator(v)
    if state is not None and state.dtype != dtype:
        raise ValueError(f"initial_state_BNHM must be {jnp.dtype(dtype)}, got {state.dtype}; cast it first")
    return dtype


def _check_shapes(q, k, v, beta, log_decay, state) -> None:
    for name, x, axes in (("q", q, "BTNH"), ("k", k, "BTKH"), ("v", v, "BTNM"), ("beta", beta, "BTN")):
        if not is_array(x):
            raise ValueError(f"{name} must be an array [{', '.join(axes)}], got {type(x).__name__}")
        if len(x.shape) != len(axes) or 0 in x.shape:
            raise ValueError(f"{name} must be [{', '.join(axes)}] without empty axes, got {x.shape}")
    for name, x in (("log_decay", log_decay), ("initial_state_BNHM", state)):
        if x is not None and not is_array(x):
            raise ValueError(f"{name} must be an array or None, got {type(x).__name__}")
    B, T, N, M = v.shape
    H = k.shape[3]
    if q.shape[:2] != (B, T) or k.shape[:2] != (B, T) or q.shape[3] != H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit [B,T,N,H], [B,T,K,H], [B,T,N,M]")
    for name, x in (("q", q), ("k", k)):
        if N % x.shape[2]:
            raise ValueError(f"{x.shape[2]} heads of {name} do not divide {N} heads of v (axis 2)")
    if beta.shape != (B, T, N):
        raise ValueError(f"beta must be [B, T, N] = {(B, T, N)}, got {beta.shape}")
    if log_decay is not None and tuple(log_decay.shape) not in ((B, T, N), (B, T, N, H)):
        raise ValueError(
            f"log_decay must be [B, T, N] = {(B, T, N)} or [B, T, N, H] = {(B, T, N, H)}, "
            f"got {log_decay.shape}"
        )
    if state is not None and tuple(state.shape) != (B, N, H, M):
        raise ValueError(f"initial_state_BNHM must be [B, N, H, M] = {(B, N, H, M)}, got {state.shape}")


def implementations() -> tuple[str, ...]:
    """The names that `impl` may be."""
    return tuple(_IMPLEMENTATIONS)
