"""Caches that grow with the text, so that a step does not read slots in which no token stands yet.

Caches that keep all tokens begin with 1,024 slots, or what the prompt needs, and double. Every size is a
compiled program of its own. Caches of another kind do not grow.
"""

from __future__ import annotations

import functools

import jax

from attention_jax.caches import CacheOptions, grow_all
from attention_jax.generation.decode import DecodeState
from attention_jax.model import ModelConfig, init_state

FIRST_SLOTS = 1024


def first_capacity(config: ModelConfig, cache: CacheOptions, needed: int, capacity: int) -> int:
    """The capacity to begin with: at least `needed`, and all of it if the caches would not become larger."""
    size = next_capacity(FIRST_SLOTS, needed, capacity)
    if size < capacity and _slots(config, cache, size) == _slots(config, cache, capacity):
        return capacity
    return size


@functools.lru_cache(maxsize=256)
def _slots(config: ModelConfig, cache: CacheOptions, capacity: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of the caches."""
    states = jax.eval_shape(lambda: init_state(config, 1, capacity, cache=cache))
    return tuple(leaf.shape for leaf in jax.tree.leaves(states))


def next_capacity(size: int, needed: int, capacity: int) -> int:
    """`size` doubled until it is at least `needed`; at most `capacity`."""
    while size < needed:
        size *= 2
    return min(size, capacity)


def grown(config: ModelConfig, state: DecodeState, capacity: int, cache: CacheOptions) -> DecodeState:
    """The state with caches for a larger capacity; a pure function."""
    empty = init_state(config, len(state.positions_B), capacity, cache=cache)
    return DecodeState(grow_all(state.caches, empty), state.positions_B, state.logits_BV)
