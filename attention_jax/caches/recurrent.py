"""States of constant size: running sums of recurrent and linear mixers, and the past states that they keep.

A running sum cannot be undone exactly, so that `rewind` takes back tokens by returning to a state that was
kept: with `CacheOptions.spare` = R > 0 a state holds the states before each of its last R tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches.base import State, _batch_axis
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PastStates:
    """The states before each of the last tokens: a ring of R states per row.

    count_B: int32, the tokens that the row has seen. held_B: int32, how many of the last ones can be taken
    back. arrays: those of the state's `view`, each with an axis R behind the batch; the state after c tokens
    is in slot c mod R. Slots that `held_B` does not count may hold anything.
    """

    count_B: jax.Array
    held_B: jax.Array
    arrays: tuple[jax.Array | None, ...]

    @staticmethod
    def empty(arrays: tuple[jax.Array | None, ...], options: CacheOptions) -> PastStates | None:
        """No past states, with room for `options.spare` of them; None if that is 0."""
        R = options.spare
        if R == 0:
            return None
        B = arrays[0].shape[0]
        rings = jax.tree.map(lambda x: jnp.zeros((B, R, *x.shape[1:]), x.dtype), arrays)
        return PastStates(jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32), rings)

    @property
    def size(self) -> int:
        """R."""
        return jax.tree.leaves(self.arrays)[0].shape[self.count_B.ndim]

    def append(self, past: tuple[jax.Array | None, ...], valid_BT: jax.Array) -> PastStates:
        """The past states after T more slots.

        past: the states before each of the last min(T, R) slots, [B, min(T, R), ...]. valid_BT: True
        [B or 1, T] for slots that hold a token; the others change nothing.
        """
        B, T, R = self.count_B.shape[0], valid_BT.shape[1], self.size
        kept = min(T, R)
        valid_BT = jnp.broadcast_to(valid_BT, (B, T)).astype(jnp.int32)
        total_B, last_BJ = valid_BT.sum(axis=1), valid_BT[:, T - kept :]
        last_B = last_BJ.sum(axis=1)
        before_BJ = jnp.cumsum(last_BJ, axis=1) - last_BJ
        count_BJ = (self.count_B + total_B - last_B)[:, None] + before_BJ
        # A slot without a token is written outside of the ring, which drops it.
        outside_J = R + jnp.arange(kept, dtype=jnp.int32)
        slot_JB = jnp.where(last_BJ > 0, count_BJ % R, outside_J[None]).T
        row_JB = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32), (kept, B))

        def write(ring, new):
            # In the order of tokens, in which a recurrence makes them.
            new = jnp.moveaxis(new, 0, 1).astype(ring.dtype)
            return ring.at[row_JB, slot_JB].set(new, mode="drop", unique_indices=True)

        # States in front of a gap, a token whose state before it was not kept, cannot be returned to.
        held_B = last_B + jnp.where(total_B == last_B, self.held_B, 0)
        return PastStates(
            self.count_B + total_B, jnp.minimum(held_B, R), jax.tree.map(write, self.arrays, past)
        )

    def take(self, n_B: jax.Array) -> tuple[tuple[jax.Array | None, ...], jax.Array, PastStates]:
        """The arrays before the last n_B[i] tokens, whether each row holds them, and what is left."""
        slot_B = (self.count_B - n_B) % self.size
        row_B = jnp.arange(slot_B.shape[0])
        found_B = (n_B >= 0) & (n_B <= self.held_B)
        step_B = jnp.where(found_B, n_B, 0)
        left = dataclasses.replace(self, count_B=self.count_B - step_B, held_B=self.held_B - step_B)
        return jax.tree.map(lambda ring: ring[row_B, slot_B], self.arrays), found_B, left


class RewindableState(State):
    """Base class of states that are running sums: implements `rewind` and `past_states`.

    The last field of a subclass is `past`, and those in front of it are the arrays of its `view`.
    """

    past: PastStates | None

    def past_states(self, new_tokens: int) -> int:
        """The number of past states that `append` needs of a call with so many tokens."""
        return 0 if self.past is None else min(new_tokens, self.past.size)

    def _appended(self, arrays: tuple, past: tuple | None, valid_BT: jax.Array | None) -> Self:
        """The state with new arrays."""
        if self.past is None:
            return type(self)(*arrays)
        assert past is not None and valid_BT is not None, "a state that keeps past states needs new ones"
        return type(self)(*arrays, self.past.append(past, valid_BT))

    def rewind(self, n_B: jax.Array) -> Self:
        """The state without the last n_B[i] tokens of each row i, bit for bit; n_B: int [B].

        A state that was made with `CacheOptions(spare=R)` can take back its last R tokens, and after that as
        many as are left of these. Of a call with more than R tokens those in its last R slots count. A row
        with n = 0 does not change. The states of scanned layers, stacked, go back together.

        Raises: ValueError for n_B that are not integers [B], and for a concrete n that is negative or more
        than a row can take back. A traced one gives a row of NaN.
        """
        axis = _batch_axis(self)
        n_B = self._checked_tokens(n_B, jax.tree.leaves(self)[0].shape[axis])
        rewind = type(self)._rewound
        for _ in range(axis):
            rewind = jax.vmap(rewind, in_axes=(0, None))
        return rewind(self, n_B)

    def _rewound(self, n_B: jax.Array) -> Self:
        """The state before the last n_B[i] tokens, NaN where a row cannot go back as far."""
        arrays, past, found_B = self.view(), None, n_B == 0
        old = arrays
        if self.past is not None:
            old, found_B, past = self.past.take(n_B)

        def select(new, old):
            stays, found = (x.reshape(-1, *(1,) * (new.ndim - 1)) for x in (n_B == 0, found_B))
            return jnp.where(stays, new, jnp.where(found, old, jnp.nan))

        return type(self)(*jax.tree.map(select, arrays, old), past)

    def _checked_tokens(self, n_B: Any, B: int) -> jax.Array:
        """n_B as int32; ValueError as `rewind` says."""
        traced = isinstance(n_B, jax.core.Tracer)
        n_B = n_B if traced else np.asarray(n_B)
        if n_B.shape != (B,) or not jnp.issubdtype(n_B.dtype, jnp.integer):
            raise ValueError(f"rewind: n_B must be integers [B] = [{B}], got {n_B.dtype} {list(n_B.shape)}")
        if traced:
            return n_B.astype(jnp.int32)
        size = 0 if self.past is None else self.past.size
        held_B = np.full(B, size)
        if size and not isinstance(self.past.held_B, jax.core.Tracer):
            held_B = np.asarray(self.past.held_B).reshape(-1, B).min(axis=0)
        for row, (n, held) in enumerate(zip(n_B.tolist(), held_B.tolist(), strict=True)):
            if not 0 <= n <= held:
                raise ValueError(
                    f"rewind: row {row} can take back 0 to {held} tokens, got {n}; this state keeps at most "
                    f"{size}: CacheOptions(spare=...) sets it"
                )
        return jnp.asarray(n_B, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState(RewindableState):
    """The state of a recurrent mixer; its size does not depend on the number of tokens.

    matrix_BNHM: float32, S_t of every head. inputs_BUC: the last U = width - 1 inputs of the short
    convolution, oldest first, zeros before the first token; None if the mixer has no convolution. past: the
    states to which `rewind` can return; None without `CacheOptions.spare`.
    """

    matrix_BNHM: jax.Array
    inputs_BUC: jax.Array | None = None
    past: PastStates | None = None

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
        arrays = (jnp.zeros((batch, heads, key_width, value_width), jnp.float32), inputs_BUC)
        return RecurrentState(*arrays, PastStates.empty(arrays, options))

    def append(
        self,
        matrix_BNHM: jax.Array,
        inputs_BUC: jax.Array | None = None,
        *,
        past: tuple[jax.Array, jax.Array | None] | None = None,
        valid_BT: jax.Array | None = None,
    ) -> RecurrentState:
        """The state after T more slots, from the final state of the recurrence.

        A state that keeps past states also needs `past`, the arrays of the view before each of the last
        `past_states(T)` slots, and valid_BT, True for slots that hold a token.
        """
        return self._appended((matrix_BNHM, inputs_BUC), past, valid_BT)

    def view(self) -> tuple[jax.Array, jax.Array | None]:
        """(matrix_BNHM, inputs_BUC)."""
        return self.matrix_BNHM, self.inputs_BUC


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState(RewindableState):
    """The float32 state of linear attention; its size does not depend on the number of tokens.

    sums_BNFM: sum of phi(k) v^T. If weights are normalised, the last column is the sum of phi(k).
    weights_BNF1: the sum of phi(k) if the denominator has other features than the numerator; else None.
    log_scale_BK: the logarithm of the factor by which the sums are divided, -inf before the first token; None
      if the sums are not scaled.
    past: the states to which `rewind` can return; None without `CacheOptions.spare`.
    """

    sums_BNFM: jax.Array
    weights_BNF1: jax.Array | None = None
    log_scale_BK: jax.Array | None = None
    past: PastStates | None = None

    @staticmethod
    def empty(
        sums_shape: tuple[int, int, int, int],
        *,
        separate_weights: bool = False,
        scaled_heads: int | None = None,
        options: CacheOptions = DEFAULT_CACHE,
    ) -> LinearState:
        """Sums of 0 of that shape; scaled_heads: K of `log_scale_BK`, None for sums that are not scaled."""
        arrays = (
            jnp.zeros(sums_shape, jnp.float32),
            jnp.zeros((*sums_shape[:3], 1), jnp.float32) if separate_weights else None,
            None if scaled_heads is None else jnp.full((sums_shape[0], scaled_heads), -jnp.inf, jnp.float32),
        )
        return LinearState(*arrays, PastStates.empty(arrays, options))

    def append(
        self,
        sums_BNFM: jax.Array,
        weights_BNF1: jax.Array | None = None,
        log_scale_BK: jax.Array | None = None,
        *,
        past: tuple[jax.Array | None, ...] | None = None,
        valid_BT: jax.Array | None = None,
    ) -> LinearState:
        """The state after more tokens, from their final sums; past and valid_BT as in `RecurrentState`."""
        return self._appended((sums_BNFM, weights_BNF1, log_scale_BK), past, valid_BT)

    def view(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(sums_BNFM, weights_BNF1, log_scale_BK)."""
        return self.sums_BNFM, self.weights_BNF1, self.log_scale_BK
