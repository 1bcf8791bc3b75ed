"""The states that mixers keep while decoding. A mixer's own composite state stands beside the mixer."""

from attention_jax.caches.kv import KVCache, MemoryCache

__all__ = ["KVCache", "MemoryCache"]
