"""The states that mixers keep while decoding. A mixer's own composite state stands beside the mixer."""

from attention_jax.caches.base import Cache, State
from attention_jax.caches.kv import HeldKeys, KVCache, MemoryCache
from attention_jax.caches.recurrent import LinearState, RecurrentState

__all__ = ["Cache", "HeldKeys", "KVCache", "LinearState", "MemoryCache", "RecurrentState", "State"]
