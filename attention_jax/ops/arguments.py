"""Checks of the arguments that the attention ops share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(x: Any) -> bool:
    """An array or a tracer, not a Python number or a list."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def per_token(name: str, x: jax.Array | None, B: int, length: int) -> jax.Array | None:
    """Integers of each token as int32 [1 or B, length], or None; ValueError names what does not fit."""
    if x is None:
        return None
    x = x if is_array(x) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    _check_fits(name, x)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[0] not in (1, B) or x.shape[1] != length:
        raise ValueError(f"{name} must be [{B}, {length}] or [{length}], got {x.shape}")
    return jnp.asarray(x, jnp.int32)


def _check_fits(name: str, x: Any) -> None:
    """ValueError where concrete integers would wrap in int32, which makes a token an empty slot."""
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
