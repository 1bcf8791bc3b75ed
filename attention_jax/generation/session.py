"""`Session`: a text of one row that goes on, with the decoding state after it.

A session holds the tokens of its text and a state that has read the first of them. The others are read by
the next call, in front of its prompt. So the state is exact however a turn ends: if the loop has drawn tokens
behind a stop string, the state takes them back together with the last token of the text, which is then read
again for its logits; if a state cannot go back so far (`State.most_rewound`), the one from the beginning of
the turn takes its place, and the tokens of that turn are read again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions, rewind_all
from attention_jax.generation import loop
from attention_jax.generation.arrays import placed_beside
from attention_jax.generation.decode import DecodeState
from attention_jax.generation.drafts import DraftModel, NGram
from attention_jax.generation.generate import begin
from attention_jax.generation.requests import checked_batch, checked_count, checked_ids, piece
from attention_jax.generation.results import Increment
from attention_jax.generation.sampling import Sampling, is_integer
from attention_jax.generation.states import check_state
from attention_jax.model import ModelConfig, init_state, prepare_for_decoding
from attention_jax.tokenizers.base import Decodes


class Session:
    """A text that `say` continues, turn by turn, without reading it again.

    Args:
      config, params: a causal model without an encoder.
      capacity: the most tokens of the text; at most the model's `limit`.
      eos_id: an id that ends every turn, and is not part of the text.
      tokenizer: an object with `decode(ids) -> str`, for text and stop strings.
      cache: how the states are stored. With `spare=chunk` rings and recurrent states, too, take back what was
        drawn behind a stop string.
      state, tokens: go on after these tokens, which a state of one row has read; neither starts anew.

    Raises: ValueError for another model, a capacity above the limit, and a state that does not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        capacity: int,
        eos_id: int | None = None,
        tokenizer: Decodes | None = None,
        cache: CacheOptions = DEFAULT_CACHE,
        state: DecodeState | None = None,
        tokens: Sequence[int] | np.ndarray = (),
    ):
        if not config.causal or config.encoder is not None:
            raise ValueError("a session needs a causal model without an encoder: it continues one text")
        capacity = checked_count("capacity", capacity)
        limit, name = config.limit or (None, "")
        if limit is not None and capacity > limit:
            raise ValueError(f"capacity {capacity} exceeds the model's {name} {limit}: lower it")
        self.config, self.capacity, self.cache = config, capacity, cache
        self._params, self._eos_id = prepare_for_decoding(config, params), eos_id
        self._tokenizer = tokenizer
        self._tokens = _ids(config, "tokens", tokens)
        self._turn: loop.Decoding | None = None
        if state is None and len(self._tokens):
            raise ValueError(f"{len(self._tokens)} tokens without the state that has read them: use say")
        self._state = self._empty() if state is None else self._checked(state)
        self._fresh = state is not None  # whether the state has the logits of the token that follows

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of the text so far, int32 [T]: those said, and those of the increments."""
        return self._tokens

    @property
    def state(self) -> DecodeState:
        """The state after `tokens`; those that it has not read yet are read now. Ends a turn that goes on.

        Raises: ValueError for a text that has no tokens, or fewer than the mask's bidirectional prefix.
        """
        self._end()
        unread = self._unread(self._tokens)
        if len(unread):
            carry = loop.start(
                self.config, self._params, [unread], capacity=self.capacity, cache=self.cache,
                chunk=piece(self.config, len(unread), self.capacity, None, 1, self.cache), state=self._state,
            )  # fmt: skip
            self._state, self._fresh = carry.state, True
        return self._state

    def say(
        self,
        tokens: Sequence[int] | np.ndarray = (),
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        key: jax.Array | None = None,
        logits_fn: loop.LogitsFn | None = None,
        speculation: NGram | None = None,
        chunk: int = 8,
    ) -> Iterator[Increment]:
        """Append tokens to the text and yield the increments of what the model continues it with.

        tokens: none at all lets the model go on. The other arguments are those of `stream`. Penalties,
        `logits_fn` and n-gram lookup know the whole text; its earlier tokens count as a prompt. The text gets
        the tokens of an increment when it is yielded: a caller that stops the iteration, or that an exception
        interrupts, keeps those that it has seen. Any other call ends the turn.

        The arguments are checked before the first increment is asked for; after an error the session is as
        before. Raises: ValueError as `stream`, and for more tokens than the capacity.
        """
        self._end()
        if isinstance(speculation, DraftModel):
            raise ValueError("a session cannot keep the state of a draft model: use NGram, or stream")
        if not isinstance(sampling, Sampling) or sampling.n != 1:
            raise ValueError(
                f"a session continues one text: give one Sampling with n=1, got {sampling!r:.80}"
            )
        text = np.concatenate([self._tokens, _ids(self.config, "tokens", tokens)])
        unread = self._unread(text)
        batch = checked_batch(
            self.config, [unread], max_new_tokens=max_new_tokens, sampling=sampling, key=key,
            eos_id=self._eos_id, request_ids=None, capacity=self.capacity, sources=None,
            tokenizer=self._tokenizer, cache=self.cache, prefill_chunk=None, state=self._state,
        )  # fmt: skip
        turn, parts = begin(
            self.config, self._params, batch, key=key, tokenizer=self._tokenizer, logits_fn=logits_fn,
            state=self._state, cache=self.cache, speculation=speculation, chunk=chunk,
            history=text[: len(text) - len(unread)],
        )  # fmt: skip
        self._tokens, self._turn = text, turn
        return self._increments(turn, parts)

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the text, which the next call reads. Ends a turn that goes on."""
        self._end()
        self._tokens = np.concatenate([self._tokens, _ids(self.config, "tokens", tokens)])

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens of the text. Ends a turn that goes on.

        Every state takes back tokens of the last turn, directly after it. Others it takes back up to
        `CacheOptions.spare`, where it does not hold all tokens. Raises: ValueError for more than that, and
        for more tokens than the text has; the session is then as before.
        """
        if not is_integer(count) or not 0 <= count <= len(self._tokens):
            raise ValueError(f"rewind: count must be in [0, {len(self._tokens)}], the tokens, got {count!r}")
        kept = len(self._tokens) - int(count)
        if self._turn is None or kept < self._least:
            self._end()
            if kept < self._least:
                self._state, self._fresh = self._before(self._state, kept), False
        self._tokens = self._tokens[:kept]
        self._end()

    def fork(self) -> Session:
        """A session with the same text and state, which goes on by itself. Ends a turn that goes on."""
        self._end()
        return copy.copy(self)

    @property
    def _read(self) -> int:
        """The tokens that the state has read."""
        return int(self._state.positions_B[0])

    @property
    def _least(self) -> int:
        """The tokens of the shortest text that the state can continue."""
        return self._read + (not self._fresh)

    def _unread(self, text: np.ndarray) -> np.ndarray:
        """The tokens of a text that the state has not read; ValueError for a text that is too short."""
        least = max(1, self.config.prefix)
        if len(text) < least:
            raise ValueError(
                f"the text has {len(text)} tokens, and the model needs at least {least}: say more"
            )
        return text[self._read :]

    def _increments(self, turn: loop.Decoding, parts: Iterator[list[Increment]]) -> Iterator[Increment]:
        while self._turn is turn and (found := next(parts, None)) is not None:
            self._tokens = np.concatenate([self._tokens, found[0].tokens])
            yield found[0]

    def _end(self) -> None:
        """The state after a turn: that of the loop, without what the text does not have."""
        turn, self._turn = self._turn, None
        if turn is None or _donated(turn.carry.state):  # an exception came in the middle of a call
            return
        state, kept = turn.carry.state, len(self._tokens)
        if int(state.positions_B[0]) == kept:
            self._state, self._fresh = state, True
            return
        # If it cannot go back so far, `self._state`, from before the turn, stays.
        with contextlib.suppress(ValueError):
            self._state, self._fresh = self._before(state, kept), False

    def _before(self, state: DecodeState, kept: int) -> DecodeState:
        """The state after all but the last of `kept` tokens, whose logits are found when that one is read."""
        read = kept - 1
        if read < max(1, self.config.prefix):  # a bidirectional prefix is read in one piece
            return self._empty()
        n_B = state.positions_B - read
        return DecodeState(rewind_all(state.caches, n_B), state.positions_B - n_B, state.logits_BV)

    def _empty(self) -> DecodeState:
        caches = init_state(self.config, 1, self.capacity, cache=self.cache)
        state = DecodeState(
            caches, jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.config.vocab_size), jnp.float32)
        )
        return placed_beside(state, jax.tree.leaves(self._params)[0])

    def _checked(self, state: Any) -> DecodeState:
        """The state, if it is one of this model with as many tokens; ValueError if not."""
        check_state(self.config, state, 1, self.cache)
        if (read := int(state.positions_B[0])) != len(self._tokens):
            raise ValueError(
                f"the state has read {read} tokens, and {len(self._tokens)} are given: give those"
            )
        if state.capacity not in (None, self.capacity):
            raise ValueError(
                f"capacity {self.capacity} is not that of the state, {state.capacity}: give that"
            )
        return state


def _ids(config: ModelConfig, what: str, ids: Any) -> np.ndarray:
    """Token ids as int32, possibly none."""
    if np.ndim(ids) == 1 and len(ids) == 0:
        return np.zeros(0, np.int32)
    return checked_ids(config, what, ids)


def _donated(state: Any) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
