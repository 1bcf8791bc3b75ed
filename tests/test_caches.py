"""KVCache against a Python dict of all appended tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.caches import CacheOptions, KVCache
from attention_jax.masks import Causal, Full, Sinks, SlidingWindow

B, K, H, M = 3, 2, 4, 3
CAPACITY, CHUNK = 40, 12

CACHED = {
    "everything": Causal(),
    "ring": SlidingWindow(5),
    "ring of one": SlidingWindow(1),
    "ring and pins": (SlidingWindow(6) | Sinks(3)) & Causal(),
    "pins alone": Sinks(2),
    "one short of all": SlidingWindow(CAPACITY - 1),
    "bidirectional window": SlidingWindow(4, 3),
}
SLOTS = dict(zip(CACHED, (40, 5, 1, 9, 3, 39, 4), strict=True))

_append = jax.jit(KVCache.append)


def append(cache: KVCache, k, v, positions) -> KVCache:
    """`cache.append`, compiled for few lengths: chunks are padded with tokens that are none."""
    pad = -positions.shape[1] % CHUNK
    k, v = (np.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=np.nan) for x in (k, v))
    return _append(cache, k, v, np.pad(positions, ((0, 0), (0, pad)), constant_values=-1).astype(np.int32))


def empty(mask, **changes) -> KVCache:
    arguments = {"batch": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": H, "value_dim": M} | changes
    return KVCache.empty(**arguments, mask=mask)


def tokens(rng, positions_BT):
    """Random keys and values [B, T, K, H] and [B, T, K, M]."""
    B, T = positions_BT.shape
    k, v = rng.normal(size=(B, T, K, H)), rng.normal(size=(B, T, K, M))
    return k.astype(np.float32), v.astype(np.float32)


class Model:
    """What was appended: position -> (k, v), a dict for each row."""

    def __init__(self):
        self.rows = [{} for _ in range(B)]

    def append(self, k, v, positions):
        for b, row in enumerate(self.rows):
            for t, p in enumerate(positions[b]):
                if 0 <= p < CAPACITY:
                    row[int(p)] = (k[b, t], v[b, t])

    def check(self, cache, mask):
        """Every slot holds one token appended, and every token a later query may see is there."""
        cache = jax.tree.map(np.asarray, cache)
        for b, row in enumerate(self.rows):
            held = cache.positions_BS[b]
            live = np.flatnonzero(held >= 0)
            assert len(set(held[live])) == len(live), "a token stands in two slots"
            for slot in live:
                k, v = row[int(held[slot])]
                assert_array_equal(cache.k_BSKH[b, slot], k)
                assert_array_equal(cache.v_BSKM[b, slot], v)
            if row:
                later, past = np.arange(max(row), max(row) + CAPACITY), np.array(sorted(row))
                needed = past[mask.dense(later, past).any(0)]
                assert set(needed.tolist()) <= set(held[live].tolist())


def histories(seed):
    """Chunks of positions [B, CHUNK]: ragged, gaps of invalid tokens, left padding, some past the end."""
    rng = np.random.default_rng(seed)
    chunks, at = [], np.zeros(B, int)
    for size in rng.permutation([12, 1, 1, 4, 7, 1, 12, 12, 3, 12]):
        positions = np.full((B, CHUNK), -1)
        for b in range(B):
            count = 0 if rng.random() < 0.2 else rng.integers(1, size + 1)
            places = np.arange(CHUNK - count, CHUNK) if rng.random() < 0.5 else rng.permutation(CHUNK)[:count]
            positions[b, np.sort(places)] = at[b] + np.arange(count)
            at[b] += count
        chunks.append((positions.astype(np.int32), *tokens(rng, positions)))
    return chunks


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_holds_what_its_mask_needs(name):
    mask, longest = CACHED[name], 0
    for seed in range(8):
        cache, model = empty(mask), Model()
        for positions, k, v in histories(seed):
            cache = append(cache, k, v, positions)
            model.append(k, v, positions)
            model.check(cache, mask)
        longest = max(longest, *(len(row) for row in model.rows))
    assert longest == CAPACITY


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_is_as_small_as_its_mask_allows(name):
    cache = empty(CACHED[name])
    assert cache.positions_BS.shape == (B, SLOTS[name])
    assert cache.k_BSKH.shape == (B, SLOTS[name], K, H) and cache.v_BSKM.shape == (B, SLOTS[name], K, M)
    assert cache.wraps == (SLOTS[name] < CAPACITY) and cache.ring + len(cache.pins) == SLOTS[name]
    assert (cache.positions_BS == -1).all()


def test_a_prompt_longer_than_the_ring_keeps_its_end_and_its_pins():
    """In whatever order its tokens come: the order of a scatter's writes is not defined."""
    cache = empty((SlidingWindow(6) | Sinks(3)) & Causal())
    order = np.random.default_rng(1).permutation(30)
    positions = np.stack([np.arange(30), np.arange(30)[::-1], order])
    k, v = tokens(np.random.default_rng(0), positions)
    cache = append(cache, k, v, positions)
    for b in range(B):
        assert sorted(cache.positions_BS[b].tolist()) == [0, 1, 2, 24, 25, 26, 27, 28, 29]
        at = np.argsort(positions[b])[np.asarray(cache.positions_BS[b])]
        assert_array_equal(cache.k_BSKH[b], k[b, at])
        assert_array_equal(cache.v_BSKM[b], v[b, at])


@pytest.mark.parametrize("name", CACHED)
def test_invalid_tokens_change_no_bit(name):
    rng = np.random.default_rng(0)
    cache = empty(CACHED[name])
    start = np.tile(np.arange(9), (B, 1))
    cache = append(cache, *tokens(rng, start), start)
    invalid = np.full((B, 5), -1)
    k, v = tokens(rng, invalid)
    after = append(cache, k * np.nan, v * np.inf, invalid)
    jax.tree.map(assert_array_equal, after, cache)
    # Beside a valid token of another row.
    mixed = invalid.copy()
    mixed[1, 2] = 9
    after = append(cache, k, v, mixed)
    for b in (0, 2):
        jax.tree.map(lambda x, y, b=b: assert_array_equal(x[b], y[b]), after, cache)
    assert 9 in after.positions_BS[1] or name == "pins alone"


@pytest.mark.parametrize("name", CACHED)
def test_tokens_past_the_capacity_are_reported_and_not_written(name):
    rng = np.random.default_rng(0)
    mask = CACHED[name]
    cache, model = empty(mask), Model()
    for start in (0, 20, 34):
        positions = np.tile(np.arange(start, start + 14), (B, 1))
        k, v = tokens(rng, positions)
        cache = append(cache, k, v, positions)
        assert_array_equal(cache.overflow(jnp.asarray(positions)), positions >= CAPACITY)
        model.append(k, v, positions)
        model.check(cache, mask)
    assert cache.positions_BS.max() == CAPACITY - 1 or name == "pins alone"


def test_left_padding_puts_positions_where_they_belong():
    cache = empty(SlidingWindow(4), batch=2)
    positions = np.array([[-1, -1, 0, 1, 2, 3], [-1, 0, 1, 2, 3, 4]])
    rng = np.random.default_rng(0)
    k, v = tokens(rng, positions)
    cache = append(cache, k, v, positions)
    assert sorted(cache.positions_BS[0].tolist()) == [0, 1, 2, 3]
    assert sorted(cache.positions_BS[1].tolist()) == [1, 2, 3, 4]
    for b, p, t in ((0, 0, 2), (1, 4, 5)):
        slot = cache.positions_BS[b].tolist().index(p)
        assert_array_equal(cache.k_BSKH[b, slot], k[b, t])


def test_append_in_pieces_is_append_at_once():
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(24), (B, 1))
    k, v = tokens(rng, positions)
    for mask in CACHED.values():
        once = append(empty(mask), k, v, positions)
        pieces = empty(mask)
        for a in range(0, 24, 8):
            pieces = append(pieces, k[:, a : a + 8], v[:, a : a + 8], positions[:, a : a + 8])
        jax.tree.map(assert_array_equal, pieces, once)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_needs_a_positive_capacity(capacity):
    with pytest.raises(ValueError, match=f"cache capacity must be >= 1, got {capacity}"):
        empty(Full(), capacity=capacity)


def test_a_cache_keeps_its_dtype_and_is_not_mutated():
    cache = KVCache.empty(B, 8, K, H, M, mask=Full(), options=CacheOptions(jnp.bfloat16))
    before = jax.tree.map(np.asarray, cache)
    positions = np.tile(np.arange(4), (B, 1))
    after = append(cache, *tokens(np.random.default_rng(0), positions), positions)
    assert after.k_BSKH.dtype == after.v_BSKM.dtype == jnp.bfloat16 and after.positions_BS.dtype == jnp.int32
    jax.tree.map(assert_array_equal, jax.tree.map(np.asarray, cache), before)
    assert dataclasses.replace(after, capacity=9).capacity == 9
