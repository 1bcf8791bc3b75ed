"""What `decay_scan` and `delta_rule` share: repeated heads, documents of a row, full-precision products."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.ops.arguments import positive_integer
from attention_jax.ops.dispatch import Explanation, Implementation, choose, evaluate, explain_choice


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


def runs_between(run_BT: jax.Array | None, start: int, stop: int) -> jax.Array | None:
    """The document counts of the slots start .. stop - 1 beside a state of the document in front of them."""
    if run_BT is None or start == 0:
        return None if run_BT is None else run_BT[:, :stop]
    return run_BT[:, start:stop] - run_BT[:, start - 1 : start]


def check_past_states(past_states: Any, T: int, return_state: bool) -> int:
    """The number of past states that a call returns; ValueError unless it is an integer in [0, T]."""
    whole = isinstance(past_states, numbers.Integral) and not isinstance(past_states, bool)
    if not whole or not 0 <= past_states <= T:
        raise ValueError(f"past_states must be an integer in [0, T] = [0, {T}], got {past_states!r}")
    if past_states and not return_state:
        raise ValueError(f"past_states={past_states} needs return_state=True: the last state completes them")
    return int(past_states)


def run_call(
    table: Mapping[str, Implementation],
    impl: Any,
    keeping: Implementation,
    call: Any,
    past_states: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(y, the last state, the states before each of the last `past_states` slots [B, n, N, H, M] or None).

    keeping: the implementation that returns the state before every token. It runs the last slots, and the
    one that `choose` finds for the others runs those.
    """
    T = call.sizes[1]
    if past_states == 0 or T == 1:
        y_BTNM, state_BNHM = evaluate(choose(table, call, impl), None, call)
        return y_BTNM, state_BNHM, call.state_BNHM[:, None] if past_states else None
    if past_states == T:
        choose(table, call, impl)  # raises what it raises without past states
        return evaluate(keeping, None, call)
    first = call.between(0, T - past_states, call.state_BNHM)
    y_BTNM, state_BNHM = evaluate(choose(table, first, impl), None, first)
    last = call.between(T - past_states, T, state_BNHM)
    last_BTNM, state_BNHM, past_BTNHM = evaluate(keeping, None, last)
    return jnp.concatenate([y_BTNM, last_BTNM], axis=1), state_BNHM, past_BTNHM


def explain_call(table: Mapping[str, Implementation], impl: Any, call: Any, past_states: int) -> Explanation:
    """`explain_choice` for the slots in front of the last `past_states`, which run token by token."""
    T = call.sizes[1]
    if past_states == 0 or T == 1:
        return explain_choice(table, call, impl)
    if past_states == T:
        reasons = dict.fromkeys(table, f"past_states={T} keeps the state before every token")
        return Explanation("recurrent", reasons)
    return explain_choice(table, call.between(0, T - past_states, call.state_BNHM), impl)


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
