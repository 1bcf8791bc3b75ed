"""Which slots of a row hold a token, and where each token stands: positions, segment ids, validity.

A slot with position < 0 or segment id < 0 holds no token. All ops share these functions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.arguments import is_array


def positions_or_arange(positions: jax.Array | None, length: int) -> jax.Array:
    """The given positions, or 0, 1, 2, ... as int32 [1, length]."""
    return jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions


def valid_tokens(positions: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """True where a slot holds a token: position >= 0 and segment >= 0. None where every slot does."""
    parts = [ids >= 0 for ids in (positions, segments) if ids is not None]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


def select_valid(x: jax.Array | None, valid: jax.Array | None) -> jax.Array | None:
    """x [B, L, ...] with 0 in slots without a token: what they hold (NaN, Inf) never enters a product.

    valid: boolean [1 or B, L], or None, which returns x as it is.
    """
    if x is None or valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def per_token(name: str, x: jax.Array | None, B: int, length: int) -> jax.Array | None:
    """Integers of each token as int32 [1 or B, length], or None; ValueError names what does not fit."""
    if x is None:
        return None
    x = x if is_array(x) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    _check_fits_int32(name, x)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[0] not in (1, B) or x.shape[1] != length:
        raise ValueError(f"{name} must be [{B}, {length}] or [{length}], got {x.shape}")
    return jnp.asarray(x, jnp.int32)


def _check_fits_int32(name: str, x: Any) -> None:
    """ValueError where concrete integers would wrap in int32, which would turn a token into an empty slot."""
    limits = np.iinfo(np.int32)
    if isinstance(x, jax.core.Tracer) or not x.size or np.iinfo(x.dtype).max <= limits.max:
        return
    values = np.asarray(x)
    if values.min() < limits.min or values.max() > limits.max:
        raise ValueError(f"{name} must fit int32, got {values.min()} .. {values.max()}")


def segment_pair(ids: Any, B: int, T: int, S: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Segment ids of queries and keys from an array [B, T] or a pair of arrays, or (None, None)."""
    if ids is None:
        return None, None
    if not isinstance(ids, tuple):
        if T != S:
            raise ValueError(f"T = {T} and S = {S} differ: give segment_ids as a pair (queries, keys)")
        ids = (ids, ids)
    if len(ids) != 2 or ids[0] is None or ids[1] is None:
        raise ValueError("segment_ids must be an array [B, T] or a pair ([B, T], [B, S]) of arrays")
    return per_token("segment_ids", ids[0], B, T), per_token("segment_ids", ids[1], B, S)
