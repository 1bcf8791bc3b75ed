"""What `decay_scan` and `delta_rule` share: repeated heads, documents of a row, full-precision products."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.ops.arguments import positive_integer
from attention_jax.ops.dispatch import Implementation


def spread(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """x with every head of `axis` repeated side by side, up to `heads`."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """An einsum in full precision on every platform."""
    return jnp.einsum(formula, *operands, precision=lax.Precision.HIGHEST)


def sum_dtype(*arrays: jax.Array) -> Any:
    """The dtype of sums and states: float64 where one of the arrays is, else float32."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


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


def with_chunk_size(
    table: dict[str, Implementation], chunk_size: int | None, impl: Any
) -> dict[str, Implementation]:
    """The table with `chunk_size` in the config of "chunked"; ValueError where `impl` is itself a config."""
    if chunk_size is None:
        return table
    positive_integer("chunk_size", chunk_size)
    if not (impl is None or isinstance(impl, str)):
        raise ValueError(f"chunk_size={chunk_size} and impl={impl!r} both set the chunk: give one of them")
    chunked = table["chunked"]
    config = dataclasses.replace(chunked.config, chunk_size=int(chunk_size))
    return table | {"chunked": dataclasses.replace(chunked, config=config)}


def check_decays(log_decay: Any, valid: jax.Array | None) -> None:
    """ValueError where a concrete log decay of a token would let the state grow; traced ones pass.

    log_decay: [N] or [B, T, ...]; valid: boolean [1 or B, T], or None where every slot holds a token.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (log_decay, valid)):
        return
    values = np.asarray(log_decay).astype(np.float32)
    if valid is not None and values.ndim > 1:
        values = np.where(np.expand_dims(valid, tuple(range(2, values.ndim))), values, 0.0)
    wrong = values[np.logical_not(values <= 0)]
    if wrong.size:
        raise ValueError(f"log_decay must be <= 0 (a factor <= 1), got {wrong[0]}; pass the log of the decay")
