"""`SamplingArrays`: the sampling options of a batch as arrays, which one compiled program serves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.generation.sampling import Sampling

# Widths of the lists of a request: 256 biases and 16 stop ids, then four times as many. The width is part of
# the compiled program's shape.
_BIASES, _STOP_IDS = 256, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The options of `Sampling` for the rows of a batch.

    rate_B: 1 / temperature; greedy_B: temperature 0. filtered_B: any of top-k (top_k_B, V for off), top-p
    (top_p_B and rest_p_B = 1 - top_p, rounded by themselves) and min-p (its logarithm). biases of the ids in
    bias_ids_BJ, V for none. stop_ids_BE: -1 for none. most_tokens_B: where the row ends. logprobs_B: whether
    log-probabilities are wanted, and how many, -1 for none.
    """

    rate_B: jax.Array
    greedy_B: jax.Array
    filtered_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    rest_p_B: jax.Array
    log_min_p_B: jax.Array
    penalised_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    biased_B: jax.Array
    bias_ids_BJ: jax.Array
    bias_BJ: jax.Array
    stop_ids_BE: jax.Array
    min_tokens_B: jax.Array
    max_tokens_B: jax.Array
    logprobs_B: jax.Array


def pack(
    rows: Sequence[Sampling],
    vocab_size: int,
    *,
    eos: int | None = None,
    max_tokens: Sequence[int] | None = None,
) -> SamplingArrays:
    """The options of each row as NumPy arrays; eos: one more stop id; max_tokens: where each row ends."""
    stops = [row.stop_ids + (() if eos is None else (eos,)) for row in rows]
    B, J = len(rows), _width(_BIASES, [len(row.logit_bias) for row in rows])
    bias_ids, bias = np.full((B, J), vocab_size, np.int32), np.zeros((B, J), np.float32)
    stop_ids = np.full((B, _width(_STOP_IDS, list(map(len, stops)))), -1, np.int32)
    for i, (row, ids) in enumerate(zip(rows, stops, strict=True)):
        stop_ids[i, : len(ids)] = ids
        for j, (token, value) in enumerate(row.logit_bias):
            bias_ids[i, j], bias[i, j] = token, value

    def column(value, dtype=np.float32):
        return np.array([value(row) for row in rows], dtype)

    return SamplingArrays(
        # The quotient of two float32 numbers.
        rate_B=np.float32(1) / column(lambda row: row.temperature or 1.0),
        greedy_B=column(lambda row: row.temperature == 0, bool),
        # A top_k of all ids is no filter: the draws are those without it.
        filtered_B=column(lambda row: row.filtered(vocab_size), bool),
        top_k_B=column(lambda row: min(row.top_k or vocab_size, vocab_size), np.int32),
        top_p_B=column(lambda row: 1.0 if row.top_p is None else row.top_p),
        rest_p_B=column(lambda row: -1.0 if row.top_p in (None, 1) else 1 - float(row.top_p)),
        log_min_p_B=column(lambda row: -math.inf if row.min_p is None else math.log(row.min_p)),
        penalised_B=column(lambda row: row.penalised, bool),
        repetition_B=column(lambda row: row.repetition_penalty),
        presence_B=column(lambda row: row.presence_penalty),
        frequency_B=column(lambda row: row.frequency_penalty),
        biased_B=column(lambda row: bool(row.logit_bias), bool),
        bias_ids_BJ=bias_ids,
        bias_BJ=bias,
        stop_ids_BE=stop_ids,
        min_tokens_B=column(lambda row: row.min_tokens, np.int32),
        max_tokens_B=np.array([2**31 - 1] * B if max_tokens is None else max_tokens, np.int32),
        logprobs_B=column(lambda row: -1 if row.logprobs is None else row.logprobs, np.int32),
    )


def placed(arrays: SamplingArrays) -> SamplingArrays:
    """The arrays on the device."""
    return jax.tree.map(jnp.asarray, arrays)


def placed_beside(tree: Any, like: jax.Array) -> Any:
    """The arrays on the device that `like` is committed to, or as they are.

    A program's results are committed if one of its arguments is. Without this, a loop would be compiled for
    its first call, and again for the results of that call.
    """
    if not like.committed or len(like.sharding.device_set) > 1:
        return tree
    return jax.device_put(tree, like.sharding)


def _width(least: int, lengths: list[int]) -> int:
    while least < max(lengths):
        least *= 4
    return least
