"""Key-value caches, which keep the keys that their mask may still need.

For a mask with cache span (lookback, pins), a cache has one slot per pinned position and a ring buffer of
`lookback + spare` slots. A pinned position has its own slot; any other position p uses ring slot
p % (lookback + spare). For a mask that keeps all keys, the ring is as long as the capacity and never wraps.
Every slot stores its position, which is < 0 for an empty slot. Attention uses these positions, so that the
order of the slots does not matter and left padding needs no special case.

`rewind` empties the slots of the last tokens. On a ring these have overwritten the tokens `lookback + spare`
positions before them, which no query after a rewind of `spare` tokens may attend to.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches.base import State, rewind_counts
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions
from attention_jax.caches.write import write_heads
from attention_jax.masks import Mask

_STATIC = {"static": True}
# `newest_B` of a row whose rewind could not be honoured. No append changes it, since it is the largest.
_LOST = np.iinfo(np.int32).max


class HeldKeys(NamedTuple):
    """The arrays of a cache: k [B, S, K, H], v [B, S, K, M] or None, positions [B, S], per_key."""

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    positions_BS: jax.Array
    per_key: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(State):
    """keys [B, K, slots, H], values [B, K, slots, M], positions int32 [B, slots].

    The keys of a head stand one after another, as a decoding step reads them. `k_BSKH` and `v_BSKM` are the
    same arrays in the order of the ops. The values are None if they are computed from the keys (a latent
    cache). `per_key` is a pytree of further arrays [B, slots, ...] with one entry per key, or None.
    `capacity` bounds positions: the largest position + 1. It is not the number of slots, which is smaller for
    a ring that wraps. `spare`: the slots of the ring beyond the lookback of its mask.

    newest_B: int32, the position of each row's newest token, one past the capacity included; -1 before the
    first, 2^31 - 1 for a lost row, whose traced rewind could not be honoured. oldest_B: int32, the oldest
    position that a rewind may make the newest; None if the ring does not wrap.
    """

    keys_BKSH: jax.Array
    values_BKSM: jax.Array | None
    positions_BS: jax.Array
    newest_B: jax.Array
    oldest_B: jax.Array | None
    capacity: int = dataclasses.field(metadata=_STATIC)
    pins: tuple[int, ...] = dataclasses.field(metadata=_STATIC, default=())
    spare: int = dataclasses.field(metadata=_STATIC, default=0)
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
        if options.quantize is not None:
            raise ValueError(f"KVCache does not store {options.quantize}: call empty_kv_cache")
        lookback, pins = mask.cache_span()
        pins = tuple(pin for pin in pins if pin < capacity)
        ring = capacity if lookback is None else max(lookback, 1) + options.spare
        if ring + len(pins) >= capacity:
            ring, pins = capacity, ()
        slots, wraps = ring + len(pins), ring < capacity
        values = None
        if value_dim is not None:
            values = jnp.zeros((batch, value_heads or kv_heads, slots, value_dim), options.storage_dtype)
        return KVCache(
            jnp.zeros((batch, kv_heads, slots, head_dim), options.storage_dtype),
            values,
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.full((batch,), -1, jnp.int32),
            jnp.full((batch,), -1, jnp.int32) if wraps else None,
            capacity,
            pins,
            options.spare if wraps else 0,
            jax.tree.map(lambda x: jnp.zeros((batch, slots, *x.shape), x.dtype), per_key),
        )

    @property
    def k_BSKH(self) -> jax.Array:
        """The keys by slot and head."""
        return self.keys_BKSH.swapaxes(-3, -2)

    @property
    def v_BSKM(self) -> jax.Array | None:
        """The values by slot and head."""
        return None if self.values_BKSM is None else self.values_BKSM.swapaxes(-3, -2)

    @property
    def ring(self) -> int:
        """The number of slots in the ring."""
        return self.positions_BS.shape[-1] - len(self.pins)

    @property
    def wraps(self) -> bool:
        """True if the ring is shorter than the capacity, so that new keys may overwrite old ones."""
        return self.ring < self.capacity

    @property
    def lost_B(self) -> jax.Array:
        """True for rows whose traced rewind could not be honoured; their outputs are NaN."""
        return self.newest_B == _LOST

    def append(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> KVCache:
        """The cache with the tokens at positions_BT written; tokens at positions < 0 are not written.

        Of tokens that share a ring slot only the newest is written. Positions must be below the capacity. A
        traced position cannot raise: tokens past the capacity are not written, and the caller must discard
        the output of their rows (see `overflow`). A rewind counts them like other tokens. Keys and values may
        have further tokens in front, which are ignored.
        """
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = self._slots(positions_BT)

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            # mode="drop": the scatter ignores the out-of-range slots of tokens that must not be written.
            return held.at[rows_B1, slots_BT].set(new.astype(held.dtype), mode="drop")

        newest_B, oldest_B = jnp.maximum(self.newest_B, positions_BT.max(1)), self.oldest_B
        return dataclasses.replace(
            self,
            keys_BKSH=write_heads(self.keys_BKSH, k_BTKH, slots_BT),
            values_BKSM=None if v_BTKM is None else write_heads(self.values_BKSM, v_BTKM, slots_BT),
            positions_BS=write(self.positions_BS, positions_BT),
            newest_B=newest_B,
            oldest_B=None if oldest_B is None else jnp.maximum(oldest_B, newest_B - self.spare),
            per_key=jax.tree.map(write, self.per_key, per_key),
        )

    def grown(self, empty: KVCache) -> KVCache:
        """The same keys in the slots of a larger empty cache of the same mixer."""
        if empty.positions_BS.shape == self.positions_BS.shape:
            return dataclasses.replace(self, **empty.static)
        if not empty.wraps:  # a position has the same slot in both

            def into(larger: jax.Array, held: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice(larger, held, (0,) * held.ndim)

            filled = jax.tree.map(into, empty, dataclasses.replace(self, **empty.static))
        else:
            filled = empty.append(*self.view())
        oldest_B = None
        if empty.wraps:
            oldest_B = jnp.maximum(
                -1 if self.oldest_B is None else self.oldest_B, self.newest_B - empty.spare
            )
            oldest_B = jnp.where(self.lost_B, self.newest_B, oldest_B).astype(jnp.int32)
        return dataclasses.replace(filled, newest_B=self.newest_B, oldest_B=oldest_B)

    @property
    def static(self) -> dict[str, Any]:
        """The fields that are not arrays."""
        return {"capacity": self.capacity, "pins": self.pins, "spare": self.spare}

    @property
    def most_rewound(self) -> int | None:
        """`spare` on a ring that wraps; None for a cache that keeps all tokens."""
        return self.spare if self.wraps else None

    def rewind(self, n_B: jax.Array) -> KVCache:
        """The cache without the last n_B[i] tokens of each row i; n_B: int [B], 0 keeps a row as it is.

        The positions of a row's tokens must be consecutive; tokens past the capacity count. A ring that wraps
        takes back at most `spare` tokens, in one call or several, before others are appended. For any other
        count, a traced row becomes lost: the output of all its later tokens is NaN.

        Raises: ValueError for n_B that is not integers [B], and for a concrete count that is negative, larger
        than the row's number of tokens, or not held by the ring.
        """
        n_B = rewind_counts(self, n_B)
        if not isinstance(n_B, jax.core.Tracer) and self.wraps:
            for row in np.flatnonzero(n_B > self.spare)[:1]:
                raise ValueError(_beyond_spare(row, n_B[row], self.spare))
        # A negative traced count is refused below; here it could overflow int32.
        target_B = self.newest_B - jnp.maximum(n_B, 0)
        rejected_BS = self.positions_BS > target_B[..., None]
        overwritten_B = False if self.oldest_B is None else target_B < self.oldest_B
        consecutive_B = self._held_after(target_B, rejected_BS)
        broken_B = consecutive_B == False  # noqa: E712
        fails_B = (n_B != 0) & ((n_B < 0) | broken_B | overwritten_B | self.lost_B)
        if not isinstance(fails_B, jax.core.Tracer):
            self._check_rewind(n_B, np.asarray(fails_B), self._counted(target_B, rejected_BS))
        return dataclasses.replace(
            self,
            positions_BS=jnp.where(rejected_BS & (fails_B == False)[..., None], -1, self.positions_BS),  # noqa: E712
            newest_B=jnp.where(fails_B, _LOST, target_B),
        )

    def _held_after(self, target_B: jax.Array, rejected_BS: jax.Array) -> jax.Array:
        """True for rows of which every position after target_B up to the newest was given to `append`.

        The slots of a cache that keeps all keys are its positions: one reduction of booleans, where XLA's CPU
        backend computes a sum in three.
        """
        if self.wraps:
            return self._counted(target_B, rejected_BS) == self.newest_B - target_B
        shape = self.positions_BS.shape
        slot_BS = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        taken_BS = (slot_BS > target_B[..., None]) & (slot_BS <= self.newest_B[..., None])
        empty_BS = taken_BS & (rejected_BS == False)  # noqa: E712
        return (target_B >= -1) & (jnp.any(empty_BS, axis=-1) == False)  # noqa: E712

    def _counted(self, target_B: jax.Array, rejected_BS: jax.Array) -> jax.Array:
        """The tokens of each row that a rewind takes back, those past the capacity included."""
        past_capacity_B = jnp.maximum(self.newest_B - jnp.maximum(target_B, self.capacity - 1), 0)
        return rejected_BS.sum(-1, dtype=jnp.int32) + past_capacity_B

    def _check_rewind(self, n_B, fails_B: np.ndarray, counted_B: jax.Array) -> None:
        """ValueError that names the first row of a concrete rewind that fails; leading axes are of layers."""
        for index in map(tuple, np.argwhere(fails_B)[:1]):
            row = index[-1]
            given = f"rewind: row {row} takes back {n_B[row]} tokens"
            if self.lost_B[index]:
                raise ValueError(f"{given}, but an earlier traced rewind lost it: use the state before that")
            if self.oldest_B is not None and 0 <= self.oldest_B[index] > self.newest_B[index] - n_B[row]:
                raise ValueError(_beyond_spare(row, n_B[row], self.newest_B[index] - self.oldest_B[index]))
            held = (self.positions_BS[index] >= 0).sum()
            if n_B[row] > held:
                raise ValueError(f"{given}, but it holds {held}: give at most as many")
            raise ValueError(
                f"{given}, but its last {n_B[row]} positions hold {counted_B[index]} tokens: positions must "
                "be consecutive"
            )

    def mark_lost(self, rows_B: jax.Array) -> KVCache:
        """The cache with these rows lost, boolean [B]: the output of their later tokens is NaN."""
        return dataclasses.replace(self, newest_B=jnp.where(rows_B, _LOST, self.newest_B))

    def newest_per_key(self) -> tuple[Any, jax.Array]:
        """`per_key` of each row's newest token, and whether the cache holds that token, boolean [B]."""
        slot_B1 = self.slot_of(self.newest_B)[..., None]
        held_B = jnp.take_along_axis(self.positions_BS, slot_B1, axis=-1)[..., 0] == self.newest_B
        axis = slot_B1.ndim - 1

        def pick(x: jax.Array) -> jax.Array:
            index = slot_B1.reshape(slot_B1.shape + (1,) * (x.ndim - slot_B1.ndim))
            return jnp.take_along_axis(x, index, axis=axis).squeeze(axis)

        return jax.tree.map(pick, self.per_key), held_B & (self.newest_B >= 0)

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

    def append_viewed(
        self, view: HeldKeys, k_BTKH: Any, v_BTKM: Any, positions_BT: jax.Array, per_key: Any = None
    ) -> KVCache:
        """`append` of tokens that are the last of `view`, from `concat_view`.

        They are read from there. What is written then depends on what was read before, so that XLA writes in
        place, where it would else copy the ring.
        """
        del k_BTKH, v_BTKM
        return self.append(view.k_BSKH, view.v_BSKM, positions_BT, per_key)

    def overflow(self, positions_BT: jax.Array) -> jax.Array:
        """True for tokens whose output must be NaN: at positions past the capacity, or of lost rows."""
        return (positions_BT >= self.capacity) | self.lost_B[:, None]

    def _slots(self, positions_BT: jax.Array) -> jax.Array:
        """The slot of each token; the number of slots (out of range) for tokens that must not be written."""
        fits_BT = self.overflow(positions_BT) == False  # noqa: E712
        if not self.wraps:
            return jnp.where((positions_BT >= 0) & fits_BT, positions_BT, self.positions_BS.shape[1])
        newest_B1 = jnp.where(fits_BT, positions_BT, -1).max(axis=1, keepdims=True)
        written_BT = (positions_BT >= 0) & (positions_BT > newest_B1 - self.ring)
        if self.pins:
            written_BT |= jnp.isin(positions_BT, jnp.array(self.pins, jnp.int32))
        return jnp.where(written_BT & fits_BT, self.slot_of(positions_BT), self.positions_BS.shape[1])

    def slot_of(self, positions: jax.Array) -> jax.Array:
        """The slot that belongs to each position."""
        slots = len(self.pins) + positions % self.ring
        if self.pins:
            pins = np.array(self.pins, np.int32)
            index = jnp.minimum(jnp.searchsorted(pins, positions), pins.size - 1)
            slots = jnp.where(jnp.asarray(pins)[index] == positions, index, slots)
        return slots


def _beyond_spare(row: int, n: int, possible: int) -> str:
    return (
        f"rewind: row {row} takes back {n} tokens, but its ring can take back {possible} more: raise "
        "CacheOptions.spare, which counts all rewinds between two appends"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCache(State):
    """The projected keys and values of a memory: keys [B, K, S, H], values [B, K, S, M].

    `k_BSKH` and `v_BSKM` are the same arrays in the order of the ops. S = 0 before the prefill, which
    computes them from `ctx.memory_BSD`.
    """

    keys_BKSH: jax.Array
    values_BKSM: jax.Array
    positions_BS: jax.Array

    @staticmethod
    def empty(batch: int, kv_heads: int, head_dim: int, *, dtype: Any) -> MemoryCache:
        """A memory without keys."""
        none_BKSH = jnp.zeros((batch, kv_heads, 0, head_dim), dtype)
        return MemoryCache(none_BKSH, none_BKSH.copy(), jnp.zeros((batch, 0), jnp.int32))

    @staticmethod
    def of(k_BSKH: jax.Array, v_BSKM: jax.Array, positions_BS: jax.Array | None) -> MemoryCache:
        """The memory of these keys; positions may be None for one call."""
        return MemoryCache(k_BSKH.swapaxes(1, 2), v_BSKM.swapaxes(1, 2), positions_BS)

    @property
    def k_BSKH(self) -> jax.Array:
        """The keys by slot and head."""
        return self.keys_BKSH.swapaxes(-3, -2)

    @property
    def v_BSKM(self) -> jax.Array:
        """The values by slot and head."""
        return self.values_BKSM.swapaxes(-3, -2)

    def append(self, k_BSKH: jax.Array, v_BSKM: jax.Array, positions_BS: jax.Array) -> MemoryCache:
        """The memory with more keys appended."""
        held, new = self.view(), (k_BSKH, v_BSKM, positions_BS)
        joined = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(held[:3], new, strict=True))
        return MemoryCache.of(*joined)

    def rewind(self, n_B: jax.Array) -> MemoryCache:
        """The memory itself: its keys are the encoder's, and no token of the row has added to them.

        Raises: ValueError for n_B that is not integers [B], and for a negative concrete count.
        """
        rewind_counts(self, n_B)
        return self

    def view(self) -> HeldKeys:
        """The arrays of all keys."""
        return HeldKeys(self.k_BSKH, self.v_BSKM, self.positions_BS)
