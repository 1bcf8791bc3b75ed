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

from attention_jax.caches.base import State, _batch_axis, rewind_counts, storable
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions


def keep_in_ring(ring: jax.Array, new: jax.Array, slot_Bn: jax.Array) -> jax.Array:
    """The ring [B, R, ...] with new [B, n, ...] in each row's slots; those >= R are dropped."""
    row_B1 = jnp.arange(slot_Bn.shape[0], dtype=jnp.int32)[:, None]
    return ring.at[row_B1, slot_Bn].set(new, mode="drop", unique_indices=True)


@storable
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

    def slots(self, valid_BT: jax.Array) -> jax.Array:
        """Where the states before the last n of T new slots belong in a ring, int32 [B, n]; >= R: nowhere.

        valid_BT: True [B or 1, T] for slots that hold a token. n = min(T, R + 1), one more than R: a row with
        slots without a token in a block of R + 1 can then still go back to its start.
        """
        valid_BT = self._per_row(valid_BT)
        (_, T), R = valid_BT.shape, self.size
        n = min(T, R + 1)
        total_B, last_Bn = valid_BT.sum(axis=1, dtype=jnp.int32), valid_BT[:, T - n :]
        # -1 for the last token of the row, -2 for that before it, ...
        before_Bn = jnp.cumsum(last_Bn, axis=1, dtype=jnp.int32) - last_Bn
        back_Bn = before_Bn - last_Bn.sum(axis=1, keepdims=True, dtype=jnp.int32)
        belongs_Bn = (last_Bn > 0) & (back_Bn >= -R)
        slot_Bn = ((self.count_B + total_B)[:, None] + back_Bn) % R
        return jnp.where(belongs_Bn, slot_Bn, R + jnp.arange(n, dtype=jnp.int32))

    def append(self, arrays: tuple[jax.Array | None, ...], valid_BT: jax.Array) -> PastStates:
        """The past states after T more slots: the rings with states in `slots(valid_BT)`."""
        valid_BT = self._per_row(valid_BT)
        T, R = valid_BT.shape[1], self.size
        total_B, last_B = (
            x.sum(axis=1, dtype=jnp.int32) for x in (valid_BT, valid_BT[:, max(0, T - R - 1) :])
        )
        # States in front of a token whose own past state was not kept are out of reach.
        held_B = last_B + jnp.where(total_B == last_B, self.held_B, 0)
        return PastStates(self.count_B + total_B, jnp.minimum(held_B, R), arrays)

    def _per_row(self, valid_BT: jax.Array) -> jax.Array:
        return jnp.broadcast_to(valid_BT, (self.count_B.shape[0], valid_BT.shape[1])).astype(jnp.int32)

    def take(self, n_B: jax.Array) -> tuple[tuple[jax.Array | None, ...], jax.Array, PastStates]:
        """The arrays before the last n_B[i] tokens, whether each row holds them, and what is left."""
        slot_B = (self.count_B - n_B) % self.size
        row_B = jnp.arange(slot_B.shape[0])
        found_B = (n_B >= 0) & (n_B <= self.held_B)
        # A row that could not go back can go nowhere: NaN is not to be followed by numbers of another token.
        left = PastStates(
            self.count_B - jnp.where(found_B, n_B, 0), jnp.where(found_B, self.held_B - n_B, 0), self.arrays
        )
        return jax.tree.map(lambda ring: ring[row_B, slot_B], self.arrays), found_B, left


class RewindableState(State):
    """Base class of states that are running sums: implements `rewind` and `past_slots`.

    The last field of a subclass is `past`, and those in front of it are the arrays of its `view`.
    """

    past: PastStates | None

    def past_slots(self, valid_BT: jax.Array | None, T: int) -> jax.Array | None:
        """`PastStates.slots` of a call with T slots; None for a state that keeps no past states."""
        if self.past is None:
            return None
        return self.past.slots(jnp.ones((1, T), bool) if valid_BT is None else valid_BT)

    def _appended(self, arrays: tuple, rings: tuple | None, valid_BT: jax.Array | None) -> Self:
        """The state with new arrays and rings."""
        if self.past is None:
            return type(self)(*arrays)
        assert rings is not None and valid_BT is not None, "a state that keeps past states needs new ones"
        return type(self)(*arrays, self.past.append(rings, valid_BT))

    @property
    def most_rewound(self) -> int:
        """The number of past states that it keeps."""
        return 0 if self.past is None else self.past.size

    def rewind(self, n_B: jax.Array) -> Self:
        """The state without the last n_B[i] tokens of each row i, bit for bit; n_B: int [B].

        A state that was made with `CacheOptions(spare=R)` can take back its last R tokens, and after that as
        many as are left of these; of a call with more than R + 1 slots, only tokens in its last R + 1. A row
        with n = 0 does not change. The stacked states of several layers go back together.

        Raises: ValueError for n_B that are not integers [B], and for a concrete n that is negative or more
        than a row can take back. A traced one gives a row of NaN.
        """
        axis = _batch_axis(self)
        n_B = rewind_counts(self, n_B)
        if not isinstance(n_B, jax.core.Tracer):
            self._check_held(n_B)
        rewind = type(self)._rewound
        for _ in range(axis):
            rewind = jax.vmap(rewind, in_axes=(0, None))
        return rewind(self, jnp.asarray(n_B))

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

    def _check_held(self, n_B: np.ndarray) -> None:
        """ValueError for a row that cannot take back as many tokens."""
        size = 0 if self.past is None else self.past.size
        held_B = np.full(len(n_B), size)
        if size and not isinstance(self.past.held_B, jax.core.Tracer):
            held_B = np.asarray(self.past.held_B).reshape(-1, len(n_B)).min(axis=0)
        for row in np.flatnonzero(n_B > held_B)[:1]:
            raise ValueError(
                f"rewind: row {row} takes back {n_B[row]} tokens, but its state can take back "
                f"{held_B[row]}; it keeps at most {size}: raise CacheOptions.spare"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState(RewindableState):
    """The state of a recurrent mixer; its size does not depend on the number of tokens.

    matrix_BNHM: float32 or float64, S_t of every head. inputs_BUC: the last U = width - 1 inputs of the
    short convolution, oldest first, zeros before the first token; None if the mixer has no convolution. past:
    the states to which `rewind` can return; None without `CacheOptions.spare`.
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
        arrays = (jnp.zeros((batch, heads, key_width, value_width), options.sum_dtype), inputs_BUC)
        return RecurrentState(*arrays, PastStates.empty(arrays, options))

    def append(
        self,
        matrix_BNHM: jax.Array,
        inputs_BUC: jax.Array | None = None,
        *,
        rings: tuple[jax.Array, jax.Array | None] | None = None,
        valid_BT: jax.Array | None = None,
    ) -> RecurrentState:
        """The state after T more slots, from the final state of the recurrence.

        A state that keeps past states also needs valid_BT, True for slots that hold a token, and `rings`, its
        rings with the states before the last slots in their places, `past_slots(valid_BT, T)`.
        """
        return self._appended((matrix_BNHM, inputs_BUC), rings, valid_BT)

    def view(self) -> tuple[jax.Array, jax.Array | None]:
        """(matrix_BNHM, inputs_BUC)."""
        return self.matrix_BNHM, self.inputs_BUC


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState(RewindableState):
    """The float32 (or float64) state of linear attention; its size does not depend on the number of tokens.

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
        dtype = options.sum_dtype
        arrays = (
            jnp.zeros(sums_shape, dtype),
            jnp.zeros((*sums_shape[:3], 1), dtype) if separate_weights else None,
            None if scaled_heads is None else jnp.full((sums_shape[0], scaled_heads), -jnp.inf, dtype),
        )
        return LinearState(*arrays, PastStates.empty(arrays, options))

    def append(
        self,
        sums_BNFM: jax.Array,
        weights_BNF1: jax.Array | None = None,
        log_scale_BK: jax.Array | None = None,
        *,
        rings: tuple[jax.Array | None, ...] | None = None,
        valid_BT: jax.Array | None = None,
    ) -> LinearState:
        """The state after more tokens, from their final sums; rings and valid_BT as in `RecurrentState`."""
        return self._appended((sums_BNFM, weights_BNF1, log_scale_BK), rings, valid_BT)

    def view(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(sums_BNFM, weights_BNF1, log_scale_BK)."""
        return self.sums_BNFM, self.weights_BNF1, self.log_scale_BK
