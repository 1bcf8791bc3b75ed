"""Checks of what `generate` is given, and its form: arrays of int32, ids that can be told apart."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.generation.sampling import Sampling
from attention_jax.model import ModelConfig

BUCKET = 64  # prompt lengths, capacities and outputs are rounded up to a multiple, to limit compilations
_IDS = 2**32  # a request id is one word of a random key


def check_count(name: str, value: Any) -> None:
    """ValueError unless `value` is an integer >= 1."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_key(sampling: Sampling, key: Any) -> None:
    """ValueError for what is not one PRNG key, and for None unless the temperature is 0."""
    if key is None:
        if sampling.temperature > 0:
            raise ValueError(
                f"sampling at temperature {sampling.temperature} needs a key: pass key=jax.random.key(0), or "
                "use temperature 0"
            )
        return
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return
        if key.dtype == np.uint32 and key.ndim == 1:  # of jax.random.PRNGKey
            return
        what = f"{key.dtype} {list(key.shape)}"
    else:
        what = repr(key)
    raise ValueError(f"key must be one PRNG key such as jax.random.key(0), got {what}")


def checked_eos(config: ModelConfig, eos_id: Any) -> int:
    """The id as an integer, -1 for None; ValueError for what is not one id of the vocabulary."""
    if eos_id is None:
        return -1
    if not _is_integer(eos_id):
        raise ValueError(f"eos_id must be one token id or None, got {eos_id!r}")
    if not 0 <= eos_id < config.vocab_size:
        raise ValueError(f"eos_id {eos_id} is outside 0..{config.vocab_size - 1}: it would end no request")
    return int(eos_id)


def checked_request_ids(request_ids: Any, requests: int) -> np.ndarray:
    """The ids as uint32, 0, 1, 2, ... for None; ValueError for ids that cannot be told apart."""
    if request_ids is None:
        return np.arange(requests, dtype=np.uint32)
    try:
        ids = request_ids.tolist() if hasattr(request_ids, "tolist") else list(request_ids)
    except TypeError:
        ids = None
    if not isinstance(ids, list) or len(ids) != requests:
        what = repr(request_ids) if ids is None else f"shape {np.shape(request_ids)}"
        raise ValueError(f"request_ids must have one id for each of {requests} prompts, got {what}")
    first: dict[int, int] = {}
    for index, value in enumerate(ids):
        if not _is_integer(value) or not 0 <= value < _IDS:
            raise ValueError(f"request_ids must be integers in [0, {_IDS}), got {value!r} for prompt {index}")
        if value in first:
            raise ValueError(
                f"request_ids: prompts {first[value]} and {index} have the id {value}, and would be sampled "
                "with the same random numbers; give each its own"
            )
        first[value] = index
    return np.array(ids, np.uint32)


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def checked_prompts(config: ModelConfig, prompts: Sequence[Any]) -> list[np.ndarray]:
    """The prompts as int32 arrays; ValueError for none, a bad id, or one shorter than the mask's prefix."""
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
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
    try:
        ids = np.asarray(ids)
    except ValueError:  # lists of several lengths
        raise ValueError(f"{what} must be a list of token ids, got nested lists") from None
    if ids.ndim != 1 or ids.size == 0:
        hint = ": give a list of prompts, such as [[1, 2]]" if ids.ndim == 0 else ""
        raise ValueError(f"{what} must be a non-empty list of token ids, got shape {ids.shape}{hint}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what} must hold integer token ids, got {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"{what}: token id {outside[0]} is outside 0..{config.vocab_size - 1}")
    return ids.astype(np.int32)


def padded_sources(config: ModelConfig, sources: Any, requests: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Source tokens and positions [B, S], right-padded with positions -1; None without an encoder."""
    if (sources is None) != (config.encoder is None):
        state = "needs sources, one per prompt" if sources is None else "takes no sources"
        raise ValueError(f"a model {'without' if config.encoder is None else 'with'} an encoder {state}")
    if sources is None:
        return None
    rows = [_checked_ids(config, f"source {index}", source) for index, source in enumerate(sources)]
    if len(rows) != requests:
        raise ValueError(f"{len(rows)} sources for {requests} prompts; give one per prompt")
    S = -(-max(map(len, rows)) // BUCKET) * BUCKET
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


def checked_capacity(config: ModelConfig, longest: int, new: int, capacity: int | None) -> int:
    """The capacity given, or one for a prompt of `longest` tokens and `new` more; ValueError if too small."""
    if capacity is not None:
        check_count("capacity", capacity)
    needed = longest + new
    limit, key = config.limit or (None, "")
    if capacity is not None and needed > capacity:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the capacity {capacity}")
    if limit is not None and needed > limit:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the model's {key} {limit}")
    if capacity is None:
        capacity = -(-needed // BUCKET) * BUCKET
    return capacity if limit is None else min(capacity, limit)
