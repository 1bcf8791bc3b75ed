"""The contract of every mixer in the table: parallel = blocked = token by token = in chunks, and so on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.mixers import (
    AttentionConfig,
    Context,
    CrossAttentionConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    LatentAttentionConfig,
    make_mixer,
    mixer_kinds,
)
from attention_jax.positions import RoPE
from tests import marks
from tests.harness import Harness
from tests.mixers import BIDIRECTIONAL, CROSS, D_MODEL, MIXERS, cross_reference, dense, mask_of

B, T, CAPACITY = 2, 19, 24
# More than the windows and chunks of the table's rows. Few lengths: each is a program to compile.
PIECE = 9
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=marks.params(MIXERS))
def case(request):
    return MIXERS[request.param], Harness(MIXERS[request.param].config)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((B, T, D_MODEL), np.float32)


def test_parallel_equals_reference_and_another_form(case, x):
    row, harness = case
    y = harness.parallel(x)
    params = nnx.to_pure_dict(harness.params)
    keep = dense(mask_of(row.config), T)
    for b in range(B):
        assert_allclose(y[b], row.reference(params, x[b], keep), **TOLERANCE)
    assert_allclose(Harness(row.config, impl=row.impls[1]).parallel(x), y, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name, row in MIXERS.items() if row.slow])
def test_a_variant_equals_its_reference(name, x):
    row = MIXERS[name]
    harness = Harness(row.config)
    expected = row.reference(nnx.to_pure_dict(harness.params), x[0], dense(mask_of(row.config), T))
    assert_allclose(harness.parallel(x)[0], expected, **TOLERANCE)


def test_cached_in_any_pieces_equals_parallel(case, x):
    """Token by token (through any ring's wrap), as a prefill longer than rings and chunks, and in pieces."""
    _, harness = case
    y = harness.parallel(x)
    for cuts in (range(1, T + 1), (PIECE, 2 * PIECE, T), (1, 1 + PIECE, T)):
        assert_allclose(harness.cached(x, cuts)[0], y, **TOLERANCE)


@pytest.mark.slow
def test_one_prefill_equals_parallel(case, x):
    _, harness = case
    assert_allclose(harness.cached(x, (T,))[0], harness.parallel(x), **TOLERANCE)


RECURRENCES = {
    name: row
    for name, row in MIXERS.items()
    if name == row.config.kind.replace("_", "-") and "recurrent" in row.impls
}


@pytest.mark.parametrize("name", marks.params(RECURRENCES, slow=lambda row: "decoding" not in row.fast))
def test_decoding_512_tokens_from_the_state_equals_the_parallel_form(name):
    """One token at a time in one `lax.scan`, from the empty state."""
    length, config = 512, MIXERS[name].config
    # The table's chunks and horizon are for short rows.
    usual, known = {"chunk_size": None, "horizon": length}, {f.name for f in dataclasses.fields(config)}
    harness = Harness(dataclasses.replace(config, **{k: v for k, v in usual.items() if k in known}))
    x = jax.random.normal(jax.random.key(2), (1, length, D_MODEL))

    @jax.jit
    def decode(params, x_BTD):
        def step(state, token):
            x_BD, t = token
            y_B1D, state = harness.run(params, x_BD[:, None], state, Context(positions_BT=t[None, None]))
            return state, y_B1D[:, 0]

        start = nnx.merge(harness.graphdef, params).init_state(1, length)
        _, y_TBD = jax.lax.scan(step, start, (jnp.moveaxis(x_BTD, 1, 0), jnp.arange(length)))
        return jnp.moveaxis(y_TBD, 0, 1)

    assert_allclose(decode(harness.params, x), harness.parallel(x), **TOLERANCE)


def test_left_padding_and_invalid_tokens(case, x):
    """A padded prompt decodes like a bare one, and padding (NaN features) leaves the state as it is."""
    _, harness = case
    pad = 3
    padded = np.concatenate([np.full((B, pad, D_MODEL), np.nan, np.float32), x[:, : T - pad]], axis=1)
    positions = np.tile(np.maximum(np.arange(T) - pad, -1), (B, 1))
    y, _ = harness.cached(padded, range(PIECE, T + 1), positions=positions)
    assert_allclose(y[:, pad:], harness.parallel(x)[:, : T - pad], **TOLERANCE)
    assert_array_equal(y[:, :pad], 0)
    _, before = harness.cached(x, (PIECE,))
    ctx = Context(positions_BT=np.full((B, PIECE), -1))
    _, after = harness.call(harness.params, x[:, PIECE : 2 * PIECE], before, ctx)
    jax.tree.map(assert_array_equal, before, after)


def test_packed_documents_equal_the_documents_alone(case, x):
    _, harness = case
    lengths = (7, 9)
    segments = np.array([0] * lengths[0] + [1] * lengths[1] + [-1] * (T - sum(lengths)))
    positions = np.array([*range(lengths[0]), *range(lengths[1]), *[-1] * (T - sum(lengths))])
    ctx = Context(positions_BT=np.tile(positions, (B, 1)), segment_ids_BT=np.tile(segments, (B, 1)))
    y = harness.parallel(x, ctx)
    # Each in front of a whole row: what follows changes no bit of it (the next test).
    first, second = harness.parallel(x), harness.parallel(np.roll(x, -lengths[0], axis=1))
    assert_allclose(y[:, : lengths[0]], first[:, : lengths[0]], **TOLERANCE)
    assert_allclose(y[:, lengths[0] : sum(lengths)], second[:, : lengths[1]], **TOLERANCE)
    assert_array_equal(y[:, sum(lengths) :], 0)


def test_the_future_changes_no_bit_of_the_past(case, x):
    _, harness = case
    for t in (0, 5, T - 2):
        changed = x + 3.0 * (np.arange(T) > t)[:, None].astype(np.float32)
        assert_array_equal(harness.parallel(changed)[:, : t + 1], harness.parallel(x)[:, : t + 1])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, 0) if form == 0 and "future" in row.fast else pytest.param(name, form, marks=pytest.mark.slow)
        for name, row in MIXERS.items()
        for form in (0, 1)
    ],
)
def test_gradients_to_the_future_are_exactly_zero(name, form, x):
    row = MIXERS[name]
    harness = Harness(row.config, impl=row.impls[form])
    t = 8

    def output(x):
        return harness.run(harness.params, x, None, Context())[0][:, t].sum()

    grad = np.asarray(jax.jit(jax.grad(output))(x))
    assert_array_equal(grad[:, t + 1 :], 0)
    seen = dense(mask_of(row.config), T)[t]
    reached = np.abs(grad[:, :t]).max((0, 2))
    # A gate in front of the window moves all scores of the row alike: its two sums cancel up to rounding.
    gated = isinstance(row.config, ForgettingAttentionConfig)
    least = 8 * np.finfo(np.float32).eps * np.abs(grad).max() if gated else 0
    assert (reached > least).tolist() == seen[:t].tolist()


# Recurrences and NSA have tests of their own, too.
@pytest.mark.parametrize("name", marks.params(MIXERS, slow=lambda row: "empty slots" not in row.fast))
def test_an_empty_slot_reaches_no_gradient(name, x):
    """With NaN in invalid slots, the gradients of parameters and of x are those of the valid tokens."""
    harness, pad = Harness(MIXERS[name].config), 3

    @jax.jit
    def gradients(params, x, positions_BT, counts_T):
        def loss(params, x):
            y, _ = harness.run(params, x, None, Context(positions_BT=positions_BT))
            return (jnp.sin(y) * counts_T[:, None]).sum()

        return jax.grad(loss, (0, 1))(params, x)

    # One program for both: tokens alone are followed by some that do not count, whatever they hold.
    at = np.arange(T + pad)
    alone = gradients(harness.params, np.concatenate([x, x[:, :pad]], axis=1), np.tile(at, (B, 1)), at < T)
    empty = np.full((B, pad, D_MODEL), np.nan, np.float32)
    padded = np.concatenate([empty, x], axis=1)
    positions = np.tile(np.maximum(at - pad, -1), (B, 1))
    params, tokens = gradients(harness.params, padded, positions, at >= 0)
    assert_array_equal(tokens[:, :pad], 0)
    assert_allclose(tokens[:, pad:], alone[1][:, :T], rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), params, alone[0])


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_masks(name, x):
    row = BIDIRECTIONAL[name]
    harness = Harness(row.config, causal=False)
    params = nnx.to_pure_dict(harness.params)
    expected = row.reference(params, x[0], dense(mask_of(row.config), T))
    assert_allclose(harness.parallel(x)[0], expected, **TOLERANCE)


def test_a_causal_model_restricts_a_bidirectional_mask(x):
    harness = Harness(BIDIRECTIONAL["full"].config, causal=True)
    changed = x + (np.arange(T) >= 9)[:, None].astype(np.float32)
    assert_array_equal(harness.parallel(changed)[:, :9], harness.parallel(x)[:, :9])


def test_cross_attention_over_a_padded_memory(x):
    harness = Harness(CROSS)
    memory = np.random.default_rng(3).standard_normal((B, 7, D_MODEL), np.float32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, -1, -1, -1]])
    memory = np.where((positions >= 0)[..., None], memory, np.float32(np.nan))
    ctx = Context(memory_BSD=memory, memory_positions_BS=positions)
    y = harness.parallel(x, ctx)
    params = nnx.to_pure_dict(harness.params)
    for b, length in ((0, 7), (1, 4)):
        expected = cross_reference(params, x[b], memory[b, :length], np.ones((T, length), bool))
        assert_allclose(y[b], expected, **TOLERANCE)
    # The prefill fills the state with the memory; later calls read it from there.
    first = dataclasses.replace(ctx, positions_BT=np.zeros((B, 1), int))
    y_first, state = harness.call(harness.params, x[:, :1], harness.state(), first)
    later = np.tile(np.arange(1, T), (B, 1))
    y_later, _ = harness.cached(x[:, 1:], (PIECE, T - 1), state=state, positions=later)
    assert_allclose(np.concatenate([y_first, y_later], axis=1), y, **TOLERANCE)


def test_attention_dropout_is_the_same_whatever_runs_it(x):
    config = AttentionConfig(num_heads=4, rope=RoPE(), dropout=0.3)
    ctx = Context(dropout_key=jax.random.key(5))
    y = Harness(config, impl="reference").parallel(x, ctx)
    assert_allclose(Harness(config, impl="chunked").parallel(x, ctx), y, **TOLERANCE)
    assert np.abs(y - Harness(config).parallel(x)).max() > 1e-2
    # Cached in two pieces, every position meets the same key and so the same bits.
    harness = Harness(config)
    state, out = harness.state(), []
    for a, b in ((0, 10), (10, T)):
        piece = dataclasses.replace(ctx, positions_BT=np.tile(np.arange(a, b), (B, 1)))
        y_piece, state = harness.call(harness.params, x[:, a:b], state, piece)
        out.append(y_piece)
    assert_allclose(np.concatenate(out, 1), y, **TOLERANCE)


def test_the_two_maps_of_differential_attention_drop_different_weights(x):
    """Equal maps and lambda 1 leave nothing without dropout; with one mask for both they would with it."""
    config = DifferentialAttentionConfig(num_heads=2, dropout=0.3, norm_eps=1.0)
    harness, ctx = Harness(config), Context(dropout_key=jax.random.key(5))
    params = nnx.to_pure_dict(harness.params)
    for name in "qk":  # heads 2n and 2n + 1 alike
        kernel = params[name]["kernel"].reshape(D_MODEL, 2, 2, -1)
        kernel[:, :, 1] = kernel[:, :, 0]
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        params[name] = np.zeros_like(params[name])
    params["lambda_q1"][0] = 1.0
    params["lambda_k1"][0] = np.log(1 + 1 - config.lambda_init)  # lambda is 1
    state = nnx.state(nnx.merge(harness.graphdef, harness.params))
    nnx.replace_by_pure_dict(state, params)
    plain = harness.call(state, x, None, Context())[0]
    dropped = harness.call(state, x, None, ctx)[0]
    assert np.abs(plain).max() < 1e-5 and np.abs(dropped).max() > 1e-2
    other = Harness(config, impl="chunked").call(state, x, None, ctx)[0]
    assert_allclose(other, dropped, **TOLERANCE)


def test_captured_weights_of_global_queries_are_those_of_their_own_projections(x):
    row = BIDIRECTIONAL["global-projections-both"]
    harness = Harness(row.config, causal=False)

    @jax.jit
    def captured(params, x):
        ctx = Context(capture={"attention"})
        return nnx.merge(harness.graphdef, params).mix(x, ctx=ctx).aux["attention"]

    weights = captured(harness.params, x)
    p = nnx.to_pure_dict(harness.params)
    q, k = (np.float64(x[0]) @ np.float64(p[f"{name}_global"]["kernel"]) for name in "qk")
    scores = q.reshape(T, 4, 8)[9, 3] @ k.reshape(T, 2, 8)[:, 1].T / np.sqrt(8)
    assert_allclose(weights[0, 3, 9], np.exp(scores) / np.exp(scores).sum(), rtol=1e-5, atol=1e-7)
    assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_past_the_capacity_the_output_is_nan_not_wrong(x):
    harness = Harness(AttentionConfig(num_heads=4))
    _, state = harness.cached(x, (T,))
    ctx = Context(positions_BT=np.tile(np.arange(CAPACITY - 1, CAPACITY + 2), (B, 1)))
    y, _ = harness.call(harness.params, x[:, :3], state, ctx)
    assert np.isfinite(y[:, 0]).all() and np.isnan(y[:, 1:]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads must be >= 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_heads": 5}, "d_model 32 is not divisible by num_heads 5; set head_dim"),
        ({"num_heads": 4, "head_dim": 7, "rope": RoPE()}, "head_dim 7 is odd: set an even rope.width"),
        ({"num_heads": 4, "rope": RoPE(width=16)}, "RoPE width 16 exceeds head_dim 8"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 0.99\]"),
        ({"mask": "SlidingWindow(0)"}, "window must be an integer >= 1"),
        ({"qk_norm": "group"}, "qk_norm must be one of rms, l2, layer, rms_per_head, .*, None, got 'group'"),
        ({"bias": "rpe"}, "bias must be one of alibi, t5, None, got 'rpe'"),
        ({"mask": np.ones((2, 2), bool)}, "mask must be a Mask or a mask expression, got ndarray"),
        ({"softcap": 0.0}, "softcap must be from 0.1 to 1e.06, got 0.0: .* null turns it off"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"clip_qkv": -1.0}, "clip_qkv must be from 0.001 to 1e.06, got -1.0: .* null turns it off"),
        ({"out_bias": 1}, "out_bias must be true or false or None, got 1"),
        (
            {"global_projections": True, "mask": "SlidingWindow(4)"},
            r"global_projections needs a mask with Global positions, such as Longformer\(64, \(0,\)\), got "
            r"SlidingWindow\(window=4",
        ),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        AttentionConfig(**arguments).build(D_MODEL, nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_options_that_a_kind_does_not_have_are_refused():
    with pytest.raises(ValueError, match="cross does not support global_projections: leave it out"):
        CrossAttentionConfig(global_projections=True, mask="Longformer(4, (0,))")
    with pytest.raises(ValueError, match="softcap must be from 0.1 to 1e.06, got 0.0: .* null turns it off"):
        LatentAttentionConfig(softcap=0.0)


@pytest.mark.parametrize("kind", mixer_kinds())
@pytest.mark.parametrize("d_model", [0, -8])
def test_a_model_has_a_width(kind, d_model):
    with pytest.raises(ValueError, match=f"d_model must be >= 1, got {d_model}"):
        make_mixer(kind, d_model, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", mixer_kinds())
def test_an_unknown_impl_is_refused_by_the_config(kind):
    """Not by the first step, when a run folder has been made that refuses the mended config."""
    with pytest.raises(ValueError, match="impl.*'flash'"):
        mixer_kinds()[kind](impl="flash")


def test_bad_calls(x):
    harness = Harness(AttentionConfig(num_heads=4))
    state = harness.state()
    with pytest.raises(ValueError, match="needs ctx.positions_BT"):
        harness.call(harness.params, x, state, Context())
    positions = jnp.tile(jnp.arange(T), (B, 1))
    with pytest.raises(ValueError, match="one document per row"):
        harness.call(harness.params, x, state, Context(positions_BT=positions, segment_ids_BT=positions))
    long = jnp.zeros((B, CAPACITY + 1, D_MODEL))
    with pytest.raises(ValueError, match="do not fit a cache of capacity 24"):
        harness.call(harness.params, long, state, Context(positions_BT=jnp.zeros(long.shape[:2], int)))
    with pytest.raises(ValueError, match="needs ctx.memory_BSD"):
        Harness(CROSS).parallel(x)
    with pytest.raises(ValueError, match="needs ctx.memory_BSD"):
        cross = Harness(CROSS)
        cross.cached(x, (T,))
