"""The dtype of sums: float64 beside float64 arrays, else float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def accumulator(*given: Any) -> Any:
    """The dtype of sums of arrays, or of arrays of these dtypes: float64 where one is, else float32."""
    dtypes = (jnp.dtype(getattr(x, "dtype", x)) for x in given)
    return jnp.dtype(jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32)


def wider(x: jax.Array) -> jax.Array:
    """x in the wider of float32 and its own dtype."""
    return x.astype(accumulator(x))


def check_dtype(dtype: Any) -> None:
    """ValueError for float64 where JAX would round it to float32."""
    if dtype is not None and jnp.dtype(dtype) == jnp.float64 != jax.dtypes.canonicalize_dtype(jnp.float64):
        raise ValueError("dtype float64 needs jax's 64-bit mode: set JAX_ENABLE_X64=1 or write float32")
