"""Text generation: `generate` for whole completions, `stream` for their parts as they come.

The random key of a token is folded from (key, request id, sample, position) only, or from (seed, sample,
position), so that a request gets the same tokens for any batch size, in any row, beside any others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions
from attention_jax.dtypes import accumulator
from attention_jax.generation import loop
from attention_jax.generation.arrays import pack, placed
from attention_jax.generation.decode import DecodeState
from attention_jax.generation.drafts import Speculation, check_speculation
from attention_jax.generation.requests import Batch, checked_batch, checked_count
from attention_jax.generation.results import Completion, Increment
from attention_jax.generation.sampling import Sampling
from attention_jax.generation.speculative import SpeculativeDecoding
from attention_jax.generation.stop import StoppableText
from attention_jax.model import ModelConfig, prepare_for_decoding
from attention_jax.tokenizers.base import Decodes

_STOP_CHUNK = 16  # tokens between two looks for stop strings; those after a match are computed in vain


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    key: jax.Array | None = None,
    eos_id: int | None = None,
    request_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    sources: Sequence[Sequence[int] | np.ndarray] | None = None,
    tokenizer: Decodes | None = None,
    logits_fn: loop.LogitsFn | None = None,
    state: DecodeState | None = None,
    cache: CacheOptions = DEFAULT_CACHE,
    prefill_chunk: int | None = None,
    speculation: Speculation | None = None,
) -> list[Completion]:
    """A `Completion` for each sample of each prompt, in the order of the prompts.

    Args:
      prompts: the token ids of each request, at least one per request; lengths may differ.
      max_new_tokens: the most new tokens of a request whose sampling has no `max_tokens`.
      sampling: one for all prompts, or one for each.
      key: a JAX PRNG key; required unless every request is greedy or has a seed.
      eos_id: an id that ends every request.
      request_ids: distinct integers in [0, 2^32), folded into the key of each request; 0, 1, ... by default.
      capacity: the largest position + 1 of the state; by default enough for the prompts and new tokens.
      sources: the source token ids of each request, for a model with an encoder.
      tokenizer: an object with `decode(ids) -> str`, for text and stop strings.
      logits_fn: `logits_fn(tokens_BC, logits_BV) -> logits_BV`, a pure function under `jit`, applied to the
        model's logits before penalties. tokens_BC: int32 [B, capacity], prompt and new tokens by position, -1
        for none (as an index, -1 would be the last id). It is compiled into the
        loop: pass the same object each time.
      state: a `DecodeState` that the prompts continue, which may then be empty: one row for all, or one row
        each. It is not changed. Penalties and `logits_fn` know only the tokens of this call.
      cache: how the states are stored.
      prefill_chunk: the prompts are read in pieces of as many tokens; None is at most 512, or the model's
        bidirectional prefix if that is longer.
      speculation: an `NGram` or a `DraftModel`: several tokens are drafted and read by one call of the model.
        The tokens are the same, up to ties that rounding decides; with `CacheOptions.residual` they may
        differ more, since the tokens in full precision then depend on how many are read by one call.

    A request whose logits are NaN, inf or all -inf ends with finish_reason "error"; the others go on.

    Raises:
      ValueError: before compilation, for a model that is not causal, an empty prompt, an id outside the
        vocabulary, request ids that cannot be told apart, a prompt with new tokens longer than the capacity
        or the model's `limit`, or a state of another model.
    """
    pieces = stream(
        config, params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, key=key, eos_id=eos_id,
        request_ids=request_ids, capacity=capacity, sources=sources, tokenizer=tokenizer,
        logits_fn=logits_fn, state=state, cache=cache, prefill_chunk=prefill_chunk,
        speculation=speculation, chunk=None,
    )  # fmt: skip
    return [Completion.of(list(parts)) for parts in zip(*pieces, strict=True)]


def stream(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    key: jax.Array | None = None,
    eos_id: int | None = None,
    request_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    sources: Sequence[Sequence[int] | np.ndarray] | None = None,
    tokenizer: Decodes | None = None,
    logits_fn: loop.LogitsFn | None = None,
    state: DecodeState | None = None,
    cache: CacheOptions = DEFAULT_CACHE,
    prefill_chunk: int | None = None,
    speculation: Speculation | None = None,
    chunk: int | None = 8,
) -> Iterator[list[Increment]]:
    """`generate` in parts: yields an `Increment` for each sample, of at most `chunk` tokens.

    A sample that has ended gives increments without tokens. chunk: None chooses a number for the fewest
    calls. The arguments are checked, and the prompts read, before the first increment is asked for.
    """
    batch = checked_batch(
        config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, key=key, eos_id=eos_id,
        request_ids=request_ids, capacity=capacity, sources=sources, tokenizer=tokenizer, cache=cache,
        prefill_chunk=prefill_chunk, state=state,
    )  # fmt: skip
    _, parts = begin(
        config, params, batch, key=key, tokenizer=tokenizer, logits_fn=logits_fn, state=state, cache=cache,
        speculation=speculation, chunk=chunk,
    )  # fmt: skip
    return parts


def begin(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    *,
    key: jax.Array | None,
    tokenizer: Decodes | None,
    logits_fn: loop.LogitsFn | None,
    state: DecodeState | None,
    cache: CacheOptions,
    speculation: Speculation | None,
    chunk: int | None,
    history: np.ndarray | None = None,
) -> tuple[loop.Decoding, Iterator[list[Increment]]]:
    """The rows after their prompts, and the iterator that decodes them and yields their increments.

    history: the tokens of a state of one row, for penalties, `logits_fn` and n-gram lookup.
    """
    stops = any(s.stop for s in batch.samplings)
    if chunk is None:
        chunk = _STOP_CHUNK if stops else loop.WIDTH
    chunk = checked_count("chunk", chunk)
    _check_logits_fn(config, logits_fn, len(batch.rows), batch.capacity)
    if speculation is not None:
        check_speculation(config, speculation, batch.capacity, state)
        cache = dataclasses.replace(cache, spare=max(cache.spare, speculation.num_tokens))
    decoding = _decoding(config, params, batch, key, logits_fn, state, cache, speculation, history)
    samples = [_Sample(batch, row, tokenizer, plain=logits_fn is None) for row in range(len(batch.rows))]
    return decoding, _produce(decoding, samples, chunk, _STOP_CHUNK if stops else loop.WIDTH)


def _decoding(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    logits_fn: loop.LogitsFn | None,
    state: DecodeState | None,
    cache: CacheOptions,
    speculation: Speculation | None,
    history: np.ndarray | None,
) -> loop.Decoding:
    """The rows after their prompts."""
    samplings, rows = batch.samplings, batch.rows
    params = prepare_for_decoding(config, params)
    alone = len(rows) == len(samplings)  # one sample of each
    carry = loop.start(
        config, params, batch.prompts, capacity=batch.capacity, chunk=batch.chunk, cache=cache, state=state,
        source=batch.source, rows=None if alone else rows,
    )  # fmt: skip
    if history is not None:
        carry = loop.with_history(carry, history)
    arrays = pack(
        [samplings[r] for r in rows], config.vocab_size,
        eos=None if batch.eos < 0 else batch.eos, max_tokens=[batch.limits[r] for r in rows],
    )  # fmt: skip
    if key is None:
        key = jax.random.key(0)
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(jnp.asarray(key))
    seeds = [samplings[r].seed for r in rows]
    keys_B = loop.row_keys(
        key,
        batch.ids[rows],
        np.array([seed or 0 for seed in seeds], np.uint32),
        np.array([seed is not None for seed in seeds]),
        batch.samples,
    )
    begun = (config, params, carry, placed(arrays), keys_B, logits_fn, cache)
    if speculation is None:
        return loop.Decoding(*begun)
    speculation = speculation.prepared()
    own = speculation.start(batch.prompts, rows, batch.capacity, batch.chunk)
    return SpeculativeDecoding(speculation, own, *begun)


def _produce(
    decoding: loop.Decoding, samples: list[_Sample], chunk: int, most: int
) -> Iterator[list[Increment]]:
    """Increments of `chunk` tokens until all samples have ended; the host looks at every `most` tokens."""
    while not all(sample.finish_reason for sample in samples):
        parts: list[list[Increment]] = [[] for _ in samples]
        left = chunk
        while left and not all(sample.finish_reason for sample in samples):
            steps = min(left, most)
            drawn, left = decoding.advance(steps), left - steps
            for row, increment in enumerate(_increments(decoding, samples, drawn, steps)):
                parts[row].append(increment)
        yield [_joined(row) for row in parts]


def _joined(parts: list[Increment]) -> Increment:
    if len(parts) == 1:
        return parts[0]
    whole = Completion.of(parts)
    return Increment(**vars(whole))


def _increments(
    decoding: loop.Decoding, samples: list[_Sample], drawn: loop.Drawn, steps: int
) -> Iterator[Increment]:
    """The next part of each sample; rows that a stop string ended draw no more tokens."""
    carry = decoding.carry
    tokens_BW, done_B, stopped_B, bad_B = jax.device_get(
        (drawn.tokens_BW[:, :steps], carry.done_B, carry.stopped_B, carry.bad_B)
    )
    reports = None
    if any(sample.sampling.logprobs is not None for sample in samples):
        reports = jax.device_get((drawn.logprobs_BW, drawn.top_ids_BWM, drawn.top_logprobs_BWM))
    drafts = jax.device_get(decoding.drafts)
    for row, sample in enumerate(samples):
        new = tokens_BW[row][tokens_BW[row] >= 0]
        ended = None
        if done_B[row]:
            ended = "error" if bad_B[row] else "length" if stopped_B[row] < 0 else "stop"
        report = None if reports is None else tuple(x[row] for x in reports)
        increment = sample.push(new, ended, int(stopped_B[row]), report)
        if drafts is not None:
            increment = dataclasses.replace(increment, drafts=(int(drafts[0][row]), int(drafts[1][row])))
        if sample.finish_reason and not done_B[row]:
            decoding.end(row)
        yield increment


class _Sample:
    """What the host knows of one row."""

    def __init__(self, batch: Batch, row: int, tokenizer: Decodes | None, *, plain: bool):
        self.request, self.sample = int(batch.rows[row]), int(batch.samples[row])
        self.sampling = batch.samplings[self.request]
        self.finish_reason: Any = None
        self._stop: int | str | None = None
        self._error: str | None = None
        self._id = int(batch.ids[self.request])
        # Whether nothing but the model itself determines which logits are finite.
        self._plain = plain and not self.sampling.logit_bias and not self.sampling.min_tokens
        self._text = None
        if tokenizer is not None:
            self._text = StoppableText(tokenizer, self.sampling.stop, self.sampling.min_tokens)

    def push(
        self, tokens: np.ndarray, ended: str | None, stop_id: int, report: tuple[np.ndarray, ...] | None
    ) -> Increment:
        """The increment of these tokens; ended: how the row ended on the device, if it did."""
        text = None if self._text is None else ""
        if self.finish_reason:
            tokens = tokens[:0]
        elif self._text is not None:
            text, kept, stop = self._text.push(tokens)
            tokens = tokens[:kept]
            if stop is not None:
                self.finish_reason, self._stop = "stop", stop
            elif ended:
                text += self._text.finish()
        if ended and not self.finish_reason:
            self.finish_reason = ended
            if ended == "stop":
                self._stop = stop_id
            elif ended == "error":
                self._error = self._message()
        return Increment(
            self.request, self.sample, tokens, text, *self._reported(len(tokens), report),
            self.finish_reason, self._stop, self._error,
        )  # fmt: skip

    def _reported(self, count: int, report: tuple[np.ndarray, ...] | None) -> tuple[Any, Any, Any]:
        n = self.sampling.logprobs
        if n is None or report is None:
            return None, None, None
        logprobs_W, ids_WM, top_WM = report
        return logprobs_W[:count], ids_WM[:count, :n], top_WM[:count, :n]

    def _message(self) -> str:
        if self._plain:
            return f"the model's logits are NaN, inf or all -inf for request {self._id}"
        return (
            f"the logits are NaN, inf or all -inf for request {self._id}, after logits_fn, logit_bias and "
            "the ban of stop ids before min_tokens: leave it an id to choose"
        )


def _check_logits_fn(config: ModelConfig, logits_fn: Any, B: int, capacity: int) -> None:
    """ValueError unless `logits_fn` returns what `generate` says."""
    if logits_fn is None:
        return
    if not callable(logits_fn):
        raise ValueError(f"logits_fn must be a function of tokens_BC and logits_BV, got {logits_fn!r}")
    logits = jax.ShapeDtypeStruct((B, config.vocab_size), accumulator(config.dtype))
    found = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct((B, capacity), jnp.int32), logits)
    if getattr(found, "shape", None) != logits.shape or found.dtype != logits.dtype:
        what = f"{found.dtype} {list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise ValueError(f"logits_fn must return {logits.dtype} {list(logits.shape)}, got {what}")
