"""What `decay_scan` and `delta_rule` share: repeated heads, documents of a row, full-precision products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.ops.arguments import is_array, positive_integer
from attention_jax.ops.dispatch import Explanation, Implementation, choose, evaluate, explain_choice


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


def runs_between(run_BT: jax.Array | None, start: int, stop: int) -> jax.Array | None:
    """The document counts of the slots start .. stop - 1 beside a state of the document in front of them."""
    if run_BT is None or start == 0:
        return None if run_BT is None else run_BT[:, :stop]
    return run_BT[:, start:stop] - run_BT[:, start - 1 : start]


def keep_state(ring_BRNHM: jax.Array, state_BNHM: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The ring with each row's state in its slot; a slot >= R is dropped."""
    row_B = jnp.arange(slot_B.shape[0], dtype=jnp.int32)
    return ring_BRNHM.at[row_B, slot_B].set(state_BNHM, mode="drop", unique_indices=True)


def checked_past(past_states: Any, call: Any, return_state: bool) -> tuple[jax.Array, jax.Array] | None:
    """The argument `past_states` of the ops as (ring_BRNHM, slot_Bn int32), or None.

    Raises: ValueError for arrays that do not fit the call, and without `return_state`.
    """
    if past_states is None:
        return None
    if not (isinstance(past_states, tuple) and len(past_states) == 2 and all(map(is_array, past_states))):
        raise ValueError(
            f"past_states must be a pair of arrays (ring_BRNHM, slot_Bn), got {past_states!r:.80}"
        )
    if not return_state:
        raise ValueError("past_states needs return_state=True: the state after the last token completes them")
    ring, slot = past_states
    B, T, N, H, M = *call.sizes[:2], *call.state_BNHM.shape[1:]
    if ring.ndim != 5 or ring.shape != (B, ring.shape[1], N, H, M) or ring.dtype != call.state_BNHM.dtype:
        raise ValueError(
            f"past_states: the ring must be {call.state_BNHM.dtype} [B, R, N, H, M] = "
            f"[{B}, R, {N}, {H}, {M}], got {ring.dtype} {list(ring.shape)}"
        )
    whole = jnp.issubdtype(slot.dtype, jnp.integer)
    if not whole or slot.ndim != 2 or slot.shape[0] != B or not 1 <= slot.shape[1] <= T:
        raise ValueError(
            f"past_states: slots must be integers [B, n] = [{B}, n] with 1 <= n <= T = {T}, "
            f"got {slot.dtype} {list(slot.shape)}"
        )
    return jnp.asarray(ring), jnp.asarray(slot, jnp.int32)


def run_call(
    table: Mapping[str, Implementation],
    impl: Any,
    keeping: Implementation,
    call: Any,
    past: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, ...]:
    """(y, the last state) or, with past = (ring_BRNHM, slot_Bn), (y, the last state, ring_BRNHM).

    keeping: the implementation of (call, ring_BRNHM, slot_BT). It runs the last n slots, and what `choose`
    finds for the others runs those.
    """
    if past is None:
        return evaluate(choose(table, call, impl), None, call)
    (ring_BRNHM, slot_Bn), T = past, call.sizes[1]
    first = _without_last(call, slot_Bn)
    chosen = choose(table, first, impl)
    if T == 1:
        return *evaluate(chosen, None, call), keep_state(ring_BRNHM, call.state_BNHM, slot_Bn[:, 0])
    if first is call:
        return evaluate(keeping, None, (call, *past))
    y_BTNM, state_BNHM = evaluate(chosen, None, first)
    last = call.between(T - slot_Bn.shape[1], T, state_BNHM)
    last_BnNM, state_BNHM, ring_BRNHM = evaluate(keeping, None, (last, *past))
    return jnp.concatenate([y_BTNM, last_BnNM], axis=1), state_BNHM, ring_BRNHM


def _without_last(call: Any, slot_Bn: jax.Array) -> Any:
    """The call of the slots in front of the last n; the whole call where there are none."""
    front = call.sizes[1] - slot_Bn.shape[1]
    return call.between(0, front, call.state_BNHM) if front else call


def explain_call(
    table: Mapping[str, Implementation], impl: Any, call: Any, past: tuple[jax.Array, jax.Array] | None
) -> Explanation:
    """`explain_choice` for the slots in front of those whose past states are kept, which run one by one."""
    first = call if past is None else _without_last(call, past[1])
    if past is not None and first is call and call.sizes[1] > 1:
        reason = "past_states asks for the state before every token"
        return Explanation("recurrent", dict.fromkeys(table, reason))
    return explain_choice(table, first, impl)


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
