"""Code shared by recurrent mixers: initial decays, the arguments of a recurrence, `decay_scan` from a state.

The state of a recurrent mixer is a matrix of constant size per head and, with a short convolution, its last
inputs. Both are updated by valid tokens only: a slot with position or segment < 0 leaves the state bitwise
unchanged.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.caches import RecurrentState, keep_in_ring
from attention_jax.layers import ShortConvolution
from attention_jax.mixers.base import Context, MixerConfig
from attention_jax.mixers.parts import cached_positions, valid_tokens
from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.decay_scan.api import implementations


@dataclasses.dataclass(frozen=True)
class DecayMixerConfig(MixerConfig):
    """Base class of configs of mixers that use `decay_scan`: causal, with a state of one matrix per head."""

    implementations = staticmethod(implementations)
    direction = "causal"
    reason = "its state decays over past tokens"


def check_steps(dt_min: float, dt_max: float) -> None:
    """Raise ValueError unless 1e-8 <= dt_min <= dt_max <= 100: other decays are 1 or 0 in float32."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min {dt_min} and dt_max {dt_max} must satisfy 0 < dt_min <= dt_max < inf")
    if not 1e-8 <= dt_min <= dt_max <= 100:
        raise ValueError(
            f"dt_min {dt_min} and dt_max {dt_max} must be from 1e-08 to 100: other decays are 1 or 0 in float32"
        )


def check_convolution(width: int) -> None:
    """Raise ValueError for a short convolution of more than 1024 tokens: a product is compiled for each."""
    if width > 1024:
        raise ValueError(f"convolution must be <= 1024 tokens, got {width}: a product is compiled for each")


def initial_decays(
    rngs: nnx.Rngs, heads: int, width: int, dt_min: float, dt_max: float
) -> tuple[nnx.Param, nnx.Param]:
    """A_log [heads] and dt_bias [width] of the decays exp(-exp(A_log) softplus(... + dt_bias)) of Mamba-2.

    Rates exp(A_log) are drawn uniformly from 1 to 16, steps softplus(dt_bias) log-uniformly from dt_min to
    dt_max (Dao & Gu 2024, arXiv 2405.21060).
    """
    rates = jax.random.uniform(rngs.params(), (heads,), jnp.float32, minval=1.0, maxval=16.0)
    low, high = math.log(dt_min), math.log(dt_max)
    steps = jnp.exp(jax.random.uniform(rngs.params(), (width,), jnp.float32, minval=low, maxval=high))
    # The inverse of softplus.
    return nnx.Param(jnp.log(rates)), nnx.Param(steps + jnp.log(-jnp.expm1(-steps)))


def scan_options(state: Any, ctx: Context, B: int, T: int) -> dict[str, Any]:
    """The positions and segment ids for a recurrence, [B, T] or None.

    Raises: ValueError for a call with a state but without positions, or with segments.
    """
    if state is not None:
        return {"positions": cached_positions(T, ctx, B, T)}  # a recurrent state is never full
    ids = {"positions": ctx.positions_BT, "segment_ids": ctx.segment_ids_BT}
    return {name: None if x is None else jnp.broadcast_to(x, (B, T)) for name, x in ids.items()}


def decayed(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTNM: jax.Array,
    state: RecurrentState | None,
    ctx: Context,
    inputs: tuple[jax.Array | None, jax.Array | None] = (None, None),
    **options: Any,
) -> tuple[jax.Array, RecurrentState | None, dict[str, jax.Array]]:
    """`decay_scan` over the new tokens, starting from the state.

    inputs: those of the short convolution for the new state, from `convolve`.

    Returns: y [B, T, N, M], the new state, and the arrays named in `ctx.capture`. The captured weights are those
    among the new tokens only, without the contribution of the state.
    """
    ids = scan_options(state, ctx, *v_BTNM.shape[:2])
    weighed = ids | {name: x for name, x in options.items() if name in ("log_decay", "scale")}
    aux = ctx.captured(
        queries=lambda: q_BTNH,
        keys=lambda: k_BTKH,
        values=lambda: v_BTNM,
        attention=lambda: decay_weights(q_BTNH, k_BTKH, **weighed),
    )
    if state is None:
        return decay_scan(q_BTNH, k_BTKH, v_BTNM, **ids, **options), None, aux
    y_BTNM, *matrices = decay_scan(
        q_BTNH, k_BTKH, v_BTNM, initial_state_BNHM=state.matrix_BNHM, return_state=True,
        past_states=past_states(state, ctx, v_BTNM.shape[1]), **ids, **options,
    )  # fmt: skip
    return y_BTNM, appended(state, matrices, inputs, ctx), aux


def past_states(state: RecurrentState | None, ctx: Context, T: int) -> tuple[jax.Array, jax.Array] | None:
    """The argument `past_states` of a recurrence over T new slots: None if the state keeps no past ones."""
    if state is None or state.past is None:
        return None
    return state.past.arrays[0], state.past_slots(valid_tokens(ctx), T)


def appended(
    state: RecurrentState,
    matrices: list[jax.Array],
    inputs: tuple[jax.Array | None, jax.Array | None],
    ctx: Context,
) -> RecurrentState:
    """The state after the new tokens.

    matrices: the last state of the recurrence and, if the state keeps past ones, their ring. inputs: the same
    of the short convolution.
    """
    matrix_BNHM, *ring = matrices
    rings = (*ring, inputs[1]) if ring else None
    return state.append(matrix_BNHM, inputs[0], rings=rings, valid_BT=valid_tokens(ctx))


def convolve(
    convolution: ShortConvolution, x_BTC: jax.Array, state: RecurrentState | None, ctx: Context
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """The short convolution of the new tokens, starting from the state, and its inputs for the new state.

    The inputs are the last ones, and the ring of past ones if the state keeps them.
    """
    valid_BT = valid_tokens(ctx)
    inputs_BUC = ring = None
    if state is not None:
        inputs_BUC = state.inputs_BUC
        slot_Bn = state.past_slots(valid_BT, x_BTC.shape[1])
        if slot_Bn is not None:
            past_BnUC = convolution.past_inputs(x_BTC, inputs_BUC, slot_Bn.shape[1], valid_BT)
            ring = keep_in_ring(state.past.arrays[1], past_BnUC, slot_Bn)
    y_BTC, inputs_BUC = convolution(x_BTC, inputs_BUC, valid_BT=valid_BT, segment_ids_BT=ctx.segment_ids_BT)
    return y_BTC, (inputs_BUC, ring)
