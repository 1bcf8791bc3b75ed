"""The size of decoding states, known before they are made."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attention_jax.caches import DEFAULT_CACHE, CacheOptions, MemoryCache
from attention_jax.model.config import ModelConfig
from attention_jax.model.language_model import check_capacity
from attention_jax.model.stack import init_layer_state


def cache_bytes(
    config: ModelConfig,
    batch: int,
    length: int,
    cache: CacheOptions = DEFAULT_CACHE,
    *,
    memory_length: int = 0,
) -> tuple[int, ...]:
    """The bytes of each layer's decoding state, one integer per layer; nothing is allocated.

    Args:
      batch: rows.
      length: the capacity of `init_state` and `prefill`, the largest position + 1.
      cache: how the states are stored.
      memory_length: slots of the encoder's memory, which `cross` mixers keep after the first call.

    Raises: ValueError, as `init_state`.
    """
    check_capacity(config, length)
    cache, period = cache.of_layer(config.dtype), config.period

    @functools.cache
    def layer(place: int) -> int:
        state = jax.eval_shape(lambda: init_layer_state(config, period[place], batch, length, cache))
        if isinstance(state, MemoryCache):
            state = jax.eval_shape(functools.partial(_filled, length=memory_length), state)
        return state.nbytes

    return tuple(layer(i % len(period)) for i in range(config.num_layers))


def _filled(state: MemoryCache, length: int) -> MemoryCache:
    """The empty memory with so many keys of 0."""
    held = (x for x in state.view() if x is not None)
    return state.append(*(jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype) for x in held))
