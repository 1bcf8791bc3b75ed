"""The size of decoding states, known before they are made."""

from __future__ import annotations

import functools

import jax

from attention_jax.caches import DEFAULT_CACHE, CacheOptions, MemoryCache
from attention_jax.model.config import ModelConfig
from attention_jax.model.language_model import check_capacity


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
    cache = cache.of_layer(config.dtype)

    @functools.cache
    def layer(place: int) -> int:
        mixer = config.mixers[place]
        state = jax.eval_shape(
            lambda: mixer.init_state(config.d_model, batch, length, causal=config.causal, cache=cache)
        )
        if isinstance(state, MemoryCache):
            state = jax.eval_shape(MemoryCache.append, state, *_memory(state, memory_length))
        return state.nbytes

    return tuple(layer(i % len(config.mixers)) for i in range(config.num_layers))


def _memory(state: MemoryCache, length: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of a memory's keys, values and positions."""
    return [jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype) for x in jax.tree.leaves(state)]
