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
    """What a call changes. drawn_B: the tokens of each row in this call; own: what the proposer carries."""

    carry: loop.Carry
    own: Any
    counts: Counts
    drawn: loop.Drawn
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
    B, V = carry.prompt_BV.shape
    carry = dataclasses.replace(carry, done_B=carry.done_B | ended_B)
    choosing = _Choosing(logits_fn, keys_B, arrays)

    def unfinished(now: Progress):
        return jnp.any((now.carry.done_B == False) & (now.drawn_B < limit))  # noqa: E712

    def draw(now: Progress) -> Progress:
        now, token_B, active_B = choosing.newest(now, limit)
        proposal, own = speculation.propose(now.own, Drafting(now.carry, token_B, active_B, keys_B, arrays))
        room_B = jnp.minimum(limit - now.drawn_B, arrays.max_tokens_B - now.carry.generated_B)
        goes_on_B = active_B & (now.carry.done_B == False)  # noqa: E712
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
            carry = dataclasses.replace(now.carry, state=state)
            return now._replace(carry=carry, counts=counts), kept_B

        drafted = jnp.any(count_B > 0)
        begun = (now._replace(own=None), jnp.zeros_like(count_B))
        now, kept_B = _once(drafted == False, stepped, _once(drafted, verified, begun))  # noqa: E712
        return now._replace(own=speculation.settle(own, active_B, count_B, kept_B))

    start = Progress(carry, own, counts, loop.Drawn.empty(B, V), jnp.zeros((B,), jnp.int32))
    end = jax.lax.while_loop(unfinished, draw, start)
    return end.carry, end.own, end.counts, end.drawn


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

    def newest(self, now: Progress, limit: jax.Array) -> tuple[Progress, jax.Array, jax.Array]:
        """The token after the state of each row, recorded, and the rows of which it is an output."""
        token_B, reports = loop.next_tokens(self.logits_fn, self.keys_B, self.arrays, now.carry)
        now, active_B = self._recorded(now, token_B, reports, now.drawn_B < limit)
        return now, jnp.where(active_B, token_B, 0), active_B

    def matched(self, now: Progress, draft_B: jax.Array, wanted_B: jax.Array) -> tuple[Progress, jax.Array]:
        """The drafts recorded where they equal the token that is chosen, and the rows where they do."""
        token_B, reports = loop.next_tokens(self.logits_fn, self.keys_B, self.arrays, now.carry)
        return self._recorded(now, token_B, reports, wanted_B & (token_B == draft_B))

    def all_matched(
        self, now: Progress, logits_BKV: jax.Array, drafts_BK: jax.Array, count_B: jax.Array
    ) -> tuple[Progress, jax.Array]:
        """The drafts recorded up to the first that is not the token that is chosen, and their number.

        All tokens are chosen at once, each as if the drafts before it were kept, as they are if it counts.
        """
        (B, K, V), carry = logits_BKV.shape, now.carry
        place_1K, row_B1 = jnp.arange(K, dtype=jnp.int32)[None], jnp.arange(B, dtype=jnp.int32)[:, None]
        at_BK = carry.state.positions_B[:, None] + 1 + place_1K
        row_R = jnp.repeat(row_B1[:, 0], K)
        arrays = jax.tree.map(lambda x: x[row_R], self.arrays)

        def seen() -> tuple[jax.Array, jax.Array]:
            one_BKV = jax.nn.one_hot(drafts_BK, V, dtype=jnp.int32)
            before_BKV = jnp.cumsum(one_BKV, axis=1, dtype=jnp.int32) - one_BKV
            return carry.prompt_BV[row_R], carry.counts_BV[row_R] + before_BKV.reshape(B * K, V)

        logits_RV, generated_BK = logits_BKV.reshape(B * K, V), carry.generated_B[:, None] + place_1K
        token_R = choose(
            adjust_by(logits_RV, arrays, seen, generated_BK.reshape(-1)), arrays,
            lambda: jax.vmap(jax.random.fold_in)(self.keys_B[row_R], at_BK.reshape(-1)),
        )  # fmt: skip
        reports = log_probabilities(logits_RV, token_R, arrays)
        token_BK = token_R.reshape(B, K)
        equal_BK = (token_BK == drafts_BK) & (place_1K < count_B[:, None])
        stop_BK = jnp.any(token_R[:, None] == arrays.stop_ids_BE, axis=1).reshape(B, K)
        kept_BK = jnp.cumprod(equal_BK & (stop_BK == False), axis=1, dtype=jnp.int32) > 0  # noqa: E712
        before_BK = jnp.concatenate([jnp.ones((B, 1), bool), kept_BK[:, :-1]], axis=1)
        ends_BK = before_BK & equal_BK & stop_BK
        kept_B, ends_B = kept_BK.sum(1, dtype=jnp.int32), ends_BK.any(1)
        generated_B = carry.generated_B + kept_B

        def write(x: jax.Array, place_BK: jax.Array, new: jax.Array) -> jax.Array:
            # mode="drop": what is not kept has a place behind the last.
            place_BK = jnp.where(kept_BK, place_BK, x.shape[1])
            return x.at[row_B1, place_BK].set(new.reshape(B, K, *new.shape[1:]), mode="drop")

        carry = dataclasses.replace(
            carry,
            tokens_BC=write(carry.tokens_BC, at_BK, token_R),
            counts_BV=carry.counts_BV.at[row_B1, jnp.where(kept_BK, token_BK, V)].add(1, mode="drop"),
            generated_B=generated_B,
            done_B=carry.done_B | ends_B | (generated_B >= self.arrays.max_tokens_B),
            stopped_B=jnp.where(
                ends_B, jnp.where(ends_BK, token_BK, 0).sum(1, dtype=jnp.int32), carry.stopped_B
            ),
        )
        place_BK = now.drawn_B[:, None] + place_1K
        drawn = loop.Drawn(*(
            write(x, place_BK, new) for x, new in zip(now.drawn.arrays(), (token_R, *reports), strict=True)
        ))  # fmt: skip
        return now._replace(carry=carry, drawn=drawn, drawn_B=now.drawn_B + kept_B), kept_B

    def _recorded(self, now: Progress, token_B, reports, live_B) -> tuple[Progress, jax.Array]:
        carry, active_B = loop.record(self.arrays, now.carry, token_B, live_B)
        rows_B = jnp.arange(len(token_B))
        column_B = jnp.where(active_B, now.drawn_B, loop.WIDTH)  # mode="drop" ignores column WIDTH
        drawn = loop.Drawn(*(
            x.at[rows_B, column_B].set(new, mode="drop")
            for x, new in zip(now.drawn.arrays(), (token_B, *reports), strict=True)
        ))  # fmt: skip
        drawn_B = now.drawn_B + active_B.astype(jnp.int32)
        return now._replace(carry=carry, drawn=drawn, drawn_B=drawn_B), active_B


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
        now, kept_B = choosing.all_matched(now, logits_BTV[:, :-1], tokens_BT[:, 1:], count_B)
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
    return now._replace(carry=dataclasses.replace(now.carry, state=state), counts=counts), kept_B


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
