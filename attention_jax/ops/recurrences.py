"""What `decay_scan` and `delta_rule` share: heads that are shared, documents in a row, full precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def spread(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """x with every head of `axis` repeated side by side, up to `heads`."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """An einsum in full precision on every platform."""
    return jnp.einsum(formula, *operands, precision=lax.Precision.HIGHEST)


def document_runs(segments: jax.Array, valid: jax.Array) -> jax.Array:
    """How many documents ended before each slot, int32 [b, T].

    A document ends where the segment of a token differs from that of the token before it; slots without a
    token, in between or in front, end nothing.
    """
    segments, valid = jnp.broadcast_arrays(segments, valid)
    T = segments.shape[1]
    last = lax.cummax(jnp.where(valid, jnp.arange(T, dtype=jnp.int32), -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    segment_before = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    starts = valid & (before >= 0) & (segments != segment_before)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def select_valid(x: jax.Array | None, valid_BT: jax.Array | None) -> jax.Array | None:
    """x [B, T, ...] with slots without a token selected to 0: what stands there (NaN, Inf) is never read."""
    if x is None or valid_BT is None:
        return x
    return jnp.where(jnp.expand_dims(valid_BT, range(2, x.ndim)), x, jnp.zeros((), x.dtype))
