"""`rewind` of key-value states: after append and rewind, a state is one that never saw the tokens.

The reference of every test gets the same calls, with the tokens that were taken back marked invalid.
Positions, keys, values and outputs are compared bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attention_jax.caches import (
    CacheOptions,
    KVCache,
    MemoryCache,
    QuantizedKVCache,
    empty_kv_cache,
    fork_all,
    rewind_all,
)
from attention_jax.masks import Causal, Sinks, SlidingWindow
from attention_jax.mixers import (
    AttentionConfig,
    Context,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    LatentAttentionConfig,
    NSAConfig,
    make_config,
)
from attention_jax.model import ModelConfig, apply, init_params, init_state
from attention_jax.ops.two_float import TwoFloat
from attention_jax.positions import RoPE

B, K, H, M, T, SPARE, CAPACITY = 3, 2, 4, 3, 4, 3, 64
OPTIONS = CacheOptions(spare=SPARE)

MASKS = {
    "everything": Causal(),
    "ring": SlidingWindow(5),
    "ring of one": SlidingWindow(1),
    "ring and pins": (SlidingWindow(6) | Sinks(3)) & Causal(),
    "pins alone": Sinks(2),
}

_append, _rewind = jax.jit(KVCache.append), jax.jit(KVCache.rewind)


def empty(mask, options=OPTIONS, **changes) -> KVCache:
    sizes = {"batch": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": H, "value_dim": M} | changes
    per_key = {"c": jax.ShapeDtypeStruct((2,), jnp.float32)}
    return empty_kv_cache(**sizes, mask=mask, options=options, per_key=per_key)


def tokens(rng, T=T):
    """k, v and per_key of T tokens."""
    shapes = (B, T, K, H), (B, T, K, M), (B, T, 2)
    k, v, c = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return k, v, {"c": c}


class History:
    """Ragged calls and rewinds; `calls` holds the positions of every call, -1 for tokens taken back since."""

    def __init__(self, seed: int, capacity: int = CAPACITY, steps: int = 40, most: int = SPARE):
        self.rng = np.random.default_rng(seed)
        self.capacity, self.steps, self.most = capacity, steps, most
        self.calls: list[np.ndarray] = []
        self.next = np.zeros(B, int)

    def append(self) -> np.ndarray:
        """The positions [B, T] of the next call, with invalid tokens in front, behind and between."""
        positions = np.full((B, T), -1, np.int32)
        for b in range(B):
            count = min(self.rng.choice([0, 1, 3, 4]), self.capacity - self.next[b])
            places = np.sort(self.rng.permutation(T)[:count])
            positions[b, places] = self.next[b] + np.arange(count)
        self.next += (positions >= 0).sum(1)
        self.calls.append(positions.copy())
        return positions

    def rewind(self, limit_B) -> np.ndarray:
        """Counts [B] up to `most` and `limit_B`, whose tokens `calls` no longer has."""
        n_B = self.rng.integers(0, self.most + 1, B) * (self.rng.random(B) < 0.3)
        n_B = np.minimum(n_B, np.minimum(limit_B, self.next))
        self.next -= n_B
        for positions in self.calls:
            positions[positions >= self.next[:, None]] = -1
        return n_B.astype(np.int32)


def possible(cache) -> np.ndarray:
    """How many tokens of each row a cache can take back."""
    oldest_B = getattr(cache, "oldest_B", None)
    return np.full(B, CAPACITY) if oldest_B is None else np.asarray(cache.newest_B - oldest_B)


def visible(cache: KVCache, lookback: int | None, b: int) -> dict:
    """Slot, key, value and per_key by position, of the tokens that a later query may see."""
    cache = jax.tree.map(np.asarray, cache)
    oldest = -1 if lookback is None else cache.newest_B[b] + 1 - lookback
    return {
        int(p): (s, cache.k_BSKH[b, s], cache.v_BSKM[b, s], cache.per_key["c"][b, s])
        for s, p in enumerate(cache.positions_BS[b])
        if p >= max(oldest, 0) or (p >= 0 and p in cache.pins)
    }


@pytest.mark.parametrize("name", MASKS)
def test_a_rewound_cache_never_saw_the_tokens(name):
    """Rewinds of 0 to 3 tokens of each row, also into earlier calls, past many wraps of the ring."""
    mask = MASKS[name]
    lookback, _ = mask.cache_span()
    for seed in range(4):
        cache, history, given = empty(mask), History(seed), []
        for _ in range(history.steps):
            positions = history.append()
            given.append(tokens(history.rng))
            cache = _append(cache, given[-1][0], given[-1][1], positions, given[-1][2])
            for _ in range(2):
                cache = _rewind(cache, history.rewind(possible(cache)))
        never = empty(mask)
        for positions, (k, v, c) in zip(history.calls, given, strict=True):
            never = _append(never, k, v, positions, c)
        assert_array_equal(cache.newest_B, never.newest_B)
        assert (cache.newest_B > 16).all()
        for b in range(B):
            jax.tree.map(assert_array_equal, visible(cache, lookback, b), visible(never, lookback, b))


def test_spare_slots_are_all_that_a_ring_gets():
    for mask, slots in ((SlidingWindow(5), 8), ((SlidingWindow(6) | Sinks(3)) & Causal(), 12), (Sinks(2), 6)):
        assert empty(mask).positions_BS.shape == (B, slots)
    for mask in (Causal(), SlidingWindow(CAPACITY - SPARE)):
        cache = empty(mask)
        assert cache.positions_BS.shape == (B, CAPACITY) and not cache.wraps and cache.oldest_B is None


def test_zero_changes_no_bit():
    cache, history = empty(SlidingWindow(5)), History(0)
    for _ in range(6):
        positions = history.append()
        k, v, c = tokens(history.rng)
        cache = _append(cache, k, v, positions, c)
    mixed = cache.rewind(np.array([0, 2, 0]))
    for b in (0, 2):
        jax.tree.map(lambda x, y, b=b: assert_array_equal(x[b], y[b]), mixed, cache)
    assert mixed.newest_B[1] == cache.newest_B[1] - 2
    jax.tree.map(assert_array_equal, _rewind(cache, np.zeros(B, np.int32)), cache)


def filled(mask, counts, options=OPTIONS, **changes) -> KVCache:
    """A cache whose row b holds counts[b] tokens."""
    cache, rng = empty(mask, options, **changes), np.random.default_rng(0)
    for start in range(0, max(counts), T):
        positions = np.tile(np.arange(start, start + T), (B, 1))
        positions = np.where(positions < np.array(counts)[:, None], positions, -1).astype(np.int32)
        k, v, c = tokens(rng)
        cache = _append(cache, k, v, positions, c)
    return cache


WRONG = {
    "shape": (Causal(), [1, 1], r"n_B must be integers \[3\], got int64 \[2\]"),
    "dtype": (Causal(), [1.0, 1.0, 0.0], r"n_B must be integers \[3\], got float64"),
    "negative": (Causal(), [0, -1, 0], "row 1 takes back -1 tokens"),
    "more than there are": (Causal(), [0, 0, 4], "row 2 takes back 4 tokens, but it holds 3"),
    "an empty row": (SlidingWindow(5), [0, 0, 0], None),
    "more than spare": (
        SlidingWindow(5),
        [4, 0, 0],
        "row 0 takes back 4 tokens, but its ring can take back 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_count_is_refused_by_row_and_number(name):
    mask, n_B, message = WRONG[name]
    cache = filled(mask, (20, 9, 3))
    if message is None:
        cache.rewind(np.array(n_B))
        return
    with pytest.raises(ValueError, match=message) as error:
        cache.rewind(np.array(n_B))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_two_rewinds_take_back_no_more_than_the_spare_slots():
    cache = filled(SlidingWindow(5), (20, 20, 20)).rewind(np.array([2, 1, 0]))
    with pytest.raises(ValueError, match="row 0 takes back 2 tokens, but its ring can take back 1 more"):
        cache.rewind(np.array([2, 2, 3]))
    cache = cache.rewind(np.array([1, 2, 3]))
    assert_array_equal(cache.newest_B, [16, 16, 16])
    # A token appended since is one more.
    k, v, c = tokens(np.random.default_rng(0), 1)
    cache = cache.append(k, v, np.array([[17], [17], [-1]]), c).rewind(np.array([1, 1, 0]))
    assert_array_equal(cache.newest_B, [16, 16, 16])


def test_positions_with_gaps_are_refused():
    k, v, c = tokens(np.random.default_rng(0))
    cache = empty(Causal()).append(k, v, np.array([[0, 1, 2, 7]] * B), c)
    with pytest.raises(ValueError, match="its last 2 positions hold 1 tokens: positions must be consecutive"):
        cache.rewind(np.array([0, 2, 0]))
    assert_array_equal(cache.rewind(np.array([1, 0, 0])).newest_B, [6, 7, 7])


def test_a_row_can_go_back_to_nothing_and_begin_again():
    for mask in (MASKS["everything"], MASKS["ring and pins"]):
        cache = filled(mask, (3, 2, 1)).rewind(np.array([3, 2, 1]))
        assert_array_equal(cache.newest_B, [-1] * B)
        assert (cache.positions_BS < 0).all()
        rng = np.random.default_rng(1)
        k, v, c = tokens(rng)
        positions = np.tile(np.arange(T), (B, 1))
        again, new = (_append(x, k, v, positions, c) for x in (cache, empty(mask)))
        for b in range(B):
            jax.tree.map(assert_array_equal, visible(again, None, b), visible(new, None, b))


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(5)], ids=str)
def test_tokens_past_the_capacity_count(mask):
    """They are not written, and a rewind takes them back before those that are."""
    full = filled(mask, (7, 8, 6), capacity=8)
    k, v, c = tokens(np.random.default_rng(1))
    positions = np.array([[7, 8, 9, -1], [8, 9, -1, -1], [6, -1, -1, -1]], np.int32)
    over = full.append(k, v, positions, c)
    assert_array_equal(over.newest_B, [9, 9, 6])
    back = over.rewind(np.array([3, 2, 1]))
    assert_array_equal(back.newest_B, full.newest_B)
    lookback, _ = mask.cache_span()
    for b in range(B):
        jax.tree.map(assert_array_equal, visible(back, lookback, b), visible(full, lookback, b))
    part = over.rewind(np.array([1, 1, 0]))
    assert part.overflow(np.array([[7], [8], [9]])).ravel().tolist() == [False, True, True]
    assert_array_equal(part.rewind(np.array([2, 1, 1])).newest_B, full.newest_B)


def test_a_cache_of_one_slot():
    cache = empty(SlidingWindow(5), capacity=1)
    k, v, c = tokens(np.random.default_rng(0), 1)
    cache = cache.append(k, v, np.zeros((B, 1), np.int32), c).rewind(np.array([1, 0, 1]))
    assert cache.positions_BS.ravel().tolist() == [-1, 0, -1]


def test_the_same_call_twice_is_one():
    cache = filled(SlidingWindow(5), (12, 12, 12))
    k, v, c = tokens(np.random.default_rng(3))
    positions = np.tile(np.arange(12, 16), (B, 1))
    once = cache.append(k, v, positions, c)
    twice = once.append(k, v, positions, c)
    jax.tree.map(assert_array_equal, twice, once)
    assert_array_equal(twice.rewind(np.array([3, 3, 3])).newest_B, [12] * B)


def test_a_traced_count_that_cannot_be_honoured_loses_its_row():
    cache = filled(SlidingWindow(5), (20, 9, 0))
    for n_B in ([4, 3, 0], [-1, 0, 1], [0, 10, 0]):
        lost = _rewind(cache, np.array(n_B, np.int32))
        wrong = [n < 0 or n > SPARE or n > newest + 1 for n, newest in zip(n_B, cache.newest_B, strict=True)]
        assert_array_equal(lost.lost_B, wrong)
        after = _rewind(lost, np.zeros(B, np.int32))
        k, v, c = tokens(np.random.default_rng(0), 1)
        after = after.append(k, v, np.full((B, 1), 21, np.int32), c)
        assert_array_equal(after.lost_B, wrong)
        assert_array_equal(after.overflow(np.full((B, 1), 21))[:, 0], wrong)
        with pytest.raises(ValueError, match="but an earlier traced rewind lost it"):
            after.rewind(np.array(wrong).astype(int))


def test_the_ring_of_the_newest_tokens_limits_a_traced_rewind():
    """The codes of all tokens could go back further, but no longer in the precision that was asked for."""
    cache = empty(Causal(), CacheOptions(spare=1, quantize="int8", residual=2), batch=1)
    k, v, c = (x[:1] for x in jax.tree.leaves(tokens(np.random.default_rng(0))))
    cache = jax.jit(QuantizedKVCache.append)(cache, k, v, np.arange(T)[None], {"c": c})
    for n, lost in ((1, False), (2, True)):
        after = jax.jit(QuantizedKVCache.rewind)(cache, np.array([n]))
        assert after.overflow(np.array([[T]])).tolist() == [[lost]]


def test_the_stacked_state_of_scanned_layers_rewinds_each_layer():
    layers = [filled(SlidingWindow(5), (20, 9, 3)), filled(SlidingWindow(5), (12, 30, 20))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    n_B = np.array([2, 3, 0])
    back = stacked.rewind(n_B)
    for i, layer in enumerate(layers):
        jax.tree.map(lambda x, y, i=i: assert_array_equal(x[i], y), back, layer.rewind(n_B))
    with pytest.raises(ValueError, match="row 0 takes back 2 tokens, but its ring can take back 1 more"):
        back.rewind(np.array([2, 0, 0]))


def test_the_memory_of_an_encoder_stays():
    memory = MemoryCache.empty(2, K, H, dtype=jnp.float32)
    assert memory.rewind(np.array([5, 0])) is memory
    with pytest.raises(ValueError, match="row 0 takes back -1"):
        memory.rewind(np.array([-1, 0]))


# Mixers: outputs after append and rewind.

D = 16
MIXERS = {
    "ring and pins": AttentionConfig(num_heads=2, mask=(SlidingWindow(5) | Sinks(2)) & Causal(), rope=RoPE()),
    "all keys": AttentionConfig(num_heads=2, num_kv_heads=1, bias="alibi"),
    "mla": LatentAttentionConfig(num_heads=2, latent_dim=6, head_dim=4, rotary_dim=2, mask=SlidingWindow(5)),
    "forgetting": ForgettingAttentionConfig(num_heads=2, mask=SlidingWindow(5)),
    "nsa": NSAConfig(
        num_heads=2,
        rope=RoPE(),
        compress_block=4,
        compress_stride=2,
        select_block=4,
        select_count=3,
        window=5,
    ),
    "differential": DifferentialAttentionConfig(num_heads=2, num_kv_heads=1, mask=SlidingWindow(5)),
}
QUANTIZED = CacheOptions(spare=SPARE, quantize="int8")


@functools.cache
def _compiled(name):
    mixer = MIXERS[name].build(D, nnx.Rngs(0), causal=True)
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def mix(x_BTD, state, positions_BT):
        y_BTD, state, _ = nnx.merge(graphdef, params).mix(x_BTD, state, ctx=Context(positions_BT))
        return y_BTD, state

    return mix, jax.jit(lambda state, n_B: state.rewind(n_B))


def limits(state) -> np.ndarray:
    """How many tokens of each row a state can take back."""
    caches = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KVCache))
    return np.min([possible(cache) for cache in caches if isinstance(cache, KVCache)], axis=0)


@pytest.mark.parametrize(
    "name, options",
    [(name, OPTIONS) for name in MIXERS]
    + [pytest.param(name, QUANTIZED, marks=pytest.mark.slow) for name in MIXERS],
    ids=lambda x: x if isinstance(x, str) else x.quantize or "plain",
)
def test_outputs_after_a_rewind_have_the_same_bits(name, options):
    config, (mix, rewind) = MIXERS[name], _compiled(name)
    history, outputs, inputs = History(1), [], []
    start = state = config.init_state(D, B, CAPACITY, cache=options)
    for _ in range(history.steps):
        positions = history.append()
        inputs.append(history.rng.normal(size=(B, T, D)).astype(np.float32))
        y_BTD, state = mix(inputs[-1], state, positions)
        outputs.append(y_BTD)
        state = rewind(state, history.rewind(limits(state)))
    assert history.next.min() > 4 * (5 + SPARE), "the rings have wrapped several times"
    kept = 0
    for x_BTD, y_BTD, positions in zip(inputs, outputs, history.calls, strict=True):
        never_BTD, start = mix(x_BTD, start, positions)
        valid_BT = positions >= 0
        assert_array_equal(np.asarray(y_BTD)[valid_BT], np.asarray(never_BTD)[valid_BT])
        assert np.isfinite(np.asarray(y_BTD)[valid_BT]).all()
        kept += valid_BT.sum()
    assert kept == history.next.sum()
    if name == "forgetting":
        jax.tree.map(assert_array_equal, state.total_BN, start.total_BN)
    if name == "nsa":
        ends_BC = state.compressed.positions_BC
        assert_array_equal(ends_BC, start.compressed.positions_BC)
        for a, b in zip(state.compressed[:2], start.compressed[:2], strict=True):
            assert_array_equal(a[ends_BC >= 0], b[ends_BC >= 0])


def test_the_sum_of_forgetting_attention_is_that_of_the_newest_token():
    """Also where invalid tokens follow it, whose sums may have other low words."""
    state = MIXERS["forgetting"].init_state(D, B, CAPACITY)
    state = dataclasses.replace(state, total_BN=TwoFloat(*np.full((2, B, 2), 7, np.float32)))
    c_BTN = TwoFloat(*np.arange(2 * B * T * 2, dtype=np.float32).reshape(2, B, T, 2))
    positions = np.array([[0, 1, -1, -1], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    k = np.zeros((B, T, 2, 8), np.float32)
    total = state.append(k, k, positions, c_BTN).total_BN
    for new, words in zip(total, c_BTN, strict=True):
        assert_array_equal(new, np.stack([words[0, 1], words[1, 3], [7, 7]]))


def test_spare_slots_spare_the_copy_of_the_ring():
    """A block of spare + 1 tokens is appended and attended in place; a longer one needs the old ring, too."""
    mix, _ = _compiled("mla")
    state = MIXERS["mla"].init_state(D, B, CAPACITY, cache=OPTIONS)

    def shapes(T):
        x, positions = jnp.zeros((B, T, D)), jnp.zeros((B, T), jnp.int32)
        return mix.lower(x, state, positions).as_text()

    ring = 5 + SPARE
    assert f"tensor<{B}x{ring + SPARE + 1}x" not in shapes(SPARE + 1)
    assert f"tensor<{B}x{ring + SPARE + 2}x" in shapes(SPARE + 2)


@pytest.mark.parametrize("name", ["ring and pins", "all keys", "mla", "forgetting", "nsa"])
def test_a_lost_row_gives_nan_and_its_neighbours_do_not(name):
    mix, rewind = _compiled(name)
    config = MIXERS[name]
    state = config.init_state(D, B, CAPACITY, cache=OPTIONS)
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    for start in (0, 4, 8):
        _, state = mix(x, state, np.tile(np.arange(start, start + T), (B, 1)))
    state = rewind(state, np.array([0, 13, 2], np.int32))
    y, state = mix(x, state, np.array([[12, 13, 14, 15]] * 2 + [[10, 11, 12, 13]]))
    assert np.isnan(y[1]).all() and np.isfinite(y[0]).all() and np.isfinite(y[2]).all()
    y, _ = mix(x, rewind(state, np.array([0, 1, 0], np.int32)), np.array([[16, 17, -1, -1]] * B))
    assert np.isnan(y[1, :2]).all() and np.isfinite(y[0]).all()


def test_nsa_loses_a_row_in_all_branches_when_one_cannot_take_it_back():
    state = MIXERS["nsa"].init_state(D, 2, 8, cache=CacheOptions(spare=1))
    assert state.tail.wraps and state.window.wraps and not state.selected.wraps
    positions, x = np.tile(np.arange(8, dtype=np.int32), (2, 1)), np.ones((2, 8, 2, 8), np.float32)
    state = dataclasses.replace(
        state,
        **{name: getattr(state, name).append(x, x, positions) for name in ("selected", "window", "tail")},
    )
    for refusing, other in (("tail", "window"), ("window", "tail")):
        free = dataclasses.replace(getattr(state, other), oldest_B=jnp.array([-1, -1]))
        after = jax.jit(lambda s, n: s.rewind(n))(
            dataclasses.replace(state, **{other: free}), np.array([2, 1])
        )
        for name in ("selected", "window", "tail"):
            assert_array_equal(getattr(after, name).lost_B, [True, False], err_msg=f"{refusing} {name}")


@pytest.mark.parametrize("scan", [False, True])
def test_all_layers_rewind_and_fork_together(scan):
    """Of unrolled and of scanned layers, whose states have a layer axis in front."""
    window = make_config("softmax", num_heads=2, mask="SlidingWindow(3)")
    forgetting = make_config("forgetting", num_heads=2)
    config = ModelConfig(
        vocab_size=13, d_model=8, num_layers=3, mixers=(window, forgetting), scan_layers=scan, mlp_width=8
    )
    params = init_params(config, jax.random.key(0))
    run = jax.jit(lambda tokens, state, at: apply(config, params, tokens, state, ctx=Context(at))[:2])
    ids = np.random.default_rng(0).integers(0, 13, (2, 12))
    at = np.tile(np.arange(4), (2, 1))
    start = jax.jit(lambda: init_state(config, 2, 20, cache=CacheOptions(spare=3)))()
    _, state = run(ids[:, :4], start, at)
    _, state = run(ids[:, 4:8], state, at + 4)
    back = jax.jit(rewind_all)(state, np.array([1, 3]))
    _, never = run(ids[:, :4], start, at)
    _, never = run(ids[:, 4:8], never, np.array([[4, 5, 6, -1], [4, -1, -1, -1]]))
    last = np.array([[7, 8, 9, 10], [5, 6, 7, 8]])
    (a, _), (b, _) = run(ids[:, 8:], back, last), run(ids[:, 8:], never, last)
    assert_array_equal(a, b)
    forked = jax.jit(fork_all)(back, np.array([1, 0]))
    swapped, _ = run(ids[::-1, 8:], forked, last[::-1])
    assert_array_equal(swapped[::-1], a)
    with pytest.raises(ValueError, match="row 1 takes back 4 tokens"):
        rewind_all(state, np.array([0, 4]))


def test_a_quantised_cache_rewinds_its_codes_and_its_newest_tokens():
    options = CacheOptions(spare=SPARE, quantize="int8", residual=3)
    append, rewind = jax.jit(QuantizedKVCache.append), jax.jit(QuantizedKVCache.rewind)
    mask = SlidingWindow(6)
    cache, history, given = empty(mask, options), History(2), []
    for _ in range(history.steps):
        positions = history.append()
        given.append(tokens(history.rng))
        cache = append(cache, given[-1][0], given[-1][1], positions, given[-1][2])
        cache = rewind(cache, history.rewind(possible(cache.recent)))
    never = empty(mask, options)
    for positions, (k, v, c) in zip(history.calls, given, strict=True):
        never = append(never, k, v, positions, c)
    views = []
    for state in (cache, never):
        k_BSKH, v_BSKM, positions_BS, per_key = state.view()
        heads = {"keys_BKSH": k_BSKH.swapaxes(1, 2), "values_BKSM": v_BSKM.swapaxes(1, 2)}
        views.append(dataclasses.replace(state.codes, positions_BS=positions_BS, per_key=per_key, **heads))
    for b in range(B):
        jax.tree.map(assert_array_equal, *(visible(view, 6, b) for view in views))
    with pytest.raises(ValueError, match="row 0 takes back 4 tokens, but its ring can take back 3"):
        cache.rewind(np.array([4, 0, 0]))
