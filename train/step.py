"""The training step: a pure function of (parameters, optimiser state, batch, step, key)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, apply, encode
from train import router
from train.config.sections import OptimizerConfig
from train.objective import count_correct, token_nll
from train.optimizer import clip_by_global_norm, make_optimizer, make_schedule

Batch = dict[str, jax.Array]


def make_train_step(model: ModelConfig, optimizer: OptimizerConfig, steps: int) -> Callable[..., tuple]:
    """`train_step(params, opt_state, batch, step, key) -> (params, opt_state, metrics)`, jitted.

    batch: int32 [B, T] arrays tokens, targets (-1: not scored), optionally positions and segment_ids. For
    seq2seq also [B, S] arrays sources and source_positions, which the encoder reads first.
    step: int32 [], the number of steps done before; key: dropout depends on (key, step, micro-batch).
    params and opt_state are donated: the caller must not use them again. metrics: `finite` (bool), and
    train/loss (nats), grad_norm (before clipping), learning_rate, tokens (scored ones). A model with experts
    has router_load too, and router_loss, which train/loss does not contain, if it has such losses. Where the
    loss or the gradient is not finite, params and opt_state are returned unchanged.
    """
    transform = make_optimizer(optimizer, steps)
    schedule = make_schedule(optimizer, steps)
    parts = optimizer.accumulation_steps
    gradient = jax.value_and_grad(functools.partial(_loss, model, 1 / parts), has_aux=True)

    def train_step(params, opt_state, batch, step, key):
        batch = drop_prefix_targets(model, batch)
        count = jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)
        key = jax.random.fold_in(key, step)
        if parts == 1:
            (total, (loss, routed)), grads = gradient(params, batch, count, jax.random.fold_in(key, 0))
        else:
            (total, (loss, routed)), grads = _accumulate(gradient, parts, params, batch, count, key)
        grads, norm = clip_by_global_norm(grads, optimizer.clip_norm)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = transform.update(grads, opt_state, params, step=step, finite=finite)
        # The updates are -0.0 where a step is skipped, but a processor may flush a denormal sum to 0.
        updated = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, params)
        params = router.move_biases(model, params, routed, finite)
        metrics = {"train/loss": loss, "grad_norm": norm, "learning_rate": schedule(step)} | router.metrics(
            routed
        )
        return params, opt_state, metrics | {"tokens": count, "finite": finite}

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_eval_step(model: ModelConfig, *, accuracy: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """`eval_step(params, batch) -> (sum of nll in nats, number of scored tokens)`, jitted; no dropout.

    accuracy: a third value, the number of scored tokens that have the largest logit.
    """

    def eval_step(params, batch):
        batch = drop_prefix_targets(model, batch)
        logits_BTV = apply(model, params, batch["tokens"], ctx=_context(model, params, batch, None)).logits
        scores = token_nll(logits_BTV, batch["targets"])
        return (*scores, count_correct(logits_BTV, batch["targets"])) if accuracy else scores

    return jax.jit(eval_step)


def make_fill_in(model: ModelConfig) -> Callable[..., jax.Array]:
    """`fill_in(params, batch) -> int32 [B, T]`, jitted: the tokens, the most likely ones where masked."""

    def fill_in(params, batch):
        logits_BTV = apply(model, params, batch["tokens"], ctx=_context(model, params, batch, None)).logits
        likeliest_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        return jnp.where(batch["targets"] >= 0, likeliest_BT, batch["tokens"])

    return jax.jit(fill_in)


def _loss(model: ModelConfig, share: float, params: Any, batch: Batch, count: jax.Array, key: jax.Array):
    """What is minimised; the batch's share of the mean over `count` tokens; and `router.collect`.

    share: of the batch in all micro-batches, by which what the routers give is multiplied.
    """
    ctx = dataclasses.replace(_context(model, params, batch, key), capture=router.captured(model))
    output = apply(model, params, batch["tokens"], ctx=ctx)
    loss = token_nll(output.logits, batch["targets"])[0] / jnp.maximum(count, 1).astype(jnp.float32)
    routed = jax.tree.map(lambda x: x * share, router.collect(output.aux))
    return loss + routed["router_loss"] if "router_loss" in routed else loss, (loss, routed)


def drop_prefix_targets(model: ModelConfig, batch: Batch) -> Batch:
    """The batch without the targets at positions below `model.prefix`, which their queries attend to.

    A bidirectional model keeps all targets: they are masked in the tokens.
    """
    if not model.causal or not model.prefix:
        return batch
    positions = batch.get("positions")
    positions = jnp.arange(batch["tokens"].shape[1])[None] if positions is None else positions
    return batch | {"targets": jnp.where(positions + 1 < model.prefix, -1, batch["targets"])}


def _context(model: ModelConfig, params: Any, batch: Batch, key: jax.Array | None) -> Context:
    """The layers' context: positions, segments and, with sources, the encoder's memory."""
    memory_BSD, positions_BS = None, batch.get("source_positions")
    if "sources" in batch:
        memory_BSD = encode(model, params, batch["sources"], positions_BS, dropout_key=key)
    return Context(
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        memory_BSD=memory_BSD,
        memory_positions_BS=positions_BS,
        dropout_key=key,
    )


def _accumulate(gradient, parts: int, params: Any, batch: Batch, count: jax.Array, key: jax.Array):
    """Loss and gradient of the whole batch from `parts` equal slices of its rows, one after another.

    Every slice divides by the whole batch's token count, so the sum weighs each token alike.
    """
    slices = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    gradients = functools.partial(gradient, params)

    def add(total, part):
        index, micro = part
        return jax.tree.map(jnp.add, total, gradients(micro, count, jax.random.fold_in(key, index))), None

    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], slices), count, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(parts), slices))[0]
