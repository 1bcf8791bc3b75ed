"""Checks of what `generate` is given, and its form: arrays of int32, ids that can be told apart.

Every error is raised before anything is compiled, and names the request.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import CacheOptions
from attention_jax.generation.decode import DecodeState, check_prefix
from attention_jax.generation.pieces import checked_chunk
from attention_jax.generation.sampling import Sampling, is_integer
from attention_jax.generation.states import check_state
from attention_jax.model import ModelConfig, cache_bytes

_BUCKET = 64  # the least multiple that lengths are rounded up to, to limit compilations
_MOST = 2**30
_IDS = 2**32  # a request id is one word of a random key


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that were checked.

    limits: the most tokens of each request. chunk: the tokens of a piece of the prefill. rows, samples: the
    request and the sample of each row of the batch. eos: -1 for none.
    """

    prompts: list[np.ndarray]
    samplings: list[Sampling]
    limits: list[int]
    ids: np.ndarray
    eos: int
    capacity: int
    chunk: int
    source: tuple[np.ndarray, np.ndarray] | None
    rows: np.ndarray
    samples: np.ndarray


def checked_batch(
    config: ModelConfig,
    prompts: Any,
    *,
    max_new_tokens: Any,
    sampling: Any,
    key: Any,
    eos_id: Any,
    request_ids: Any,
    capacity: Any,
    sources: Any,
    tokenizer: Any,
    cache: CacheOptions,
    prefill_chunk: Any,
    state: DecodeState | None,
) -> Batch:
    """The requests in the form that the compiled programs take; ValueError for anything else."""
    if not config.causal:
        raise ValueError(
            "the model is not causal: it predicts masked tokens from bidirectional context and cannot "
            "continue a prompt; use a model with causal: true"
        )
    prompts = checked_prompts(config, prompts, state is not None)
    if not isinstance(cache, CacheOptions):
        raise ValueError(
            f"cache must be a CacheOptions, such as CacheOptions(quantize='int8'), got {cache!r:.80}"
        )
    if max_new_tokens is not None:
        max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
    samplings = _checked_samplings(config, sampling, len(prompts), tokenizer)
    check_key(samplings, key)
    eos = checked_eos(config, eos_id)
    limits = _checked_limits(samplings, max_new_tokens)
    before = [0] * len(prompts)
    if state is not None:
        if sources is not None:
            raise ValueError(
                "a state holds what its layers need of the sources: give one of state and sources"
            )
        before, capacity = _checked_start(config, state, len(prompts), cache, capacity)
    needs = [(b + len(p), limit) for b, p, limit in zip(before, prompts, limits, strict=True)]
    capacity = checked_capacity(config, needs, capacity)
    counts = [s.n for s in samplings]
    return Batch(
        prompts=prompts,
        samplings=samplings,
        limits=limits,
        ids=checked_request_ids(request_ids, len(prompts)),
        eos=eos,
        capacity=capacity,
        chunk=piece(config, max(map(len, prompts)), capacity, prefill_chunk, len(prompts), cache),
        source=None if state is not None else padded_sources(config, sources, len(prompts)),
        rows=np.repeat(np.arange(len(prompts), dtype=np.int32), counts),
        samples=np.concatenate([np.arange(n, dtype=np.uint32) for n in counts]),
    )


def _checked_limits(samplings: list[Sampling], max_new_tokens: int | None) -> list[int]:
    """The most new tokens of each request; ValueError for one without, or with more at least."""
    limits = [max_new_tokens if s.max_tokens is None else s.max_tokens for s in samplings]
    for index, (s, limit) in enumerate(zip(samplings, limits, strict=True)):
        if limit is None:
            raise ValueError(f"request {index} has no limit: give max_new_tokens, or its max_tokens")
        if s.min_tokens > limit:
            raise ValueError(
                f"request {index}: min_tokens {s.min_tokens} is larger than the {limit} tokens it may have"
            )
    return limits


def _checked_start(
    config: ModelConfig, state: DecodeState, requests: int, cache: CacheOptions, capacity: Any
) -> tuple[list[int], Any]:
    """The tokens in front of each prompt, and the capacity; ValueError for a state that does not fit."""
    check_state(config, state, requests, cache)
    check_prefix(config, np.asarray(state.positions_B))
    if capacity is not None and capacity != (state.capacity or capacity):
        raise ValueError(f"capacity {capacity} is not that of the state, {state.capacity}: leave it out")
    before = np.broadcast_to(np.asarray(state.positions_B), (requests,)).tolist()
    return before, state.capacity if capacity is None else capacity


def bucket(length: int) -> int:
    """The length rounded up: to a multiple of 64, and beyond 1,024 of an eighth to a sixteenth of itself."""
    step = max(_BUCKET, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def piece(
    config: ModelConfig, longest: int, capacity: int, chunk: Any, batch: int, cache: CacheOptions
) -> int:
    """The tokens of a piece: as asked for, else the fewest pieces of about the same length."""
    most = checked_chunk(config, chunk, batch, _cache_bytes(config, batch, capacity, cache))
    if chunk is None:
        most = max(1, -(-longest // -(-max(longest, 1) // most)))
        most = max(-(-most // _BUCKET) * _BUCKET, config.prefix)
    return min(most, capacity)


@functools.lru_cache(maxsize=256)
def _cache_bytes(config: ModelConfig, batch: int, capacity: int, cache: CacheOptions) -> int:
    return sum(cache_bytes(config, batch, capacity, cache))


def _checked_samplings(config: ModelConfig, sampling: Any, requests: int, tokenizer: Any) -> list[Sampling]:
    """One `Sampling` for each request; ValueError for ids outside the vocabulary, strings to no avail."""
    if isinstance(sampling, Sampling):
        sampling = [sampling] * requests
    elif isinstance(sampling, str | bytes) or not hasattr(sampling, "__len__"):
        raise ValueError(f"sampling must be a Sampling, or one for each prompt, got {sampling!r}")
    if len(sampling) != requests:
        raise ValueError(f"{len(sampling)} samplings for {requests} prompts; give one, or one per prompt")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(f"tokenizer must have a method decode(ids), got {type(tokenizer).__name__}")
    for index, row in enumerate(sampling):
        if not isinstance(row, Sampling):
            raise ValueError(f"request {index}: sampling must be a Sampling, got {row!r}")
        ids = {"stop_ids": row.stop_ids, "logit_bias": [token for token, _ in row.logit_bias]}
        for name, tokens in ids.items():
            for token in tokens:
                if not 0 <= token < config.vocab_size:
                    raise ValueError(
                        f"request {index}: {name} has the id {token}, outside 0..{config.vocab_size - 1}"
                    )
        if row.stop and tokenizer is None:
            raise ValueError(
                f"request {index}: the stop string {row.stop[0]!r} needs a tokenizer: pass tokenizer="
            )
    return list(sampling)


def checked_count(name: str, value: Any) -> int:
    """The integer as Python's, whose sums do not overflow; ValueError unless it is >= 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return operator.index(value)


def check_key(samplings: Sequence[Sampling], key: Any) -> None:
    """ValueError for what is not one PRNG key, and for None unless every request is greedy or has a seed."""
    if key is None:
        for index, sampling in enumerate(samplings):
            if sampling.temperature > 0 and sampling.seed is None:
                raise ValueError(
                    f"request {index}: sampling at temperature {sampling.temperature} needs a key: pass "
                    "key=jax.random.key(0), give it a seed, or use temperature 0"
                )
        return
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return
        if key.dtype == np.uint32 and key.shape == _raw_key_shape():  # of jax.random.PRNGKey
            return
        what = f"{key.dtype} {list(key.shape)}"
    else:
        what = repr(key)
    raise ValueError(f"key must be one PRNG key such as jax.random.key(0), got {what}")


def _raw_key_shape() -> tuple[int, ...]:
    """The shape of a key of `jax.random.PRNGKey`, which depends on jax_default_prng_impl."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def checked_eos(config: ModelConfig, eos_id: Any) -> int:
    """The id as an integer, -1 for None; ValueError for what is not one id of the vocabulary."""
    if eos_id is None:
        return -1
    if not is_integer(eos_id):
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
        if not is_integer(value) or not 0 <= value < _IDS:
            raise ValueError(f"request_ids must be integers in [0, {_IDS}), got {value!r} for prompt {index}")
        if value in first:
            raise ValueError(
                f"request_ids: prompts {first[value]} and {index} have the id {value}, and would be sampled "
                "with the same random numbers; give each its own"
            )
        first[value] = index
    return np.array(ids, np.uint32)


def checked_prompts(config: ModelConfig, prompts: Sequence[Any], continued: bool = False) -> list[np.ndarray]:
    """The prompts as int32 arrays; ValueError for none, a bad id, or one shorter than the mask's prefix.

    continued: they continue a state, and may be empty.
    """
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
    prompts = [
        np.zeros(0, np.int32)
        if continued and np.ndim(prompt) == 1 and len(prompt) == 0
        else checked_ids(config, f"prompt {index}", prompt)
        for index, prompt in enumerate(prompts)
    ]
    if not prompts:
        raise ValueError("no prompts given: give at least one")
    for index, prompt in enumerate(prompts):
        if prompt.size < config.prefix and not continued:
            # Earlier prefix tokens would have to attend to tokens that are generated inside the prefix.
            raise ValueError(
                f"prompt {index} has {prompt.size} tokens, fewer than the prefix of {config.prefix} tokens "
                "within which the mask is bidirectional; give a longer prompt"
            )
    return prompts


def checked_ids(config: ModelConfig, what: str, ids: Any) -> np.ndarray:
    """The ids of one sequence as int32; ValueError for none, and for one outside the vocabulary."""
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
    rows = [checked_ids(config, f"source {index}", source) for index, source in enumerate(sources)]
    if len(rows) != requests:
        raise ValueError(f"{len(rows)} sources for {requests} prompts; give one per prompt")
    S = bucket(max(map(len, rows)))
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


def checked_capacity(config: ModelConfig, needs: Sequence[tuple[int, int]], capacity: int | None) -> int:
    """The capacity given, or one for all (tokens of a prompt, new tokens); ValueError if it is too small."""
    if capacity is not None:
        capacity = checked_count("capacity", capacity)
    limit, key = config.limit or (None, "")
    for index, (prompt, new) in enumerate(needs):
        for most, what in ((capacity, f"capacity {capacity}"), (limit, f"model's {key} {limit}")):
            if most is not None and prompt + new > most:
                fits = f"at most {most - prompt} new ones" if prompt < most else "a shorter prompt"
                raise ValueError(
                    f"request {index}: a prompt of {prompt} tokens and {new} new ones exceed the {what}: "
                    f"{fits} would fit"
                )
        if prompt + new > _MOST:
            raise ValueError(
                f"request {index}: a prompt of {prompt} tokens and {new} new ones exceed {_MOST} positions: "
                "lower max_new_tokens"
            )
    if capacity is None:
        capacity = bucket(max(map(sum, needs)))
    return capacity if limit is None else min(capacity, limit)
