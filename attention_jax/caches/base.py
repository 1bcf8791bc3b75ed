"""The interface of decoding states.

A state is a frozen pytree whose leaves all have the batch as their first axis, as the names of its fields say
(`keys_BKSH`). The states of several layers may be stacked along one more axis in front. A state is an
argument and a return value: nothing is changed in place.
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


STORABLE: dict[str, type] = {}  # the classes that a saved state may contain, by the name in its file


def storable(cls: type) -> type:
    """The class itself, a dataclass or NamedTuple of arrays, which `save` and `load` then accept in a state.

    Subclasses of `State` are registered as they are defined. Fields that are no arrays need the metadata
    `static` and hold numbers, strings, dtypes, None or tuples of these.
    """
    STORABLE[stored_name(cls)] = cls
    return cls


def stored_name(cls: type) -> str:
    """The name of a class in files: independent of its module in this library, qualified elsewhere."""
    inside = cls.__module__.partition(".")[0] == "attention_jax"
    return cls.__name__ if inside else f"{cls.__module__}.{cls.__qualname__}"


class State:
    """Base class of all states: implements `fork` and `nbytes` for any pytree."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        storable(cls)

    def fork(self, rows: jax.Array) -> Self:
        """The state whose row i is a copy of row rows[i]; rows: int [B'], each in [0, B).

        The stacked state of several layers is forked along its batch axis, too.

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

    def grown(self, empty: Self) -> Self:
        """The state with the slots of `empty`, the empty state of the same mixer for a larger capacity.

        By default the state itself, whose size does not depend on the capacity.
        """
        del empty
        return self

    def rewind(self, n_B: jax.Array) -> Self:
        """The state without the last n_B[i] tokens of each row i, exactly; n_B: int [B], 0 changes nothing.

        The stacked state of several layers is rewound in all of them. Raises: ValueError for n_B that is
        not integers [B], and for concrete counts that are negative or that this state cannot take back. A row
        whose traced count cannot be taken back gives NaN from then on.
        """
        raise NotImplementedError

    @property
    def most_rewound(self) -> int | None:
        """The most tokens that `rewind` takes back after any call; None if there is no limit.

        By default that of the states in its fields.
        """
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return most_rewound([value for value in fields if isinstance(value, State)])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the leaves may be ShapeDtypeStructs."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def rewind_all(states: Any, n_B: jax.Array) -> Any:
    """A pytree of states, such as those of all layers, without the last n_B[i] tokens of each row i."""
    return jax.tree.map(lambda state: state.rewind(n_B), states, is_leaf=_is_state)


def grow_all(states: Any, empty: Any) -> Any:
    """A pytree of states with the slots of the empty states `empty` for a larger capacity."""
    return jax.tree.map(lambda state, larger: state.grown(larger), states, empty, is_leaf=_is_state)


def most_rewound(states: Any) -> int | None:
    """The smallest `most_rewound` of a pytree of states, None if none of them has a limit."""
    limits = (state.most_rewound for state in jax.tree.leaves(states, is_leaf=_is_state))
    return min((limit for limit in limits if limit is not None), default=None)


def fork_all(states: Any, rows: jax.Array) -> Any:
    """A pytree of states, such as those of all layers, whose row i is a copy of row rows[i]."""
    return jax.tree.map(lambda state: state.fork(rows), states, is_leaf=_is_state)


def rewind_counts(state: State, n_B: Any) -> jax.Array | np.ndarray:
    """The counts of a rewind as int32 [B], traced or concrete.

    Raises: ValueError for counts that are not integers [B], and for a concrete count that is negative.
    """
    batch = jax.tree.leaves(state)[0].shape[_batch_axis(state)]
    n_B = n_B if isinstance(n_B, jax.core.Tracer) else np.asarray(n_B)
    if n_B.shape != (batch,) or not jnp.issubdtype(n_B.dtype, jnp.integer):
        raise ValueError(f"rewind: n_B must be integers [{batch}], got {n_B.dtype} {list(n_B.shape)}")
    if isinstance(n_B, jax.core.Tracer):
        return n_B.astype(jnp.int32)
    for row, n in enumerate(n_B):
        if not 0 <= n <= np.iinfo(np.int32).max:
            raise ValueError(f"rewind: row {row} takes back {n} tokens: give an int32 >= 0")
    return n_B.astype(np.int32)


def _is_state(x: Any) -> bool:
    return isinstance(x, State)


def _batch_axis(state: State) -> int:
    """The number of axes in front of the batch: those that a field has beyond the axes in its name."""
    for field in dataclasses.fields(state):
        value, axes = getattr(state, field.name), field.name.rpartition("_")[2]
        if isinstance(value, State):
            return _batch_axis(value)
        if axes.isupper() and hasattr(value, "ndim"):
            return value.ndim - len(axes)
    return 0
