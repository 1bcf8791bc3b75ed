"""Mixers for bidirectional models only, over the table BIDIRECTIONAL_ONLY: formulas, padding, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.mixers import Context, LinformerConfig, NystromformerConfig, make_mixer
from attention_jax.mixers.nystromformer import DepthwiseConv, pseudo_inverse, segment_means
from attention_jax.model import ModelConfig, apply
from tests import marks
from tests.mixers import BIDIRECTIONAL_ONLY, D_MODEL
from tests.params import random_params
from tests.reference import lowrank

B, T, PADDED = 2, 19, 24
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def drawn(config):
    """(graphdef, parameters): kernels that keep the size of what they meet, small biases."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: config.build(D_MODEL, nnx.Rngs(0))))
    rng = np.random.default_rng(7)

    def draw(leaf):
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 25
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return graphdef, jax.tree.map(draw, abstract)


@dataclasses.dataclass
class Harness:
    """A built mixer with random parameters behind a jitted call."""

    config: object

    def __post_init__(self):
        self.graphdef, self.params = drawn(self.config)
        self.call = jax.jit(self.run)

    def run(self, params, x, ctx):
        return nnx.merge(self.graphdef, params)(x, ctx=ctx)

    def __call__(self, x, ctx=None):
        return self.call(self.params, x, ctx or Context())


@pytest.fixture(scope="module", params=marks.params(BIDIRECTIONAL_ONLY))
def case(request):
    row = BIDIRECTIONAL_ONLY[request.param]
    return row, Harness(row.config)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((B, T, D_MODEL), np.float32)


def padded(x, left: int, fill=np.nan):
    """x between empty slots that hold `fill`, `left` of them in front, and the context that says so."""
    right = PADDED - left - x.shape[1]
    positions = np.array([-1] * left + list(range(x.shape[1])) + [-1] * right)
    wide = np.pad(np.asarray(x), ((0, 0), (left, right), (0, 0)), constant_values=fill)
    return jnp.asarray(wide), Context(positions_BT=jnp.tile(positions, (len(x), 1)))


def test_equals_the_reference(case, x):
    """19 tokens: no multiple of the landmarks, fewer than Linformer's columns."""
    row, harness = case
    y, params = harness(x), nnx.to_pure_dict(harness.params)
    for b in range(B):
        assert_allclose(y[b], row.reference(params, x[b]), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name, row in BIDIRECTIONAL_ONLY.items() if row.slow])
def test_a_variant_equals_its_reference(name, x):
    row = BIDIRECTIONAL_ONLY[name]
    harness = Harness(row.config)
    assert_allclose(harness(x)[0], row.reference(nnx.to_pure_dict(harness.params), x[0]), **TOLERANCE)


def test_a_row_that_fills_the_segments_equals_the_reference(case):
    """24 tokens: whole segments, all of Linformer's columns."""
    row, harness = case
    x = jax.random.normal(jax.random.key(2), (B, PADDED, D_MODEL))
    assert_allclose(harness(x)[0], row.reference(nnx.to_pure_dict(harness.params), x[0]), **TOLERANCE)


def test_padding_on_either_side_changes_nothing(case, x):
    """What invalid slots hold, NaN included, changes no bit; rows of invalid tokens are exactly 0."""
    _, harness = case
    alone = harness(x)
    for left in (0, 2, PADDED - T):
        y = harness(*padded(x, left))
        assert_allclose(y[:, left : left + T], alone, **TOLERANCE)
        assert_array_equal(np.delete(y, np.s_[left : left + T], axis=1), 0)
        assert_array_equal(harness(*padded(x, left, fill=7.0)), y)
    empty = Context(positions_BT=jnp.full((B, PADDED), -1))
    assert_array_equal(harness(padded(x, 0)[0], empty), 0)


def test_rows_of_different_lengths_are_alone_in_their_batch(case, x):
    """A batch of 19 and 4 tokens: fewer tokens than landmarks, too."""
    row, harness = case
    wide, ctx = padded(x, 0)
    ctx = Context(positions_BT=ctx.positions_BT.at[1, 4:].set(-1))
    y, params = harness(wide, ctx), nnx.to_pure_dict(harness.params)
    assert_allclose(y[0, :T], row.reference(params, x[0]), **TOLERANCE)
    assert_allclose(y[1, :4], row.reference(params, x[1, :4]), **TOLERANCE)


def test_gradients_are_finite_and_zero_at_invalid_tokens(case, x):
    _, harness = case
    wide, ctx = padded(x, 2)

    def loss(params, x):
        return jnp.sum(jnp.sin(harness.run(params, x, ctx)))

    params, features = jax.jit(jax.grad(loss, argnums=(0, 1)))(harness.params, wide)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(params))
    assert_array_equal(np.delete(features, np.s_[2 : 2 + T], axis=1), 0)
    assert (np.abs(features[:, 2 : 2 + T]).max(-1) > 0).all()


def test_gradients_equal_those_of_the_reference(case, x):
    """By central differences of the float64 reference along a random direction of the features."""
    row, harness = case
    params = nnx.to_pure_dict(harness.params)
    rng = np.random.default_rng(0)
    weights, direction = rng.normal(size=(2, T, D_MODEL))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(weights * harness.run(harness.params, x, Context())[0])))(x)
    ends = [row.reference(params, np.float64(x[0]) + h * direction) for h in (1e-4, -1e-4)]
    expected = np.sum(weights * (ends[0] - ends[1])) / 2e-4
    assert_allclose(np.sum(np.float64(grad[0]) * direction), expected, rtol=2e-5)


@pytest.mark.parametrize("sharing", ["none", "head", "kv"])
def test_linformer_with_an_identity_projection_is_full_attention(sharing, x):
    harness = Harness(LinformerConfig(length=T, projected_length=T, sharing=sharing))
    for name in ("k_rows", "v_rows") if sharing != "kv" else ("k_rows",):
        harness.params[name]["kernel"].set_value(
            np.broadcast_to(np.eye(T, dtype=np.float32), harness.params[name]["kernel"].shape)
        )
    expected = lowrank.softmax_attention(nnx.to_pure_dict(harness.params), x[0], heads=4)
    assert_allclose(harness(x)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("iterations, error", [(6, 5e-2), (12, 5e-4), (16, 1e-5)])
def test_nystromformer_with_all_landmarks_is_full_attention(iterations, error, x):
    """S S^+ S = S, as far as the iteration has come; the paper's six stop two percent short of it here."""
    config = NystromformerConfig(landmarks=T, iterations=iterations, conv_width=None)
    harness = Harness(config)
    expected = lowrank.softmax_attention(nnx.to_pure_dict(harness.params), x[0], heads=4)
    distance = np.abs(harness(x)[0] - expected).max() / np.abs(expected).max()
    assert distance < error
    assert iterations > 6 or distance > 1e-3  # more iterations are worth asking for


def test_the_pseudo_inverse_is_that_of_each_matrix_alone():
    rng = np.random.default_rng(0)
    a = np.exp(rng.normal(size=(2, 3, 5, 5)) + 3 * np.eye(5)).astype(np.float32)
    a /= a.sum(-1, keepdims=True)
    a[1] *= 50  # a neighbour in the batch changes nothing
    found = jax.jit(pseudo_inverse, static_argnums=1)(a, 24)
    for i in np.ndindex(2, 3):
        assert_allclose(found[i] @ a[i], np.eye(5), atol=2e-4)
    two = jax.jit(pseudo_inverse, static_argnums=1)(a, 2)
    for i in np.ndindex(2, 3):
        assert_allclose(two[i], lowrank.inverse(np.float64(a[i]), 2), rtol=1e-4, atol=1e-5)


@functools.cache
def _means(segments: int):
    return jax.jit(lambda x, valid: segment_means(x, valid, segments))


def test_segment_means_of_any_length():
    """Every number of tokens from none to all, with holes, against exact fractions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 23, 1, 3)).astype(np.float32)
    for segments in (1, 4, 7):
        for count in range(24):
            valid = np.zeros((1, 23), bool)
            valid[0, np.sort(rng.permutation(23)[:count])] = True
            kept = np.where(valid[..., None, None], x, 0)
            found = _means(segments)(kept, valid)[0, :, 0]
            expected = (
                lowrank.means(np.float64(x[0, valid[0], 0]), segments) if count else np.zeros_like(found)
            )
            assert_allclose(found, expected, atol=2e-6)
    assert_allclose(
        segment_means(x[:, :20], None, 5)[0, :, 0], x[0, :20, 0].reshape(5, 4, 3).mean(1), rtol=1e-6
    )


@pytest.mark.parametrize("width", [1, 3, 33])
@pytest.mark.parametrize("length", [1, 31, 65])
def test_the_banded_convolution_is_a_convolution(width, length):
    rng = np.random.default_rng(0)
    conv = DepthwiseConv(width, 2, kernel_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    v = rng.normal(size=(1, length, 2, 1)).astype(np.float32)
    y = jax.jit(conv)(v)
    for n in range(2):
        kernel = np.float64(conv.kernel[...][:, n])
        full = np.convolve(v[0, :, n, 0], kernel[::-1])  # a correlation: tap w meets token t + w - W // 2
        assert_allclose(y[0, :, n, 0], full[width // 2 : width // 2 + length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linformer", "nystromformer"])
def test_rejected_calls(kind, x):
    with pytest.raises(ValueError, match=f"^mixers.0: {kind} cannot be causal: .*the future included"):
        ModelConfig(
            d_model=D_MODEL,
            mixers=({"linformer": LinformerConfig, "nystromformer": NystromformerConfig}[kind](),),
        )
    with pytest.raises(ValueError, match=f"{kind} cannot be causal"):
        make_mixer(kind, D_MODEL, rngs=nnx.Rngs(0), causal=True)
    mixer = make_mixer(kind, D_MODEL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"{kind} has no state"):
        mixer.init_state(1, 8)
    with pytest.raises(ValueError, match=f"{kind} has no state"):
        mixer.mix(x, {"k": 0}, ctx=Context(positions_BT=jnp.arange(T)[None]))
    with pytest.raises(ValueError, match=f"{kind} mixes all tokens of a row .* set data.packing to stream"):
        mixer(x, ctx=Context(segment_ids_BT=jnp.zeros((B, T), int)))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (LinformerConfig, {"length": 0}, "length must be >= 1, got 0"),
        (LinformerConfig, {"projected_length": 0}, "projected_length must be >= 1, got 0"),
        (LinformerConfig, {"length": 8, "projected_length": 9}, "projected_length 9 exceeds length 8"),
        (NystromformerConfig, {"landmarks": 0}, "landmarks must be >= 1, got 0"),
        (NystromformerConfig, {"iterations": 0}, "iterations must be >= 1, got 0"),
        (NystromformerConfig, {"conv_width": 4}, "conv_width must be odd and >= 1, got 4"),
        (NystromformerConfig, {"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
    ],
)
def test_bad_configs(cls, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**arguments).build(D_MODEL, nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_linformer_beyond_its_length(x):
    harness = Harness(LinformerConfig(length=T - 1, projected_length=4))
    with pytest.raises(ValueError, match=f"{T} tokens exceed its length {T - 1}; increase length"):
        harness(x)
    # A traced position cannot raise: the row that holds it is NaN, its neighbour is not.
    positions = np.tile(np.arange(8), (B, 1))
    positions[0] += T - 8
    y = harness(x[:, :8], Context(positions_BT=jnp.asarray(positions)))
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_attention_dropout_follows_the_key(x):
    harness = Harness(LinformerConfig(length=T, projected_length=4, dropout=0.5))
    plain, one, again, two = (
        harness(x, Context(dropout_key=key))
        for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    assert_array_equal(one, again)
    assert min(np.abs(one - two).max(), np.abs(one - plain).max()) > 1e-2


@pytest.mark.parametrize("name", ["linformer-head", "nystromformer"])
def test_a_bfloat16_model_computes_near_float32(name):
    config = ModelConfig(
        vocab_size=31, d_model=D_MODEL, num_layers=1, mixers=(BIDIRECTIONAL_ONLY[name].config,), causal=False,
        init_std=0.2,
    )  # fmt: skip
    params, tokens = random_params(config), np.arange(T)[None] % 31
    low = dataclasses.replace(config, dtype="bfloat16")
    exact, near = (jax.jit(lambda p, c=c: apply(c, p, tokens)[0])(params) for c in (config, low))
    assert near.dtype == jnp.float32 and 0 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()
