"""`decay_scan`: linear attention whose state decays, one function for the whole family.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,   y_t = scale * q_t S_t

Linear attention (arXiv 2006.16236), RetNet (2307.08621), GLA (2312.06635) and Mamba-2's state-space duality
(2405.21060) are a feature map and a decay each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.dtypes import accumulator
from attention_jax.ops.arguments import finite_number, is_array
from attention_jax.ops.decay_scan import chunked, quadratic, recurrent
from attention_jax.ops.decay_scan.chunked import ChunkedScanConfig
from attention_jax.ops.decay_scan.common import DecayScanCall
from attention_jax.ops.dispatch import Explanation, Implementation, explained
from attention_jax.ops.recurrences import (
    check_decays,
    checked_past,
    document_runs,
    explain_call,
    run_call,
    with_chunk_size,
)
from attention_jax.ops.tokens import per_token, select_valid, valid_tokens


def _many_tokens(call: DecayScanCall) -> str | None:
    T = call.sizes[1]
    return None if T == 1 else f"T = {T} > 1: one step per token, and a backward that keeps every state"


# In order of preference. Forward and backward of a call always run in the same implementation.
_IMPLEMENTATIONS = {
    "recurrent": Implementation(recurrent.attend, unwanted=_many_tokens),
    "chunked": Implementation(chunked.attend, config=ChunkedScanConfig()),
    "quadratic": Implementation(quadratic.attend, quadratic.unsupported, unwanted=lambda call: "O(T^2)"),
}
_KEEPING = Implementation(recurrent.attend_and_keep)


def decay_scan(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKM: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state_BNHM: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    chunk_size: int | None = None,
    return_state: bool = False,
    past_states: tuple[jax.Array, jax.Array] | None = None,
    impl: str | ChunkedScanConfig | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Causal linear attention through a decaying state; a token sees itself and what came before.

    Args:
      q_BTNH: queries [batch, T, heads, H].
      k_BTKH: keys [batch, T, heads, H].
      v_BTKM: values [batch, T, heads, M]; M may differ from H. N is the largest of the three head counts;
        each divides N, and heads [g N/K, (g+1) N/K) share head g of K.
      log_decay: log of the factors in [0, 1] that the state is multiplied with before a token is added.
        None: no decay. [N]: constant. [B, T, N]: per token. [B, T, N, H]: per token and row of the state.
        Its heads, too, may be any number that divides N. -inf forgets all.
      initial_state_BNHM: float32, the state before the first token, M + 1 columns with normalize; None: 0.
      segment_ids: int [B, T] or [T]. The state is reset at a token whose segment differs from that of the
        token before it; the initial state is continued by the first document.
      positions: int [B, T] or [T]. A slot with position < 0 or segment < 0 holds no token: it is never
        read, whatever it contains, and leaves the state as it is. Nothing else is read of positions.
      normalize: y_t = scale * q_t S_t / (q_t . z_t) with z_t = exp(log_decay_t) z_{t-1} + k_t, for
        features q, k >= 0. A denominator of exactly 0 gives 0. z is the last of the state's M + 1 columns.
      scale: multiplies y.
      chunk_size: tokens of a chunk in the chunked form; by default that of `ChunkedScanConfig`.
      return_state: also return the state after the last token.
      past_states: (ring_BRNHM, slot_Bn), with return_state: also return the ring with S_{T-n} ... S_{T-1} in
        its places slot_Bn, int [B, n]; those >= R are dropped. The last n slots then run token by token.
      impl: "recurrent" (token by token), "chunked" (products of matrices, a state per chunk kept for the
        backward), "quadratic" (dense [T, T], for inspection), a `ChunkedScanConfig` (chunked with these
        sizes), or None, which chooses; see `explain`.

    Returns:
      y_BTNM in v's dtype, or (y_BTNM, state_BNHM float32), or with past_states also ring_BRNHM. Slots without
      a token give 0 and pass no gradient. Everything accumulates in float32 (float64 if q, k or v is).

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together; a concrete log_decay > 0 or NaN.
      NotImplementedError: a named `impl` cannot do this call, or `jax.jvp` through "chunked".
    """
    call, valid = _checked_call(
        q_BTNH, k_BTKH, v_BTKM, log_decay, initial_state_BNHM, segment_ids, positions, normalize, scale,
    )  # fmt: skip
    past = checked_past(past_states, call, return_state)
    table = with_chunk_size(_IMPLEMENTATIONS, chunk_size, impl)
    y_BTNM, *states = run_call(table, impl, _KEEPING, call, past)
    if normalize:
        y_BTNM = _normalized(y_BTNM, float(scale)).astype(call.v_BTNM.dtype)
    y_BTNM = select_valid(y_BTNM, valid)
    return (y_BTNM, *states) if return_state else y_BTNM


def decay_weights(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state_BNHM: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> jax.Array:
    """W [B, N, T, T] with which `decay_scan` adds values, y_t = sum_s W_ts v_s, for inspection.

    The arguments are the op's, and so are the ValueErrors. N is the largest head count among them; where v
    has more heads, consecutive ones share a head of W. W is signed, float32 (float64 if q or k is) and
    differentiable. It includes `scale` and, with `normalize`, the denominator. The part of y that the initial
    state gives is not included; with `normalize` the state's last column is in the denominator.

    Raises:
      NotImplementedError: the array would be too large; its size and the limit are named.
    """
    v_BTNM = _any_values(q_BTNH, k_BTKH, log_decay, initial_state_BNHM, normalize)
    call, _ = _checked_call(
        q_BTNH, k_BTKH, v_BTNM, log_decay, initial_state_BNHM, segment_ids, positions, normalize, scale
    )
    if why_not := quadratic.unsupported(call):
        raise NotImplementedError(f"decay_weights cannot make this array: {why_not}")
    W_BNTT = quadratic.weights(call)
    return float(scale) * W_BNTT if normalize else W_BNTT


def _any_values(q, k, log_decay, state, normalize) -> Any:
    """Values of 0 that fit the other arguments: k, where they are so wrong that the checks refuse them."""
    shapes = [getattr(x, "shape", ()) for x in (q, k, log_decay, state)]
    heads = [shape[min(2, len(shape) - 1)] for shape in shapes[:3] if shape]
    if len(shapes[1]) != 4:
        return k
    if len(shapes[3]) != 4:
        return jnp.zeros((*shapes[1][:2], max(heads), 1), k.dtype)
    return jnp.zeros((*shapes[1][:2], max(*heads, shapes[3][1]), max(1, shapes[3][3] - normalize)), k.dtype)


def explain(*args, impl: str | ChunkedScanConfig | None = None, **kwargs) -> Explanation:
    """What `decay_scan` would run for the same arguments; arrays may be ShapeDtypeStructs."""

    def find(*, impl, return_state, past_states, chunk_size, **given):
        call = _checked_call(*given.values())[0]
        past = checked_past(past_states, call, return_state)
        return explain_call(with_chunk_size(_IMPLEMENTATIONS, chunk_size, impl), impl, call, past)

    return explained(decay_scan, find, args, kwargs | {"impl": impl})


def _normalized(y_BTNM: jax.Array, scale: float) -> jax.Array:
    """The last column is the denominator; y = 0 where it is."""
    den_BTN1 = y_BTNM[..., -1:]
    some = den_BTN1 != 0
    return jnp.where(some, y_BTNM[..., :-1] * scale / jnp.where(some, den_BTN1, 1.0), 0.0)


def _checked_call(
    q, k, v, log_decay, state, segment_ids, positions, normalize, scale
) -> tuple[DecayScanCall, jax.Array | None]:
    """The call, and which slots hold a token, boolean [1 or B, T], or None where all do."""
    B, T, N, H, M = _sizes(q, k, v)
    q, k, v = map(jnp.asarray, (q, k, v))
    segments = per_token("segment_ids", segment_ids, B, T)
    positions = per_token("positions", positions, B, T)
    scale = finite_number("scale", scale)
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize must be True or False, got {normalize!r}")
    dtype = accumulator(q, k, v)
    valid = valid_tokens(positions, segments)
    log_decay = _log_decay(log_decay, (B, T, N, H), dtype, valid)
    out_dtype = dtype if normalize else v.dtype
    q, k, v = (select_valid(x, valid) for x in (q, k, v))
    if normalize:
        ones = select_valid(jnp.ones((B, T, v.shape[2], 1), v.dtype), valid)
        v = jnp.concatenate([v, ones], axis=3)
    call = DecayScanCall(
        q, k, v, log_decay,
        _state(state, (B, N, H, M + normalize), dtype, normalize),
        None if segments is None else document_runs(segments, valid),
        scale=1.0 if normalize else scale,
        out_dtype=out_dtype,
        normalize=normalize,
    )  # fmt: skip
    return call, valid


def _sizes(q, k, v) -> tuple[int, int, int, int, int]:
    """(B, T, N, H, M) of arrays that fit."""
    for name, x, axes in (("q", q, "BTNH"), ("k", k, "BTKH"), ("v", v, "BTKM")):
        if not is_array(x):
            raise ValueError(f"{name} must be an array [{', '.join(axes)}], got {type(x).__name__}")
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be [{', '.join(axes)}] without empty axes, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    B, T, _, H = q.shape
    if k.shape[:2] != (B, T) or v.shape[:2] != (B, T) or k.shape[3] != H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit [B,T,N,H], [B,T,K,H], [B,T,K,M]")
    heads = [x.shape[2] for x in (q, k, v)]
    N = max(heads)
    if any(N % n for n in heads):
        raise ValueError(f"heads of q, k, v must divide the largest of them, got {heads}")
    return B, T, N, H, v.shape[3]


def _log_decay(x: Any, sizes: tuple[int, int, int, int], dtype: Any, valid: jax.Array | None):
    """The checked log decay in `dtype`, 0 in slots without a token, or None."""
    if x is None:
        return None
    B, T, N, H = sizes
    if not is_array(x):
        raise ValueError(f"log_decay must be an array or None, got {type(x).__name__}")
    heads = x.shape[min(2, len(x.shape) - 1)] if len(x.shape) in (1, 3, 4) else 0
    if tuple(x.shape) not in {(heads,), (B, T, heads), (B, T, heads, H)} or heads < 1 or N % heads:
        raise ValueError(
            f"log_decay must be [N], [B, T, N] or [B, T, N, H] = [{N}], {[B, T, N]} or {[B, T, N, H]}, "
            f"or have heads that divide {N}; got {x.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"log_decay must be floating point, got {x.dtype}")
    check_decays(x, valid)
    x = jnp.asarray(x).astype(dtype)
    if valid is not None and x.ndim == 1:
        x = jnp.broadcast_to(x, (B, T, heads))
    return x if x.ndim == 1 else select_valid(x, valid)


def _state(x: Any, shape: tuple[int, ...], dtype: Any, normalize: bool) -> jax.Array:
    if x is None:
        return jnp.zeros(shape, dtype)
    if not is_array(x) or tuple(x.shape) != shape:
        what = getattr(x, "shape", None) or type(x).__name__
        columns = " (its last column is z)" * normalize
        raise ValueError(f"initial_state_BNHM must be {list(shape)}{columns}, got {what}")
    if x.dtype != dtype:
        raise ValueError(f"initial_state_BNHM must be {jnp.dtype(dtype)}, got {x.dtype}; cast it first")
    return jnp.asarray(x)


def implementations() -> tuple[str, ...]:
    """The names that `impl` may be."""
    return tuple(_IMPLEMENTATIONS)
