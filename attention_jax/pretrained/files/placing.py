"""Tensors from files on devices: each device's part is read on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.hints import quoted
from attention_jax.pretrained.files.reading import Tensors

Index = tuple[slice, ...]


def place(
    tensors: Tensors,
    name: str,
    to: jax.Device | jax.sharding.Sharding | None = None,
    *,
    dtype: Any = None,
) -> jax.Array:
    """The tensor of a file on a device, or with a sharding; the default device unless `to` is given.

    dtype: of the result, the stored one unless given. Raises: ValueError for 64-bit numbers without
    jax_enable_x64, and for a cast of anything but floats to floats.
    """
    shape, stored = tensors.shape(name), tensors.dtype(name)
    wanted = jnp.dtype(stored if dtype is None else dtype)
    if wanted != stored and not all(jnp.issubdtype(d, jnp.floating) for d in (stored, wanted)):
        raise ValueError(
            f"place: {quoted(name)} is stored as {stored}, and only floats are cast, not to {wanted}"
        )
    return place_parts(lambda index: tensors.read_slice(name, index), shape, wanted, to)


def place_parts(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
    to: jax.Device | jax.sharding.Sharding | None = None,
) -> jax.Array:
    """An array whose parts `read` gives, on a device, or with a sharding; parts are cast on the host.

    Args:
      read: from one slice per axis to that part of the array. It is called once for every part that differs:
        with a sharding over 8 devices 8 times for an eighth each, and once for an array that is replicated.
      shape, dtype: of the whole.
    """
    wanted = jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"place: JAX would round {wanted} numbers: set jax_enable_x64, or give another dtype"
        )
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts[bounds] = np.asarray(read(tuple(slice(*each) for each in bounds))).astype(
                wanted, copy=False
            )
        return parts[bounds]

    if isinstance(to, jax.sharding.Sharding):
        return jax.make_array_from_callback(tuple(shape), to, part, dtype=wanted)
    return jax.device_put(part((slice(None),) * len(shape)), to)
