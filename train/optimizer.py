"""AdamW with a schedule and global-norm clipping (Loshchilov & Hutter 2019, arXiv 1711.05101).

    g <- g min(1, c / |g|);   m, v <- Adam moments;   w <- w - lr(n) (m^ / (sqrt(v^) + eps) + decay w)

n = 1, 2, ... counts steps. Decay is decided by a parameter's path, never by its rank: layers are stacked.

The training step calls `update(grads, state, params, step=, finite=)` of whatever `make_optimizer` returns
and applies the updates with `optax.apply_updates`. `step` is the number of steps done before. Where `finite`
is false, the state must come back unchanged and the updates must change no parameter: `skip_non_finite` gives
any optax optimiser that property. So a skipped step counts for the learning rate, which is a function of the
step, and not for Adam's bias correction, whose count is of the gradients in its moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config.sections import OptimizerConfig

# gate, up and down are the stacks of experts, [E, in, out].
_DECAYED = ("kernel", "embedding", "gate", "up", "down")


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """lr(count): float32 learning rate of update n = count + 1, defined at every count >= 0.

    n <= W:   peak n / W                                               (warm-up of W steps)
    constant: peak
    cosine:   final + (peak - final) (1 + cos(pi p)) / 2,   p = (n - W) / (E - W),   E = decay_steps or steps
    wsd:      final + (peak - final) (1 - p),   p = (n - steps) / D + 1,   D = decay_steps or steps / 5

    with p clipped to [0, 1]: past the end of a decay the rate is `final`. W < E; W + D <= steps.
    """
    config = config.resolved(steps)
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        start, end = warmup, config.decay_steps or steps
    else:
        start, end = steps - config.wsd_decay(steps), steps

    def schedule(count):
        n = jnp.asarray(count, jnp.float32) + 1.0
        progress = jnp.clip((n - start) / max(end - start, 1), 0.0, 1.0)
        if config.schedule == "constant":
            rate = jnp.full_like(n, peak)
        elif config.schedule == "cosine":
            rate = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            rate = final + (peak - final) * (1.0 - progress)
        return jnp.where(n <= warmup, peak * n / max(warmup, 1), rate)

    return schedule


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: leaves named kernel or embedding, and the stacks of experts."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW for a run of `steps` updates: `update(grads, state, params, step=, finite=) -> (updates, state)`.

    step: int32 [], the number of steps done before; finite: bool [], whether the update is to be done. The
    updates are what `optax.apply_updates` adds. The caller clips first.

    The chain is that of `optax.adamw`: Adam, decoupled decay, learning rate. It differs in two places. The
    rate is a function of `step`, which the training loop counts already, so that no second counter is saved
    that could disagree with it. And Adam selects its moments itself (see `_scale_by_adam`).
    """
    return optax.chain(
        _scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        _scale_by_learning_rate(make_schedule(config, steps)),
    )


def skip_non_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser, for the training step: where `finite` is false its state and the parameters stay.

    Unlike `optax.apply_if_finite` it never applies an update that is not finite: the training loop ends the
    run after too many of them. The caller decides what is finite, since the loss has to be finite, too.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(grads, state, params=None, *, finite, **extra):
        updates, new_state = inner.update(grads, state, params, finite=finite, **extra)
        updates = jax.tree.map(lambda u: _select_update(finite, u), updates)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _select_update(finite: jax.Array, update: jax.Array) -> jax.Array:
    """The update, or -0.0, the one number that changes no bit of any number that it is added to."""
    return jnp.where(finite, update, jnp.asarray(-0.0, update.dtype))


def _scale_by_learning_rate(
    schedule: Callable[[jax.Array | int], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` without a counter of its own: the rate is `schedule(step)`."""

    def update(updates, state, params=None, *, step, finite, **_):
        rate = schedule(step)
        return jax.tree.map(lambda u: _select_update(finite, -rate * u), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that keeps its state where the gradient is not finite.

    Selecting inside, before the updates are formed, spares XLA a copy of both moments, which selecting
    between the old and the new state afterwards costs (40 % of the optimiser's time on a CPU).
    """

    def update(grads, state, params=None, *, finite, **_):
        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        mu = keep(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = keep(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        count = state.count + finite.astype(state.count.dtype)
        # optax raises a float to the power of an integer.
        with jax.numpy_dtype_promotion("standard"):
            mu_hat = optax.tree.bias_correction(mu, b1, count)
            nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def clip_by_global_norm(grads: Any, limit: float | None) -> tuple[Any, jax.Array]:
    """(gradients scaled to a norm of at most `limit`, their norm before that).

    A non-finite gradient gives a non-finite norm, which the caller checks; so does one whose squares
    overflow float32. A norm of 0 leaves the gradients as they are.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    if limit is None:
        return grads, norm
    scale = jnp.where(norm > limit, limit / norm, 1.0)
    return jax.tree.map(lambda g: g * scale, grads), norm
