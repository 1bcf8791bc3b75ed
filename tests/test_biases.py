"""ALiBi against the published slopes; slicing of bias leaves against its transpose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.biases import ALiBi, ArrayBias, add_to_slices, alibi_slopes, slice_leaves
from attention_jax.ops.softmax import dot_product_attention, explain
from tests.cases import Gate
from tests.reference.positions import ALIBI_SLOPES


@pytest.mark.parametrize("heads", ALIBI_SLOPES)
def test_alibi_slopes_are_the_published_ones(heads):
    assert_allclose(alibi_slopes(heads), ALIBI_SLOPES[heads], rtol=1e-15)


def test_alibi_scores_follow_positions_and_global_heads():
    q, k = jnp.array([[7, 100]]), jnp.array([[9, 0, 100], [3, 7, -1]])
    found = ALiBi(12).score(jnp.array([3, 8, 11]), q, k)
    slopes = np.array([ALIBI_SLOPES[12][n] for n in (3, 8, 11)])
    distance = np.abs(np.asarray(q)[:, :, None] - np.asarray(k)[:, None])
    assert found.dtype == jnp.float32 and found.shape == (2, 3, 2, 3)
    assert_allclose(found, -slopes[None, :, None, None] * distance[:, None], rtol=1e-6)


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


@pytest.mark.parametrize("shape", [(3, 4, 10, 12), (1, 4, 10, 1), (3, 1, 1, 12), (1, 1, 1, 1)])
def test_array_bias_broadcasts_and_slices(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    cut = slice_leaves(ArrayBias(jnp.asarray(array)), batch=(2, 1), query=(4, 5), key=(8, 4))
    found = cut.score(jnp.array([3]), jnp.zeros((1, 5), int), jnp.zeros((1, 4), int))
    wanted = np.broadcast_to(array, (3, 4, 10, 12))[2:3, 3:4, 4:9, 8:12]
    assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)


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
    with pytest.raises(ValueError, match="Gate: a leaf .* axis .*, must be .* or 1") as error:
        explain(q, k, k, bias=bias)
    assert "\n" not in str(error.value)
