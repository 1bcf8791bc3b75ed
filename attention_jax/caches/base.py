"""The interface of decoding states.

A state is a frozen pytree whose leaves all have the batch as their first axis. It is an argument and a return
value: nothing is changed in place.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp


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

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        ...


class State:
    """Base class of all states: implements `fork` and `nbytes` for any pytree."""

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i is a copy of row rows[i]; rows: int [B'], each in [0, B).

        Raises: ValueError for a concrete row outside the batch, since JAX indexing would clamp or wrap it.
        """
        batch = jax.tree.leaves(self)[0].shape[0]
        if not isinstance(rows, jax.core.Tracer):
            for row in rows:
                if not 0 <= int(row) < batch:
                    raise ValueError(f"fork: row {int(row)} is outside the batch, rows 0..{batch - 1}")
        return jax.tree.map(lambda x: x[jnp.asarray(rows)], self)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the leaves may be ShapeDtypeStructs."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
