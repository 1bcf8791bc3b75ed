"""The drafts of speculative decoding: from n-gram lookup (`NGram`) or from a small model (`DraftModel`).

A proposer is a frozen pytree, an argument of the compiled loop. `own` is what the loop carries for it.

    prepared()                 the proposer with weights in the layout for decoding
    start(prompts, ...)        own, after the prompts
    grown(own, reach, ...)     own with room for a text of `reach` tokens
    propose(own, drafting)     a `Proposal`: drafts for the tokens after the newest one, and own
    settle(own, kept_B, ...)   own, after the model has kept that many drafts of each row
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import CacheOptions, most_rewound, rewind_all
from attention_jax.generation import loop
from attention_jax.generation.arrays import SamplingArrays
from attention_jax.generation.choose import adjust, choose
from attention_jax.generation.decode import next_state
from attention_jax.model import ModelConfig, bind, prepare_for_decoding

_MOST_DRAFTS = 64
_LONGEST_PAUSE = 5  # a row without success proposes again after 2^5 calls at the latest
_STATIC = {"static": True}


class Drafting(NamedTuple):
    """What a proposer may read; the newest token of each row is recorded in `carry` but not yet appended."""

    carry: loop.Carry
    token_B: jax.Array
    active_B: jax.Array
    keys_B: jax.Array
    arrays: SamplingArrays


class Proposal(NamedTuple):
    """drafts_BK: int32, proposed to follow the newest token; count_B: int32, how many of them are meant."""

    drafts_BK: jax.Array
    count_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NGram:
    """Drafts by lookup: what followed the last occurrence of the text's last tokens, in prompt or output.

    num_tokens: drafts per call (K). longest, shortest: the lengths of a suffix that is looked up; the longest
    one that occurs before is used, and of several occurrences the last. A row of which a call keeps no draft
    proposes none in the next 1, 2, 4, ... 32 calls, so that text that does not repeat costs little.

    Raises: ValueError for an option outside its range.
    """

    num_tokens: int = dataclasses.field(default=8, metadata=_STATIC)
    longest: int = dataclasses.field(default=16, metadata=_STATIC)
    shortest: int = dataclasses.field(default=3, metadata=_STATIC)

    def __post_init__(self):
        _check_integer("num_tokens", self.num_tokens, _MOST_DRAFTS)
        _check_integer("longest", self.longest, 256)
        _check_integer("shortest", self.shortest, 256)
        if self.shortest > self.longest:
            raise ValueError(f"shortest {self.shortest} must be <= longest {self.longest}")

    def prepared(self) -> NGram:
        """The proposer itself."""
        return self

    def start(self, prompts: list[np.ndarray], rows: np.ndarray, capacity: int, chunk: int) -> jax.Array:
        """own: calls without success in a row, and calls that a row still pauses, int32 [B, 2]."""
        del prompts, capacity, chunk
        return jnp.zeros((len(rows), 2), jnp.int32)

    def grown(self, own: jax.Array, reach: int, capacity: int) -> jax.Array:
        """own, whose size does not depend on the text."""
        del reach, capacity
        return own

    def propose(self, own: jax.Array, drafting: Drafting) -> tuple[Proposal, jax.Array]:
        """The tokens after the last occurrence of the longest known suffix."""
        carry, pause_B = drafting.carry, own[:, 1]
        drafts_BK, found_B = lookup(
            carry.tokens_BC, carry.state.positions_B + 1,
            count=self.num_tokens, longest=self.longest, shortest=self.shortest,
        )  # fmt: skip
        usable_B = found_B & (pause_B == 0) & drafting.active_B
        own = own.at[:, 1].set(jnp.maximum(pause_B - 1, 0))
        return Proposal(drafts_BK, jnp.where(usable_B, self.num_tokens, 0)), own

    def settle(self, own: jax.Array, active_B: jax.Array, count_B: jax.Array, kept_B: jax.Array) -> jax.Array:
        """own: a row that kept none of its drafts pauses, longer each time."""
        failed_B = active_B & (count_B > 0) & (kept_B == 0)
        failures_B = jnp.where(failed_B, jnp.minimum(own[:, 0] + 1, _LONGEST_PAUSE + 1), own[:, 0])
        pause_B = jnp.where(failed_B, 1 << jnp.maximum(failures_B - 1, 0), own[:, 1])
        return jnp.stack([jnp.where(kept_B > 0, 0, failures_B), pause_B], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts by a small model with the same vocabulary.

    config, params: the model; params may be what `prepare_for_decoding` returns. num_tokens: drafts per call
    (K). It draws with the sampling options and the random keys of each request.

    Raises: ValueError for an option outside its range, and for a model that is not causal or has an encoder.
    """

    config: ModelConfig = dataclasses.field(metadata=_STATIC)
    params: Any
    num_tokens: int = dataclasses.field(default=4, metadata=_STATIC)

    def __post_init__(self):
        _check_integer("num_tokens", self.num_tokens, _MOST_DRAFTS)
        if not self.config.causal or self.config.encoder is not None:
            raise ValueError(
                "a draft model must be causal and without an encoder: it continues the same tokens"
            )

    def prepared(self) -> DraftModel:
        """The proposer with weights laid out for decoding."""
        return dataclasses.replace(self, params=prepare_for_decoding(self.config, self.params))

    def start(self, prompts: list[np.ndarray], rows: np.ndarray, capacity: int, chunk: int) -> Any:
        """own: the `DecodeState` of the draft model after the prompts."""
        started = loop.start(
            self.config, self.params, prompts, capacity=self._most(capacity), chunk=chunk, cache=self._cache,
            rows=rows,
        )  # fmt: skip
        return started.state

    def grown(self, own: Any, reach: int, capacity: int) -> Any:
        """own with caches for a text of `reach` tokens and drafts behind it."""
        most = self._most(capacity)
        return loop.with_room(self.config, own, min(reach + self.num_tokens, most), most, self._cache)

    def _most(self, capacity: int) -> int:
        # Drafts may reach past the last token that is wanted. Those past the draft model's limit are NaN, and
        # then none are proposed.
        most = capacity + self.num_tokens
        return min(most, max(capacity, self.config.limit[0])) if self.config.limit else most

    @property
    def _cache(self) -> CacheOptions:
        return CacheOptions(spare=self.num_tokens)

    def propose(self, own: Any, drafting: Drafting) -> tuple[Proposal, Any]:
        """The draft model's own tokens; its states then hold the newest token and all drafts."""
        carry, K, active_B = drafting.carry, self.num_tokens, drafting.active_B
        arrays, fold = drafting.arrays, jax.vmap(jax.random.fold_in)

        def step(loop_carry, _):
            state, token_B = loop_carry
            state = next_state(self.config, self.params, state, token_B, active_B)
            logits_BV = adjust(state.logits_BV, arrays, carry.prompt_BV, carry.counts_BV, carry.generated_B)
            token_B = choose(logits_BV, arrays, lambda: fold(drafting.keys_B, state.positions_B))
            return (state, jnp.maximum(token_B, 0)), token_B

        (own, _), drafts = jax.lax.scan(step, (own, drafting.token_B), length=K + 1)
        # The last step only appends the last draft.
        drafts_BK = drafts[:K].T
        bad_B = (drafts_BK < 0).any(1)  # a draft model without a distribution proposes nothing
        return Proposal(drafts_BK, jnp.where(active_B & ~bad_B, K, 0)), own

    def settle(self, own: Any, active_B: jax.Array, count_B: jax.Array, kept_B: jax.Array) -> Any:
        """own without the drafts that were not kept."""
        del count_B
        n_B = jnp.where(active_B, self.num_tokens - kept_B, 0)
        return dataclasses.replace(own, caches=rewind_all(own.caches, n_B), positions_B=own.positions_B - n_B)


Speculation = NGram | DraftModel


def lookup(
    tokens_BC: jax.Array, length_B: jax.Array, *, count: int, longest: int, shortest: int
) -> tuple[jax.Array, jax.Array]:
    """What followed the last occurrence of the longest known suffix, int32 [B, count], and if there is one.

    tokens_BC: int32, the tokens of each row; those at length_B and after are ignored. If the occurrence is so
    late that the text ends before `count` tokens, the drafts go on with the period that this implies.
    """
    C = tokens_BC.shape[1]
    index_C = jnp.arange(C, dtype=jnp.int32)

    def row(tokens_C, length):
        # matched_C: the number of tokens that end at an index and equal the last tokens of the text.
        j_J = jnp.arange(longest, dtype=jnp.int32)
        last_J = jnp.where(j_J < length, tokens_C[jnp.maximum(length - 1 - j_J, 0)], -2)
        index_JC = index_C[None] - j_J[:, None]
        here_JC = jnp.where(index_JC >= 0, tokens_C[jnp.maximum(index_JC, 0)], -1)
        matched_C = jnp.where(here_JC == last_J[:, None], longest, j_J[:, None]).min(0)
        usable_C = (index_C < length - 1) & (matched_C >= shortest)
        # Of the longest matches the last: C distinct indices fit below the next length.
        best = jnp.argmax(jnp.where(usable_C, matched_C * C + index_C, -1)).astype(jnp.int32)
        start = best + 1
        period = jnp.maximum(length - start, 1)
        drafts_K = tokens_C[(start + jnp.arange(count, dtype=jnp.int32) % period) % C]
        return drafts_K, usable_C[best]

    return jax.vmap(row)(tokens_BC, length_B)


def check_speculation(config: ModelConfig, speculation: Any, capacity: int, state: Any = None) -> None:
    """ValueError for what is not a proposer, or one that does not fit the model or the state to continue."""
    if not isinstance(speculation, Speculation):
        raise ValueError(f"speculation must be an NGram, a DraftModel or None, got {speculation!r:.80}")
    if isinstance(speculation, DraftModel):
        bind(speculation.config, speculation.params)
        if speculation.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has {speculation.config.vocab_size} token ids and the model "
                f"{config.vocab_size}: both must have the same vocabulary"
            )
        limit, key = speculation.config.limit or (None, "")
        if limit is not None and limit < capacity:
            raise ValueError(
                f"the draft model's {key} {limit} is below the capacity {capacity}: pass capacity={limit} if "
                "that is enough, or another draft model"
            )
        if state is not None:
            raise ValueError("a draft model has not read the tokens of state: pass state=None or use NGram()")
    most = None if state is None else most_rewound(state.caches)
    if most is not None and most < speculation.num_tokens:
        raise ValueError(
            f"the state can take back {most} tokens and {speculation.num_tokens} are drafted: make it with "
            f"CacheOptions(spare={speculation.num_tokens}), or lower num_tokens"
        )


def _check_integer(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be an integer in [1, {most}], got {value!r}")
