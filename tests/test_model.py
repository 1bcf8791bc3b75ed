"""The language model: one parameter layout, unrolled = scanned = rematerialised, causal, checked."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.layers import gelu, gelu_tanh
from attention_jax.mixers import AttentionConfig, Context
from attention_jax.model import ModelConfig, apply, bind, count_params, init_params
from attention_jax.positions import RoPE
from tests.params import random_params
from tests.reference import positions as truth

MIX = (
    AttentionConfig(num_heads=4, num_kv_heads=2, rope=RoPE()),
    AttentionConfig(num_heads=2, mask="SlidingWindow(4)", bias="alibi", qk_norm="rms", sink_logits=True),
)
CONFIG = ModelConfig(vocab_size=31, d_model=32, num_layers=3, mixers=MIX, init_std=0.2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 31, (2, 12), np.int32)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, ctx=None):
    return apply(config, params, tokens, ctx=ctx)[0]


def loss_and_grads(config, params, tokens, ctx=None):
    def loss(params):
        logits = apply(config, params, tokens, ctx=ctx)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": True, "remat": "dots_saveable"},
        pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
        pytest.param({"remat": "nothing_saveable"}, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_compute_the_same(params, tokens, change):
    loss, grads = loss_and_grads(CONFIG, params, tokens)
    loss2, grads2 = loss_and_grads(dataclasses.replace(CONFIG, **change), params, tokens)
    assert_allclose(loss2, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads2, grads)


def test_remat_saves_less(params, tokens):
    """The policy reaches the layers: fewer residuals are kept from forward to backward."""

    def residuals(config):
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: apply(config, p, tokens)[0], p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert residuals(dataclasses.replace(CONFIG, remat="nothing_saveable")) < 0.7 * residuals(CONFIG)


def test_parameters_are_stacked_per_place_in_the_period(params):
    assert params["stacks"]["0"]["mixer"]["q"]["kernel"].shape == (2, 32, 32)
    assert params["stacks"]["1"]["mixer"]["sink_logits"].shape == (1, 2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert count_params(params) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_layers_are_initialised_differently(params):
    kernels = params["stacks"]["0"]["mixer"]["q"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cached_equals_parallel(params, tokens, scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    expected = logits_of(config, params, tokens)
    state = bind(config, params).init_state(2, 12)
    step = jax.jit(lambda t, s, pos: apply(config, params, t, s, ctx=Context(positions_BT=pos)))
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 12)):
        logits, state, _ = step(tokens[:, a:b], state, np.tile(np.arange(a, b), (2, 1)))
        assert_allclose(logits, expected[:, a:b], rtol=1e-4, atol=2e-5)


def test_the_future_changes_no_bit_and_gets_no_gradient(params, tokens):
    run = jax.jit(lambda t: apply(CONFIG, params, t)[0])
    changed = np.where(np.arange(12) < 6, tokens, (tokens + 1) % 31)
    assert_array_equal(run(changed)[:, :6], run(tokens)[:, :6])

    def one_logit(embedding):
        changed = params | {"embed": {"embedding": embedding}}
        model = bind(dataclasses.replace(CONFIG, tie_embeddings=False), changed | {
            "head": {"kernel": jnp.ones((32, 31))}})  # fmt: skip
        return model(jnp.arange(12)[None])[0, 5].sum()

    grad = jax.jit(jax.grad(one_logit))(params["embed"]["embedding"])
    assert_array_equal(grad[6:12], 0)
    assert (np.abs(grad[:6]).max(1) > 0).all()


def test_packing_and_invalid_tokens(params, tokens):
    """Packed documents give the logits they give alone; an invalid slot may hold any id."""
    packed = np.concatenate([tokens[:1, :5], tokens[1:, :4], np.array([[999, -7, 31]])], axis=1)
    ctx = Context(
        positions_BT=np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, -1, -1, -1]]),
        segment_ids_BT=np.array([[0] * 5 + [1] * 4 + [-1] * 3]),
    )
    run = jax.jit(lambda t, ctx: apply(CONFIG, params, t, ctx=ctx)[0])
    logits = run(packed, ctx)
    # Alone: what follows a document in its row changes no bit of it.
    first, second = run(tokens, None)
    assert_allclose(logits[0, :5], first[:5], rtol=1e-4, atol=2e-5)
    assert_allclose(logits[0, 5:9], second[:4], rtol=1e-4, atol=2e-5)
    assert np.isfinite(logits).all()


def test_bfloat16_computes_near_float32(params, tokens):
    exact = logits_of(CONFIG, params, tokens)
    rough = logits_of(dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens)
    assert rough.dtype == jnp.float32
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_dropout_depends_on_the_key_alone(params, tokens):
    config = dataclasses.replace(CONFIG, dropout=0.2, scan_layers=True)
    run = jax.jit(lambda key: apply(config, params, tokens, ctx=Context(dropout_key=key))[0])
    a, b, c = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    unrolled = dataclasses.replace(config, scan_layers=False)
    same = logits_of(unrolled, params, tokens, Context(dropout_key=jax.random.key(0)))
    assert_allclose(same, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("mlp", "norm", "more"),
    [
        *((mlp, norm, {}) for mlp in ("swiglu", "geglu", "gelu") for norm in ("rmsnorm", "layernorm")),
        ("geglu_tanh", "rmsnorm", {"norm_order": "sandwich", "norm_eps": 0.05, "embedding_scale": 2.5}),
        ("gelu_tanh", "layernorm", {"norm_order": "post", "norm_eps": 0.05}),
    ],
)
def test_a_block_equals_numpy(mlp, norm, more, tokens):
    """One layer without attention's part (its output projection is 0): embed, norm, mlp, norm, head."""
    config = ModelConfig(
        vocab_size=31, d_model=16, num_layers=1, mixers=(AttentionConfig(num_heads=2),), mlp=mlp, norm=norm,
        use_bias=True, max_positions=12, tie_embeddings=False, logit_softcap=3.0, **more,
    )  # fmt: skip
    params = random_params(dataclasses.replace(config, init_std=0.3))
    params["stacks"]["0"]["mixer"]["out"]["kernel"] *= 0
    logits = logits_of(config, params, tokens)

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    block = jax.tree.map(lambda a: a[0], p["stacks"]["0"])

    def normal(x, w):
        if w is None:
            return x
        if norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w["scale"]
        return y + w["bias"] if norm == "layernorm" else y

    def dense(x, w):
        return x @ w["kernel"] + w["bias"]

    def gelu_of(x):
        if mlp.endswith("_tanh"):
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

    scale = 1.0 if config.embedding_scale is None else config.embedding_scale
    h = scale * p["embed"]["embedding"][np.asarray(tokens)] + p["positions"]["embedding"][: tokens.shape[1]]
    assert {name for name in block if "norm" in name} == {
        "pre": {"norm1", "norm2"},
        "post": {"post_norm1", "post_norm2"},
        "sandwich": {"norm1", "norm2", "post_norm1", "post_norm2"},
    }[config.norm_order]
    h = h + normal(np.zeros_like(h), block.get("post_norm1"))
    x = normal(h, block.get("norm2"))
    up = dense(x, block["mlp"]["up"])
    if mlp in ("gelu", "gelu_tanh"):
        up = gelu_of(up)
    else:
        gate = dense(x, block["mlp"]["gate"])
        up = up * (gate / (1 + np.exp(-gate)) if mlp == "swiglu" else gelu_of(gate))
    h = h + normal(dense(up, block["mlp"]["down"]), block.get("post_norm2"))
    expected = normal(h, p["final_norm"]) @ p["head"]["kernel"]
    assert_allclose(logits, 3 * np.tanh(expected / 3), rtol=1e-4, atol=1e-5)


def test_gelu_of_both_forms_equals_float64():
    """Each is within rounding of its own formula, and no formula is the other."""
    x = np.linspace(-9, 9, 20_001, dtype=np.float32)
    exact = {
        gelu: [0.5 * y * math.erfc(-y / math.sqrt(2)) for y in x.tolist()],
        gelu_tanh: [
            0.5 * y * (1 + math.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) for y in x.tolist()
        ],
    }
    for f, values in exact.items():
        # The rounding of 1 + erf or 1 + tanh and of its argument, multiplied by x.
        error, allowed = np.abs(np.float64(f(x)) - values), 4 * np.finfo(np.float32).eps * np.abs(x)
        assert (error <= allowed).all(), (f, (error / np.abs(x)).max())
    apart = np.abs(np.subtract(*exact.values())).max()
    assert 4e-4 < apart < 5e-4


def test_sinusoidal_positions_are_added_to_scaled_embeddings(tokens):
    """Without attention's and the mlp's part the logits are those of sqrt(D) E[token] + P[position]."""
    config = ModelConfig(
        vocab_size=31, d_model=16, num_layers=1, mixers=(AttentionConfig(num_heads=2),), sinusoidal=True,
        tie_embeddings=False,
    )  # fmt: skip
    params = random_params(config)
    for name in ("mixer/out", "mlp/down"):
        part, leaf = name.split("/")
        params["stacks"]["0"][part][leaf]["kernel"] *= 0
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1], [*range(90_000, 90_012)]])
    tokens = jnp.where(positions < 0, 99, tokens)
    logits = logits_of(config, params, tokens, Context(positions_BT=positions))
    assert np.isfinite(logits).all()
    at = np.where(positions < 0, 0, positions)
    h = np.array([[[truth.sinusoid(int(p), i, 16) for i in range(16)] for p in row] for row in at])
    h += 4 * np.asarray(params["embed"]["embedding"], np.float64)[np.where(positions < 0, 0, tokens)]
    h /= np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    h *= np.asarray(params["final_norm"]["scale"], np.float64)
    wanted = h @ np.asarray(params["head"]["kernel"], np.float64)
    assert_allclose(logits[0, :10], wanted[0, :10], rtol=1e-5, atol=1e-6)
    assert_allclose(logits[1], wanted[1], atol=1e-3)  # an angle of 90,000 is known to 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinusoidal": True, "max_positions": 8}, "sinusoidal and max_positions 8 both add positions"),
        ({"sinusoidal": True, "d_model": 33}, "sinusoidal positions need an even d_model, got 33"),
        ({"d_model": 30}, "mixers.0: d_model 30 is not divisible by num_heads 4"),
        ({"num_layers": 1}, "mixers: 2 given for 1 layers"),
        ({"mixers": ()}, "mixers: 0 given"),
        ({"vocab_size": 0}, "vocab_size must be >= 1"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 0.99\]"),
        ({"remat": "dots_savable"}, "unknown policy 'dots_savable'; .*; did you mean dots_saveable"),
        ({"mlp": "tanh"}, "mlp must be one of swiglu, geglu, geglu_tanh, .*, relu2, got 'tanh'"),
        (
            {"norm_order": "parallel"},
            "norm_order must be one of pre, post, sandwich, residual, got 'parallel'",
        ),
        ({"embedding_scale": 0.0}, "embedding_scale must be from 0.001 to 1e\\+06, got 0.0"),
        ({"norm": "rms"}, "norm must be one of rmsnorm, layernorm, got 'rms'"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, float64, got 'float16'"),
        (
            {"mixers": ("softmax",)},
            r"mixers.0 must be the config of a mixer, such as make_config\('softmax'\), got 'softmax'",
        ),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(CONFIG, **arguments)
    assert "\n" not in str(error.value)


def test_bad_calls(params, tokens):
    with pytest.raises(ValueError, match="vocab_size is not set"):
        init_params(dataclasses.replace(CONFIG, vocab_size=None), jax.random.key(0))
    with pytest.raises(ValueError, match="parameter /?head is missing|parameter head.* is missing"):
        apply(dataclasses.replace(CONFIG, tie_embeddings=False), params, tokens)
    with pytest.raises(ValueError, match=r"parameter embed/embedding must have shape \(32, 32\)"):
        apply(dataclasses.replace(CONFIG, vocab_size=32), params, tokens)
    short = dataclasses.replace(CONFIG, max_positions=8)
    short_params = random_params(short)
    with pytest.raises(ValueError, match="12 tokens exceed the 8 learned positions"):
        apply(short, short_params, tokens)
    with pytest.raises(ValueError, match="capacity 9 exceeds the 8 learned positions"):
        bind(short, short_params).init_state(1, 9)
