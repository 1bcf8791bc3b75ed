"""What recurrent mixers share: a short causal convolution, gated and per-head norms, the state they keep.

A recurrent mixer keeps a matrix per head that does not grow with the text, and where it convolves its inputs,
the last few of them. Both are kept over valid tokens: a slot whose position or segment is < 0 is skipped, as
if it were not there, and changes no bit of the state.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import cached_positions, valid_tokens, zero_invalid
from attention_jax.ops.decay_scan import decay_scan

_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a recurrent mixer keeps of a stream, whatever its length.

    matrix_BNHM: float32, S_t of every head. inputs_BUC: the last U = width - 1 inputs of the short
    convolution, oldest first, zeros before the first token; None where the mixer has none.
    """

    matrix_BNHM: jax.Array
    inputs_BUC: jax.Array | None = None

    @staticmethod
    def empty(
        batch: int, heads: int, key_width: int, value_width: int, inputs_BUC: jax.Array | None = None
    ) -> RecurrentState:
        """The state before the first token: S_0 = 0."""
        matrix_BNHM = jnp.zeros((batch, heads, key_width, value_width), jnp.float32)
        return RecurrentState(matrix_BNHM, inputs_BUC)


def check_steps(dt_min: float, dt_max: float) -> None:
    """ValueError unless 0 < dt_min <= dt_max."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min {dt_min} and dt_max {dt_max} must be 0 < dt_min <= dt_max")


def initial_decays(
    rngs: nnx.Rngs, heads: int, width: int, dt_min: float, dt_max: float
) -> tuple[nnx.Param, nnx.Param]:
    """A_log [heads] and dt_bias [width] of decays exp(-exp(A_log) softplus(... + dt_bias)), as in Mamba-2.

    Rates exp(A_log) are drawn uniformly from 1 to 16, steps softplus(dt_bias) log-uniformly from dt_min to
    dt_max (Dao & Gu 2024, arXiv 2405.21060).
    """
    rates = jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)
    low, high = math.log(dt_min), math.log(dt_max)
    steps = jnp.exp(jax.random.uniform(rngs.params(), (width,), minval=low, maxval=high))
    # The inverse of softplus.
    return nnx.Param(jnp.log(rates)), nnx.Param(steps + jnp.log(-jnp.expm1(-steps)))


def refuse_bidirectional(kind: str, causal: bool, reason: str) -> None:
    """ValueError where a recurrence meets a model that is not causal."""
    if not causal:
        raise ValueError(f"{kind} is causal only: {reason}; use kind softmax in a model with causal: false")


def scan_options(state: Any, ctx: Context, B: int, T: int) -> dict[str, Any]:
    """The positions and segment ids that a recurrence takes, [B, T] or None.

    Raises: ValueError for a cached call without positions or with segments.
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
    inputs_BUC: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, RecurrentState | None]:
    """`decay_scan` over the new tokens from what the state holds: y [B, T, N, M], and the state after them.

    inputs_BUC: what the new state keeps for the short convolution.
    """
    ids = scan_options(state, ctx, *v_BTNM.shape[:2])
    if state is None:
        return decay_scan(q_BTNH, k_BTKH, v_BTNM, **ids, **options), None
    y_BTNM, matrix_BNHM = decay_scan(
        q_BTNH, k_BTKH, v_BTNM, initial_state_BNHM=state.matrix_BNHM, return_state=True, **ids, **options
    )
    return y_BTNM, RecurrentState(matrix_BNHM, inputs_BUC)


class ShortConvolution(nnx.Module):
    """A depthwise causal convolution over the last `width` valid tokens of the document.

        y_t = activation(b + sum_{j < W} kernel[W - 1 - j] x_{t - j}),   x = 0 before the document's start

    t counts valid tokens. Its state is the last W - 1 valid inputs [B, W - 1, C]. Sums are float32.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        activation: Literal["silu"] | None = "silu",
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"a short convolution needs a width >= 1, got {width}")
        self.width, self.channels, self.activation, self.dtype = width, channels, activation, dtype
        # Uniform in +-1 / sqrt(W), as published models of this kind start: a channel's fan-in is W.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (width, channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32)) if use_bias else None

    def __call__(
        self, x_BTC: jax.Array, inputs_BUC: jax.Array | None = None, *, ctx: Context
    ) -> tuple[jax.Array, jax.Array | None]:
        """y [B, T, C], 0 for invalid tokens, and the state with x appended (None for None)."""
        B, T, C = x_BTC.shape
        x_BTC = zero_invalid(x_BTC.astype(self.dtype), ctx)
        held_BUC = jnp.zeros((B, self.width - 1, C), x_BTC.dtype) if inputs_BUC is None else inputs_BUC
        valid_BT = valid_tokens(ctx)
        if valid_BT is None:
            return self._convolved(jnp.concatenate([held_BUC, x_BTC], axis=1), None), None
        valid_BT = jnp.broadcast_to(valid_BT, (B, T))
        # Valid tokens are brought to the front, convolved, and brought back to where they stood.
        order_BT, rank_BT = _valid_first(valid_BT)
        seen_BSC = jnp.concatenate([held_BUC, _permuted(x_BTC, order_BT, rank_BT)], axis=1)
        document_BT = None
        if ctx.segment_ids_BT is not None:
            segments_BT = jnp.broadcast_to(ctx.segment_ids_BT, (B, T))
            document_BT = _documents(jnp.take_along_axis(segments_BT, order_BT, axis=1))
        y_BTC = zero_invalid(_permuted(self._convolved(seen_BSC, document_BT), rank_BT, order_BT), ctx)
        if inputs_BUC is None:
            return y_BTC, None
        last_BU = valid_BT.sum(axis=1, keepdims=True) + jnp.arange(self.width - 1)
        last_BUC = jnp.take_along_axis(seen_BSC, last_BU[..., None], axis=1, mode="clip")
        return y_BTC, last_BUC.astype(inputs_BUC.dtype)

    def init_state(self, batch: int, dtype: Any = None) -> jax.Array:
        """The zeros before the first token [B, W - 1, C]."""
        return jnp.zeros((batch, self.width - 1, self.channels), dtype or self.dtype)

    def _convolved(self, seen_BSC: jax.Array, document_BT: jax.Array | None) -> jax.Array:
        """y of the last T = S - (W - 1) of the inputs; a tap of another document counts as 0."""
        U, T = self.width - 1, seen_BSC.shape[1] - (self.width - 1)
        kernel_WC = self.kernel[...]
        y_BTC = jnp.zeros((), jnp.float32) if self.bias is None else self.bias[...]
        for lag in range(self.width):
            tap_BTC = seen_BSC[:, U - lag : U - lag + T].astype(jnp.float32)
            if document_BT is not None and lag:
                same_BT = jnp.pad(document_BT, ((0, 0), (lag, 0)), constant_values=-1)[:, :T] == document_BT
                tap_BTC = jnp.where(same_BT[..., None], tap_BTC, 0.0)
            y_BTC = y_BTC + kernel_WC[U - lag] * tap_BTC
        if self.activation is not None:
            y_BTC = _GATES[self.activation](y_BTC)
        return y_BTC.astype(self.dtype)


def _valid_first(valid_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of the slots that puts valid ones first, else as they stand, and its inverse."""
    invalid_BT = valid_BT == False  # noqa: E712
    count_B1 = valid_BT.sum(axis=1, keepdims=True)
    rank_BT = jnp.where(
        valid_BT, jnp.cumsum(valid_BT, axis=1) - 1, count_B1 + jnp.cumsum(invalid_BT, axis=1) - 1
    )
    return jnp.argsort(invalid_BT, axis=1, stable=True), rank_BT


def _documents(segments_BT: jax.Array) -> jax.Array:
    """Which run of equal ids a token belongs to: 0, 1, ...; a document's id may come back later."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(jnp.cumsum(changes_BT, axis=1), ((0, 0), (1, 0)))


@jax.custom_vjp
def _permuted(x_BTC: jax.Array, order_BT: jax.Array, inverse_BT: jax.Array) -> jax.Array:
    """x[:, order]. Its gradient is the inverse permutation: a gather, where a general one scatters."""
    if x_BTC.shape[1] == 1:
        return x_BTC
    return jnp.take_along_axis(x_BTC, order_BT[..., None], axis=1, mode="clip")


def _permuted_forward(x_BTC, order_BT, inverse_BT):
    return _permuted(x_BTC, order_BT, inverse_BT), (order_BT, inverse_BT)


def _permuted_backward(orders, g_BTC):
    order_BT, inverse_BT = orders
    return _permuted(g_BTC, inverse_BT, order_BT), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


class GatedRMSNorm(nnx.Module):
    """RMS norm over the last axis, with a gate.

        after:  y = RMSNorm(x) scale * act(g)          before:  y = RMSNorm(x * act(g)) scale

    after: GLA, Gated DeltaNet, lightning attention; before: Mamba-2. The axis is a head's features or those of
    all heads; its mean square is taken over each of `groups` equal parts. Float32 inside.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: Literal["silu", "sigmoid"] = "silu",
        gated: Literal["before", "after"] = "after",
        groups: int = 1,
        epsilon: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs  # the scale starts as ones
        self.gate, self.gated, self.groups, self.epsilon, self.dtype = gate, gated, groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """x and gate [..., width]."""
        x, gate = x.astype(jnp.float32), _GATES[self.gate](gate.astype(jnp.float32))
        if self.gated == "before":
            x = x * gate
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, -1, keepdims=True) + self.epsilon)
        x = parts.reshape(x.shape) * self.scale[...]
        return (x if self.gated == "before" else x * gate).astype(self.dtype)


class HeadGroupNorm(nnx.Module):
    """Group norm with a head a group: (x - mean) / sqrt(var + eps) over a head's features, scale and bias each.

    A positive factor that all of a head's features share drops out of it, but for eps.
    """

    def __init__(
        self, heads: int, width: int, *, epsilon: float = 1e-5, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        del rngs  # the scale starts as ones, the bias as zeros
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((heads, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((heads, width), jnp.float32))

    def __call__(self, x_BTNM: jax.Array) -> jax.Array:
        """x [..., N, M]; float32 inside."""
        x = x_BTNM.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)
