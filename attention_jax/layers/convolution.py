"""The short causal convolution of recurrent mixers, over the valid tokens of a document."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.dtypes import accumulator, wider
from attention_jax.layers.norms import ACTIVATIONS
from attention_jax.ops.tokens import select_valid


class ShortConvolution(nnx.Module):
    """A depthwise causal convolution over the last `width` valid tokens of the document.

        y_t = activation(b + sum_{j < W} kernel[W - 1 - j] x_{t - j}),   x = 0 before the document's start

    t counts valid tokens only. The state is the last W - 1 valid inputs [B, W - 1, C]. Sums are
    float32 or wider.
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
            raise ValueError(f"the width of a short convolution must be >= 1, got {width}")
        self.width, self.channels, self.activation, self.dtype = width, channels, activation, dtype
        # Uniform in +-1 / sqrt(W), as in published models: the fan-in of a channel is W.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (width, channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32)) if use_bias else None

    def __call__(
        self,
        x_BTC: jax.Array,
        inputs_BUC: jax.Array | None = None,
        *,
        valid_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """y [B, T, C], 0 for invalid tokens, and the last inputs including x (None if `inputs_BUC` is None).

        inputs_BUC: the last valid inputs before x; None starts a document and returns no state.
        valid_BT: True for slots that hold a token; None if all do. segment_ids_BT: the document ids of the
        tokens; requires valid_BT and excludes inputs_BUC.
        """
        B, T, C = x_BTC.shape
        x_BTC = select_valid(x_BTC.astype(self.dtype), valid_BT)
        past_BUC = jnp.zeros((B, self.width - 1, C), x_BTC.dtype) if inputs_BUC is None else inputs_BUC
        if valid_BT is None:
            history_BSC = jnp.concatenate([past_BUC, x_BTC], axis=1)
            return self._convolved(history_BSC, None), None if inputs_BUC is None else history_BSC[:, T:]
        valid_BT = jnp.broadcast_to(valid_BT, (B, T))
        # Move valid tokens to the front, convolve them, and restore the original order.
        order_BT, rank_BT = _valid_first(valid_BT)
        history_BSC = jnp.concatenate([past_BUC, _permuted(x_BTC, order_BT, rank_BT)], axis=1)
        document_BT = None
        if segment_ids_BT is not None:
            segments_BT = jnp.broadcast_to(segment_ids_BT, (B, T))
            document_BT = _documents(jnp.take_along_axis(segments_BT, order_BT, axis=1))
        y_BTC = select_valid(
            _permuted(self._convolved(history_BSC, document_BT), rank_BT, order_BT), valid_BT
        )
        if inputs_BUC is None:
            return y_BTC, None
        count_B1 = valid_BT.sum(axis=1, keepdims=True, dtype=jnp.int32)
        last_BU = count_B1 + jnp.arange(self.width - 1, dtype=jnp.int32)[None]
        last_BUC = jnp.take_along_axis(history_BSC, last_BU[..., None], axis=1, mode="clip")
        return y_BTC, last_BUC.astype(inputs_BUC.dtype)

    def past_inputs(
        self, x_BTC: jax.Array, inputs_BUC: jax.Array, count: int, valid_BT: jax.Array | None = None
    ) -> jax.Array:
        """The last inputs before each of the last `count` slots of x, [B, count, U, C] in the state's dtype.

        inputs_BUC, valid_BT: as in a call. What `__call__` returns are the last inputs after all slots.
        """
        (B, T, C), U = x_BTC.shape, self.width - 1
        if T == 1 or U == 0:
            return jnp.broadcast_to(inputs_BUC[:, None], (B, count, U, C))
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else jnp.broadcast_to(valid_BT, (B, T))
        order_BT, _ = _valid_first(valid_BT)
        before_BT = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - valid_BT.astype(jnp.int32)
        # The rank of each input among the valid tokens of x; it is negative before x.
        rank_BJ = before_BT[:, T - count :, None] + jnp.arange(-U, 0, dtype=jnp.int32)[None, None]
        rank_BJ = rank_BJ.reshape(B, count * U)
        slot_BJ = jnp.take_along_axis(order_BT, jnp.maximum(rank_BJ, 0), axis=1)
        new_BJC = _gathered(x_BTC.astype(self.dtype).astype(inputs_BUC.dtype), slot_BJ)
        old_BJC = _gathered(inputs_BUC, jnp.minimum(rank_BJ + U, U - 1))
        found_BJC = jnp.where(rank_BJ[..., None] < 0, old_BJC, new_BJC)
        return found_BJC.reshape(B, count, U, -1)

    def _convolved(self, history_BSC: jax.Array, document_BT: jax.Array | None) -> jax.Array:
        """y of the last T = S - (W - 1) inputs; taps from other documents are 0."""
        U, T = self.width - 1, history_BSC.shape[1] - (self.width - 1)
        kernel_WC = self.kernel[...].astype(accumulator(history_BSC))
        sums = accumulator(history_BSC)
        y_BTC = jnp.zeros((), sums) if self.bias is None else self.bias[...].astype(sums)[None, None]
        for lag in range(self.width):
            tap_BTC = wider(history_BSC[:, U - lag : U - lag + T])
            if document_BT is not None and lag:
                same_BT = jnp.pad(document_BT, ((0, 0), (lag, 0)), constant_values=-1)[:, :T] == document_BT
                tap_BTC = jnp.where(same_BT[..., None], tap_BTC, 0.0)
            y_BTC = y_BTC + kernel_WC[None, None, U - lag] * tap_BTC
        if self.activation is not None:
            y_BTC = ACTIVATIONS[self.activation](y_BTC)
        return y_BTC.astype(self.dtype)


def _valid_first(valid_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable permutation that moves valid slots to the front, and its inverse."""
    invalid_BT = valid_BT == False  # noqa: E712
    count_B1 = valid_BT.sum(axis=1, keepdims=True)
    rank_BT = jnp.where(
        valid_BT, jnp.cumsum(valid_BT, axis=1) - 1, count_B1 + jnp.cumsum(invalid_BT, axis=1) - 1
    )
    return jnp.argsort(invalid_BT, axis=1, stable=True), rank_BT


def _documents(segments_BT: jax.Array) -> jax.Array:
    """The index 0, 1, ... of each token's run of equal ids; ids may be reused by later documents."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(jnp.cumsum(changes_BT, axis=1), ((0, 0), (1, 0)))


def _permuted(x_BTC: jax.Array, order_BT: jax.Array, inverse_BT: jax.Array) -> jax.Array:
    """x[:, order], with the inverse permutation as transpose: a gather instead of a scatter.

    A permutation is the solution of a linear system with its inverse, which JAX differentiates in every
    mode and to any order, by the two gathers given here.
    """
    if x_BTC.shape[1] == 1:
        return x_BTC
    forth, back = (functools.partial(_gathered, indices_BT=ids) for ids in (order_BT, inverse_BT))
    return jax.lax.custom_linear_solve(
        back, x_BTC, solve=lambda _, x_BTC: forth(x_BTC), transpose_solve=lambda _, g_BTC: back(g_BTC)
    )


def _gathered(x_BTC: jax.Array, indices_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTC, indices_BT[..., None], axis=1, mode="clip")
