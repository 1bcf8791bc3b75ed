"""Key-value caches, which keep the keys that their mask may still need.

For a mask with cache span (lookback, pins), a cache has one slot per pinned position and a ring buffer of
`lookback` slots. A pinned position has its own slot; any other position p uses ring slot p % lookback. For a
mask that keeps all keys, the ring is as long as the capacity and never wraps. Every slot stores its position,
which is < 0 for an empty slot. Attention uses these positions, so that the order of the slots does not matter
and left padding needs no special case.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches.base import State
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions
from attention_jax.masks import Mask

_STATIC = {"static": True}


class HeldKeys(NamedTuple):
    """The arrays of a cache: k [B, S, K, H], v [B, S, K, M] or None, positions [B, S], per_key."""

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    positions_BS: jax.Array
    per_key: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(State):
    """k [B, slots, K, H], v [B, slots, K, M], positions int32 [B, slots].

    v is None if values are computed from the keys (a latent cache). `per_key` is a pytree of further arrays
    [B, slots, ...] with one entry per key, or None. `capacity` bounds positions: the largest position + 1. It
    is not the number of slots, which is smaller for a ring that wraps.
    """

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    positions_BS: jax.Array
    capacity: int = dataclasses.field(metadata=_STATIC)
    pins: tuple[int, ...] = dataclasses.field(metadata=_STATIC, default=())
    per_key: Any = None

    @staticmethod
    def empty(
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        *,
        mask: Mask,
        options: CacheOptions = DEFAULT_CACHE,
        value_heads: int | None = None,
        per_key: Any = None,
    ) -> KVCache:
        """An empty cache for positions 0 .. capacity - 1 of `batch` rows, with the slots that `mask` needs.

        value_dim: None stores no values. value_heads: `kv_heads` by default. per_key: a pytree of
        ShapeDtypeStructs, the shapes of further arrays per key without the batch and slot axes.
        """
        if capacity < 1:
            raise ValueError(f"cache capacity must be >= 1, got {capacity}")
        lookback, pins = mask.cache_span()
        pins = tuple(pin for pin in pins if pin < capacity)
        if lookback is None or lookback + len(pins) >= capacity:
            lookback, pins = capacity, ()
        slots = max(lookback, 1) + len(pins)
        values = None
        if value_dim is not None:
            values = jnp.zeros((batch, slots, value_heads or kv_heads, value_dim), options.storage_dtype)
        return KVCache(
            jnp.zeros((batch, slots, kv_heads, head_dim), options.storage_dtype),
            values,
            jnp.full((batch, slots), -1, jnp.int32),
            capacity,
            pins,
            jax.tree.map(lambda x: jnp.zeros((batch, slots, *x.shape), x.dtype), per_key),
        )

    @property
    def ring(self) -> int:
        """The number of slots in the ring."""
        return self.positions_BS.shape[1] - len(self.pins)

    @property
    def wraps(self) -> bool:
        """True if the ring is shorter than the capacity, so that new keys may overwrite old ones."""
        return self.ring < self.capacity

    def append(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> KVCache:
        """The cache with the tokens at positions_BT written; tokens at positions < 0 are not written.

        Of tokens that share a ring slot only the newest is written. Positions must be below the capacity. A
        traced position cannot raise: tokens past the capacity are not written, and the caller must discard
        the output of their rows (see `overflow`).
        """
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = self._slots(positions_BT)

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            # mode="drop": the scatter ignores the out-of-range slots of tokens that must not be written.
            return held.at[rows_B1, slots_BT].set(new.astype(held.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k_BSKH=write(self.k_BSKH, k_BTKH),
            v_BSKM=None if self.v_BSKM is None else write(self.v_BSKM, v_BTKM),
            positions_BS=write(self.positions_BS, positions_BT),
            per_key=jax.tree.map(write, self.per_key, per_key),
        )

    def view(self) -> HeldKeys:
        """The arrays of all slots; empty slots have position -1."""
        return HeldKeys(self.k_BSKH, self.v_BSKM, self.positions_BS, self.per_key)

    def concat_view(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> HeldKeys:
        """The slots concatenated with new tokens: the keys that several new tokens attend to in a ring.

        Appending first would overwrite keys that the earliest new tokens still attend to.
        """

        def join(held: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.concatenate([held, new.astype(held.dtype)], axis=1)

        return HeldKeys(
            join(self.k_BSKH, k_BTKH),
            None if self.v_BSKM is None else join(self.v_BSKM, v_BTKM),
            join(self.positions_BS, positions_BT),
            jax.tree.map(join, self.per_key, per_key),
        )

    def overflow(self, positions_BT: jax.Array) -> jax.Array:
        """True for tokens at positions past the capacity."""
        return positions_BT >= self.capacity

    def _slots(self, positions_BT: jax.Array) -> jax.Array:
        """The slot of each token; the number of slots (out of range) for tokens that must not be written."""
        fits_BT = self.overflow(positions_BT) == False  # noqa: E712
        newest_B1 = jnp.where(fits_BT, positions_BT, -1).max(axis=1, keepdims=True)
        slots_BT = len(self.pins) + positions_BT % self.ring
        written = (positions_BT >= 0) & (positions_BT > newest_B1 - self.ring)
        slots_BT = jnp.where(written, slots_BT, self.positions_BS.shape[1])
        if self.pins:
            pins = np.array(self.pins, np.int32)
            index_BT = jnp.minimum(jnp.searchsorted(pins, positions_BT), pins.size - 1)
            slots_BT = jnp.where(jnp.asarray(pins)[index_BT] == positions_BT, index_BT, slots_BT)
        return jnp.where(fits_BT, slots_BT, self.positions_BS.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCache(State):
    """The projected keys and values of a cross-attention memory: k [B, S, K, H], v [B, S, K, M].

    S = 0 before the prefill, which computes them from `ctx.memory_BSD`.
    """

    k_BSKH: jax.Array
    v_BSKM: jax.Array
    positions_BS: jax.Array

    @staticmethod
    def empty(batch: int, kv_heads: int, head_dim: int, *, dtype: Any) -> MemoryCache:
        """A memory without keys."""
        none_BSKH = jnp.zeros((batch, 0, kv_heads, head_dim), dtype)
        return MemoryCache(none_BSKH, none_BSKH.copy(), jnp.zeros((batch, 0), jnp.int32))

    def append(self, k_BSKH: jax.Array, v_BSKM: jax.Array, positions_BS: jax.Array) -> MemoryCache:
        """The memory with more keys appended."""
        held, new = jax.tree.leaves(self), (k_BSKH, v_BSKM, positions_BS)
        joined = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(held, new, strict=True))
        return MemoryCache(*joined)

    def view(self) -> HeldKeys:
        """The arrays of all keys."""
        return HeldKeys(self.k_BSKH, self.v_BSKM, self.positions_BS)
