"""States of constant size: running sums of recurrent and linear mixers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.caches.base import State
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState(State):
    """The state of a recurrent mixer; its size does not depend on the number of tokens.

    matrix_BNHM: float32, S_t of every head. inputs_BUC: the last U = width - 1 inputs of the short
    convolution, oldest first, zeros before the first token; None if the mixer has no convolution.
    """

    matrix_BNHM: jax.Array
    inputs_BUC: jax.Array | None = None

    @staticmethod
    def empty(
        batch: int,
        heads: int,
        key_width: int,
        value_width: int,
        inputs: tuple[int, int, Any] | None = None,
        options: CacheOptions = DEFAULT_CACHE,
    ) -> RecurrentState:
        """The state before the first token: S_0 = 0. inputs: (U, C, dtype) of `inputs_BUC`."""
        inputs_BUC = None
        if inputs is not None:
            kept, channels, dtype = inputs
            inputs_BUC = jnp.zeros((batch, kept, channels), dtype)
        return RecurrentState(jnp.zeros((batch, heads, key_width, value_width), jnp.float32), inputs_BUC)

    def append(self, matrix_BNHM: jax.Array, inputs_BUC: jax.Array | None = None) -> RecurrentState:
        """The state after more tokens, from the final state of the recurrence."""
        return RecurrentState(matrix_BNHM, inputs_BUC)

    def view(self) -> tuple[jax.Array, jax.Array | None]:
        """(matrix_BNHM, inputs_BUC)."""
        return self.matrix_BNHM, self.inputs_BUC


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState(State):
    """The float32 state of linear attention; its size does not depend on the number of tokens.

    sums_BNFM: sum of phi(k) v^T. If weights are normalised, the last column is the sum of phi(k).
    weights_BNF1: the sum of phi(k) if the denominator has other features than the numerator; else None.
    log_scale_BK: the logarithm of the factor by which the sums are divided, -inf before the first token; None
      if the sums are not scaled.
    """

    sums_BNFM: jax.Array
    weights_BNF1: jax.Array | None = None
    log_scale_BK: jax.Array | None = None

    def append(
        self,
        sums_BNFM: jax.Array,
        weights_BNF1: jax.Array | None = None,
        log_scale_BK: jax.Array | None = None,
    ) -> LinearState:
        """The state after more tokens, from their final sums."""
        return LinearState(sums_BNFM, weights_BNF1, log_scale_BK)

    def view(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(sums_BNFM, weights_BNF1, log_scale_BK)."""
        return self.sums_BNFM, self.weights_BNF1, self.log_scale_BK
