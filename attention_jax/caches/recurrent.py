"""States of mixers that keep sums instead of keys: as large for any number of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.caches.base import State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState(State):
    """What a recurrent mixer keeps of a stream, whatever its length.

    matrix_BNHM: float32, S_t of every head. inputs_BUC: the last U = width - 1 inputs of the short
    convolution, oldest first, zeros before the first token; None where the mixer has none.
    """

    matrix_BNHM: jax.Array
    inputs_BUC: jax.Array | None = None

    @staticmethod
    def empty(
        batch: int, heads: int, key_width: int, value_width: int, inputs: tuple[int, int, Any] | None = None
    ) -> RecurrentState:
        """The state before the first token: S_0 = 0. inputs: U, C and the dtype of the kept inputs."""
        inputs_BUC = None
        if inputs is not None:
            kept, channels, dtype = inputs
            inputs_BUC = jnp.zeros((batch, kept, channels), dtype)
        return RecurrentState(jnp.zeros((batch, heads, key_width, value_width), jnp.float32), inputs_BUC)

    def append(self, matrix_BNHM: jax.Array, inputs_BUC: jax.Array | None = None) -> RecurrentState:
        """The state after more tokens: what the recurrence ended with."""
        return RecurrentState(matrix_BNHM, inputs_BUC)

    def view(self) -> tuple[jax.Array, jax.Array | None]:
        """(matrix_BNHM, inputs_BUC)."""
        return self.matrix_BNHM, self.inputs_BUC


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState(State):
    """What linear attention keeps of a stream, whatever its length; float32.

    sums_BNFM: sum of phi(k) v^T; where weights are normalised, its last column is the sum of phi(k).
    weights_BNF1: that sum by itself, where the denominator's features are not the numerator's; else None.
    log_scale_BK: the sums stand divided by its exponential; -inf before the first token; else None.
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
        """The state after more tokens: what the sums ended with."""
        return LinearState(sums_BNFM, weights_BNF1, log_scale_BK)

    def view(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(sums_BNFM, weights_BNF1, log_scale_BK)."""
        return self.sums_BNFM, self.weights_BNF1, self.log_scale_BK
