"""Speculative decoding: several tokens are drafted, and one call of the model reads them all.

    x_p = choose(logits_p, key_p)             what plain decoding draws at position p
    drafts d_{p+1} ... d_{p+K} after x_p      by n-gram lookup or by a small model (`drafts.py`)
    logits_{p+1} ... logits_{p+K+1}           one call of the model with x_p, d_{p+1}, ..., d_{p+K}
    d_{p+j} is kept if it and all drafts before it equal x_{p+j} = choose(logits_{p+j}, key_{p+j})

The states then take back the other drafts (`State.rewind`), as many as each row needs. The key of a token
depends on its request and position only. The tokens are therefore those of plain decoding, greedy or sampled,
up to the rounding of logits, and their distribution is that of the model without a rejection step. A draft
model draws with the same keys: with the same Gumbel noise both models take the same token wherever their
distributions are close.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318), who accept by rejection;
common random numbers: Daliri et al. 2024 (arXiv 2408.07978).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import rewind_all
from attention_jax.dtypes import accumulator
from attention_jax.generation import loop
from attention_jax.generation.arrays import SamplingArrays, placed_beside
from attention_jax.generation.choose import adjust_by, choose, log_probabilities
from attention_jax.generation.decode import DecodeState, next_state
from attention_jax.generation.drafts import Drafting, Speculation
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """int32 sums over the calls so far. drafted_B, kept_B: drafts of each row, and those that were kept.

    calls: calls of the model with drafts; steps: calls without.
    """

    drafted_B: jax.Array
    kept_B: jax.Array
    calls: jax.Array
    steps: jax.Array


class Progress(NamedTuple):
    """What a call changes.

    own: what the proposer carries. next_B: the token after the state of each row, chosen but not yet
    recorded. reports: the log-probabilities of each row's tokens in this call as in `loop.Drawn`, T columns
    wider. drawn_B: the number of tokens of each row in this call.
    """

    carry: loop.Carry
    own: Any
    counts: Counts
    next_B: jax.Array
    reports: tuple[jax.Array, ...]
    drawn_B: jax.Array


class SpeculativeDecoding(loop.Decoding):
    """`Decoding` with drafts; the tokens are the same."""

    def __init__(self, speculation: Speculation, own: Any, *args: Any):
        super().__init__(*args)
        zeros_B = jnp.zeros((len(self.keys_B),), jnp.int32)
        # Distinct buffers: they are donated.
        counts = Counts(zeros_B, zeros_B.copy(), jnp.int32(0), jnp.int32(0).copy())
        self._speculation = speculation
        self._own, self.counts = placed_beside((own, counts), self.carry.state.positions_B)

    @property
    def drafts(self) -> tuple[jax.Array, jax.Array]:
        """Drafts read and drafts kept so far, of each row."""
        return self.counts.drafted_B, self.counts.kept_B

    def advance(self, steps: int) -> loop.Drawn:
        """At most `steps` <= WIDTH more tokens of every row that is not done."""
        self.make_room(steps)
        self._own = self._speculation.grown(self._own, self._reach, self.carry.tokens_BC.shape[1])
        B, C = self.carry.tokens_BC.shape[0], self.carry.state.capacity
        with loop.compilation_logged(_advance, f"speculative decoding for batch {B}, capacity {C}"):
            self.carry, self._own, self.counts, drawn = _advance(
                self.config, self.logits_fn, self.params, self.keys_B, self.arrays, self._speculation,
                self.carry, self._own, self.counts, self.ended_B, np.int32(steps),
            )  # fmt: skip
        return drawn


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(6, 7, 8))
def _advance(
    config: ModelConfig,
    logits_fn: loop.LogitsFn | None,
    params: Any,
    keys_B: jax.Array,
    arrays: SamplingArrays,
    speculation: Speculation,
    carry: loop.Carry,
    own: Any,
    counts: Counts,
    ended_B: jax.Array,
    limit: jax.Array,
) -> tuple[loop.Carry, Any, Counts, loop.Drawn]:
    """The state after `limit` tokens of every row that is not done before."""
    T = speculation.num_tokens + 1
    carry = dataclasses.replace(carry, done_B=carry.done_B | ended_B)
    choosing, began_B = _Choosing(logits_fn, keys_B, arrays), carry.state.positions_B

    def unfinished(now: Progress):
        return jnp.any((now.carry.done_B == False) & (now.drawn_B < limit))  # noqa: E712

    def draw(now: Progress) -> Progress:
        carry, active_B = loop.record(arrays, now.carry, now.next_B, now.drawn_B < limit)
        now = now._replace(carry=carry, drawn_B=now.drawn_B + active_B.astype(jnp.int32))
        token_B = jnp.where(active_B, now.next_B, 0)
        proposal, own = speculation.propose(now.own, Drafting(carry, token_B, active_B, keys_B, arrays))
        room_B = jnp.minimum(limit - now.drawn_B, arrays.max_tokens_B - carry.generated_B)
        goes_on_B = active_B & (carry.done_B == False)  # noqa: E712
        count_B = jnp.where(goes_on_B, jnp.minimum(proposal.count_B, room_B), 0)
        tokens_BT = jnp.concatenate([token_B[:, None], proposal.drafts_BK], axis=1)

        def verified(begun: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
            return _verified(config, params, choosing, begun[0], tokens_BT, active_B, count_B)

        def stepped(begun: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
            now, kept_B = begun
            state = next_state(config, params, now.carry.state, token_B, active_B)
            logits_BV = jnp.where(active_B[:, None], state.logits_BV, now.carry.state.logits_BV)
            state = dataclasses.replace(state, logits_BV=logits_BV)
            counts = dataclasses.replace(now.counts, steps=now.counts.steps + 1)
            now = now._replace(carry=dataclasses.replace(now.carry, state=state), counts=counts)
            return choosing.following(now), kept_B

        drafted = jnp.any(count_B > 0)
        begun = (now._replace(own=None), jnp.zeros_like(count_B))
        now, kept_B = _once(drafted == False, stepped, _once(drafted, verified, begun))  # noqa: E712
        return now._replace(own=speculation.settle(own, active_B, count_B, kept_B))

    zeros_B = jnp.zeros_like(began_B)
    reports = _no_reports(*carry.prompt_BV.shape, T, accumulator(config.dtype))
    start = Progress(carry, own, counts, zeros_B, reports, zeros_B)
    end = jax.lax.while_loop(unfinished, draw, choosing.following(start))
    return end.carry, end.own, end.counts, _drawn(end, began_B)


def _no_reports(B: int, V: int, T: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Arrays for `Progress.reports`: T tokens can be written behind the last column that counts."""
    empty = loop.Drawn.empty(B, V, dtype).arrays()[1:]
    return tuple(jnp.pad(x, ((0, 0), (0, T), *((0, 0),) * (x.ndim - 2))) for x in empty)


def _drawn(end: Progress, began_B: jax.Array) -> loop.Drawn:
    """The tokens of a call, which began at these positions, and their log-probabilities."""
    column_1W = jnp.arange(loop.WIDTH, dtype=jnp.int32)[None]
    drawn_BW = column_1W < end.drawn_B[:, None]
    tokens_BW = end.carry.tokens_BC.at[jnp.arange(len(began_B))[:, None], began_B[:, None] + column_1W].get(
        mode="clip"
    )

    def only_drawn(x: jax.Array) -> jax.Array:
        x = x[:, : loop.WIDTH]
        return jnp.where(drawn_BW.reshape(drawn_BW.shape + (1,) * (x.ndim - 2)), x, 0)

    return loop.Drawn(jnp.where(drawn_BW, tokens_BW, -1), *map(only_drawn, end.reports))


def _once(condition: jax.Array, run: Callable[[Any], Any], x: Any) -> Any:
    """run(x) if the condition holds, else x: a loop of one or no turn.

    XLA's CPU backend copies what a `lax.cond` reads and another instruction changes in place: whole caches.
    """
    return jax.lax.while_loop(
        lambda now: now[0], lambda now: (jnp.array(False), run(now[1])), (condition, x)
    )[1]


@dataclasses.dataclass(frozen=True)
class _Choosing:
    """How tokens are chosen, and recorded."""

    logits_fn: loop.LogitsFn | None
    keys_B: jax.Array
    arrays: SamplingArrays

    def following(self, now: Progress) -> Progress:
        """The token after the state of each row as `next_B`, with its report."""
        token_B = loop.chosen(self.logits_fn, self.keys_B, self.arrays, now.carry)
        logits_BV = now.carry.state.logits_BV
        return self._reported(now._replace(next_B=token_B), now.drawn_B, logits_BV, token_B)

    def matched(self, now: Progress, draft_B: jax.Array, wanted_B: jax.Array) -> tuple[Progress, jax.Array]:
        """The drafts recorded where they equal the token that is chosen, and the rows where they do."""
        now = self.following(now)
        carry, active_B = loop.record(self.arrays, now.carry, now.next_B, wanted_B & (now.next_B == draft_B))
        return now._replace(carry=carry, drawn_B=now.drawn_B + active_B.astype(jnp.int32)), active_B

    def all_matched(
        self, now: Progress, logits_BTV: jax.Array, drafts_BK: jax.Array, count_B: jax.Array
    ) -> tuple[Progress, jax.Array]:
        """The drafts recorded up to the first that is not the token that is chosen, and their number.

        All tokens are chosen at once, each as if the drafts before it were kept, as they are if it counts.
        The one after the drafts that are kept is `next_B`.
        """
        (B, T, V), K, carry = logits_BTV.shape, drafts_BK.shape[1], now.carry
        place_1T, row_B1 = jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(B, dtype=jnp.int32)[:, None]
        at_BT = carry.state.positions_B[:, None] + 1 + place_1T
        row_R = jnp.repeat(row_B1[:, 0], T)

        def seen() -> tuple[jax.Array, jax.Array]:
            one_BKV = jax.nn.one_hot(drafts_BK, V, dtype=jnp.int32)
            before_BTV = jnp.pad(jnp.cumsum(one_BKV, axis=1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))
            return carry.prompt_BV[row_R], carry.counts_BV[row_R] + before_BTV.reshape(B * T, V)

        logits_RV, generated_BT = logits_BTV.reshape(B * T, V), carry.generated_B[:, None] + place_1T
        token_R = choose(
            adjust_by(logits_RV, self.arrays, seen, generated_BT.reshape(-1)), self.arrays,
            lambda: jax.vmap(jax.random.fold_in)(self.keys_B[row_R], at_BT.reshape(-1)),
        )  # fmt: skip
        token_BT = token_R.reshape(B, T)
        now = self._reported(now, now.drawn_B, logits_RV, token_R)
        token_BK = token_BT[:, :K]
        equal_BK = (token_BK == drafts_BK) & (place_1T[:, :K] < count_B[:, None])
        stop_BK = jnp.any(token_BK[..., None] == self.arrays.stop_ids_BE[:, None], axis=-1)
        # The first draft that is not kept, K if all are.
        kept_B = jnp.where(equal_BK & (stop_BK == False), K, place_1T[:, :K]).min(1)  # noqa: E712
        kept_BK = place_1T[:, :K] < kept_B[:, None]
        ends_BK = equal_BK & stop_BK & (place_1T[:, :K] == kept_B[:, None])
        generated_B = carry.generated_B + kept_B
        # mode="drop": what is not kept has a place behind the last.
        place_BK = jnp.where(kept_BK, at_BT[:, :K], carry.tokens_BC.shape[1])
        carry = dataclasses.replace(
            carry,
            tokens_BC=carry.tokens_BC.at[row_B1, place_BK].set(token_BK, mode="drop"),
            counts_BV=carry.counts_BV.at[row_B1, jnp.where(kept_BK, token_BK, V)].add(1, mode="drop"),
            generated_B=generated_B,
            done_B=carry.done_B | ends_BK.any(1) | (generated_B >= self.arrays.max_tokens_B),
            stopped_B=jnp.maximum(carry.stopped_B, jnp.where(ends_BK, token_BK, -1).max(1)),
        )
        next_B = jnp.take_along_axis(token_BT, kept_B[:, None], axis=1)[:, 0]
        return now._replace(carry=carry, next_B=next_B, drawn_B=now.drawn_B + kept_B), kept_B

    def _reported(
        self, now: Progress, place_B: jax.Array, logits_RV: jax.Array, token_R: jax.Array
    ) -> Progress:
        """The reports of tokens written from a column of each row on, if any row wants them.

        Those of tokens that are then not drawn are overwritten, or removed by `_drawn`.
        """
        B = len(place_B)

        def write(reports: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            new = log_probabilities(logits_RV, token_R, self.arrays)
            column_BT = place_B[:, None] + jnp.arange(len(token_R) // B, dtype=jnp.int32)[None]
            rows_B1 = jnp.arange(B)[:, None]
            return tuple(
                x.at[rows_B1, column_BT].set(y.reshape(B, -1, *y.shape[1:]), mode="drop")
                for x, y in zip(reports, new, strict=True)
            )

        return now._replace(reports=_once(jnp.any(self.arrays.logprobs_B >= 0), write, now.reports))


def _verified(
    config: ModelConfig,
    params: Any,
    choosing: _Choosing,
    now: Progress,
    tokens_BT: jax.Array,
    active_B: jax.Array,
    count_B: jax.Array,
) -> tuple[Progress, jax.Array]:
    """The state after the newest token and the drafts that are kept, and their number."""
    state, T = now.carry.state, tokens_BT.shape[1]
    offset_T = jnp.arange(T, dtype=jnp.int32)[None]
    read_BT = active_B[:, None] & (offset_T <= count_B[:, None])
    ctx = Context(jnp.where(read_BT, state.positions_B[:, None] + offset_T, -1))
    logits_BTV, caches, _ = bind(config, params).run(jnp.where(read_BT, tokens_BT, 0), state.caches, ctx=ctx)

    bare = DecodeState(None, state.positions_B, state.logits_BV)
    now = now._replace(carry=dataclasses.replace(now.carry, state=bare))
    if choosing.logits_fn is None:
        now, kept_B = choosing.all_matched(now, logits_BTV, tokens_BT[:, 1:], count_B)
    else:
        now, kept_B = _one_by_one(choosing, now, logits_BTV, tokens_BT, count_B)
    logits_BV = jnp.take_along_axis(logits_BTV, kept_B[:, None, None], axis=1)[:, 0]
    state = DecodeState(
        rewind_all(caches, jnp.where(active_B, count_B - kept_B, 0)),
        state.positions_B + jnp.where(active_B, 1 + kept_B, 0),
        jnp.where(active_B[:, None], logits_BV, state.logits_BV),
    )
    counts = Counts(
        now.counts.drafted_B + count_B, now.counts.kept_B + kept_B, now.counts.calls + 1, now.counts.steps
    )
    now = now._replace(carry=dataclasses.replace(now.carry, state=state), counts=counts)
    return now if choosing.logits_fn is None else choosing.following(now), kept_B


def _one_by_one(
    choosing: _Choosing, now: Progress, logits_BTV: jax.Array, tokens_BT: jax.Array, count_B: jax.Array
) -> tuple[Progress, jax.Array]:
    """`_Choosing.all_matched` with a `logits_fn`, which sees the rows of the batch and no token too many."""
    positions_B = now.carry.state.positions_B

    def compare(loop_carry, j):
        now, alive_B, kept_B = loop_carry
        at = DecodeState(None, positions_B + 1 + j, logits_BTV[:, j])
        now = now._replace(carry=dataclasses.replace(now.carry, state=at))
        now, kept_now_B = choosing.matched(now, tokens_BT[:, j + 1], alive_B & (j < count_B))
        alive_B = kept_now_B & (now.carry.done_B == False)  # noqa: E712
        return (now, alive_B, kept_B + kept_now_B.astype(jnp.int32)), None

    begin = (now, count_B > 0, jnp.zeros_like(count_B))
    places = jnp.arange(tokens_BT.shape[1] - 1, dtype=jnp.int32)
    (now, _, kept_B), _ = jax.lax.scan(compare, begin, places)
    return now, kept_B
