"""ALiBi against the published slopes, T5's buckets against its formula; slices of leaves."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax import biases
from attention_jax.biases import (
    T5,
    ALiBi,
    ALiBiConfig,
    ArrayBias,
    Axes,
    Bias,
    T5Bias,
    add_to_slices,
    alibi_slopes,
    slice_leaves,
    t5_boundaries,
)
from attention_jax.ops.softmax import ChunkedConfig, dot_product_attention, explain
from tests.cases import Gate
from tests.reference import softmax as truth
from tests.reference.positions import ALIBI_SLOPES, t5_bucket


@pytest.mark.parametrize("heads", ALIBI_SLOPES)
def test_alibi_slopes_are_the_published_ones(heads):
    assert_allclose(alibi_slopes(heads), ALIBI_SLOPES[heads], rtol=1e-15)


@pytest.mark.parametrize("heads", ALIBI_SLOPES)
def test_alibi_slopes_have_a_factor_and_a_largest_exponent(heads):
    """A slope 2^-x of the published ones becomes scale 2^-(x e / 8), whatever the number of heads."""
    wanted = [0.3 * 2 ** (np.log2(slope) * 5.0 / 8.0) for slope in ALIBI_SLOPES[heads]]
    assert_allclose(alibi_slopes(heads, scale=0.3, max_exponent=5.0), wanted, rtol=1e-14)
    bias = ALiBiConfig(scale=0.3, max_exponent=5).of(heads)
    score = bias.score(jnp.arange(heads), jnp.array([[9]]), jnp.array([[7]]))
    assert_allclose(score[0, :, 0, 0], -2 * np.array(wanted), rtol=1e-6)


@pytest.mark.parametrize("name", ["scale", "max_exponent"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_alibi_refuses_slopes_that_are_no_penalty(name, value):
    # The config refuses what no number of a config may be before it says what a slope must be.
    for make, what in ((ALiBiConfig, name), (lambda **options: ALiBi(4, **options), f"ALiBi {name}")):
        allowed = "finite" if make is ALiBiConfig and not math.isfinite(value) else "finite and > 0"
        what = what if allowed == "finite" else f"ALiBi {name}"
        with pytest.raises(ValueError, match=f"^{what} must be {allowed}, got {value}"):
            make(**{name: value})


def test_alibi_scores_follow_positions_and_global_heads():
    q, k = jnp.array([[7, 100]]), jnp.array([[9, 0, 100], [3, 7, -1]])
    found = ALiBi(12).score(jnp.array([3, 8, 11]), q, k)
    slopes = np.array([ALIBI_SLOPES[12][n] for n in (3, 8, 11)])
    distance = np.abs(np.asarray(q)[:, :, None] - np.asarray(k)[:, None])
    assert found.dtype == jnp.float32 and found.shape == (2, 3, 2, 3)
    assert_allclose(found, -slopes[None, :, None, None] * distance[:, None], rtol=1e-6)


def test_alibi_with_products_of_bfloat16():
    """As Falcon-RW computes it: bfloat16(slope) * bfloat16(position), rounded, before the scale."""

    def rounded(x):
        return np.asarray(x).astype(jnp.bfloat16)

    q, k = np.array([[7, 2000]]), np.array([[0, 257, 1999], [3, 777, -1]])
    heads = np.array([3, 8, 11])
    bias = ALiBiConfig(scale=0.25, rounding="bfloat16").of(32)
    found = jax.jit(lambda *x: bias.score(*x))(jnp.array(heads), jnp.array(q), jnp.array(k))
    slopes = rounded(2 ** (-0.25 * (heads + 1)))
    q_BNT, k_BNS = (
        rounded(np.float64(slopes)[None, :, None] * np.float64(rounded(x))[:, None]).astype(np.float64)
        for x in (q, k)
    )
    assert_array_equal(found, 0.25 * (k_BNS[:, :, None] - q_BNT[..., None]))
    exact = ALiBi(32, 0.25).score(jnp.array(heads), jnp.array(q), jnp.array(k))
    assert np.abs(found - exact)[:, :, 1].max() > 0.05  # some keys are behind the other query
    with pytest.raises(ValueError, match="rounding must be one of bfloat16, None, got 'float16'"):
        ALiBiConfig(rounding="float16")


def test_alibi_of_a_decoded_token_is_not_zero():
    """One query at position 9 weighs its keys by distance, as row 9 of the full score matrix does."""
    q, k = np.zeros((1, 1, 4, 8), np.float32), np.zeros((1, 10, 4, 8), np.float32)
    v = np.broadcast_to(np.eye(10, dtype=np.float32)[None, :, None], (1, 10, 4, 10))
    out = jax.jit(lambda *x: dot_product_attention(*x, bias=ALiBi(4), q_positions=np.array([9])))(q, k, v)[
        0, 0
    ]
    wanted = np.exp(-np.outer(ALIBI_SLOPES[4], 9 - np.arange(10)))
    assert_allclose(out, wanted / wanted.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("heads", [0, -2])
def test_alibi_needs_heads(heads):
    with pytest.raises(ValueError, match=f"num_heads must be >= 1, got {heads}"):
        ALiBi(heads)


def test_t5_boundaries_of_the_published_setting():
    """32 buckets up to 128: bucket 16 + 16/3 log2(d / 16) or, bidirectional, 8 + 2 log2(d / 8)."""
    coarse = (19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
    assert t5_boundaries(32, 128) == (*range(1, 17), *coarse)
    # sqrt(2), 2, 2 sqrt(2), ... times 8; 16, 32 and 64 are reached exactly.
    assert t5_boundaries(16, 128) == (*range(1, 9), 12, 16, 23, 32, 46, 64, 91)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 14), (4, 3), (64, 10_000), (6, 1000)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_follow_the_published_formula(buckets, max_distance, bidirectional):
    table = np.arange(buckets, dtype=np.float32)[:, None] * [1, 100]
    bias = T5Bias(jnp.asarray(table, jnp.float32), bidirectional, max_distance)
    farthest = min(2 * max_distance, 3000)
    q, k = np.array([[farthest]]), np.arange(2 * farthest)[None]
    found = np.asarray(bias.score(jnp.array([1]), q, k))
    assert found.shape == (1, 1, 1, 2 * farthest) and found.dtype == np.float32
    options = {"bidirectional": bidirectional, "buckets": buckets, "max_distance": max_distance}
    wanted = [t5_bucket(int(j) - farthest, **options) for j in k[0]]
    differ = np.flatnonzero(found[0, 0, 0] != 100 * np.array(wanted))
    # The formula's logarithms may fall short of a whole number where the distance reaches it exactly.
    side = buckets // 2 if bidirectional else buckets
    exact, rest = side // 2, side - side // 2
    for d in (abs(int(j) - farthest) for j in differ):
        assert any(d**rest * exact**i == max_distance**i * exact**rest for i in range(rest)), d


@pytest.mark.parametrize(
    ("impl", "bidirectional"),
    [
        ("reference", False),
        ("chunked", True),
        pytest.param("reference", True, marks=pytest.mark.slow),
        pytest.param("chunked", False, marks=pytest.mark.slow),
    ],
)
def test_t5_output_and_the_tables_gradient_against_float64(impl, bidirectional):
    """Shuffled positions, grouped heads, several tiles, empty slots."""
    if impl == "chunked":
        impl = ChunkedConfig(query_tile=16, key_tile=32, key_unit=8)
    rng = np.random.default_rng(0)
    B, T, S, N, K, H = 2, 21, 35, 4, 2, 8
    q, do = (rng.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(B, S, K, H)).astype(np.float32) for _ in range(2))
    table = rng.normal(size=(8, N)).astype(np.float32)
    q_pos, k_pos = (rng.permuted(np.tile(np.arange(n) + lo, (B, 1)), axis=1) for n, lo in ((T, 20), (S, -1)))

    @functools.partial(jax.jit)
    def run(table):
        def attend(table):
            bias = T5Bias(table, bidirectional, 14)
            return dot_product_attention(q, k, v, bias=bias, q_positions=q_pos, k_positions=k_pos, impl=impl)

        out, vjp = jax.vjp(attend, table)
        return out, vjp(do)[0]

    options = {"bidirectional": bidirectional, "buckets": 8, "max_distance": 14}
    difference = k_pos[:, None, :] - q_pos[:, :, None]
    bucket = np.vectorize(lambda d: t5_bucket(int(d), **options))(difference)
    keep = np.broadcast_to((k_pos >= 0)[:, None, None], (B, N, T, S))
    exact = truth.Attention(q, k, v, keep, H**-0.5, bias=table.astype(float)[bucket].transpose(0, 3, 1, 2))
    ds = exact.backward(do, np.zeros((B, T, N)))["bias"]
    gradient = [[ds[:, n][bucket == row].sum() for n in range(N)] for row in range(8)]
    out, found = run(table)
    assert_allclose(out, exact.out, rtol=1e-5, atol=1e-5)
    assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)
    assert (np.abs(gradient) > 1e-3).sum() > 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"buckets": 3}, "T5 buckets must be even and >= 4, got 3"),
        ({"buckets": 2}, "T5 buckets must be even and >= 4, got 2"),
        ({"max_distance": 16}, "T5 max_distance must exceed buckets / 2 = 16, got 16"),
    ],
)
def test_t5_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        T5(**arguments)


@pytest.mark.parametrize(
    "shape, dtype, bidirectional, max_distance, message",
    [
        (
            (32, 3),
            float,
            False,
            128,
            r"T5Bias table must be \[buckets, 4\], one column per head, got \(32, 3\)",
        ),
        ((32,), float, False, 128, r"T5Bias table must be \[buckets, 4\]"),
        ((32, 4), int, False, 128, "T5Bias table must be floating point, got int32"),
        ((6, 4), float, True, 128, None),
        ((7, 4), float, False, 128, None),
        ((7, 4), float, True, 128, "T5Bias buckets must be an even number >= 4, got a table with 7 rows"),
        ((2, 4), float, True, 128, "T5Bias buckets must be an even number >= 4, got a table with 2 rows"),
        ((1, 4), float, False, 128, "T5Bias buckets must be >= 2, got a table with 1 rows"),
        ((32, 4), float, False, 16, "T5Bias max_distance must exceed 16, got 16"),
    ],
)
def test_t5_tables_that_do_not_fit(shape, dtype, bidirectional, max_distance, message):
    bias = T5Bias(jnp.zeros(shape, dtype), bidirectional, max_distance)
    q = jnp.zeros((1, 5, 4, 8))
    if message is None:
        assert explain(q, q, q, bias=bias).chosen
        return
    with pytest.raises(ValueError, match=message):
        explain(q, q, q, bias=bias)


def _gate(rng, B=3, N=4, T=10, S=12):
    floats = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N,), (B, T), (1, S)))
    return Gate(*floats, jnp.arange(B))


def test_slices_are_cut_where_axes_say_and_score_as_the_whole():
    bias = _gate(np.random.default_rng(0))
    positions = jnp.zeros((1, 10), int), jnp.zeros((1, 12), int)
    whole = bias.score(jnp.arange(4), *positions)

    @jax.jit
    def block(b, t, s):
        cut = slice_leaves(bias, batch=(b, 2), query=(t, 5), key=(s, 4))
        assert [x.shape for x in jax.tree.leaves(cut)] == [(4,), (2, 5), (1, 4), (2,)]
        return cut.score(jnp.array([1, 3]), positions[0][:, :5], positions[1][:, :4])

    assert_array_equal(block(1, 3, 6), whole[1:3, [1, 3], 3:8, 6:10])
    untouched = slice_leaves(bias, query=(2, 3))
    assert_array_equal(untouched.weight_N, bias.weight_N)
    assert_array_equal(untouched.past_BT, bias.past_BT[:, 2:5])
    assert_array_equal(untouched.present_BS, bias.present_BS)


def test_adding_to_slices_is_the_transpose_of_slicing():
    rng = np.random.default_rng(0)
    bias, total = _gate(rng), _gate(rng)
    windows = {"batch": (1, 2), "query": (3, 5), "key": (7, 5)}
    cut = slice_leaves(bias, **windows)
    block = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), cut)
    added = jax.jit(lambda total, block: add_to_slices(total, block, **windows))(total, block)
    for x, before, after, c, d in zip(*map(jax.tree.leaves, (bias, total, added, cut, block)), strict=True):
        assert after.dtype == before.dtype
        assert_allclose(((after - before) * x).sum(), (c * d).sum(), rtol=1e-4)


@pytest.mark.parametrize("leaf", ["past_BT", "present_BS", "ids_B"])
def test_a_leaf_of_the_wrong_length_is_refused(leaf):
    """Slices past an end would be clamped in silence."""
    bias = _gate(np.random.default_rng(0))
    object.__setattr__(bias, leaf, getattr(bias, leaf)[..., :2])
    q, k = jnp.zeros((3, 10, 4, 8)), jnp.zeros((3, 12, 4, 8))
    with pytest.raises(ValueError, match="Gate: a leaf of shape .* axis .*; it must be .* or 1") as error:
        explain(q, k, k, bias=bias)
    assert "\n" not in str(error.value)


def test_every_bias_keeps_its_promise():
    rng, sizes = np.random.default_rng(0), (3, 4, 10, 12)
    table, array = rng.normal(size=(8, 4)), rng.normal(size=(3, 4, 10, 12))
    some = [_gate(rng), ALiBi(4), T5Bias(jnp.asarray(table, jnp.float32), True, 14)]
    shapes = [array, array[:1, ..., :1]]
    for bias in (*some, *(ArrayBias(jnp.asarray(x, jnp.float32)) for x in shapes)):
        biases.check(bias, sizes)


def _own(score, axes=None, leaf=(2, 12)):
    """A bias of one leaf, per batch row and query by default."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Own(Bias):
        leaf: Any

        def axes(self):
            return (Axes(batch=0, query=1),) if axes is None else axes

    Own.score = score
    return Own(jnp.asarray(np.random.default_rng(0).normal(size=leaf), jnp.float32))


def _by_query(self, heads_N, q_pos_BT, k_pos_BS):
    return self.leaf[:, None, :, None]


BROKEN = {
    "none": (_own(_by_query), None),
    "unnamed query": (
        _own(_by_query, (Axes(batch=0),)),
        r"score of a block of sizes \(1, 2, 6, 8\) fails: ",
    ),
    "unnamed batch": (
        _own(_by_query, (Axes(query=1),)),
        r"score of a block of sizes \(1, 2, 6, 8\) fails: ",
    ),
    "an index by slot": (
        _own(lambda self, h, q, k: self.leaf[jnp.arange(len(h))][None, :, None, None], (Axes(),), (4,)),
        r"block of batch rows 0..0, heads 2..3, queries 0..5, keys 0..7 is not that part of the whole",
    ),
    "slots for positions": (
        _own(lambda self, h, q, k: 1.0 * jnp.arange(k.shape[1], dtype=jnp.float32), (Axes(),), (4,)),
        r"queries 0..5, keys 8..15 is not that part of the whole",
    ),
    "half": (
        _own(lambda self, h, q, k: _by_query(self, h, q, k).astype(jnp.bfloat16)),
        "float32 or float64, got bfloat16",
    ),
    "too few axes": (_own(_by_query, ()), r"axes\(\) has 0 entries for 1 leaves"),
    "no such axis": (_own(_by_query, (Axes(batch=0, query=2),)), "are not different axes of a leaf of shape"),
    "one axis twice": (
        _own(_by_query, (Axes(batch=0, query=0),)),
        "are not different axes of a leaf of shape",
    ),
    "a wrong size": (_own(_by_query, leaf=(2, 11)), "has size 11 on its query axis 1; it must be 12 or 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name):
    bias, message = BROKEN[name]
    if message is None:
        biases.check(bias)
        return
    with pytest.raises(ValueError, match=rf"\AOwn: [^\n]*{message}[^\n]*\Z"):
        biases.check(bias)


def test_what_is_no_bias_is_named():
    @dataclasses.dataclass(frozen=True)
    class Unregistered(Bias):
        leaf: Any

    with pytest.raises(
        TypeError, match="Unregistered is not a pytree: write @jax.tree_util.register_dataclass"
    ):
        biases.check(Unregistered(jnp.zeros(3)))
    with pytest.raises(TypeError, match="check takes a Bias, got"):
        biases.check(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"sizes .B, N, T, S. must be >= 2 each, got \(1, 4, 12, 16\)"):
        biases.check(ALiBi(4), (1, 4, 12, 16))
