"""The training step: accumulation, dropout keys, donation, refusal of what is not finite, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.mixers import AttentionConfig, Context
from attention_jax.model import ModelConfig, ModelOutput, apply, init_params
from attention_jax.positions import RoPE
from train.config.sections import OptimizerConfig
from train.objective import mean_nll
from train.optimizer import make_optimizer, skip_non_finite
from train.step import make_eval_step, make_train_step

MODEL = ModelConfig(
    vocab_size=11, d_model=16, num_layers=1, mixers=(AttentionConfig(num_heads=2, rope=RoPE()),), mlp_width=24
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0, schedule="constant")
# No clipping, no decay, and so large an epsilon that Adam's first step is no mere sign of the gradient.
PLAIN = dataclasses.replace(OPTIMIZER, epsilon=1.0, clip_norm=None, weight_decay=0.0)
KEY = jax.random.key(7)


@functools.cache
def initial():
    """Parameters drawn by NumPy: compiling their initialisation takes longer than all of these tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)


def fresh():
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), initial())
    return params, make_optimizer(OPTIMIZER, 100).init(params)


def packed_batch(seed=0, B=4, T=8):
    """Rows of two documents and padding; the number of scored tokens differs much from row to row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, (B, T)).astype(np.int32)
    targets = rng.integers(0, 11, (B, T)).astype(np.int32)
    segments = np.repeat(np.int32([[0, 0, 0, 1, 1, 1, -1, -1]]), B, 0)
    positions = np.repeat(np.int32([[0, 1, 2, 0, 1, 2, -1, -1]]), B, 0)
    targets[segments < 0] = -1
    targets[0, 1:] = -1
    targets[1] = -1
    return {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": segments}


@functools.cache
def compiled(model=MODEL, optimizer=OPTIMIZER):
    return make_train_step(model, optimizer, 100)


def stepped(batch, model=MODEL, optimizer=OPTIMIZER, step=0, key=KEY):
    params, opt_state = fresh()
    return compiled(model, optimizer)(params, opt_state, batch, np.int32(step), key)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def test_first_step_is_the_formula():
    """After one Adam step from zero moments each weight moves by rate * g / (|g| + eps) and its decay."""
    batch = packed_batch()
    start, _ = fresh()

    def loss(params):
        logits = apply(MODEL, params, batch["tokens"], ctx=_context(batch)).logits
        return mean_nll(logits, batch["targets"])[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(start)
    params, _, metrics = stepped(batch, optimizer=PLAIN)
    expected = jax.tree.map(lambda w, g: w - 1e-2 * g / (jnp.abs(g) + 1), start, grads)
    assert distance(params, expected) < 3e-7 < 1e-4 < distance(params, start)
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert int(metrics["tokens"]) == (batch["targets"] >= 0).sum()


def _context(batch):
    return Context(positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"])


def test_accumulation_equals_the_large_batch():
    """Four micro-batches whose token counts are 1, 0, 6 and 6."""
    batch = packed_batch()
    expected, _, one = stepped(batch, optimizer=PLAIN)
    got, _, many = stepped(batch, optimizer=dataclasses.replace(PLAIN, accumulation_steps=4))
    assert distance(got, expected) < 3e-7 < 1e-4 < distance(expected, fresh()[0])
    for name in ("train/loss", "grad_norm"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-6)
    assert int(many["tokens"]) == int(one["tokens"])


def test_dropout_depends_on_key_step_and_micro_batch_alone(monkeypatch):
    """A stand-in model whose loss shows its dropout key: 0.5 + uniform(key) for every token."""

    def apply(model, params, tokens, *, ctx):
        del model
        logit = jnp.log(jnp.expm1(0.5 + jax.random.uniform(ctx.dropout_key)))
        logits = jnp.stack([params["w"], params["w"] + logit])
        return ModelOutput(jnp.broadcast_to(logits, (*tokens.shape, 2)))

    def seen(parts, step=0, key=KEY):
        optimizer = dataclasses.replace(OPTIMIZER, accumulation_steps=parts)
        params = {"w": jnp.zeros(())}
        batch = {"tokens": np.zeros((2, 3), np.int32), "targets": np.zeros((2, 3), np.int32)}
        run = make_train_step(MODEL, optimizer, 100)
        opt_state = make_optimizer(optimizer, 100).init(params)
        return float(run(params, opt_state, batch, np.int32(step), key)[2]["train/loss"])

    def expected(*folded):
        key = KEY
        for data in folded:
            key = jax.random.fold_in(key, data)
        return 0.5 + float(jax.random.uniform(key))

    monkeypatch.setattr("train.step.apply", apply)
    np.testing.assert_allclose(seen(1), expected(0, 0), rtol=1e-6)
    np.testing.assert_allclose(seen(1, step=5), expected(5, 0), rtol=1e-6)
    np.testing.assert_allclose(seen(2, step=5), (expected(5, 0) + expected(5, 1)) / 2, rtol=1e-6)
    assert seen(1, key=jax.random.key(8)) != seen(1)


def test_without_dropout_the_key_changes_nothing():
    batch = packed_batch()
    assert distance(stepped(batch)[0], stepped(batch, key=jax.random.key(8))[0]) == 0


@pytest.mark.parametrize("where", ["embed", "stacks"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(where, poison):
    params, opt_state = fresh()
    step = compiled()
    params, opt_state, _ = step(params, opt_state, packed_batch(), np.int32(0), KEY)
    leaf = jax.tree.leaves(params[where])[0]
    params[where] = jax.tree.map(lambda x: x.at[..., 0].set(poison) if x is leaf else x, params[where])
    scale = params["final_norm"]["scale"]
    params["final_norm"]["scale"] = scale.at[:3].set(
        np.float32([-0.0, 1e-40, -1e-45])
    )  # denormal numbers too
    before = jax.tree.map(np.array, (params, opt_state))
    *after, metrics = step(params, opt_state, packed_batch(), np.int32(1), KEY)
    assert not bool(metrics["finite"])
    assert all(map(_same_bits, jax.tree.leaves(before), jax.tree.leaves(tuple(after))))


def _same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_batch_without_targets_is_defined():
    batch = packed_batch()
    batch["targets"][:] = -1
    params, _, metrics = stepped(batch)
    assert float(metrics["train/loss"]) == 0 and float(metrics["grad_norm"]) == 0 and bool(metrics["finite"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_buffers_are_donated_and_one_compilation_serves_all_steps():
    params, opt_state = fresh()
    step = compiled()  # a donation that cannot be used is a warning, an error here
    for count in range(3):
        old = jax.tree.leaves((params, opt_state))
        params, opt_state, _ = step(params, opt_state, packed_batch(count), np.int32(count), KEY)
        assert all(leaf.is_deleted() for leaf in old)
    size = step._cache_size()
    step(params, opt_state, packed_batch(), np.int32(9), KEY)
    assert step._cache_size() == size


def test_bfloat16_computes_on_float32_weights():
    batch = packed_batch()
    params, opt_state, metrics = stepped(batch, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    loss = float(stepped(batch)[2]["train/loss"])
    assert 0 < abs(float(metrics["train/loss"]) - loss) < 2e-2 * loss


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_loss_falls(monkeypatch, kind):
    """With our optimiser, and with any of optax that takes its place."""
    if kind == "lion":
        transform = skip_non_finite(optax.lion(optax.linear_schedule(2e-2, 1e-3, 40)))
        monkeypatch.setattr("train.step.make_optimizer", lambda config, steps: transform)
        params = fresh()[0]
        opt_state, step = transform.init(params), make_train_step(MODEL, OPTIMIZER, 100)
    else:
        (params, opt_state), step = fresh(), compiled()
    evaluate, batch = make_eval_step(MODEL), packed_batch()

    def score():
        total, count = evaluate(params, batch)
        return float(total) / int(count)

    before = score()
    for count in range(40):
        params, opt_state, _ = step(params, opt_state, batch, np.int32(count), KEY)
    assert score() < before / 4


def test_the_loss_skips_what_a_prefix_shows():
    """Of positions 0, 1, 2 and a prefix of 3, the first two targets are seen by their own queries."""
    model = dataclasses.replace(MODEL, mixers=(AttentionConfig(num_heads=2, mask="Prefix(3) | Causal()"),))
    batch = packed_batch()
    kept = batch | {"targets": np.where(batch["positions"] < 2, -1, batch["targets"])}
    params, _ = fresh()
    found, wanted = (jax.jit(make_eval_step(model))(params, b) for b in (batch, kept))
    scored = (kept["targets"] >= 0).sum()
    assert int(found[1]) == int(wanted[1]) == scored < (batch["targets"] >= 0).sum()
    assert float(found[0]) == float(wanted[0])
    metrics = stepped(batch, model=model)[2]
    assert int(metrics["tokens"]) == int(found[1])
    np.testing.assert_allclose(metrics["train/loss"], found[0] / found[1], rtol=1e-6)
    plain = {name: batch[name] for name in ("tokens", "targets")}
    shown = jax.jit(make_eval_step(model))(params, plain)
    assert int(shown[1]) == int((plain["targets"][:, 2:] >= 0).sum())
