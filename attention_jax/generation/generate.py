"""Text generation: one jitted prefill, then a `lax.while_loop` that decodes with the state.

Prompts of different lengths are left-padded to one batch; padding has position -1. The random key of a token
is folded from (key, request id, position) only, so that a request gets the same tokens for any batch size and
in any row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.generation import decode
from attention_jax.generation.requests import (
    BUCKET,
    check_count,
    check_key,
    checked_capacity,
    checked_eos,
    checked_prompts,
    checked_request_ids,
    padded_sources,
)
from attention_jax.generation.sampling import Sampling
from attention_jax.model import ModelConfig, prepare_for_decoding


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: jax.Array | None = None,
    eos_id: int | None = None,
    request_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    sources: Sequence[Sequence[int] | np.ndarray] | None = None,
) -> list[np.ndarray]:
    """The new tokens of each prompt, int32, up to and excluding `eos_id`.

    Args:
      prompts: the token ids of each request, at least one per request; lengths may differ.
      key: a JAX PRNG key; required unless the temperature is 0.
      eos_id: the id that ends a request.
      request_ids: distinct integers in [0, 2^32), folded into the key of each request; 0, 1, ... by default.
      capacity: the largest position + 1 of the state; by default enough for the prompts and new tokens.
      sources: the source token ids of each request, for a model with an encoder.

    Raises:
      ValueError: before compilation, for a model that is not causal, an empty prompt, an id outside the
        vocabulary, request ids that cannot be told apart, or a prompt with new tokens longer than the
        capacity or the model's `limit`; during decoding, for logits that are NaN or all -inf.
    """
    pieces = list(
        stream(
            config, params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, key=key,
            eos_id=eos_id, request_ids=request_ids, capacity=capacity, sources=sources,
            chunk=max_new_tokens,
        )
    )  # fmt: skip
    return [np.concatenate(rows) for rows in zip(*pieces, strict=True)]


def stream(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: jax.Array | None = None,
    eos_id: int | None = None,
    request_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    sources: Sequence[Sequence[int] | np.ndarray] | None = None,
    chunk: int = 8,
) -> Iterator[list[np.ndarray]]:
    """`generate` in chunks: yields the next tokens, at most `chunk`, of each request."""
    if not config.causal:
        raise ValueError(
            "the model is not causal: it predicts masked tokens from bidirectional context and cannot "
            "continue a prompt; use a model with causal: true"
        )
    prompts = checked_prompts(config, prompts)
    check_count("max_new_tokens", max_new_tokens)
    check_count("chunk", chunk)
    check_key(sampling, key)
    eos = jnp.int32(checked_eos(config, eos_id))
    capacity = checked_capacity(config, max(map(len, prompts)), max_new_tokens, capacity)
    ids = checked_request_ids(request_ids, len(prompts))
    source = padded_sources(config, sources, len(prompts))
    params = prepare_for_decoding(config, params)
    tokens_BT, positions_BT = _left_padded(prompts, capacity)
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(ids)
    width = -(-max_new_tokens // BUCKET) * BUCKET
    carry = decode._prefill(config, capacity, width, params, tokens_BT, positions_BT, source)

    def produce(carry):
        for start in range(0, max_new_tokens, chunk):
            limit = min(start + chunk, max_new_tokens)
            carry = decode._decode(config, sampling, params, keys_B, carry, eos, jnp.int32(limit))
            new_BN = np.asarray(carry["out"][:, start:limit])
            if (bad := np.flatnonzero(carry["bad"])).size:
                raise ValueError(f"the model's logits are NaN or all -inf for request {ids[bad[0]]}")
            yield [row[row >= 0] for row in new_BN]
            if bool(carry["done"].all()):
                return

    return produce(carry)


def _left_padded(prompts: list[np.ndarray], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    T = min(-(-max(map(len, prompts)) // BUCKET) * BUCKET, capacity)
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    positions_BT = np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = prompt
        positions_BT[row, T - len(prompt) :] = np.arange(len(prompt))
    return tokens_BT, positions_BT
