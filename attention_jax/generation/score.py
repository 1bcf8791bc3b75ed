"""Log-probabilities of given text.

    log p(x_i | x_0 ... x_{i-1})    for every token of a sequence behind its prompt

by the parallel form, teacher-forced, in batches of sequences of about one length. The logits of a batch are
never held at once: the output projection is applied to some tokens at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.generation.requests import bucket, checked_count, checked_ids, padded_sources
from attention_jax.generation.sampling import is_integer
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind

_HEAD_TOKENS = 128  # tokens whose logits are held at once


def score(
    config: ModelConfig,
    params: Any,
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    prompt_lengths: Sequence[int] | None = None,
    sources: Sequence[Sequence[int] | np.ndarray] | None = None,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """The log-probability of each token behind the prompt of each sequence, float32 [length - prompt length].

    The log-probability of a continuation given its prompt is the sum of its array.

    Args:
      sequences: token ids, prompt and continuation together; lengths may differ.
      prompt_lengths: how many tokens of each sequence are given, at least 1 and at least the model's
        bidirectional prefix, which are the default. As many as the sequence has give an empty array.
      sources: the source token ids of each sequence, for a model with an encoder.
      batch_size: sequences that are computed together. It changes no more than rounding.

    Compiled once per length, rounded up. Raises: ValueError for a model that is not causal, an id outside the
    vocabulary, a sequence longer than the model's `limit`, and a prompt longer than its sequence.
    """
    if not config.causal:
        raise ValueError(
            "the model is not causal: a token's log-probability given those before it is undefined"
        )
    if isinstance(sequences, str | bytes) or not hasattr(sequences, "__len__"):
        raise ValueError(f"sequences must be a list of lists of token ids, got {type(sequences).__name__}")
    rows = [checked_ids(config, f"sequence {index}", row) for index, row in enumerate(sequences)]
    batch_size = checked_count("batch_size", batch_size)
    lengths = _checked_lengths(config, rows, prompt_lengths)
    limit, key = config.limit or (None, "")
    for index, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            raise ValueError(
                f"sequence {index} of {len(row)} tokens exceeds the model's {key} {limit}: cut it"
            )
    source = padded_sources(config, sources, len(rows)) if rows else None
    scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        padded = [*members, *[members[-1]] * (batch_size - len(members))]  # one shape for the last batch, too
        found_BT = _batch(config, params, [rows[i] for i in padded], limit, source, padded)
        for row_T, index in zip(found_BT, members, strict=False):
            scores[index] = row_T[lengths[index] - 1 : len(rows[index]) - 1]
    return scores


def _checked_lengths(config: ModelConfig, rows: list[np.ndarray], lengths: Any) -> list[int]:
    """The tokens given of each sequence; ValueError unless they are integers that its length allows."""
    least = max(1, config.prefix)
    if lengths is None:
        for index, row in enumerate(rows):
            if len(row) < config.prefix:
                raise ValueError(
                    f"sequence {index} has {len(row)} tokens, fewer than the prefix of {config.prefix} "
                    "within which the mask is bidirectional; give a longer one"
                )
        return [least] * len(rows)
    if not hasattr(lengths, "__len__") or len(lengths) != len(rows):
        raise ValueError(
            f"prompt_lengths must have one number for each of {len(rows)} sequences, got {lengths!r}"
        )
    for index, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if not is_integer(length) or not least <= length <= len(row):
            raise ValueError(
                f"prompt_lengths of sequence {index} must be an integer in [{least}, {len(row)}], got "
                f"{length!r}"
            )
    return [int(length) for length in lengths]


def _batch(
    config: ModelConfig,
    params: Any,
    rows: list[np.ndarray],
    limit: int | None,
    source: tuple[np.ndarray, np.ndarray] | None,
    members: list[int],
) -> np.ndarray:
    """Log-probabilities [B, T] of the token after each slot; anything behind a row's last token but one."""
    T = bucket(max(map(len, rows)))
    T = T if limit is None else min(T, limit)
    tokens_BT, positions_BT = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)], positions_BT[row, : len(ids)] = ids, np.arange(len(ids))
    if source is not None:
        source = source[0][members], source[1][members]
    return np.asarray(_scores(config, params, tokens_BT, positions_BT, source))


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    source: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    model, memory = bind(config, params), {}
    if source is not None:
        memory_BSD = model.encode(source[0], ctx=Context(positions_BT=source[1]))
        memory = {"memory_BSD": memory_BSD, "memory_positions_BS": source[1]}
    ctx = Context(positions_BT=positions_BT, capture=frozenset({"hidden"}), **memory)
    # The logits of the whole rows are not used, so that XLA leaves them out.
    x_BTD = model.final_norm(model.run(tokens_BT, None, ctx=ctx).aux[-1]["hidden"])
    B, T, D = x_BTD.shape
    size = min(_HEAD_TOKENS, B * T)
    pieces = -(-B * T // size)
    next_BT = jnp.roll(tokens_BT, -1, axis=1)

    def cut(x, *axes):
        flat = x.reshape(B * T, *axes)
        return jnp.pad(flat, [(0, pieces * size - B * T), *[(0, 0)] * len(axes)]).reshape(pieces, size, *axes)

    def piece(x):
        x_CD, next_C = x
        logits_CV = model.logits(x_CD[None])[0]
        chosen_C = jnp.take_along_axis(logits_CV, next_C[:, None], axis=-1)[:, 0]
        return chosen_C - jax.nn.logsumexp(logits_CV, axis=-1)

    scores = jax.lax.map(piece, (cut(x_BTD, D), cut(next_BT)))
    return scores.reshape(-1)[: B * T].reshape(B, T)
