"""The loss against NumPy float64, and what must not reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objective import check_ids, mean_nll, token_nll


def reference(logits_BTV, targets_BT):
    """Sum of nll and its gradient, in float64, token by token."""
    total, grad_BTV = 0.0, np.zeros(logits_BTV.shape)
    for b, t in np.argwhere(targets_BT >= 0):
        z = logits_BTV[b, t].astype(np.float64)
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        total -= log_p[targets_BT[b, t]]
        grad_BTV[b, t] = np.exp(log_p)
        grad_BTV[b, t, targets_BT[b, t]] -= 1
    return total, grad_BTV


def example(seed=0, B=3, T=5, V=7, scale=4.0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((B, T, V))).astype(np.float32)
    targets = rng.integers(-1, V, (B, T)).astype(np.int32)
    targets[0, 1] = -1
    return logits, targets


def test_equals_the_float64_reference():
    logits, targets = example()
    (total, count), grad = jax.value_and_grad(token_nll, has_aux=True)(jnp.asarray(logits), targets)
    expected, expected_grad = reference(logits, targets)
    np.testing.assert_allclose(total, expected, rtol=3e-7)
    np.testing.assert_allclose(grad, expected_grad, atol=3e-7)
    assert int(count) == (targets >= 0).sum()
    mean, _ = mean_nll(jnp.asarray(logits), targets)
    np.testing.assert_allclose(mean, expected / (targets >= 0).sum(), rtol=3e-7)


def test_large_logits_do_not_overflow():
    logits, targets = example(scale=1e4)
    total, _ = token_nll(jnp.asarray(logits), targets)
    np.testing.assert_allclose(total, reference(logits, targets)[0], rtol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits, targets = example(V=300)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    total, _ = token_nll(rounded, targets)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, reference(np.asarray(rounded, np.float32), targets)[0], rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unscored_positions_reach_neither_loss_nor_gradient(poison):
    logits, targets = example()
    poisoned = np.where((targets == -1)[..., None], np.float32(poison), logits)
    value = jax.value_and_grad(lambda z: token_nll(z, targets)[0])
    clean, dirty = value(jnp.asarray(logits)), value(jnp.asarray(poisoned))
    assert clean[0] == dirty[0]
    assert np.array_equal(clean[1], dirty[1])
    assert not np.asarray(dirty[1])[targets == -1].any()


def test_nothing_scored_is_zero():
    logits, targets = example()
    (mean, count), grad = jax.value_and_grad(mean_nll, has_aux=True)(jnp.asarray(logits), targets * 0 - 1)
    assert (float(mean), int(count)) == (0.0, 0)
    assert not np.asarray(grad).any()


def test_ids_are_checked():
    def batch(tokens, targets, **more):
        return {"tokens": np.array([tokens]), "targets": np.array([targets])} | more

    check_ids(batch([0, 6], [6, -1]), 7)
    check_ids(batch([0, -9], [6, -1], segment_ids=np.array([[0, -1]])), 7)  # a padding slot may hold anything
    sources = {"sources": np.array([[6, -9]]), "source_positions": np.array([[0, -1]])}
    check_ids(batch([0], [0]) | sources, 7)
    for bad, message in [
        (batch([0, 7], [0, 0]), r"tokens holds the id 7, outside \[0, 7\)"),
        (batch([-1, 0], [0, 0]), r"tokens holds the id -1"),
        (batch([0, 0], [0, 7]), r"targets holds the id 7, outside \[-1, 7\)"),
        (batch([0, 0], [-2, 0]), r"targets holds the id -2"),
        (batch([0], [0]) | sources | {"sources": np.array([[7, 0]])}, r"sources holds the id 7, outside"),
        (batch([0], [0]) | sources | {"source_positions": np.array([[0, 1]])}, r"sources holds the id -9"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_ids(bad, 7)
