"""The shared code of recurrent mixers against NumPy float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.caches import RecurrentState
from attention_jax.layers import GatedRMSNorm, HeadGroupNorm, ShortConvolution
from attention_jax.mixers import Context, make_config
from attention_jax.mixers.recurrent import convolve

B, T, C = 3, 13, 6
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def silu(x):
    return x / (1 + np.exp(-x))


def convolution(x_TC, valid_T, segments_T, kernel_WC, bias_C, activation):
    """One row: each valid token reads back through the valid tokens of its own document."""
    y_TC = np.zeros(x_TC.shape)
    document, previous = [], None
    for t, x_C in enumerate(x_TC):
        if not valid_T[t]:
            continue
        if segments_T[t] != previous:
            document, previous = [], segments_T[t]
        document.append(x_C.astype(np.float64))
        y_C = np.array(bias_C, np.float64)
        for lag, past_C in enumerate(document[: -len(kernel_WC) - 1 : -1]):
            y_C += kernel_WC[len(kernel_WC) - 1 - lag] * past_C
        y_TC[t] = silu(y_C) if activation else y_C
    return y_TC


@functools.cache
def convolver(width, activation="silu"):
    """A convolution with random kernel and bias, jitted: (parameters, call)."""
    module = ShortConvolution(C, width, activation=activation, use_bias=True, rngs=nnx.Rngs(width))
    module.bias[...] = jax.random.normal(jax.random.key(3), C)
    graphdef, params = nnx.split(module)

    @jax.jit
    def call(params, x, inputs, ctx):
        held = None if inputs is None else RecurrentState(jnp.zeros(()), inputs)
        y, (last, _) = convolve(nnx.merge(graphdef, params), x, held, ctx)
        return y, last

    return module, params, call


def inputs():
    return np.random.default_rng(0).normal(size=(B, T, C)).astype(np.float32)


def holes():
    """Rows that start, end and are broken by slots without a token; the last holds none at all."""
    valid = np.ones((B, T), bool)
    valid[0, [0, 1, 4, 12]] = False
    valid[1, [5, 6, 7, 8, 9]] = False
    valid[2] = False
    return valid


def positions_of(valid):
    return jnp.asarray(np.where(valid, np.cumsum(valid, 1) - 1, -1))


def expected(module, x, valid, segments=None):
    segments = np.zeros((B, T), int) if segments is None else segments
    kernel, bias = np.asarray(module.kernel[...], np.float64), module.bias[...]
    return np.stack(
        [convolution(x[b], valid[b], segments[b], kernel, bias, module.activation) for b in range(B)]
    )


@pytest.mark.parametrize(("width", "activation"), [(1, "silu"), (4, "silu"), (4, None), (20, None)])
def test_convolution_of_plain_rows(width, activation):
    module, params, call = convolver(width, activation)
    y, state = call(params, inputs(), None, Context())
    assert state is None
    assert_allclose(y, expected(module, inputs(), np.ones((B, T), bool)), **TOLERANCE)


def test_convolution_skips_what_holds_no_token():
    module, params, call = convolver(4)
    x = np.where(holes()[..., None], inputs(), np.nan)
    y, _ = call(params, x, None, Context(positions_BT=positions_of(holes())))
    assert_allclose(y, expected(module, x, holes()), **TOLERANCE)
    assert_array_equal(np.asarray(y)[~holes()], 0)


def test_convolution_reads_no_other_document():
    """Documents shorter than the kernel, an id that comes back, slots without a token in between."""
    module, params, call = convolver(4)
    segments = np.array([[0, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 3, 3]] * B)
    x = np.where(holes()[..., None], inputs(), np.nan)
    for valid, rows in ((np.ones((B, T), bool), inputs()), (holes(), x)):
        ctx = Context(positions_BT=positions_of(valid), segment_ids_BT=jnp.asarray(segments))
        assert_allclose(
            call(params, rows, None, ctx)[0], expected(module, rows, valid, segments), **TOLERANCE
        )
    ctx = Context(segment_ids_BT=jnp.asarray(np.where(holes(), segments, -1)))
    assert_allclose(call(params, x, None, ctx)[0], expected(module, x, holes(), segments), **TOLERANCE)


@pytest.mark.parametrize("cuts", [range(1, T + 1), (2, 3, 9, T), (T,)])
@pytest.mark.parametrize("width", [1, 4])
def test_convolution_in_pieces(width, cuts):
    module, params, call = convolver(width)
    x = np.where(holes()[..., None], inputs(), np.nan)
    state, out, start = jnp.zeros((B, width - 1, C)), [], 0
    for cut in cuts:
        ctx = Context(positions_BT=positions_of(holes())[:, start:cut])
        y, state = call(params, x[:, start:cut], state, ctx)
        out.append(y)
        start = cut
    assert_allclose(np.concatenate(out, 1), expected(module, x, holes()), **TOLERANCE)
    for b in range(B):
        kept = np.concatenate([np.zeros((width - 1, C)), inputs()[b, holes()[b]]])
        assert_array_equal(state[b], kept[len(kept) - (width - 1) :])


def test_slots_without_a_token_leave_the_state_bit_for_bit():
    _, params, call = convolver(4)
    state = jnp.asarray(inputs()[:, :3])
    for length in (1, 5):
        x = jnp.full((B, length, C), jnp.nan)
        y, after = call(params, x, state, Context(positions_BT=jnp.full((B, length), -1)))
        assert_array_equal(after, state)
        assert_array_equal(y, 0)


def test_gradients_of_the_convolution():
    """Through the permutation as through plain slices, and 0, not NaN, into slots without a token."""
    _, params, call = convolver(4)
    valid = holes()
    x = np.where(valid[..., None], inputs(), np.nan)
    weights = np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)
    ctx = Context(positions_BT=positions_of(valid))

    def loss(params, x, weights, ctx):
        return (call(params, x, None, ctx)[0] * weights).sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    of_params, of_x = gradient(params, x, weights, ctx)
    assert_array_equal(np.asarray(of_x)[~valid], 0)
    total = jax.tree.map(jnp.zeros_like, params)
    for b in range(B - 1):
        rows = np.zeros((2, 1, T, C), np.float32)
        count = valid[b].sum()
        rows[:, 0, :count] = x[b, valid[b]], weights[b, valid[b]]
        alone, of_row = gradient(params, rows[0], rows[1], Context())
        assert_allclose(np.asarray(of_x)[b, valid[b]], of_row[0, :count], **TOLERANCE)
        total = jax.tree.map(jnp.add, total, alone)
    jax.tree.map(lambda a, b: assert_allclose(a, b, **TOLERANCE), of_params, total)


def test_bfloat16_is_summed_in_float32():
    module = ShortConvolution(C, 4, activation=None, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(inputs(), jnp.bfloat16)
    y, _ = module(x)
    exact, _ = ShortConvolution(C, 4, activation=None, rngs=nnx.Rngs(0))(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("gated", ["before", "after"])
def test_gated_norm(gate, gated):
    norm = GatedRMSNorm(C, gate=gate, gated=gated, epsilon=1e-5, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, C + 1)
    x, g = inputs()[:2].astype(np.float64)
    act = silu(g) if gate == "silu" else 1 / (1 + np.exp(-g))
    y = x * act if gated == "before" else x
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * np.arange(1, C + 1)
    assert_allclose(
        norm(x.astype(np.float32), g.astype(np.float32)), y if gated == "before" else y * act, **TOLERANCE
    )


def test_gated_norm_in_groups():
    norm, alone = (
        GatedRMSNorm(width, groups=n, epsilon=1e-5, rngs=nnx.Rngs(0)) for width, n in ((C, 2), (C // 2, 1))
    )
    x, g = inputs()[:2]
    parts = [alone(x[..., cut], g[..., cut]) for cut in (slice(C // 2), slice(C // 2, C))]
    assert_allclose(norm(x, g), jnp.concatenate(parts, -1), **TOLERANCE)


def test_group_norm_of_heads():
    norm = HeadGroupNorm(T, C, epsilon=1e-5, rngs=nnx.Rngs(0))
    scale, bias = np.random.default_rng(2).normal(size=(2, T, C))
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    x = inputs().astype(np.float64)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    assert_allclose(norm(inputs()), y, **TOLERANCE)


def test_refusals():
    with pytest.raises(ValueError, match="width of a short convolution must be >= 1, got 0"):
        ShortConvolution(C, 0, rngs=nnx.Rngs(0))
    make_config("gla").check(32, causal=True)
    with pytest.raises(ValueError, match="gla is causal only: its state decays .*; use kind softmax"):
        make_config("gla").check(32, causal=False)
