"""The loss of causal and masked language modelling, and of a target given its source.

    L = sum_i nll_i / n   over the n targets >= 0,    nll_i = logsumexp(z_i) - z_i[target_i]

computed in float32 whatever dtype the model computes in. A target of -1 is not scored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def token_nll(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the negative log-likelihoods in nats: float32 [], number of scored targets: int32 []).

    Both are 0 if no target is scored. The logits of an unscored position, even NaN, affect neither the sum
    nor a gradient. Targets must lie below V: see `check_ids`.
    """
    scored_BT = targets_BT >= 0
    # Select the logits, not only the result: the gradient of logsumexp at NaN is NaN, and so is 0 * NaN.
    logits_BTV = jnp.where(scored_BT[..., None], logits_BTV.astype(jnp.float32), 0.0)
    # A comparison instead of a gather: it fuses, and its transpose is not a scatter.
    ids_V = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
    is_target_BTV = targets_BT[..., None] == jnp.broadcast_to(ids_V, logits_BTV.shape)
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    return jnp.sum(jnp.where(scored_BT, nll_BT, 0.0)), jnp.sum(scored_BT, dtype=jnp.int32)


def mean_nll(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean negative log-likelihood of the scored targets in nats, their number); (0, 0) if there is none."""
    total, count = token_nll(logits_BTV, targets_BT)
    return total / jnp.maximum(count, 1).astype(jnp.float32), count


def count_correct(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """How many scored targets have the largest logit of their position: int32 []."""
    likeliest_BT = jnp.argmax(logits_BTV, axis=-1).astype(targets_BT.dtype)
    return jnp.sum((targets_BT >= 0) & (likeliest_BT == targets_BT), dtype=jnp.int32)


def check_ids(batch: dict[str, np.ndarray], vocab_size: int) -> None:
    """ValueError if a token, target or source token lies outside the vocabulary.

    On the host, because on the device an id past the table gives NaN, -1 wraps, and a target past the
    last logit would be scored as a logit of 0.
    """
    places = {"tokens": "segment_ids", "sources": "source_positions"}
    for name, lowest in (("tokens", 0), ("targets", -1), ("sources", 0)):
        if name not in batch:
            continue
        ids = batch[name]
        wrong = (ids < lowest) | (ids >= vocab_size)
        if places.get(name) in batch:  # a padding slot may hold anything
            wrong &= batch[places[name]] >= 0
        if wrong.any():
            raise ValueError(
                f"{name} holds the id {ids[wrong][0]}, outside [{lowest}, {vocab_size}):"
                " raise model.vocab_size to the vocabulary of the data, or set it to null"
            )
