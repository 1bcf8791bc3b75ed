"""Native sparse attention beyond the contract of tests/test_mixers.py: selection, branches, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.mixers.base import Context
from attention_jax.mixers.nsa import NSAConfig
from attention_jax.positions import RoPE
from tests import marks
from tests.harness import Harness
from tests.mixers import D_MODEL, MIXERS
from tests.mixers import nsa_reference as reference

B, T, CAPACITY = 2, 19, 24
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CASES = {name: row for name, row in MIXERS.items() if isinstance(row.config, NSAConfig)}


@pytest.fixture(scope="module", params=marks.params(CASES))
def harness(request):
    return Harness(CASES[request.param].config)


@pytest.fixture(scope="module")
def chunked(harness):
    """The same mixer and parameters in blocks."""
    return Harness(harness.config, impl="chunked")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D_MODEL))


def test_parallel_equals_reference_and_chunked(harness, chunked, x):
    y = harness.parallel(x)
    params, choices = nnx.to_pure_dict(harness.params), []
    for b in range(B):
        assert_allclose(y[b], reference(harness.config, params, x[b], choices=choices), **TOLERANCE)
    # The data has to make the choice: some query leaves out a block, and not always the oldest.
    left_out = {
        j for t, _, blocks in choices for j in range(t // harness.config.select_block) if j not in blocks
    }
    assert len(left_out) > 1
    assert_allclose(chunked.parallel(x), y, **TOLERANCE)


def test_rows_of_a_batch_have_different_positions(harness, x):
    """Row 0 goes on while row 1 is padded, and the other way round."""
    positions = np.stack([np.arange(T), np.where(np.arange(T) < 4, -1, np.arange(T) - 4)])
    moved = jnp.stack([x[0], jnp.roll(x[1], 4, axis=0)])
    y, _ = harness.cached(moved, (8, 9, 10, 11, T), positions=jnp.asarray(positions))
    expected = harness.parallel(x)
    assert_allclose(y[0], expected[0], **TOLERANCE)
    assert_allclose(y[1, 4:], expected[1, : T - 4], **TOLERANCE)


def test_packed_documents_equal_the_documents_alone(harness, chunked, x):
    lengths = (4, 13)  # the second is long enough to leave blocks out
    segments = jnp.array([0] * lengths[0] + [1] * lengths[1] + [-1] * (T - sum(lengths)))
    positions = jnp.array([*range(lengths[0]), *range(lengths[1]), *[-1] * (T - sum(lengths))])
    ctx = Context(positions_BT=jnp.tile(positions, (B, 1)), segment_ids_BT=jnp.tile(segments, (B, 1)))
    padded = x.at[:, sum(lengths) :].set(jnp.nan)
    alone = harness.parallel(x)
    # In front of a whole row, whose later tokens change no bit of it.
    second = harness.parallel(jnp.roll(x, -lengths[0], axis=1))[:, : lengths[1]]
    for y in (harness.parallel(padded, ctx), chunked.parallel(padded, ctx)):
        assert_allclose(y[:, : lengths[0]], alone[:, : lengths[0]], **TOLERANCE)
        assert_allclose(y[:, lengths[0] : sum(lengths)], second, **TOLERANCE)
        assert_array_equal(y[:, sum(lengths) :], 0)


def test_explicit_positions_are_the_implicit_ones(harness, x):
    """Padding before and after, and one document whose positions and segment are given."""
    y = harness.parallel(x)
    ctx = Context(positions_BT=jnp.tile(jnp.arange(T), (B, 1)), segment_ids_BT=jnp.zeros((B, T), int))
    assert_allclose(harness.parallel(x, ctx), y, **TOLERANCE)
    positions = jnp.where((jnp.arange(T) < 2) | (jnp.arange(T) > 15), -1, jnp.arange(T) - 2)
    padded = jnp.where((positions < 0)[:, None], jnp.nan, jnp.roll(x, 2, axis=1))
    ctx = Context(positions_BT=jnp.tile(positions, (B, 1)))

    def loss(p, x):
        y, _ = harness.run(p, x, None, ctx)
        return (y**2).sum(), y

    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, part = grad(harness.params, padded)
    assert_allclose(part[:, 2:16], y[:, :14], **TOLERANCE)
    # What padding holds does not reach the gradients either.
    jax.tree.map(assert_array_equal, grads, grad(harness.params, jnp.nan_to_num(padded))[0])


def test_state_holds_complete_blocks_only(harness, x):
    block, stride = harness.config.compress_block, harness.config.compress_stride
    for cuts in ((8,), (1, 2, 3, 4, 5)):
        _, state = harness.cached(x[:, : cuts[-1]], cuts)
        ends = state.compressed.positions_BC[0]
        expected = [
            i * stride + block - 1 if i * stride + block <= cuts[-1] else -1 for i in range(ends.size)
        ]
        assert ends.tolist() == expected
        assert_array_equal(state.compressed.k_BCKH[:, ends < 0], 0)


def test_gradients_to_the_future_are_exactly_zero_in_blocks(chunked, x):
    t = 8
    grad = jax.jit(jax.grad(lambda x: chunked.run(chunked.params, x, None, Context())[0][:, t].sum()))(x)
    assert_array_equal(grad[:, t + 1 :], 0)
    assert np.abs(grad[:, : t + 1]).max((0, 2)).min() > 0


@pytest.mark.parametrize("form", [pytest.param("reference", marks=pytest.mark.slow), "chunked"])
def test_gradients_are_those_of_the_reference(form, harness, chunked, x):
    """Every parameter's, along a random direction, against differences of the float64 twin."""
    harness, x = {"reference": harness, "chunked": chunked}[form], x[:1, :11]
    weight = np.asarray(jax.random.normal(jax.random.key(2), x.shape[1:]), np.float64)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(harness.params))
    leaves, treedef = jax.tree.flatten(params)
    rng, slopes = np.random.default_rng(0), []
    for index, leaf in enumerate(leaves):
        direction, values = rng.standard_normal(leaf.shape), []
        for step in (1e-6, -1e-6):
            moved = [p + step * direction if i == index else p for i, p in enumerate(leaves)]
            y = reference(harness.config, jax.tree.unflatten(treedef, moved), x[0])
            values.append((y * weight).sum())
        slopes.append((direction, (values[0] - values[1]) / 2e-6))
    grads = jax.jit(jax.grad(lambda p: (harness.run(p, x, None, Context())[0][0] * weight).sum()))(
        harness.params
    )
    for grad, (direction, slope) in zip(jax.tree.leaves(nnx.to_pure_dict(grads)), slopes, strict=True):
        assert_allclose((grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)


def test_past_the_capacity_the_output_is_nan_not_wrong(harness, x):
    _, state = harness.cached(x, (T,))
    ctx = Context(positions_BT=jnp.tile(jnp.arange(T, T + 8), (B, 1)))
    y, state = harness.call(harness.params, x[:, :8], state, ctx)
    assert np.isfinite(y[:, : CAPACITY - T]).all() and np.isnan(y[:, CAPACITY - T :]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # Without a state the row's length is what its positions must stay below.
    ctx = Context(positions_BT=jnp.tile(jnp.arange(T) + 10, (B, 1)))
    assert np.isnan(harness.parallel(x, ctx)[:, 10:]).all()


def test_rows_shorter_than_a_block(x):
    """Nothing is compressed yet: the branch gives 0, in both forms, and its gradient is 0, not NaN."""
    config = dataclasses.replace(CASES["nsa-rope"].config, compress_block=32, select_block=32)
    harness = Harness(config)
    y = harness.parallel(x)
    assert_allclose(y[0], reference(config, nnx.to_pure_dict(harness.params), x[0]), **TOLERANCE)
    assert_allclose(harness.cached(x, (T,))[0], y, **TOLERANCE)
    loss = jax.grad(lambda p: harness.run(p, x, None, Context())[0].sum())
    grads = jax.jit(loss)(harness.params)
    for leaf in jax.tree.leaves(nnx.to_pure_dict(grads)["phi_k"]):
        assert_array_equal(leaf, 0)


def test_state_is_small_where_it_can_be():
    config = CASES["nsa-rope"].config
    state = jax.eval_shape(
        lambda: config.build(D_MODEL, nnx.Rngs(0), causal=True).init_state(
            1, 1000, cache=CacheOptions(jnp.bfloat16)
        )
    )
    slots = {name: getattr(state, name).positions_BS.shape[1] for name in ("selected", "window", "tail")}
    assert slots == {"selected": 1000, "window": 5, "tail": 4}
    assert state.compressed.k_BCKH.shape == (1, 499, 2, 8) and state.compressed.k_BCKH.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
        ({"compress_stride": 0}, "compress_stride must be >= 1, got 0"),
        ({"compress_stride": 5}, "compress_stride 5 does not divide compress_block 32"),
        ({"compress_stride": 32}, None),
        ({"compress_block": 48, "compress_stride": 48}, "48 does not divide select_block 64"),
        ({"compress_width": 0}, "compress_width must be >= 1"),
        ({"select_count": 2}, "select_count must be >= 3, got 2: the first and the last two"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"head_dim": 7, "rope": RoPE()}, "head_dim 7 is odd"),
        ({"impl": "cudnn"}, "unknown impl 'cudnn'; choose from reference, chunked"),
    ],
)
def test_bad_configs(arguments, message):
    build = functools.partial(lambda **given: NSAConfig(**given).check(D_MODEL, causal=True), **arguments)
    if message is None:
        return build()
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_nsa_rejects_a_bidirectional_model():
    with pytest.raises(ValueError, match="nsa is causal only: .*; use kind softmax"):
        NSAConfig().build(D_MODEL, nnx.Rngs(0), causal=False)


def test_bad_calls(harness, x):
    with pytest.raises(ValueError, match=r"needs ctx\.positions_BT"):
        harness.call(harness.params, x, harness.state(), Context())
    long = jnp.zeros((B, CAPACITY + 1, D_MODEL))
    with pytest.raises(ValueError, match="do not fit a cache of capacity 24"):
        harness.call(harness.params, long, harness.state(), Context(positions_BT=jnp.zeros((B, 25), int)))
