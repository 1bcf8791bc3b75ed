"""Caches of 8 and 4 bits against NumPy, their size, and the newest tokens in full precision."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.caches import CacheOptions, KVCache, QuantizedKVCache, empty_kv_cache
from attention_jax.masks import Causal, Sinks, SlidingWindow
from attention_jax.mixers import Context, make_config

B, K, H, M, CAPACITY = 2, 2, 5, 3, 24
LARGEST = {"int8": 127, "int4": 7}

_append = jax.jit(QuantizedKVCache.append)


def empty(mask=None, **options) -> QuantizedKVCache:
    mask = Causal() if mask is None else mask
    return empty_kv_cache(B, CAPACITY, K, H, M, mask=mask, options=CacheOptions(**options))


def rounded(x: np.ndarray, quantize: str) -> np.ndarray:
    """What a code and its float32 scale stand for, by the formula, with float32 products."""
    scale = (np.abs(x).max(-1, keepdims=True) / np.float32(LARGEST[quantize])).astype(np.float32)
    codes = np.round(x / np.where(scale > 0, scale, 1))  # to nearest, ties to even
    assert np.abs(codes).max() <= LARGEST[quantize]
    return (codes.astype(np.float32) * scale).astype(np.float32)


def tokens(rng, T):
    """k and v of T tokens, whose heads and tokens differ in magnitude."""
    sizes = 10.0 ** rng.uniform(-3, 3, (2, B, T, K, 1))
    k, v = rng.normal(size=(B, T, K, H)) * sizes[0], rng.normal(size=(B, T, K, M)) * sizes[1]
    return k.astype(np.float32), v.astype(np.float32)


@pytest.mark.parametrize("quantize", LARGEST)
def test_codes_round_to_the_nearest_by_token_and_head(quantize):
    k, v = tokens(np.random.default_rng(0), CAPACITY)
    positions = np.tile(np.arange(CAPACITY), (B, 1))
    view = _append(empty(quantize=quantize), k, v, positions).view()
    for held, given in ((view.k_BSKH, k), (view.v_BSKM, v)):
        assert held.dtype == jnp.float32
        assert_allclose(held, rounded(given, quantize), rtol=3e-7)
        step = np.abs(given).max(-1, keepdims=True) / LARGEST[quantize]
        assert (np.abs(held - given) <= step * 0.500001).all()


@pytest.mark.parametrize("quantize", LARGEST)
def test_ties_zeros_nan_and_infinity(quantize):
    q = LARGEST[quantize]
    k = np.zeros((B, 6, K, H), np.float32)
    k[:, 0] = [q, 0.5, 1.5, -2.5, -q]
    k[:, 1, 0] = [np.nan, 1, 2, 3, 4]
    k[:, 2, 0] = [1, -np.inf, 2, 3, 4]
    k[:, 3, 1] = [0, 0, 0, 0, 1e-3]
    positions = np.tile(np.arange(6), (B, 1))
    held = np.asarray(_append(empty(quantize=quantize), k, k[..., :M], positions).view().k_BSKH)[:, :6]
    assert_array_equal(held[:, 0], np.broadcast_to(np.array([q, 0, 2, -2, -q], np.float32), (B, K, H)))
    assert np.isnan(held[:, 1:3, 0]).all() and (held[:, 1:3, 1] == 0).all()
    assert (held[:, 4:] == 0).all() and not np.signbit(held[:, 4:]).any()
    assert_allclose(held[:, 3, 1], k[:, 3, 1], rtol=1e-6)


@pytest.mark.parametrize("quantize, share", [("int8", 0.55), ("int4", 0.3)])
@pytest.mark.parametrize("H", [64, 128])
def test_memory_beside_bfloat16(quantize, share, H):
    """The arrays that exist, not the bits that they stand for; the newest 32 tokens take their part."""

    def size(**options):
        options = CacheOptions(jnp.bfloat16, **options)
        state = jax.eval_shape(lambda: empty_kv_cache(1, 4096, 2, H, H, mask=Causal(), options=options))
        return state.nbytes

    assert size(quantize=quantize) <= share * size()
    assert size(quantize=quantize, residual=32) <= (share + 0.01) * size()
    cache = empty(quantize=quantize)
    assert cache.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    "mask", [Causal(), SlidingWindow(7), (SlidingWindow(2) | Sinks(2)) & Causal()], ids=str
)
def test_exactly_the_newest_tokens_are_as_given(mask):
    """By position, in ragged rows, across the wraps of both rings, in view and concat_view."""
    R, T = 2, 3
    cache, rng = empty(mask, quantize="int4", residual=R, spare=1), np.random.default_rng(0)
    given = [{} for _ in range(B)]
    rewind = jax.jit(QuantizedKVCache.rewind)
    joined = jax.jit(QuantizedKVCache.concat_view)
    for step in range(10):
        k, v = tokens(rng, T)
        positions = np.full((B, T), -1)
        for b in range(B):
            count = rng.integers(1, T) if b else T
            positions[b, :count] = len(given[b]) + np.arange(count)
            positions[positions >= CAPACITY] = -1
        together = joined(cache, k, v, positions)
        cache = _append(cache, k, v, positions)
        for b in range(B):
            given[b] |= {int(p): (k[b, t], v[b, t]) for t, p in enumerate(positions[b]) if p >= 0}
            newest = max(given[b])
            for view in (cache.view(), together):
                for slot, p in enumerate(np.asarray(view.positions_BS[b])):
                    if p < 0 or (view is together and slot < cache.ring and p <= newest - cache.ring):
                        continue
                    for held, x in zip((view.k_BSKH, view.v_BSKM), given[b][int(p)], strict=True):
                        held = np.asarray(held[b, slot])
                        if p > newest - R:
                            assert_array_equal(held, x)
                        else:
                            assert_allclose(held, rounded(x, "int4"), rtol=3e-7)
        if step % 3 == 2:
            cache = rewind(cache, np.array([1, 0]))
            given[0].pop(max(given[0]))


KINDS = {
    "softmax": {"num_heads": 2, "mask": "(SlidingWindow(4) | Sinks(2)) & Causal()"},
    "differential": {"num_heads": 2, "num_kv_heads": 1},
    "mla": {"num_heads": 2, "latent_dim": 6, "head_dim": 4, "rotary_dim": 2},
    "nsa": {
        "num_heads": 2,
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "select_count": 3,
        "window": 5,
    },
    "forgetting": {"num_heads": 2, "mask": "SlidingWindow(4)"},
}


SLOW = {"differential", "forgetting"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_every_mixer_of_keys_and_values_decodes_from_codes(kind):
    """With all tokens kept in full precision too, the outputs have the same bits as without codes."""
    config = make_config(kind, **KINDS[kind])
    mixer = config.build(16, nnx.Rngs(0), causal=True)
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def mix(x_BTD, state, positions_BT):
        y_BTD, state, _ = nnx.merge(graphdef, params).mix(x_BTD, state, ctx=Context(positions_BT))
        return y_BTD, state

    x = np.random.default_rng(0).normal(size=(B, 16, 16)).astype(np.float32)

    def outputs(**options):
        state, ys = config.init_state(16, B, CAPACITY, cache=CacheOptions(**options)), []
        for start in range(0, 16, 4):
            positions = np.tile(np.arange(start, start + 4), (B, 1))
            y, state = mix(x[:, start : start + 4], state, positions)
            ys.append(y)
        return np.concatenate(ys, 1), state

    plain, _ = outputs()
    exact, state = outputs(quantize="int8", residual=CAPACITY)
    # The products read other layouts, so that sums may be in another order.
    assert_allclose(exact, plain, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(plain).max())
    codes, _ = outputs(quantize="int8")
    assert 0 < np.abs(codes - plain).max() < 0.02 * np.abs(plain).max()
    caches = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KVCache | QuantizedKVCache))
    assert any(isinstance(cache, QuantizedKVCache) for cache in caches)


def test_the_choice_is_made_in_one_place():
    sizes = (B, CAPACITY, K, H, M)
    assert isinstance(empty_kv_cache(*sizes, mask=Causal()), KVCache)
    cache = empty(quantize="int8", dtype=jnp.bfloat16)
    assert isinstance(cache, QuantizedKVCache) and cache.view().k_BSKH.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="KVCache does not store int4: call empty_kv_cache"):
        KVCache.empty(*sizes, mask=Causal(), options=CacheOptions(quantize="int4"))
    with pytest.raises(ValueError, match="cache capacity must be >= 1, got 0"):
        empty_kv_cache(B, 0, K, H, M, mask=Causal(), options=CacheOptions(quantize="int4"))


def test_rows_fork_and_overflow_as_in_other_caches():
    k, v = tokens(np.random.default_rng(0), 3)
    cache = _append(
        empty(quantize="int8", residual=2), k, v, np.array([[0, 1, 2], [CAPACITY - 1, CAPACITY, -1]])
    )
    assert_array_equal(cache.overflow(np.array([[3], [CAPACITY]])), [[False], [True]])
    forked = cache.fork(np.array([1, 1, 0]))
    for i, row in enumerate((1, 1, 0)):
        jax.tree.map(lambda x, y, i=i, row=row: assert_array_equal(x[i], y[row]), forked, cache)
    assert dataclasses.replace(cache, residual=1).residual == 1
