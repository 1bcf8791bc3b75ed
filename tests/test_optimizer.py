"""Schedules against their formulas, AdamW against NumPy float64 and optax, and what a bad gradient does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.sections import OptimizerConfig
from train.optimizer import (
    clip_by_global_norm,
    decay_mask,
    make_optimizer,
    make_schedule,
    skip_non_finite,
)


def expected_rate(config, steps, n):
    """The rate of update n by the definition, in float64."""
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if n <= warmup:
        return peak * n / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        end = config.decay_steps or steps
        p = min((n - warmup) / (end - warmup), 1)
        return final + (peak - final) * (1 + math.cos(math.pi * p)) / 2
    length = config.decay_steps or max(1, math.ceil(steps / 5))
    p = min(max((n - (steps - length)) / length, 0), 1)
    return final + (peak - final) * (1 - p)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("decay", [None, 13])
def test_schedule_is_its_formula_at_every_step(schedule, warmup, decay):
    rates = {"learning_rate": 3e-3, "final_learning_rate": 2e-4, "warmup_steps": warmup}
    if schedule != "constant":
        rates["decay_steps"] = decay
    config = OptimizerConfig(schedule=schedule, **rates)
    counts = np.arange(100)
    rates = jax.vmap(make_schedule(config, 50))(counts)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, [expected_rate(config, 50, n + 1) for n in counts], rtol=1e-5)


def test_schedule_ends_where_it_should():
    config = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=10)
    for kind in ("cosine", "wsd"):
        rate = make_schedule(OptimizerConfig(**{**vars(config), "schedule": kind}), 100)
        assert float(rate(9)) == np.float32(1e-3)  # the last update of the warm-up
        np.testing.assert_allclose(float(rate(99)), 1e-5, rtol=1e-5)  # the last update of all


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_of_warm_up_alone_is_defined(schedule):
    rate = make_schedule(OptimizerConfig(warmup_steps=7, schedule=schedule), 7)
    assert np.isfinite(jax.vmap(rate)(np.arange(20))).all()


def params(seed=0):
    """Stacked like a model's: a norm's scale has two axes, a bias three."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query = {"kernel": leaf(3, 4, 4), "bias": leaf(3, 2, 4)}
    return {
        "embed": {"embedding": leaf(5, 4)},
        "stacks": {"0": {"norm1": {"scale": leaf(3, 4)}, "mixer": {"q": query}}},
        "final_norm": {"scale": leaf(4)},
    }


def test_decay_goes_by_path():
    mask = decay_mask(params())
    assert mask == {
        "embed": {"embedding": True},
        "stacks": {"0": {"norm1": {"scale": False}, "mixer": {"q": {"kernel": True, "bias": False}}}},
        "final_norm": {"scale": False},
    }


def run(config, weights, gradients):
    transform = make_optimizer(config, len(gradients))
    state = transform.init(weights)
    for step, grads in enumerate(gradients):
        updates, state = transform.update(grads, state, weights, step=step, finite=jnp.array(True))
        weights = optax.apply_updates(weights, updates)
    return weights


def test_adamw_equals_numpy_and_optax():
    config = OptimizerConfig(
        learning_rate=0.05,
        final_learning_rate=0.01,
        warmup_steps=2,
        beta1=0.8,
        beta2=0.95,
        weight_decay=0.3,
        epsilon=1e-3,
    )
    start, gradients = params(), [params(seed) for seed in range(1, 6)]
    ours = run(config, start, gradients)

    schedule = make_schedule(config, len(gradients))
    reference = optax.adamw(schedule, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3, mask=decay_mask)
    theirs, state = start, reference.init(start)
    for grads in gradients:
        updates, state = reference.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, theirs)

    trees = (decay_mask(start), start, *gradients, ours)
    for decay, w, *gs, got in zip(*map(jax.tree.leaves, trees), strict=True):
        w, m, v = np.float64(w), 0.0, 0.0
        for n, g in enumerate(map(np.float64, gs), 1):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            rate = expected_rate(config, len(gradients), n)
            w = w - rate * ((m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-3) + 0.3 * decay * w)
        np.testing.assert_allclose(got, w, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_a_gradient_that_is_not_finite_changes_no_bit(kind):
    """Neither of the state nor of the parameters, -0.0 and what is not finite already included."""
    config = OptimizerConfig()
    lion = optax.lion(make_schedule(config, 9), weight_decay=0.1, mask=decay_mask)
    transform = {"adamw": make_optimizer(config, 9), "lion": skip_non_finite(lion)}[kind]
    weights = params()
    weights["final_norm"]["scale"] = jnp.array([-0.0, 0.0, jnp.nan, -jnp.inf])
    poison = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan), params(2))

    def step(weights, state, grads, number, finite):
        updates, state = transform.update(grads, state, weights, step=number, finite=jnp.array(finite))
        return optax.apply_updates(weights, updates), state

    fresh = transform.init(weights)
    begun = step(weights, fresh, params(1), 0, True)[1]
    for state in (fresh, begun):
        same_bits(step(weights, state, poison, 1, False), (weights, state))
    moved = step(weights, fresh, params(1), 0, True)[0]
    assert not np.array_equal(moved["embed"]["embedding"], weights["embed"]["embedding"])


def same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_clipping():
    grads = params()
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads)))
    for limit in (norm / 3, norm * 3, None):
        clipped, seen = clip_by_global_norm(grads, limit)
        np.testing.assert_allclose(seen, norm, rtol=1e-6)
        factor = min(1, limit / norm) if limit else 1
        jax.tree.map(lambda c, g, f=factor: np.testing.assert_allclose(c, g * f, rtol=1e-6), clipped, grads)
    zero, seen = clip_by_global_norm(jax.tree.map(jnp.zeros_like, grads), 1.0)
    assert float(seen) == 0 and not any(np.any(z) for z in jax.tree.leaves(zero))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_gradient_shows_in_the_norm(poison):
    grads = params()
    grads["final_norm"]["scale"] = grads["final_norm"]["scale"].at[1].set(poison)
    for limit in (1.0, None):
        assert not np.isfinite(clip_by_global_norm(grads, limit)[1])
