"""Key-value caches: data and how it grows. What a cache keeps is what its mask may still need.

A cache of `slots` = pins + ring holds the keys of a mask whose retention is (lookback, pins): position p
lives in its own slot where it is pinned, else in ring slot p % lookback. A mask that keeps everything
has a ring as long as the capacity, which never wraps. Every slot carries its position; < 0 is empty.
Attention reads positions, so a ring needs no rotation and left padding no case of its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attention_jax.masks import Mask

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """k [B, slots, K, H], v [B, slots, K, M], positions int32 [B, slots]."""

    k_BSKH: jax.Array
    v_BSKM: jax.Array
    positions_BS: jax.Array
    capacity: int = dataclasses.field(metadata=_STATIC)
    pins: tuple[int, ...] = dataclasses.field(metadata=_STATIC, default=())

    @staticmethod
    def empty(
        batch: int, capacity: int, kv_heads: int, head_dim: int, value_dim: int, *, mask: Mask, dtype
    ) -> KVCache:
        """A cache for positions 0 .. capacity-1 of `batch` rows, as small as `mask` allows."""
        if capacity < 1:
            raise ValueError(f"cache capacity must be >= 1, got {capacity}")
        lookback, pins = mask.retention()
        pins = tuple(pin for pin in pins if pin < capacity)
        if lookback is None or lookback + len(pins) >= capacity:
            lookback, pins = capacity, ()
        slots = max(lookback, 1) + len(pins)
        return KVCache(
            jnp.zeros((batch, slots, kv_heads, head_dim), dtype),
            jnp.zeros((batch, slots, kv_heads, value_dim), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
            capacity,
            pins,
        )

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.positions_BS.shape[1] - len(self.pins)

    @property
    def wraps(self) -> bool:
        """The ring is shorter than the capacity, so new keys may overwrite old ones."""
        return self.ring < self.capacity

    def append(self, k_BTKH: jax.Array, v_BTKM: jax.Array, positions_BT: jax.Array) -> KVCache:
        """The cache with the tokens at positions_BT written; positions < 0 are left out.

        Of tokens that share a ring slot only the newest is written. Positions must lie below the
        capacity: the caller checks what it knows before compiling and must discard the output of rows
        that exceed it (`overflow`), since a traced value cannot raise. Such tokens are not written.
        """
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = self._slots(positions_BT)
        # Slots out of range are dropped by the scatter: the one place where that is what we want.
        write = {"mode": "drop", "unique_indices": False}
        return dataclasses.replace(
            self,
            k_BSKH=self.k_BSKH.at[rows_B1, slots_BT].set(k_BTKH.astype(self.k_BSKH.dtype), **write),
            v_BSKM=self.v_BSKM.at[rows_B1, slots_BT].set(v_BTKM.astype(self.v_BSKM.dtype), **write),
            positions_BS=self.positions_BS.at[rows_B1, slots_BT].set(positions_BT, **write),
        )

    def overflow(self, positions_BT: jax.Array) -> jax.Array:
        """True where a token lies past the capacity."""
        return positions_BT >= self.capacity

    def _slots(self, positions_BT: jax.Array) -> jax.Array:
        """The slot of each token, or the number of slots (out of range) for one not to be written."""
        fits_BT = self.overflow(positions_BT) == False  # noqa: E712
        newest_B1 = jnp.where(fits_BT, positions_BT, -1).max(axis=1, keepdims=True)
        slots_BT = len(self.pins) + positions_BT % self.ring
        written = (positions_BT >= 0) & (positions_BT > newest_B1 - self.ring)
        slots_BT = jnp.where(written, slots_BT, self.positions_BS.shape[1])
        for index, pin in enumerate(self.pins):
            slots_BT = jnp.where(positions_BT == pin, index, slots_BT)
        return jnp.where(fits_BT, slots_BT, self.positions_BS.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCache:
    """The keys and values of a cross-attention memory, projected once. k [B, S, K, H], v [B, S, K, M]."""

    k_BSKH: jax.Array
    v_BSKM: jax.Array
    positions_BS: jax.Array
