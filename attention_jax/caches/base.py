"""What every state that a mixer keeps of a stream can do.

A state is a frozen pytree whose leaves all have the batch rows as their first axis. It is an argument and a
return value: nothing is changed in place.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Cache(Protocol):
    """append: the state after more tokens. view: what a layer reads. fork: rows repeated or reordered."""

    def append(self, *new: Any) -> Self:
        """The state with what new tokens add to it; slots without a token change nothing."""
        ...

    def view(self) -> Any:
        """The arrays that a layer reads."""
        ...

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i continues row rows[i]; rows: int [B']."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        ...


class State:
    """`fork` and `nbytes` of a state, from its leaves; a base class of every `Cache`."""

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i continues row rows[i]; rows: int [B'], each in [0, B).

        Raises: ValueError for a concrete row outside the batch, which indexing would clamp or wrap.
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
