"""The compiled programs of generation, and `Decoding`, which runs them.

`_start` reads the prompts in pieces; `_advance` draws tokens in a `lax.while_loop`. They are compiled for a
model, a number of rows and a capacity, `_start` also for the length of a piece. Sampling options, keys,
prompt lengths and numbers of tokens are arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions
from attention_jax.dtypes import accumulator
from attention_jax.generation.arrays import SamplingArrays
from attention_jax.generation.choose import adjust, choose, log_probabilities, threefry
from attention_jax.generation.decode import DecodeState, append_pieces, next_state
from attention_jax.generation.growth import first_capacity, grown, next_capacity
from attention_jax.generation.sampling import TOP_LOGPROBS
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind, init_state

LogitsFn = Callable[[jax.Array, jax.Array], jax.Array]
WIDTH = 64  # the most tokens that one call of `_advance` draws
_SAMPLES = np.uint32(2**32 - 1)  # folded before the index of a sample: no position of a token
_LOG = logging.getLogger("attention_jax.generation")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What the loop changes.

    tokens_BC: int32, the prompt and the new tokens by position, -1 for none. prompt_BV: ids in the prompt.
    counts_BV: int32, how often an id was generated. generated_B: the number of new tokens. stopped_B: the
    stop id that ended a row, else -1. bad_B: rows that ended without a distribution.
    """

    state: DecodeState
    tokens_BC: jax.Array
    prompt_BV: jax.Array
    counts_BV: jax.Array
    generated_B: jax.Array
    done_B: jax.Array
    stopped_B: jax.Array
    bad_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """The tokens of one call, -1 after a row's end, W = WIDTH; log-probabilities are 0 if none are wanted."""

    tokens_BW: jax.Array
    logprobs_BW: jax.Array
    top_ids_BWM: jax.Array
    top_logprobs_BWM: jax.Array

    @staticmethod
    def empty(B: int, V: int, dtype: Any) -> Drawn:
        """No tokens yet, of B rows and V ids; dtype: of log-probabilities."""
        M = min(TOP_LOGPROBS, V)
        return Drawn(
            jnp.full((B, WIDTH), -1, jnp.int32),
            jnp.zeros((B, WIDTH), dtype),
            jnp.zeros((B, WIDTH, M), jnp.int32),
            jnp.zeros((B, WIDTH, M), dtype),
        )

    def arrays(self) -> tuple[jax.Array, ...]:
        """The arrays, in order."""
        return self.tokens_BW, self.logprobs_BW, self.top_ids_BWM, self.top_logprobs_BWM


class Decoding:
    """Rows that are being decoded: `advance` draws tokens, `end` ends rows, `carry.state` is their state."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        carry: Carry,
        arrays: SamplingArrays,
        keys_B: jax.Array,
        logits_fn: LogitsFn | None = None,
        cache: CacheOptions = DEFAULT_CACHE,
    ):
        self.config, self.params, self.carry = config, params, carry
        self.arrays, self.keys_B, self.logits_fn = arrays, keys_B, logits_fn
        self.ended_B = np.zeros(len(keys_B), bool)
        self._cache, self._reach = cache, int(carry.state.positions_B.max())

    @property
    def drafts(self) -> tuple[jax.Array, jax.Array] | None:
        """Drafts read and drafts kept so far, of each row; None without speculation."""
        return None

    def end(self, row: int) -> None:
        """Draw no more tokens of this row."""
        self.ended_B[row] = True

    def make_room(self, steps: int) -> None:
        """Let the caches grow if so many more tokens would not fit."""
        self._reach, capacity = self._reach + steps, self.carry.tokens_BC.shape[1]
        state = with_room(self.config, self.carry.state, min(self._reach, capacity), capacity, self._cache)
        self.carry = dataclasses.replace(self.carry, state=state)

    def advance(self, steps: int) -> Drawn:
        """At most `steps` <= WIDTH more tokens of every row that is not done."""
        self.make_room(steps)
        B, C = self.carry.tokens_BC.shape[0], self.carry.state.capacity
        with compilation_logged(_advance, f"decoding for batch {B}, capacity {C}"):
            self.carry, drawn = _advance(
                self.config, self.logits_fn, self.params, self.keys_B, self.arrays, self.carry,
                self.ended_B, np.int32(steps),
            )  # fmt: skip
        return drawn


def start(
    config: ModelConfig,
    params: Any,
    prompts: list[np.ndarray],
    *,
    capacity: int,
    chunk: int,
    cache: CacheOptions,
    state: DecodeState | None = None,
    source: tuple[np.ndarray, np.ndarray] | None = None,
    rows: np.ndarray | None = None,
) -> Carry:
    """The carry after the prompts, read in pieces of `chunk` tokens; row i of it continues prompt rows[i].

    state: what the prompts continue, one row for all or one row each; None starts anew.
    """
    tokens_RC = np.full((len(prompts), capacity), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_RC[row, : len(prompt)] = prompt
    lengths_R = np.array([len(prompt) for prompt in prompts], np.int32)
    count = np.int32(-(-lengths_R.max() // chunk))
    what = f"prefill for batch {len(prompts)}, capacity {capacity}, pieces of {chunk} tokens"
    size = first_capacity(config, cache, int(lengths_R.max()) + WIDTH, capacity)
    with compilation_logged(_start, what):
        return _start(config, size, chunk, cache, params, state, tokens_RC, lengths_R, count, source, rows)


def with_history(carry: Carry, history: np.ndarray) -> Carry:
    """The carry of rows whose state already held these tokens: they count as tokens of the prompt."""
    (_, C), (_, V) = carry.tokens_BC.shape, carry.prompt_BV.shape
    tokens_1C, prompt_1V = np.full((1, C), -1, np.int32), np.zeros((1, V), bool)
    tokens_1C[0, : len(history)] = history
    prompt_1V[0, history] = True
    return _with_history(carry, tokens_1C, prompt_1V)


@functools.partial(jax.jit, donate_argnums=0)
def _with_history(carry: Carry, tokens_1C: jax.Array, prompt_1V: jax.Array) -> Carry:
    tokens_BC = jnp.maximum(carry.tokens_BC, tokens_1C)
    return dataclasses.replace(carry, tokens_BC=tokens_BC, prompt_BV=carry.prompt_BV | prompt_1V)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    config: ModelConfig,
    capacity: int,
    chunk: int,
    cache: CacheOptions,
    params: Any,
    state: DecodeState | None,
    tokens_RC: jax.Array,
    lengths_R: jax.Array,
    count: jax.Array,
    source: tuple[jax.Array, jax.Array] | None,
    rows: jax.Array | None,
) -> Carry:
    R, C = tokens_RC.shape
    V, ctx = config.vocab_size, Context()
    if source is not None:
        memory_BSD = bind(config, params).encode(source[0], ctx=Context(positions_BT=source[1]))
        ctx = Context(memory_BSD=memory_BSD, memory_positions_BS=source[1])
    if state is None:
        caches, zeros_R = init_state(config, R, capacity, cache=cache), jnp.zeros((R,), jnp.int32)
        state = DecodeState(caches, zeros_R, jnp.zeros((R, V), accumulator(config.dtype)))
    elif len(state.positions_B) < R:
        state = state.fork(jnp.zeros((R,), jnp.int32))
    columns_RC = jnp.arange(C, dtype=jnp.int32)[None]
    positions_RC = jnp.where(tokens_RC >= 0, state.positions_B[:, None] + columns_RC, -1)
    caches, logits_RV = append_pieces(
        config, params, state, tokens_RC, positions_RC, jnp.zeros((R,), jnp.int32), lengths_R, count,
        chunk=chunk, ctx=ctx,
    )  # fmt: skip
    logits_RV = jnp.where(lengths_R[:, None] > 0, logits_RV, state.logits_BV)
    rows_R1 = jnp.arange(R)[:, None]
    # mode="drop": the columns without a token are written to an id or a place that does not exist.
    ids_RC = jnp.where(tokens_RC >= 0, tokens_RC, V)
    prompt_RV = jnp.zeros((R, V), bool).at[rows_R1, ids_RC].set(True, mode="drop")
    places_RC = jnp.where(tokens_RC >= 0, positions_RC, C)
    tokens_RC = jnp.full((R, C), -1, jnp.int32).at[rows_R1, places_RC].set(tokens_RC, mode="drop")
    state = DecodeState(caches, state.positions_B + lengths_R, logits_RV)
    if rows is not None:
        state, tokens_RC, prompt_RV = state.fork(rows), tokens_RC[rows], prompt_RV[rows]
    B = len(tokens_RC)
    no_B, zeros_B = jnp.zeros((B,), bool), jnp.zeros((B,), jnp.int32)
    counts_BV = jnp.zeros((B, V), jnp.int32)
    return Carry(state, tokens_RC, prompt_RV, counts_BV, zeros_B, no_B, zeros_B - 1, no_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _advance(
    config: ModelConfig,
    logits_fn: LogitsFn | None,
    params: Any,
    keys_B: jax.Array,
    arrays: SamplingArrays,
    carry: Carry,
    ended_B: jax.Array,
    limit: jax.Array,
) -> tuple[Carry, Drawn]:
    """The carry after `limit` steps, or as soon as all rows are done, and the tokens drawn."""
    drawn = Drawn.empty(*carry.prompt_BV.shape, accumulator(config.dtype))
    carry = dataclasses.replace(carry, done_B=carry.done_B | ended_B)

    def unfinished(loop):
        step, carry, _ = loop
        return (step < limit) & (jnp.all(carry.done_B) == False)  # noqa: E712

    def draw(loop):
        step, carry, drawn = loop
        token_B, reports = next_tokens(logits_fn, keys_B, arrays, carry)
        carry, active_B = record(arrays, carry, token_B, True)
        # The states of finished rows do not change.
        state = next_state(config, params, carry.state, token_B, active_B)
        columns = (jnp.where(active_B, token_B, -1), *reports)
        drawn = Drawn(*(
            jax.lax.dynamic_update_index_in_dim(x, column, step, axis=1)
            for x, column in zip(drawn.arrays(), columns, strict=True)
        ))  # fmt: skip
        return step + 1, dataclasses.replace(carry, state=state), drawn

    _, carry, drawn = jax.lax.while_loop(unfinished, draw, (jnp.int32(0), carry, drawn))
    return carry, drawn


def next_tokens(
    logits_fn: LogitsFn | None, keys_B: jax.Array, arrays: SamplingArrays, carry: Carry
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A token per row, -1 without a distribution, and its log-probabilities."""
    token_B = chosen(logits_fn, keys_B, arrays, carry)
    return token_B, log_probabilities(carry.state.logits_BV, token_B, arrays)


def chosen(logits_fn: LogitsFn | None, keys_B: jax.Array, arrays: SamplingArrays, carry: Carry) -> jax.Array:
    """A token per row, -1 without a distribution."""
    state = carry.state
    logits_BV = state.logits_BV
    if logits_fn is not None:
        logits_BV = logits_fn(carry.tokens_BC, logits_BV)
    logits_BV = adjust(logits_BV, arrays, carry.prompt_BV, carry.counts_BV, carry.generated_B)
    return choose(logits_BV, arrays, lambda: jax.vmap(jax.random.fold_in)(keys_B, state.positions_B))


def record(
    arrays: SamplingArrays, carry: Carry, token_B: jax.Array, where_B: jax.Array | bool
) -> tuple[Carry, jax.Array]:
    """The carry with the tokens recorded, all but the state, and the rows of which the token is an output.

    Only rows of `where_B` that are not done are changed.
    """
    B, C = carry.tokens_BC.shape
    live_B = (carry.done_B == False) & where_B  # noqa: E712
    bad_B = live_B & (token_B < 0)
    stop_B = live_B & jnp.any(token_B[:, None] == arrays.stop_ids_BE, axis=1) & (token_B >= 0)
    active_B = live_B & (bad_B == False) & (stop_B == False)  # noqa: E712
    generated_B = carry.generated_B + active_B.astype(jnp.int32)
    rows_B = jnp.arange(B)
    columns_B = jnp.where(active_B, carry.state.positions_B, C)  # mode="drop" ignores column C
    ids_B = jnp.where(active_B, token_B, carry.counts_BV.shape[1])
    carry = dataclasses.replace(
        carry,
        tokens_BC=carry.tokens_BC.at[rows_B, columns_B].set(token_B, mode="drop"),
        counts_BV=carry.counts_BV.at[rows_B, ids_B].add(1, mode="drop"),
        generated_B=generated_B,
        done_B=carry.done_B | (live_B & ((active_B == False) | (generated_B >= arrays.max_tokens_B))),  # noqa: E712
        stopped_B=jnp.where(stop_B, token_B, carry.stopped_B),
        bad_B=carry.bad_B | bad_B,
    )
    return carry, active_B


def with_room(
    config: ModelConfig, state: DecodeState, needed: int, capacity: int, cache: CacheOptions
) -> DecodeState:
    """The state, with larger caches of at most `capacity` if it does not have room for `needed` tokens."""
    size = state.capacity
    if size is None or needed <= size:
        return state
    return _grown(config, state, next_capacity(size, needed, capacity), cache)


_grown = jax.jit(grown, static_argnums=(0, 2, 3))


@jax.jit
def row_keys(
    key: jax.Array, ids_B: jax.Array, seeds_B: jax.Array, seeded_B: jax.Array, samples_B: jax.Array
) -> jax.Array:
    """The key of each row: of its seed where it has one, else of the call's key and the request id.

    Sample 0 has the key of its request, so that a request's first sample does not depend on their number. The
    keys are of threefry2x32 whatever the call's key is (see `threefry`).
    """
    fold, key = jax.vmap(jax.random.fold_in, (None, 0)), threefry(key)
    seed = jax.random.key(0, impl="threefry2x32")
    keys_B = jnp.where(seeded_B, fold(seed, seeds_B), fold(key, ids_B))
    apart_B = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, _SAMPLES), n))
    return jnp.where(samples_B > 0, apart_B(keys_B, samples_B), keys_B)


@contextlib.contextmanager
def compilation_logged(program: Any, what: str) -> Iterator[None]:
    """Log, at level INFO, how long a call took that compiled a program."""
    before, began = program._cache_size(), time.perf_counter()
    yield
    if program._cache_size() > before:
        _LOG.info("compiled %s in %.1f s", what, time.perf_counter() - began)
