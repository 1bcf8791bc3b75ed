"""Decoding states of the mixers. A state that only one mixer uses is defined in the mixer's module."""

from attention_jax.caches.base import Cache, State, fork_all, grow_all, most_rewound, rewind_all, storable
from attention_jax.caches.files import load, save
from attention_jax.caches.kv import HeldKeys, KVCache, MemoryCache
from attention_jax.caches.none import NoState
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions
from attention_jax.caches.quantized import QuantizedKVCache, empty_kv_cache
from attention_jax.caches.recurrent import LinearState, RecurrentState, keep_in_ring

__all__ = [
    "DEFAULT_CACHE",
    "Cache",
    "CacheOptions",
    "HeldKeys",
    "KVCache",
    "LinearState",
    "MemoryCache",
    "NoState",
    "QuantizedKVCache",
    "RecurrentState",
    "State",
    "empty_kv_cache",
    "fork_all",
    "grow_all",
    "keep_in_ring",
    "load",
    "most_rewound",
    "rewind_all",
    "save",
    "storable",
]
