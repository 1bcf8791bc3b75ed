"""The linear attention family beyond the contract of tests/test_mixers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax import feature_maps
from attention_jax.mixers import (
    AttentionConfig,
    BasedConfig,
    Context,
    CosformerConfig,
    HedgehogConfig,
    LinearAttentionConfig,
    PerformerConfig,
)
from attention_jax.mixers.performer import redraw
from attention_jax.model import ModelConfig, init_params
from attention_jax.positions import RoPE
from tests.harness import Harness
from tests.mixers import BIDIRECTIONAL, D_MODEL, MIXERS
from tests.params import random_params
from tests.reference import linear as reference
from train.config.sections import OptimizerConfig
from train.optimizer import decay_mask, make_optimizer
from train.step import make_train_step

B, T = 2, 19
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
PERFORMER = MIXERS["performer"].config


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D_MODEL))


# A numerator of rotated features, no denominator, and a stabiliser per document.
@pytest.mark.parametrize(
    "name", ["linear-both", pytest.param("linear-identity-both", marks=pytest.mark.slow), "performer-both"]
)
def test_bidirectional_packed_documents(name, x):
    """A document sees itself, whole, and nothing else; NaN in slots without a token reaches nothing."""
    harness = Harness(BIDIRECTIONAL[name].config, causal=False)
    segments = jnp.array([0] * 7 + [-1] * 2 + [1] * 9 + [-1])
    positions = jnp.array([*range(7), -1, -1, *range(9), -1])
    ctx = Context(positions_BT=jnp.tile(positions, (B, 1)), segment_ids_BT=jnp.tile(segments, (B, 1)))
    padded = jnp.where((positions < 0)[:, None], jnp.nan, x)

    def loss(params, x):
        y, _ = harness.run(params, x, None, ctx)
        return (y**2).sum(), y

    (grads, grad_x), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(harness.params, padded)
    for start, stop in ((0, 7), (9, 18)):
        assert_allclose(y[:, start:stop], harness.parallel(x[:, start:stop]), **TOLERANCE)
    assert_array_equal(y[:, positions < 0], 0)
    assert_array_equal(grad_x[:, positions < 0], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("name", "causal"), [("linear-rope", True), ("performer", True), ("performer", False)]
)
def test_gradients_are_those_of_the_reference(name, causal, x):
    """Every parameter's, along a random direction, against differences of the float64 twin.

    No gradient passes through Performer's stabilisers: the quotient does not depend on them.
    """
    row = MIXERS[name] if causal else BIDIRECTIONAL[f"{name}-both"]
    harness = Harness(row.config, causal=causal)
    x = x[:1, :9]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(x.shape[1:])
    loss = jax.jit(jax.grad(lambda p: (harness.run(p, x, None, Context())[0][0] * weight).sum()))
    grads = jax.tree.leaves(nnx.to_pure_dict(loss(harness.params)))
    leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(harness.params))
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(harness.params))]
    for index, grad in enumerate(grads):
        if names[index] == "random_directions":
            assert_array_equal(grad, 0)
            continue
        direction, values = rng.standard_normal(grad.shape), []
        for step in (1e-5, -1e-5):
            moved = [p + step * direction if i == index else p for i, p in enumerate(leaves)]
            y = row.reference(jax.tree.unflatten(treedef, moved), x[0], None)
            values.append((y * weight).sum())
        assert_allclose((grad * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=2e-4, atol=2e-4)


def test_a_bidirectional_mixer_has_no_state():
    mixer = nnx.eval_shape(lambda: LinearAttentionConfig().build(D_MODEL, nnx.Rngs(0), causal=False))
    with pytest.raises(ValueError, match="linear has no state in a bidirectional model"):
        mixer.init_state(1, 8)


@pytest.mark.parametrize("name", [name for name, row in MIXERS.items() if row.impls[0] == "chunked"])
def test_the_state_does_not_grow(name):
    mixer = nnx.eval_shape(lambda: MIXERS[name].config.build(D_MODEL, nnx.Rngs(0), causal=True))
    short, long = (jax.eval_shape(lambda size=size: mixer.init_state(1, size)) for size in (1, 10**9))
    assert short == long and jax.tree.leaves(long)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(long))


def _scaled(params, **factors):
    """The parameters with the leaves below some names multiplied."""

    def scale(path, leaf):
        return leaf * np.float32(np.prod([f for name, f in factors.items() if f"'{name}'" in str(path)]))

    return jax.tree_util.tree_map_with_path(scale, params)


@pytest.mark.parametrize(
    ("factors", "holds"),
    [
        ({"k": 16.0, "random_directions": 5.0}, lambda largest: np.median(largest) < -104),
        ({"q": 0.3, "k": 3.0, "random_directions": 40.0}, lambda largest: largest.max() > 89),
    ],
    ids=["most-vanish", "some-overflow"],
)
def test_performer_is_right_whatever_the_norms_of_keys(factors, holds, x):
    """Keys whose features float32 does not hold; growing along the text, and shrinking."""
    harness = Harness(PERFORMER)
    params = _scaled(harness.params, **factors)
    plain = nnx.to_pure_dict(params)
    # Rows of one norm but for the trend: the reference's own exponentials must fit float64.
    growing = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * jnp.linspace(5.0, 7.0, T)[:, None]
    for row in (growing, growing[:, ::-1]):
        y = harness.call(params, row, None, Context())[0]
        expected = reference.performer(plain, row[0], causal=True, heads=4, kv_heads=2)
        assert_allclose(y[0], expected, rtol=2e-3, atol=2e-3)
    k = (growing @ plain["k"]["kernel"] + plain["k"]["bias"]).reshape(B, T, 2, 8) / 8**0.25
    logs = feature_maps.log_positive_random(k, plain["random_directions"])
    assert holds(np.asarray(logs.max(-1)))


def test_performer_approaches_softmax_attention(x):
    """The same projections in both, 2048 directions: outputs differ by the estimate's error alone."""
    harness = Harness(PerformerConfig(num_features=2048))
    params = _scaled(harness.params, q=0.4, k=0.4)
    mixer = nnx.merge(harness.graphdef, params)
    w = feature_maps.random_directions(jax.random.key(0), 2048, 8)
    mixer.random_directions[...] = w
    _, params = nnx.split(mixer)
    y = harness.call(params, x, None, Context())[0]
    softmax = Harness(AttentionConfig())
    given = nnx.to_pure_dict(params)
    theirs = jax.tree_util.tree_map_with_path(
        lambda path, leaf: given[path[0].key][path[1].key], softmax.params
    )
    expected = softmax.call(theirs, x, None, Context())[0]
    assert np.std(y - expected) < 0.03 * np.std(expected)


def test_random_directions_are_drawn_for_each_layer_and_can_be_redrawn():
    mixer = PerformerConfig(num_heads=2, num_features=12)
    model = ModelConfig(vocab_size=11, d_model=16, num_layers=2, mixers=(mixer,))
    drawn = init_params(model, jax.random.key(0))["stacks"]["0"]["mixer"]["random_directions"]
    assert drawn.shape == (2, 12, 8) and np.abs(drawn[0] - drawn[1]).max() > 0.1  # a draw for each layer

    params = random_params(dataclasses.replace(model, num_layers=1))
    assert not decay_mask(params)["stacks"]["0"]["mixer"]["random_directions"]
    params["stacks"]["0"]["mixer"]["random_directions"] = np.asarray(drawn)
    again = redraw(params, jax.random.key(7))
    assert _changed(params, again) == {"random_directions"}
    w = np.asarray(again["stacks"]["0"]["mixer"]["random_directions"])
    assert np.abs(w[0] - w[1]).max() > 0.1
    products = w[0, :8] @ w[0, :8].T
    assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-4)
    with pytest.raises(ValueError, match="no performer mixer"):
        redraw({"out": {"kernel": np.ones(2)}}, jax.random.key(0))


@pytest.mark.slow
def test_random_directions_are_not_trained():
    mixer = PerformerConfig(num_heads=2, num_features=12, chunk_size=6)
    model = ModelConfig(vocab_size=11, d_model=16, num_layers=1, mixers=(mixer,))
    params, optimizer = random_params(model), OptimizerConfig(weight_decay=0.1)
    step = make_train_step(model, optimizer, 4)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 11
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}
    given = jax.tree.map(jnp.array, params)  # the step may reuse its arguments' memory
    after, *_ = step(given, make_optimizer(optimizer, 4).init(given), batch, np.int32(0), jax.random.key(1))
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert _changed(params, after) == names - {"random_directions"}


def _changed(before, after):
    """The names of leaves with another bit."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {path[-1].key for (path, old), new in pairs if not np.array_equal(old, new)}


def test_cosformer_has_a_fixed_horizon(x):
    """Weights do not know the current length, and past the horizon nothing is made up."""
    config = CosformerConfig(horizon=12, chunk_size=8)
    harness = Harness(config)
    y = harness.parallel(x[:, :12])
    assert_allclose(harness.parallel(x[:, :5]), y[:, :5], **TOLERANCE)
    with pytest.raises(ValueError, match="19 tokens exceed cosformer's horizon 12; increase horizon"):
        harness.parallel(x)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    lost = harness.parallel(x, Context(positions_BT=positions))
    assert_allclose(lost[:, :12], y, **TOLERANCE)
    assert np.isnan(lost[:, 12:]).all()
    # Nor do tokens past it reach the state.
    _, state = harness.cached(x[:, :12], (12,))
    ctx = Context(positions_BT=positions[:, 12:])
    beyond, after = harness.call(harness.params, x[:, 12:], state, ctx)
    jax.tree.map(assert_array_equal, state, after)
    assert np.isnan(beyond).all()
    # Where both sides are seen, no token of a row that is too long sees all the others.
    positions = jnp.stack([jnp.arange(T), jnp.where(jnp.arange(T) < 12, jnp.arange(T), -1)])
    both = Harness(config, causal=False).parallel(x, Context(positions_BT=positions))
    assert np.isnan(both[0]).all() and np.isfinite(both[1]).all()
    assert_array_equal(both[1, 12:], 0)


def test_rope_encodes_relative_positions(x):
    harness = Harness(MIXERS["linear-rope"].config)
    ctx = Context(positions_BT=jnp.tile(jnp.arange(T) + 100, (B, 1)))
    assert_allclose(harness.parallel(x, ctx), harness.parallel(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_support_gives_zero(causal):
    """relu features that share no support with any key: 0, and no NaN in the gradient."""
    harness = Harness(LinearAttentionConfig(num_heads=2, feature_map="relu"), causal=causal)
    x = jnp.zeros((1, 4, D_MODEL))

    def loss(params):
        y = harness.run(params, x, None, Context())[0]
        return y.sum(), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(harness.params)
    assert_array_equal(y, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_hedgehog_starts_as_the_identity():
    mixer = HedgehogConfig(num_kv_heads=2).build(D_MODEL, nnx.Rngs(0), causal=True)
    for leaf, heads in ((mixer.map_q, 4), (mixer.map_k, 2)):
        assert_array_equal(leaf[...], np.tile(np.eye(8), (heads, 1, 1)))


@pytest.mark.parametrize("config", [BasedConfig(), PERFORMER], ids=lambda config: config.kind)
def test_bfloat16_models_sum_in_float32(config, x):
    exact = Harness(config)
    mixer = nnx.eval_shape(lambda: config.build(D_MODEL, nnx.Rngs(0), causal=True, dtype=jnp.bfloat16))
    graphdef, _ = nnx.split(mixer)
    call = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))
    y = call(exact.params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = exact.parallel(x)
    assert np.abs(y.astype(jnp.float32) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (LinearAttentionConfig, {"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        (LinearAttentionConfig, {"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
        (LinearAttentionConfig, {"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        (LinearAttentionConfig, {"feature_map": "exp"}, "feature_map must be one of elu1, .*, got 'exp'"),
        (LinearAttentionConfig, {"feature_map": "identity", "normalize": True}, "set normalize: false"),
        (LinearAttentionConfig, {"rope": RoPE(width=10)}, "RoPE width 10 exceeds head_dim 8"),
        (PerformerConfig, {"num_features": 0}, "num_features must be >= 1, got 0"),
        (CosformerConfig, {"horizon": 0}, "horizon must be >= 1, got 0"),
        (BasedConfig, {"feature_dim": 0}, "feature_dim must be >= 1, got 0"),
        (HedgehogConfig, {"head_dim": 0}, "head_dim must be >= 1, got 0"),
    ],
)
def test_bad_configs(config, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**arguments).build(D_MODEL, nnx.Rngs(0), causal=True)
    assert "\n" not in str(error.value)


def test_bad_calls(x):
    harness = Harness(LinearAttentionConfig())
    with pytest.raises(ValueError, match=r"needs ctx\.positions_BT"):
        harness.call(harness.params, x, harness.state(), Context())
    ids = jnp.zeros((B, T), int)
    with pytest.raises(ValueError, match="one document per row"):
        harness.call(harness.params, x, harness.state(), Context(positions_BT=ids, segment_ids_BT=ids))
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        Harness(LinearAttentionConfig(), impl="fast").parallel(x)
