"""Key-value caches: data and how it grows. What a cache keeps is what its mask may still need.

A cache of `slots` = pins + ring holds the keys of a mask whose cache span is (lookback, pins): position p
lives in its own slot where it is pinned, else in ring slot p % lookback. A mask that keeps everything
has a ring as long as the capacity, which never wraps. Every slot carries its position; < 0 is empty.
Attention reads positions, so a ring needs no rotation and left padding no case of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches.base import State
from attention_jax.masks import Mask

_STATIC = {"static": True}


class HeldKeys(NamedTuple):
    """What attention reads of a cache: k [B, S, K, H], v [B, S, K, M] or None, positions [B, S], per_key."""

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    positions_BS: jax.Array
    per_key: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(State):
    """k [B, slots, K, H], v [B, slots, K, M], positions int32 [B, slots].

    v is None where values are made from the keys (a latent cache). `per_key` is a pytree of further
    arrays [B, slots, ...] that belong to a key, or None. `capacity` is the largest position + 1, not the
    number of slots: a ring has fewer.
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
        dtype,
        value_heads: int | None = None,
        per_key: Any = None,
    ) -> KVCache:
        """A cache for positions 0 .. capacity-1 of `batch` rows, as small as `mask` allows.

        value_dim: None keeps no values. value_heads: where they are not as many as `kv_heads`. per_key:
        a pytree of ShapeDtypeStructs, further arrays of each key: shapes without batch and slot axes.
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
            values = jnp.zeros((batch, slots, value_heads or kv_heads, value_dim), dtype)
        return KVCache(
            jnp.zeros((batch, slots, kv_heads, head_dim), dtype),
            values,
            jnp.full((batch, slots), -1, jnp.int32),
            capacity,
            pins,
            jax.tree.map(lambda x: jnp.zeros((batch, slots, *x.shape), x.dtype), per_key),
        )

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.positions_BS.shape[1] - len(self.pins)

    @property
    def wraps(self) -> bool:
        """The ring is shorter than the capacity, so new keys may overwrite old ones."""
        return self.ring < self.capacity

    def append(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> KVCache:
        """The cache with the tokens at positions_BT written; positions < 0 are left out.

        Of tokens that share a ring slot only the newest is written. Positions must lie below the
        capacity: the caller checks what it knows before compiling and must discard the output of rows
        that exceed it (`overflow`), since a traced value cannot raise. Such tokens are not written.
        """
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = self._slots(positions_BT)

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            # Slots out of range are dropped by the scatter: the one place where that is what we want.
            return held.at[rows_B1, slots_BT].set(new.astype(held.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k_BSKH=write(self.k_BSKH, k_BTKH),
            v_BSKM=None if self.v_BSKM is None else write(self.v_BSKM, v_BTKM),
            positions_BS=write(self.positions_BS, positions_BT),
            per_key=jax.tree.map(write, self.per_key, per_key),
        )

    def view(self) -> HeldKeys:
        """The slots as they stand; empty ones have position -1."""
        return HeldKeys(self.k_BSKH, self.v_BSKM, self.positions_BS, self.per_key)

    def concat_view(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> HeldKeys:
        """The old slots and the new tokens side by side: what several new tokens attend to in a ring.

        Appending first would overwrite slots that the first of the new tokens still see.
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
        """True where a token lies past the capacity."""
        return positions_BT >= self.capacity

    def _slots(self, positions_BT: jax.Array) -> jax.Array:
        """The slot of each token, or the number of slots (out of range) for one not to be written."""
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
    """The keys and values of a cross-attention memory, projected once. k [B, S, K, H], v [B, S, K, M].

    S = 0 before the prefill, which fills it from `ctx.memory_BSD`.
    """

    k_BSKH: jax.Array
    v_BSKM: jax.Array
    positions_BS: jax.Array

    @staticmethod
    def empty(batch: int, kv_heads: int, head_dim: int, *, dtype: Any) -> MemoryCache:
        """No memory yet."""
        none_BSKH = jnp.zeros((batch, 0, kv_heads, head_dim), dtype)
        return MemoryCache(none_BSKH, none_BSKH.copy(), jnp.zeros((batch, 0), jnp.int32))

    def append(self, k_BSKH: jax.Array, v_BSKM: jax.Array, positions_BS: jax.Array) -> MemoryCache:
        """The memory with more keys behind those it holds."""
        held, new = jax.tree.leaves(self), (k_BSKH, v_BSKM, positions_BS)
        joined = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(held, new, strict=True))
        return MemoryCache(*joined)

    def view(self) -> HeldKeys:
        """All of it."""
        return HeldKeys(self.k_BSKH, self.v_BSKM, self.positions_BS)
