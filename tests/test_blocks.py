"""Layers in every form that `BlockConfig` has, against their formulas, and their decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.caches import NoState, fork_all, rewind_all
from attention_jax.feed_forwards import Dense, DenseConfig
from attention_jax.generation import decode_step, prefill
from attention_jax.mixers import Context, make_config
from attention_jax.model import (
    BlockConfig,
    ModelConfig,
    apply,
    bind,
    cache_bytes,
    init_params,
    prepare_for_decoding,
)
from tests.params import random_params

SOFTMAX, GLA = make_config("softmax", num_heads=2), make_config("gla", num_heads=2)
BLOCKS = {
    "pre": BlockConfig(SOFTMAX),
    "post": BlockConfig(SOFTMAX, norm_order="post"),
    "sandwich": BlockConfig(SOFTMAX, norm_order="sandwich", mixer_scale=0.5, feed_forward_scale=-0.25),
    "residual": BlockConfig(
        SOFTMAX, norm_order="residual", mixer_residual_scale=3.5, feed_forward_residual_scale=2.0
    ),
    "parallel": BlockConfig(SOFTMAX, parallel=True, feed_forward_scale=0.5, mixer_residual_scale=2.0),
    "shared": BlockConfig(GLA, DenseConfig(activation="gelu"), parallel=True, shared_norm=True),
    "mixer": BlockConfig(GLA, None, norm_order="sandwich"),
    "feed-forward": BlockConfig(None, DenseConfig(activation="relu2", gated=False)),
}


def _model(**options):
    """A model of all forms, one layer each, with every option about them."""
    return ModelConfig(
        vocab_size=31,
        d_model=16,
        num_layers=len(BLOCKS),
        blocks=tuple(BLOCKS.values()),
        init_std=0.3,
        norm_offset=1.0,
        embedding_norm=True,
        tie_embeddings=False,
        head_bias=True,
        logit_scale=0.5,
        **options,
    )


TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    config = _model()
    params = jax.tree.map(jnp.asarray, random_params(config))
    return config, params, np.asarray(_logits(config, params))


def _logits(config, params):
    return jax.jit(functools.partial(apply, config))(params, TOKENS).logits


def _by_hand(name, block, x):
    """The formula of a form, from the layer's own parts."""
    mixer, mlp, n1, n2, p1, p2 = (
        part or (lambda x: x)
        for part in (block.mixer, block.mlp, block.norm1, block.norm2, block.post_norm1, block.post_norm2)
    )
    match name:
        case "pre":
            x = x + mixer(n1(x))
            return x + mlp(n2(x))
        case "post":
            x = x + p1(mixer(x))
            return x + p2(mlp(x))
        case "sandwich":
            x = x + 0.5 * p1(mixer(n1(x)))
            return x - 0.25 * p2(mlp(n2(x)))
        case "residual":
            x = 3.5 * n1(x) + mixer(n1(x))
            return 2 * n2(x) + mlp(n2(x))
        case "parallel":
            return 2 * x + mixer(n1(x)) + 0.5 * mlp(n2(x))
        case "shared":
            return x + mixer(n1(x)) + mlp(n1(x))
        case "mixer":
            return x + p1(mixer(n1(x)))
        case "feed-forward":
            return x + mlp(n2(x))


def test_the_formula_of_each_form(model):
    config, params, logits = model

    @jax.jit
    def run(params):
        bound = bind(config, params)
        x = bound.embed_norm(bound.embed(TOKENS))
        for (name, _), stack in zip(BLOCKS.items(), bound.stacks, strict=True):
            graphdef, weights = nnx.split(stack)
            x = _by_hand(name, nnx.merge(graphdef, jax.tree.map(lambda a: a[0], weights)), x)
        x = bound.final_norm(x)
        return 0.5 * (x @ bound.head.kernel[...] + bound.head.bias[...])

    np.testing.assert_allclose(run(params), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_norm_offset(model):
    """The learned scale holds w of (1 + w), starts at 0, and is added in float32."""
    config, params, logits = model
    assert not init_params(config, jax.random.key(0))["final_norm"]["scale"].any()

    def moved(path, leaf):
        norms = ("norm1", "norm2", "post_norm1", "post_norm2", "final_norm", "embed_norm")
        return leaf + 1 if any(key.key in norms for key in path) and path[-1].key == "scale" else leaf

    plain = dataclasses.replace(config, norm_offset=0.0)
    folded = jax.tree_util.tree_map_with_path(moved, params)
    np.testing.assert_allclose(_logits(plain, folded), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_embedding_dropout(model):
    """Its rate, or that of the branches."""
    config, params, _ = model
    bound, ctx = bind(config, params), Context(dropout_key=jax.random.key(0))

    def embedded(**rates):
        bound.config = dataclasses.replace(config, **rates)
        return np.asarray(bound._embed(TOKENS, ctx))

    plain, dropped = embedded(), embedded(dropout=0.5)
    np.testing.assert_array_equal(embedded(embedding_dropout=0.5), dropped)
    np.testing.assert_array_equal(embedded(dropout=0.5, embedding_dropout=0.0), plain)
    np.testing.assert_array_equal(dropped, np.where(dropped, 2 * plain, 0))
    assert 0.4 < (dropped == 0).mean() < 0.6


@pytest.mark.parametrize("form", ["scanned", "prepared"])
def test_other_layouts_give_the_same_logits(model, form):
    config, params, logits = model
    if form == "scanned":
        config = dataclasses.replace(config, scan_layers=True)
    else:
        params = prepare_for_decoding(config, params)
    np.testing.assert_allclose(_logits(config, params), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_decoding(model):
    """Token by token after a prefill; a layer without a mixer has a state without arrays."""
    config, params, logits = model
    params = prepare_for_decoding(config, params)
    state = prefill(config, params, TOKENS[:, :5], capacity=9)
    assert isinstance(state.caches[-1], NoState)
    step = jax.jit(functools.partial(decode_step, config))
    for t in range(5, 9):
        state = step(params, state, TOKENS[:, t])
        np.testing.assert_allclose(state.logits_BV, logits[:, t], rtol=0, atol=1e-5 * np.abs(logits).max())
    assert [cache.nbytes for cache in state.caches] == list(cache_bytes(config, 2, 9))
    assert cache_bytes(config, 2, 9)[-1] == 0
    fork_all(state.caches, np.array([1, 0, 0]))
    assert rewind_all(state.caches[-1], np.array([1, 1])) == NoState()


def test_the_short_form_is_the_long_one():
    sizes = {"vocab_size": 31, "d_model": 16, "num_layers": 2}
    short = ModelConfig(**sizes, mixers=(SOFTMAX,), mlp="geglu", mlp_width=24)
    block = BlockConfig(SOFTMAX, DenseConfig(activation="gelu", width=24))
    long = dataclasses.replace(
        short, mixers=ModelConfig.mixers, mlp="swiglu", mlp_width=None, blocks=(block,)
    )
    params = init_params(short, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, params, init_params(long, jax.random.key(3)))
    np.testing.assert_array_equal(_logits(short, params), _logits(long, params))


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"activation": "relu", "gated": False}, lambda g, u: np.maximum(u, 0)),
        ({"activation": "relu2"}, lambda g, u: np.maximum(g, 0) ** 2 * u),
        ({"gated": False}, lambda g, u: u / (1 + np.exp(-u))),
        (
            {"limit": 0.7, "sharpness": 1.702, "up_offset": 1.0},
            lambda g, u: (
                np.minimum(g, 0.7) / (1 + np.exp(-1.702 * np.minimum(g, 0.7))) * (np.clip(u, -0.7, 0.7) + 1)
            ),
        ),
    ],
)
def test_dense_units(options, unit):
    """Against NumPy float64; gpt-oss's clamped unit last."""
    layer = Dense(6, width=10, use_bias=True, **options, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)

    def project(name, x):
        f = getattr(layer, name, None)
        return f and x.astype(np.float64) @ np.float64(f.kernel[...]) + np.float64(f.bias[...])

    for f in (layer.up, layer.down, *([layer.gate] if layer.config.gated else [])):
        f.bias[...] = jax.random.normal(jax.random.key(2), f.bias.shape)
    expected = project("down", unit(project("gate", x), project("up", x)))
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockConfig(None, None), "a layer needs a mixer or a feed_forward"),
        (lambda: BlockConfig("softmax"), "mixer must be the config of a mixer or None, got str"),
        (lambda: BlockConfig(SOFTMAX, SOFTMAX), "feed_forward must be the config of a feed-forward or None"),
        (lambda: BlockConfig(SOFTMAX, None, parallel=True), "needs both a mixer and a feed_forward"),
        (lambda: BlockConfig(SOFTMAX, shared_norm=True), "only a parallel layer has one norm"),
        (lambda: BlockConfig(parallel=True, norm_order="post"), "norm_order must be pre, got post"),
        (lambda: BlockConfig(mixer_scale=0.0), "mixer_scale must be of a magnitude from 1e-06"),
        (lambda: BlockConfig(parallel=True, feed_forward_residual_scale=2.0), "there is one sum"),
        (lambda: DenseConfig(width=0), "width must be >= 1, got 0"),
        (lambda: DenseConfig(activation="tanh"), "activation must be one of silu, gelu"),
        (lambda: DenseConfig(activation="gelu", sharpness=2.0), "sharpness 2.0 is for activation silu"),
        (lambda: DenseConfig(gated=False, up_offset=1.0), "up_offset 1.0 is for a gated unit"),
        (lambda: ModelConfig(blocks=()), "blocks: 0 given for 4 layers"),
        (lambda: ModelConfig(blocks=BlockConfig()), "blocks must be a sequence of BlockConfigs, got one"),
        (lambda: ModelConfig(blocks=(SOFTMAX,)), "blocks.0 must be a BlockConfig, got AttentionConfig"),
        (lambda: ModelConfig(blocks=(BlockConfig(None),)), "no layer has a mixer"),
        (lambda: ModelConfig(blocks=(BlockConfig(),), mixers=(GLA,)), "blocks and mixers are both set"),
        (lambda: ModelConfig(blocks=(BlockConfig(),), mlp="gelu"), "blocks and mlp are both set"),
        (
            lambda: ModelConfig(blocks=(BlockConfig(parallel=True),), norm_order="post"),
            "blocks.0 is parallel",
        ),
        (lambda: ModelConfig(embedding_dropout=1.0), r"embedding_dropout must be in \[0, 0.99\], got 1.0"),
        (lambda: ModelConfig(head_bias=True), "a tied output projection has no bias"),
        (lambda: ModelConfig(blocks=(BlockConfig(make_config("nystromformer")),)), "blocks.0.mixer: nystrom"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
