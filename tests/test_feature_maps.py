"""Feature maps against the similarities they approximate, and random features against their expectation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax import feature_maps
from attention_jax.feature_maps import FEATURE_MAPS

H = 6


@pytest.fixture(scope="module")
def pairs():
    """Queries and keys [5, H] of a few sizes."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 5, H)).astype(np.float32) * np.array([0.1, 0.5, 1, 2, 3], np.float32)[:, None]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("elu1", lambda x: np.where(x > 0, x + 1, np.exp(x))),
        ("relu", lambda x: np.where(x > 0, x, 0)),
        ("squared_relu", lambda x: np.where(x > 0, x, 0) ** 2),
        ("identity", lambda x: x),
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    ],
)
def test_maps_of_single_features(name, formula, pairs):
    q = pairs[0].astype(np.float64)
    assert_allclose(FEATURE_MAPS[name].phi(pairs[0]), formula(q), rtol=1e-5)
    assert FEATURE_MAPS[name].never_negative == bool((formula(q) >= 0).all())
    assert FEATURE_MAPS[name].phi(jnp.asarray(pairs[0], jnp.bfloat16)).dtype == jnp.float32
    assert {"elu1", "relu", "squared_relu", "identity", "softmax"} == set(FEATURE_MAPS)


def test_elu1_far_from_zero():
    """Small features keep their precision, large arguments send no Inf through the branch not taken."""
    x = jnp.array([-80.0, -20.0, 0.0, 100.0])
    assert_allclose(feature_maps.elu1(x), [np.exp(-80.0), np.exp(-20.0), 1, 101], rtol=1e-5)
    assert_allclose(jax.grad(lambda x: feature_maps.elu1(x).sum())(x), [np.exp(-80), np.exp(-20), 1, 1], 1e-5)


def test_taylor_features_multiply_to_the_polynomial(pairs):
    q, k = pairs.astype(np.float64)
    phi_q, phi_k = feature_maps.taylor2(pairs[0]), feature_maps.taylor2(pairs[1])
    assert phi_q.shape == (5, feature_maps.taylor2_features(H)) == (5, 1 + 6 + 21)
    u = q @ k.T
    assert_allclose(np.asarray(phi_q, np.float64) @ np.asarray(phi_k).T, 1 + u + u**2 / 2, rtol=1e-5)


def test_cosine_reweighting(pairs):
    """Products are those of the formula, and never negative, up to the ends of the horizon."""
    horizon, at = 11, np.array([0, 3, 5, 9, 10])
    q, k = (
        feature_maps.cos_reweighted(x[None, :, None], jnp.asarray(at)[None], horizon)[0, :, 0] for x in pairs
    )
    distance = at[:, None] - at
    relu_q, relu_k = np.maximum(pairs.astype(np.float64), 0)
    expected = relu_q @ relu_k.T * np.cos(np.pi / 2 * distance / horizon)
    products = np.asarray(q, np.float64) @ np.asarray(k).T
    assert_allclose(products, expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(q) >= 0).all() and (products >= 0).all() and q.shape == (5, 2 * H)


def test_hedgehog_is_a_softmax_of_a_learned_map_and_its_opposite(pairs):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(2, H, 3))
    x = np.stack([pairs[0], pairs[1]], axis=1)[None]
    y = np.asarray(feature_maps.hedgehog(jnp.asarray(x), jnp.asarray(w)))
    for head in range(2):
        z = pairs[head].astype(np.float64) @ w[head]
        e = np.exp(np.concatenate([z, -z], axis=1))
        assert_allclose(y[0, :, head], e / e.sum(1, keepdims=True), rtol=1e-5)


def test_orthogonal_directions_are_normal_vectors_at_right_angles():
    draw = jax.jit(jax.vmap(lambda key: feature_maps.random_directions(key, 2 * H + 2, H)))
    w = np.asarray(draw(jax.random.split(jax.random.key(0), 500)), np.float64)
    for block in (w[:, :H], w[:, H : 2 * H], w[:, 2 * H :]):
        products = block @ block.transpose(0, 2, 1)
        lengths = np.sqrt(np.einsum("bii->bi", products))
        cosines = products / (lengths[:, :, None] * lengths[:, None])
        assert_allclose(cosines, np.tile(np.eye(block.shape[1]), (500, 1, 1)), atol=1e-5)
        assert_allclose((lengths**2).mean(), H, rtol=0.05)
        assert_allclose((lengths**2).var(), 2 * H, rtol=0.2)  # of a chi-square with H degrees of freedom
    # Any one direction is N(0, I): no feature is preferred, and different blocks are independent.
    assert_allclose(np.einsum("bih,big->hg", w, w) / w[..., 0].size, np.eye(H), atol=0.06)
    assert np.abs(np.einsum("bih,bih->bi", w[:, :H], w[:, H : 2 * H]).mean(0)).max() < 4 * math.sqrt(H / 500)
    assert np.abs(w.mean((0, 1))).max() < 4 / math.sqrt(w[..., 0].size)


def _softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_random_features_converge_to_softmax_at_the_monte_carlo_rate():
    """The error of attention weights falls as m^(-1/2); orthogonal directions err less than independent."""
    seeds, most, width, T = 16, 4096, 16, 12
    rng = np.random.default_rng(3)
    q, k = 0.15 * rng.normal(size=(2, T, width)).astype(np.float32)
    truth = _softmax(q.astype(np.float64) @ k.T)
    sizes = [16, 64, 256, 1024, 4096]
    errors = {}
    for orthogonal in (True, False):

        def log_features(key, orthogonal=orthogonal):
            w = feature_maps.random_directions(key, most, width, orthogonal=orthogonal)
            return [feature_maps.log_positive_random(x, w) for x in (q, k)]

        log_q, log_k = jax.jit(jax.vmap(log_features))(jax.random.split(jax.random.key(5), seeds))
        phi_q, phi_k = (np.exp(np.asarray(x, np.float64)) for x in (log_q, log_k))
        squares = []
        for m in sizes:
            weights = phi_q[..., :m] @ phi_k[..., :m].transpose(0, 2, 1)
            estimate = weights / weights.sum(-1, keepdims=True)
            squares.append(((estimate - truth) ** 2).mean())
        errors[orthogonal] = np.sqrt(squares)
        slope = np.polyfit(np.log(sizes), np.log(errors[orthogonal]), 1)[0]
        assert -0.65 < slope < -0.35, slope
    assert errors[True][-1] < 0.05 * truth.max()
    # A block is 16 wide: from the first size on, every estimate is made of whole blocks.
    assert (errors[True] < errors[False]).all(), errors


def test_random_features_estimate_exp_without_bias():
    """One small product, many draws: the mean is within four of its own standard errors of exp(q.k)."""
    q, k = np.array([[0.5, -0.3], [0.2, 0.9]], np.float32)
    w = feature_maps.random_directions(jax.random.key(1), 40000, 2)
    products = (
        np.asarray(feature_maps.positive_random(q, w) * feature_maps.positive_random(k, w), np.float64)
        * 40000
    )
    assert abs(products.mean() - np.exp(q @ k)) < 4 * products.std() / math.sqrt(40000)
    assert_array_equal(products > 0, True)
