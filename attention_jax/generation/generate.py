"""Text generation: one jitted prefill, then a `lax.while_loop` that decodes with the state.

Prompts of different lengths are left-padded to one batch; padding has position -1. The random key of a token
is folded from (key, request id, position) only, so that a request gets the same tokens for any batch size and
in any row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.generation import decode
from attention_jax.generation.sampling import Sampling
from attention_jax.model import ModelConfig

_BUCKET = 64  # prompt lengths, capacities and outputs are rounded up to a multiple, to limit compilations


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
      request_ids: integers folded into the key of each request; 0, 1, 2, ... by default.
      capacity: the largest position + 1 of the state; by default enough for the prompts and new tokens.
      sources: the source token ids of each request, for a model with an encoder.

    Raises:
      ValueError: before compilation, for a model that is not causal, an empty prompt, an id outside the
        vocabulary, or a prompt with new tokens longer than the capacity or the model's `limit`; during
        decoding, for logits that are NaN or all -inf.
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
    prompts = _checked_prompts(config, prompts)
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"max_new_tokens and chunk must be >= 1, got {max_new_tokens} and {chunk}")
    if sampling.temperature > 0 and key is None:
        raise ValueError(
            f"sampling at temperature {sampling.temperature} needs a key: pass key=jax.random.key(0), or use "
            "temperature 0"
        )
    capacity = _capacity(config, max(map(len, prompts)), max_new_tokens, capacity)
    ids = np.arange(len(prompts)) if request_ids is None else np.asarray(request_ids)
    if ids.shape != (len(prompts),):
        raise ValueError(
            f"request_ids must have one id for each of {len(prompts)} prompts, got shape {ids.shape}"
        )
    source = _sources(config, sources, len(prompts))
    tokens_BT, positions_BT = _left_padded(prompts, capacity)
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(ids)
    width = -(-max_new_tokens // _BUCKET) * _BUCKET
    carry = decode._prefill(config, capacity, width, params, tokens_BT, positions_BT, source)
    eos = jnp.int32(-1 if eos_id is None else eos_id)

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


def _checked_prompts(config: ModelConfig, prompts: Sequence[Any]) -> list[np.ndarray]:
    """The prompts as int32 arrays; ValueError for none, a bad id, or one shorter than the mask's prefix."""
    prompts = [_checked_ids(config, f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    if not prompts:
        raise ValueError("no prompts given: give at least one")
    for index, prompt in enumerate(prompts):
        if prompt.size < config.prefix:
            # Earlier prefix tokens would have to attend to tokens that are generated inside the prefix.
            raise ValueError(
                f"prompt {index} has {prompt.size} tokens, fewer than the prefix of {config.prefix} tokens "
                "within which the mask is bidirectional; give a longer prompt"
            )
    return prompts


def _checked_ids(config: ModelConfig, what: str, ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0:
        hint = ": give a list of prompts, such as [[1, 2]]" if ids.ndim == 0 else ""
        raise ValueError(f"{what} must be a non-empty list of token ids, got shape {ids.shape}{hint}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what} must hold integer token ids, got {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"{what}: token id {outside[0]} is outside 0..{config.vocab_size - 1}")
    return ids.astype(np.int32)


def _sources(config: ModelConfig, sources: Any, requests: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Source tokens and positions [B, S], right-padded with positions -1; None without an encoder."""
    if (sources is None) != (config.encoder is None):
        state = "needs sources, one per prompt" if sources is None else "takes no sources"
        raise ValueError(f"a model {'without' if config.encoder is None else 'with'} an encoder {state}")
    if sources is None:
        return None
    rows = [_checked_ids(config, f"source {index}", source) for index, source in enumerate(sources)]
    if len(rows) != requests:
        raise ValueError(f"{len(rows)} sources for {requests} prompts; give one per prompt")
    S = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    if config.max_positions is not None:
        S = min(S, config.max_positions)
        if max(map(len, rows)) > S:
            raise ValueError(f"a source of {max(map(len, rows))} tokens exceeds the {S} learned positions")
    tokens_BS = np.zeros((requests, S), np.int32)
    positions_BS = np.full((requests, S), -1, np.int32)
    for row, source in enumerate(rows):
        tokens_BS[row, : len(source)] = source
        positions_BS[row, : len(source)] = np.arange(len(source))
    return tokens_BS, positions_BS


def _capacity(config: ModelConfig, longest: int, new: int, capacity: int | None) -> int:
    needed = longest + new
    limit, key = config.limit or (None, "")
    if capacity is not None and needed > capacity:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the capacity {capacity}")
    if limit is not None and needed > limit:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the model's {key} {limit}")
    if capacity is None:
        capacity = -(-needed // _BUCKET) * _BUCKET
    return capacity if limit is None else min(capacity, limit)


def _left_padded(prompts: list[np.ndarray], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    T = min(-(-max(map(len, prompts)) // _BUCKET) * _BUCKET, capacity)
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    positions_BT = np.full((len(prompts), T), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = prompt
        positions_BT[row, T - len(prompt) :] = np.arange(len(prompt))
    return tokens_BT, positions_BT
