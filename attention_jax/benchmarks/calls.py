"""Attention as jitted calls that return when the result is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from attention_jax.benchmarks.timing import device_time


def qkv(
    T: int, N: int = 8, H: int = 64, B: int = 1, dtype: str = "float32", K: int | None = None
) -> list[Any]:
    """Random normal q [B, T, N, H] and k, v [B, T, K, H], K = N by default: zeros would run faster."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(x, (B, T, n, H), dtype) for x, n in zip(keys, (N, K or N, K or N), strict=True)]


def ours(impl: str | None, mask: Any, q, k, v, backward: bool) -> Callable[[], Any]:
    """`dot_product_attention` of q, k, v by an implementation."""
    from attention_jax import dot_product_attention

    def forward(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, impl=impl)

    return jitted(forward, q, k, v, backward=backward)


def jitted(forward: Callable, *arrays: Any, backward: bool) -> Callable[[], Any]:
    """forward(*arrays), with `backward` its gradients too.

    `.temporaries`: bytes that the compiler plans. `.device_time()`: milliseconds of a call on a GPU.
    """
    import jax

    def both(*arrays_and_d):
        *arrays, d = arrays_and_d
        out, pullback = jax.vjp(forward, *arrays)
        return out, pullback(d)

    if backward:
        out = jax.eval_shape(forward, *arrays)
        arrays = (*arrays, jax.random.normal(jax.random.key(1), out.shape, out.dtype))
    compiled = jax.jit(both if backward else forward).lower(*arrays).compile()

    def call():
        return jax.block_until_ready(compiled(*arrays))

    call.temporaries = compiled.memory_analysis().temp_size_in_bytes
    call.device_time = functools.partial(device_time, compiled, *arrays)
    return call
