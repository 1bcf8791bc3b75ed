"""Mixtures of experts: against NumPy float64, gradients, decoding, and what training does with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.feed_forwards import DenseConfig, Experts, ExpertsConfig, RouterConfig
from attention_jax.feed_forwards.router import route
from attention_jax.generation import decode_step, prefill
from attention_jax.mixers import Context, make_config
from attention_jax.model import BlockConfig, ModelConfig, apply, prepare_for_decoding
from attention_jax.positions import RoPE
from tests.params import random_params
from tests.reference import experts as reference
from train.config.sections import OptimizerConfig
from train.optimizer import decay_mask, make_optimizer
from train.step import make_train_step

B, T, D = 2, 7, 6
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.array([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]], np.int32)  # a row padded on the left


def _silu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def _gpt_oss(gate, up):
    gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


# Options of the config, options of the router, and the unit in NumPy.
CASES = {
    "mixtral": ({}, {}, _silu),
    "qwen2": ({"shared_width": 5, "shared_gate": True}, {"normalize": False}, _silu),
    "gpt_oss": (
        {"use_bias": True, "limit": 0.7, "sharpness": 1.702, "up_offset": 1.0, "impl": "ragged"},
        {"use_bias": True},
        _gpt_oss,
    ),
    "deepseek_v3": (
        {"num_experts": 6, "shared_width": 5, "experts_per_token": 3},
        {"scoring": "sigmoid", "correction_bias": True, "num_groups": 3, "groups_per_token": 2,
         "group_score": "top2", "scale": 2.5},
        _silu,
    ),
    "llama4": (
        {"experts_per_token": 1, "weigh_input": True, "shared_width": 5},
        {"scoring": "sigmoid", "normalize": False},
        _silu,
    ),
    "few tokens": ({"num_experts": 32, "use_bias": True}, {}, _silu),
    "ungated, capacity": (
        {"capacity_factor": 0.4, "gated": False, "activation": "relu", "use_bias": True},
        {},
        lambda gate, up: np.maximum(up, 0),
    ),
}  # fmt: skip


def _layer(options, router):
    """A layer with random biases, and a router that differs clearly between experts."""
    router = RouterConfig(**{"balance_loss": 0.5, "z_loss": 0.25} | router)
    config = ExpertsConfig(**{"num_experts": 5, "width": 8} | options, router=router)
    layer = Experts(D, config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for path, param in nnx.to_flat_state(nnx.state(layer)):
        if "bias" in path[-1]:
            param[...] = jnp.asarray(0.3 * rng.normal(size=param.shape), jnp.float32)
    return layer


def _arrays(layer):
    """The parameters under the names of the reference."""
    p = {name: getattr(layer, name) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")}
    p |= {"router": layer.router.kernel, "router_b": layer.router.bias, "router_bias": layer.router_bias}
    if layer.shared is not None:
        for name, key in (("gate_proj", "gate"), ("up", "up"), ("down", "down")):
            p[f"shared_{name}"] = getattr(layer.shared, key).kernel
        p["shared_gate"] = layer.shared_gate and layer.shared_gate.kernel
    return {name: np.float64(x[...]) for name, x in p.items() if x is not None}


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    options, router, unit = CASES[name]
    layer = _layer(options, router)
    config = layer.config
    ctx = Context(positions_BT=POSITIONS, capture={"router", "router_load", "router_losses"})
    y, aux = jax.jit(lambda x: tuple(layer.run(x, ctx=ctx)))(np.where(POSITIONS[..., None] < 0, np.nan, X))
    names = ("scoring", "normalize", "scale", "num_groups", "groups_per_token", "group_score")
    expected = reference.experts(
        np.float64(X), POSITIONS >= 0, _arrays(layer), unit, k=config.experts_per_token,
        weigh_input=config.weigh_input, capacity=config.capacity(T),
        **{key: getattr(config.router, key) for key in names},
    )  # fmt: skip
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=4e-6 * np.abs(expected[0]).max())
    valid = POSITIONS >= 0
    np.testing.assert_allclose(aux["router"][valid], expected[1][valid], rtol=2e-6)
    np.testing.assert_allclose(aux["router_load"], expected[2], rtol=1e-6)
    np.testing.assert_allclose(aux["router_losses"], [0.5 * expected[3], 0.25 * expected[4]], rtol=2e-6)


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_groups_and_correction(scoring, group_score):
    """The choice of 200 tokens; a correction below every score cannot bring in another group."""
    rng = np.random.default_rng(1)
    logits, correction = rng.normal(size=(200, 12)).astype(np.float32), rng.normal(size=12) - 4
    config = RouterConfig(
        scoring, num_groups=4, groups_per_token=2, group_score=group_score, correction_bias=True
    )
    found = jax.jit(lambda z, b: route(config, z, 4, b).experts_NK)(logits, correction.astype(np.float32))
    for z, chosen in zip(logits.astype(np.float64), found, strict=True):
        s = reference.scores(z, scoring)
        assert list(chosen) == reference.choose(s, 4, correction, 4, 2, group_score)


def test_weights_of_scores_that_underflow():
    logits = jnp.array([[-200.0, -201.0, -300.0]])
    weights = route(RouterConfig("sigmoid"), logits, 2).weights_NK
    np.testing.assert_allclose(weights[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.e)], rtol=1e-6)


def _dense(layer, x_BTD):
    """All experts for all tokens, as one formula."""
    routing = route(layer.config.router, layer.router(x_BTD.reshape(-1, D)), layer.config.experts_per_token)
    one_hot = routing.experts_NK[..., None] == jnp.arange(layer.config.num_experts)
    weights_NE = (routing.weights_NK[..., None] * one_hot).sum(1)
    x_ND = x_BTD.reshape(-1, D)

    def project(name, x, form):
        return jnp.einsum(form, x, getattr(layer, name)[...]) + getattr(layer, f"{name}_bias")[...][None]

    gate, up = (project(name, x_ND, "nd,edf->nef") for name in ("gate", "up"))
    y_NED = project("down", jax.nn.silu(gate) * up, "nef,efd->ned")
    return jnp.einsum("ned,ne->nd", y_NED, weights_NE).reshape(x_BTD.shape)


@pytest.mark.parametrize(
    "options",
    [
        {"impl": "ragged"},
        {"impl": "blocked"},
        {"num_experts": 32, "impl": "blocked"},
        {"capacity_factor": 100.0},
    ],
    ids=["ragged", "blocked", "single", "capacity"],
)
def test_gradients_equal_those_of_the_dense_formula(options):
    layer = _layer(options | {"use_bias": True}, {})
    graphdef, params = nnx.split(layer)

    def loss(run, params, x):
        return jnp.sum(jnp.sin(run(nnx.merge(graphdef, params), x)))

    both = [
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(params, X)
        for run in (lambda layer, x: layer(x), _dense)
    ]
    for found, wanted in zip(*(jax.tree.leaves(g) for g in both), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


def test_invalid_slots_take_no_capacity_and_get_no_gradient():
    """NaN in them changes no bit and no gradient, and no row depends on the padding of another."""
    layer = _layer({"capacity_factor": 0.5, "use_bias": True}, {})
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, x, positions):
        def loss(params, x):
            layer, ctx = nnx.merge(graphdef, params), Context(positions, capture={"router_losses"})
            y, aux = layer.run(x, ctx=ctx)
            return jnp.sum(y**2) + aux["router_losses"].sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    clean = run(params, X, POSITIONS)
    dirty = run(params, np.where(POSITIONS[..., None] < 0, np.nan, X), POSITIONS)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    (_, x_grad), y = clean
    assert not np.any(x_grad[0, :2]) and not np.any(y[0, :2])
    moved = run(params, X, np.abs(POSITIONS))[1]
    np.testing.assert_array_equal(moved[1], y[1])
    # Later tokens do not take the place of earlier ones.
    later = X.copy()
    later[:, 4:] += 1
    np.testing.assert_array_equal(run(params, later, POSITIONS)[1][:, :4], y[:, :4])


SOFTMAX = make_config("softmax", num_heads=2, rope=RoPE())
EXPERTS = ExpertsConfig(
    num_experts=5, width=12, shared_width=8, router=RouterConfig(balance_loss=0.5, z_loss=0.1)
)
V3 = RouterConfig("sigmoid", correction_bias=True, bias_rate=0.25)
MODEL = ModelConfig(
    vocab_size=31,
    d_model=16,
    num_layers=4,
    init_std=0.3,
    blocks=(
        BlockConfig(SOFTMAX, DenseConfig(width=24)),
        BlockConfig(SOFTMAX, EXPERTS),
        BlockConfig(None, ExpertsConfig(num_experts=4, width=12, use_bias=True, capacity_factor=50.0)),
        BlockConfig(SOFTMAX, ExpertsConfig(num_experts=4, width=12, router=V3), parallel=True),
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(MODEL))


def _logits(config, params):
    return np.asarray(jax.jit(functools.partial(apply, config))(params, TOKENS).logits)


def test_names_of_parameters(params):
    assert set(params["stacks"]["2"]["mlp"]) == {
        "router", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"
    }  # fmt: skip
    mlp = params["stacks"]["1"]["mlp"]
    assert set(mlp["shared"]) == {"gate", "up", "down"} and mlp["router"]["kernel"].shape == (1, 16, 5)
    assert mlp["up"].shape == (1, 5, 16, 12) and mlp["down"].shape == (1, 5, 12, 16)
    decayed = decay_mask(params)["stacks"]
    assert decayed["1"]["mlp"]["up"] and not decayed["2"]["mlp"]["up_bias"]
    assert not decayed["3"]["mlp"]["router_bias"]
    stds = [np.std(x) for x in Experts(64, num_experts=64, width=8, rngs=nnx.Rngs(0)).up[...]]
    np.testing.assert_allclose(stds, 1 / 8, rtol=0.2)  # lecun_normal of each expert by itself


def test_decoding_and_other_layouts(params):
    """Scanned, prepared, and token by token after a prefill."""
    logits = _logits(MODEL, params)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(logits).max())
    scanned = dataclasses.replace(MODEL, scan_layers=True, remat="nothing_saveable")
    close(_logits(scanned, params), logits)
    weights = prepare_for_decoding(MODEL, params)
    state = prefill(MODEL, weights, TOKENS[:, :6], capacity=9)
    step = jax.jit(functools.partial(decode_step, MODEL))
    for t in range(6, 9):
        state = step(weights, state, TOKENS[:, t])
        close(state.logits_BV, logits[:, t])


def test_a_call_with_a_cache_drops_no_token():
    def model(factor):
        experts = ExpertsConfig(num_experts=4, width=12, capacity_factor=factor)
        return dataclasses.replace(MODEL, num_layers=1, blocks=(BlockConfig(SOFTMAX, experts),))

    params = random_params(model(None))
    dropless = _logits(model(None), params)
    assert np.abs(_logits(model(0.3), params) - dropless).max() > 0.1
    state = prefill(model(0.3), params, TOKENS, capacity=9)
    np.testing.assert_allclose(state.logits_BV, dropless[:, -1], rtol=0, atol=1e-5 * np.abs(dropless).max())


def test_prepared_bfloat16_weights_give_the_same_bits():
    config = dataclasses.replace(MODEL, dtype="bfloat16", num_layers=1, blocks=(MODEL.blocks[1],))
    params = random_params(config)
    weights = jax.jit(functools.partial(prepare_for_decoding, config))(params)
    up = weights.weights["stacks"]["blocks"][0]["mlp"]["up"]
    np.testing.assert_array_equal(
        up, params["stacks"]["0"]["mlp"]["up"][0].astype(jnp.bfloat16).astype(up.dtype)
    )
    np.testing.assert_allclose(_logits(config, params), _logits(config, weights), atol=0.1)


@pytest.mark.parametrize("parts", [1, 2])
def test_training_step(params, parts):
    """The reported loss is the language model's; the gradient has the router's; the correction bias moves."""
    optimizer = OptimizerConfig(accumulation_steps=parts, clip_norm=None, warmup_steps=0)
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1)}
    start = jax.tree.map(jnp.copy, params)
    state = make_optimizer(optimizer, 9).init(start)
    new, _, metrics = make_train_step(MODEL, optimizer, 9)(
        start, state, batch, np.int32(0), jax.random.key(0)
    )

    @jax.jit
    def routed(params, tokens):
        output = apply(MODEL, params, tokens, ctx=Context(capture={"router_load", "router_losses"}))
        return output.logits, [a for a in output.aux if a]

    outputs = [routed(params, tokens) for tokens in np.split(TOKENS, parts)]
    logits = jnp.concatenate([logits for logits, _ in outputs])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1).mean()
    np.testing.assert_allclose(metrics["train/loss"], nll, rtol=1e-5)
    router_loss = np.mean([sum(a["router_losses"].sum() for a in aux) for _, aux in outputs])
    np.testing.assert_allclose(metrics["router_loss"], router_loss, rtol=1e-5)
    loads = [np.mean([aux[i]["router_load"] for _, aux in outputs], axis=0) for i in range(3)]
    np.testing.assert_allclose(metrics["router_load"], max(x.size * x.max() for x in loads), rtol=1e-5)
    bias = [p["stacks"]["3"]["mlp"]["router_bias"][0] for p in (params, new)]
    np.testing.assert_allclose(bias[1] - bias[0], 0.25 * np.sign(0.25 - loads[2]), atol=1e-6)


def test_losses_reach_the_gradient():
    """Of the router alone where the language model's loss has none: no target is scored."""
    config = dataclasses.replace(MODEL, num_layers=1, blocks=(MODEL.blocks[1],))
    optimizer = OptimizerConfig(warmup_steps=0, weight_decay=0.0)
    params = jax.tree.map(jnp.asarray, random_params(config))
    batch = {"tokens": TOKENS, "targets": np.full_like(TOKENS, -1)}
    state = make_optimizer(optimizer, 9).init(params)
    before = jax.tree.map(np.array, params)
    after, _, metrics = make_train_step(config, optimizer, 9)(
        params, state, batch, np.int32(0), jax.random.key(0)
    )
    mlps = [p["stacks"]["0"]["mlp"] for p in (before, after)]
    assert metrics["train/loss"] == 0 and metrics["grad_norm"] > 0
    assert np.any(mlps[0]["router"]["kernel"] != mlps[1]["router"]["kernel"])
    np.testing.assert_array_equal(mlps[0]["up"], mlps[1]["up"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertsConfig(num_experts=0), "num_experts must be >= 1, got 0"),
        (lambda: ExpertsConfig(num_experts=2**15), "num_experts must be <= 16384, got 32768"),
        (
            lambda: ExpertsConfig(num_experts=2, experts_per_token=3),
            "experts_per_token 3 exceeds num_experts 2",
        ),
        (lambda: ExpertsConfig(shared_width=0), "shared_width must be >= 1, got 0"),
        (lambda: ExpertsConfig(shared_gate=True), "shared_gate is true without a shared expert"),
        (lambda: ExpertsConfig(capacity_factor=0.0), "capacity_factor must be from 0.001 to 10000, got 0"),
        (
            lambda: ExpertsConfig(capacity_factor=1.0, impl="ragged"),
            "impl ragged is for capacity_factor null",
        ),
        (lambda: ExpertsConfig(impl="dense"), "impl must be one of ragged, blocked, None, got 'dense'"),
        (lambda: ExpertsConfig(router="softmax"), "router must be a RouterConfig, got str"),
        (lambda: RouterConfig("tanh"), "scoring must be one of softmax, sigmoid, got 'tanh'"),
        (lambda: RouterConfig(scale=0.0), "scale must be from 1e-06"),
        (lambda: RouterConfig(balance_loss=-1.0), "balance_loss must be 0, or from 1e-08"),
        (lambda: RouterConfig(bias_rate=0.1), "bias_rate 0.1 moves a correction bias"),
        (lambda: RouterConfig(num_groups=2, groups_per_token=3), "groups_per_token 3 exceeds num_groups 2"),
        (lambda: RouterConfig(num_groups=0), "num_groups must be >= 1, got 0"),
        (
            lambda: ExpertsConfig(router=RouterConfig(num_groups=3)),
            "num_groups 3 does not divide num_experts 8",
        ),
        (
            lambda: ExpertsConfig(router=RouterConfig(num_groups=8, group_score="top2")),
            "group_score top2 needs groups of 2 experts or more, got 1",
        ),
        (
            lambda: ExpertsConfig(router=RouterConfig(num_groups=8)),
            "experts_per_token 2 exceeds the 1 experts of a token's 1 groups",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
