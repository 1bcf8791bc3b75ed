"""The interface of decoding states.

A state is a frozen pytree whose leaves all have the batch as their first axis, as the names of its fields say
(`k_BSKH`). A model with `scan_layers` stacks the states of its layers along one more axis in front. A state
is an argument and a return value: nothing is changed in place.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


@runtime_checkable
class Cache(Protocol):
    """The protocol of all decoding states."""

    def append(self, *new: Any) -> Self:
        """The state after new tokens; invalid slots leave it unchanged."""
        ...

    def view(self) -> Any:
        """The arrays that a layer reads."""
        ...

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i is a copy of row rows[i]; rows: int [B']."""
        ...

    def rewind(self, n_B: jax.Array) -> Self:
        """The state without the last n_B[i] tokens of each row i; n_B: int [B]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        ...


class State:
    """Base class of all states: implements `fork` and `nbytes` for any pytree."""

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i is a copy of row rows[i]; rows: int [B'], each in [0, B).

        The stacked state of scanned layers is forked along its batch axis, too.

        Raises: ValueError for rows that are not integers [B'], and for a concrete row outside the batch,
        since JAX indexing would clamp or wrap it.
        """
        axis = _batch_axis(self)
        batch = jax.tree.leaves(self)[0].shape[axis]
        rows = rows if isinstance(rows, jax.core.Tracer) else np.asarray(rows)
        if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(f"fork: rows must be integers [B'], got {rows.dtype} {rows.shape}")
        if not isinstance(rows, jax.core.Tracer):
            for row in rows:
                if not 0 <= row < batch:
                    raise ValueError(f"fork: row {row} is outside the batch, rows 0..{batch - 1}")
        return jax.tree.map(lambda x: x[(slice(None),) * axis + (jnp.asarray(rows),)], self)

    def rewind(self, n_B: jax.Array) -> Self:
        """The state without the last n_B[i] tokens of each row i, exactly; n_B: int [B]."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the leaves may be ShapeDtypeStructs."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _batch_axis(state: State) -> int:
    """The number of axes in front of the batch: those that a field has beyond the axes in its name."""
    for field in dataclasses.fields(state):
        value, axes = getattr(state, field.name), field.name.rpartition("_")[2]
        if isinstance(value, State):
            return _batch_axis(value)
        if axes.isupper() and hasattr(value, "ndim"):
            return value.ndim - len(axes)
    return 0
