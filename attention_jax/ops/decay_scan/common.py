"""What every implementation of `decay_scan` shares: the normalised call, shared heads, documents.

Implementations import this module and never one another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """One checked call of `decay_scan`: arrays are pytree leaves, the rest is static.

    Heads of q, k, v and log_decay divide N, the heads of the state. Slots without a token are already 0 in
    q, k, v and log_decay, so that they neither add to the state nor decay it. `run_BT` (int32 [1 or B, T],
    or None) counts the documents before each slot's own: where it differs from a state's, nothing of that
    state is seen. `log_decay` is None, [N], [B, T, N] or [B, T, N, H], in `state_BNHM`'s dtype.
    """

    q_BTNH: jax.Array
    k_BTNH: jax.Array
    v_BTNM: jax.Array
    log_decay: jax.Array | None
    state_BNHM: jax.Array
    run_BT: jax.Array | None
    scale: float = dataclasses.field(metadata=_STATIC)
    chunk_size: int | None = dataclasses.field(metadata=_STATIC)
    out_dtype: Any = dataclasses.field(metadata=_STATIC)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, T, N, H, M)."""
        B, N, H, M = self.state_BNHM.shape
        return B, self.q_BTNH.shape[1], N, H, M

    @property
    def dtype(self) -> Any:
        """Of the state and of every sum: float32, or float64 where an input is."""
        return self.state_BNHM.dtype


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
