"""What a task is judged by: beside the loss, the share of scored tokens that the model would name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, apply
from train.objective import token_nll


def correct_count(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """How many targets >= 0 have the largest logit, of equal ones the first: int32 []."""
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT) & (targets_BT >= 0)
    return jnp.sum(right_BT, dtype=jnp.int32)


def make_task_eval_step(model: ModelConfig) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`eval_step(params, batch) -> (nll in nats, scored tokens, right ones)`, sums, jitted; no dropout."""

    def eval_step(params: Any, batch: dict[str, jax.Array]):
        logits_BTV, _ = apply(model, params, batch["tokens"], ctx=Context())
        return *token_nll(logits_BTV, batch["targets"]), correct_count(logits_BTV, batch["targets"])

    return jax.jit(eval_step)
