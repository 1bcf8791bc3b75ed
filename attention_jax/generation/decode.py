"""Decoding with a state: `prefill`, `extend` and `decode_step`.

state = prefill(config, params, tokens_BT, positions_BT, capacity=2048)
token_B = state.logits_BV.argmax(-1)
state = decode_step(config, params, state, token_B)

A long prompt is read in pieces by one compiled loop. Each row is cut from its first token on, so that a
prefix within which a mask is bidirectional lies in one piece, and its last piece is padded on the left, so
that all rows end together:

    row of 7 tokens, pieces of 4    0 1 2 3 | - 4 5 6
    row of 3 tokens                 - - - - | - 0 1 2
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions, State, rewind_all, storable
from attention_jax.dtypes import accumulator
from attention_jax.generation.pieces import checked_chunk
from attention_jax.generation.sampling import is_integer
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind, init_state

_LARGEST = np.iinfo(np.int32).max


@storable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding between two tokens.

    caches: the states of all layers. positions_B: int32, the position of the next token of each row.
    logits_BV: float32 (or float64), the logits of that token.
    """

    caches: Any
    positions_B: jax.Array
    logits_BV: jax.Array

    def fork(self, rows: Any) -> DecodeState:
        """The state whose row i is a copy of row rows[i]; rows: int [B']."""
        check_kept(self)
        caches = jax.tree.map(lambda cache: cache.fork(rows), self.caches, is_leaf=_is_state)
        rows = jnp.asarray(rows)
        return DecodeState(caches, self.positions_B[rows], self.logits_BV[rows])

    @property
    def capacity(self) -> int | None:
        """The largest position + 1 that all layers support; None if their states have a constant size."""
        return min(map(_capacity, jax.tree.leaves(self.caches, is_leaf=_is_state)), default=None, key=_last)


def _is_state(x: Any) -> bool:
    return isinstance(x, State)


def _nbytes(caches: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def _last(capacity: int | None) -> float:
    return float("inf") if capacity is None else capacity


def _capacity(state: Any) -> int | None:
    """The smallest `capacity` of a state and of the states in its fields; None if there is none."""
    found = [getattr(state, "capacity", None)]
    for field in dataclasses.fields(state) if dataclasses.is_dataclass(state) else ():
        if _is_state(value := getattr(state, field.name)):
            found.append(_capacity(value))
    return min(found, key=_last)


def prefill(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    capacity: int,
    memory_BSD: jax.Array | None = None,
    memory_positions_BS: jax.Array | None = None,
    cache: CacheOptions = DEFAULT_CACHE,
    prefill_chunk: int | None = None,
) -> DecodeState:
    """The state after the prompts.

    Args:
      tokens_BT: prompts, left-padded if their lengths differ.
      positions_BT: their positions, -1 for padding; 0, 1, 2, ... by default.
      capacity: the largest position + 1 that the caches support.
      memory_BSD, memory_positions_BS: the memory of `cross` mixers, from `encode`; their caches keep it.
      cache: how the states are stored.
      prefill_chunk: read the prompts in pieces of as many tokens, by a loop; None is 256 to 512 by the size
        of model and caches, or the model's bidirectional prefix if that is longer.

    A pure function: call it under `jax.jit` with config and capacity static. Raises: ValueError for more
    tokens than the capacity, for positions of another shape or padded on the right, for a model without a
    state, for pieces shorter than the model's prefix, and for a token id outside the vocabulary (traced ids
    give NaN logits).
    """
    tokens_BT = _checked_tokens(tokens_BT)
    B, T = tokens_BT.shape
    if not is_integer(capacity) or capacity < 1:
        raise ValueError(f"capacity must be an integer >= 1, static under jax.jit, got {capacity!r:.80}")
    capacity = operator.index(capacity)
    if T > capacity:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {capacity}")
    positions_BT = _positions(positions_BT, B, T)
    zeros_B = jnp.zeros((B,), jnp.int32)
    start = DecodeState(
        init_state(config, B, capacity, cache=cache),
        zeros_B,
        jnp.zeros((B, config.vocab_size), accumulator(config.dtype)),
    )
    ctx = Context(memory_BSD=memory_BSD, memory_positions_BS=memory_positions_BS)
    chunk = checked_chunk(config, prefill_chunk, B, _nbytes(start.caches))
    return _append(config, params, start, tokens_BT, positions_BT, chunk, ctx)


def extend(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    prefill_chunk: int | None = None,
) -> DecodeState:
    """The state after more tokens of each row, as after a prefill of all tokens.

    tokens_BT: the new tokens, left-padded if their numbers differ. positions_BT: their positions, which
    continue `state.positions_B`, -1 for padding; no padding by default. A row without new tokens does not
    change. prefill_chunk: as in `prefill`.

    A pure function. Raises: ValueError as `prefill`, for positions that do not continue the state or exceed
    its capacity, and for a state that ends within the prefix of the mask. Where positions are traced, such
    rows give NaN logits from then on.
    """
    check_kept(state)
    tokens_BT = _checked_tokens(tokens_BT)
    B, T = tokens_BT.shape
    if B != len(state.positions_B):
        raise ValueError(f"tokens_BT has {B} rows and the state {len(state.positions_B)}: give one per row")
    next_B1 = state.positions_B[:, None]
    if positions_BT is None:
        positions_BT = next_B1 + jnp.arange(T, dtype=jnp.int32)[None]
    else:
        positions_BT = _positions(positions_BT, B, T)
    if not any(isinstance(x, jax.core.Tracer) for x in (positions_BT, next_B1)):
        given_BT = np.asarray(positions_BT)
        check_prefix(config, np.asarray(state.positions_B), (given_BT >= 0).any(1))
        wanted_BT = np.asarray(next_B1) + np.cumsum(given_BT >= 0, axis=1) - 1
        wrong_B = ((given_BT >= 0) & (given_BT != wanted_BT)).any(1)
        if wrong_B.any():
            row = int(np.flatnonzero(wrong_B)[0])
            raise ValueError(
                f"positions_BT of row {row} must continue the state at {int(next_B1[row, 0])}, got "
                f"{given_BT[row].max(initial=-1, where=given_BT[row] >= 0)} for its last token"
            )
        capacity = state.capacity
        if capacity is not None and given_BT.max() >= capacity:
            raise ValueError(
                f"position {given_BT.max()} exceeds the state's capacity {capacity}: prefill with more"
            )
    else:
        state = _without_short_rows(config, state, jnp.asarray(positions_BT >= 0).any(1))
    chunk = checked_chunk(config, prefill_chunk, B, _nbytes(state.caches))
    return _append(config, params, state, tokens_BT, positions_BT, chunk, Context())


def check_prefix(config: ModelConfig, positions_B: Any, appends_B: Any = None) -> None:
    """ValueError for a row that ends within the prefix: its tokens have not attended to the rest of it.

    appends_B: boolean, the rows that get tokens; None is all.
    """
    appends_B = True if appends_B is None else np.asarray(appends_B)
    for row in np.flatnonzero((np.asarray(positions_B) < config.prefix) & appends_B)[:1]:
        raise ValueError(
            f"row {row} of the state has {positions_B[row]} tokens, fewer than the prefix of {config.prefix} "
            "tokens within which the mask is bidirectional: prefill with the whole prefix"
        )


def check_kept(state: DecodeState) -> None:
    """ValueError for a state whose arrays were donated."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise ValueError(
                "the state's arrays were donated to another call: keep the state that it returned"
            )


def _without_short_rows(config: ModelConfig, state: DecodeState, appends_B: jax.Array) -> DecodeState:
    """The state in which rows that append tokens within the prefix are lost: their outputs are NaN."""
    if not config.prefix:
        return state
    short_B = appends_B & (state.positions_B < config.prefix)
    # No state can take back a negative number of tokens.
    caches = rewind_all(state.caches, jnp.where(short_B, jnp.int32(-1), jnp.int32(0)))
    return dataclasses.replace(state, caches=caches)


def _append(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_BT: jax.Array,
    positions_BT: Any,
    chunk: int,
    ctx: Context,
) -> DecodeState:
    """The state after left-padded tokens."""
    T = tokens_BT.shape[1]
    # In NumPy where the positions are known: XLA takes seconds to fold long constants.
    xp = np if isinstance(positions_BT, np.ndarray) else jnp
    valid_BT = positions_BT >= 0
    start_B = xp.where(valid_BT.any(1), xp.argmax(valid_BT, axis=1), T).astype(np.int32)
    given_BT, positions_BT = positions_BT, jnp.asarray(positions_BT)
    if T <= chunk:
        context = dataclasses.replace(ctx, positions_BT=positions_BT)
        out = bind(config, params).run(tokens_BT, state.caches, ctx=context, last_only=True)
        caches, logits_BV = out.state, out.logits[:, 0]
    else:
        _check_ids(config, tokens_BT, given_BT)
        caches, logits_BV = append_pieces(
            config, params, state, jnp.asarray(tokens_BT), positions_BT, start_B, T - start_B, -(-T // chunk),
            chunk=chunk, ctx=ctx,
        )  # fmt: skip
    new_B = valid_BT.any(1)
    return DecodeState(
        caches,
        jnp.where(new_B, positions_BT[:, -1] + 1, state.positions_B),
        jnp.where(new_B[:, None], logits_BV, state.logits_BV),
    )


def append_pieces(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    count: jax.Array | int,
    *,
    chunk: int,
    ctx: Context,
) -> tuple[Any, jax.Array]:
    """The caches and the last logits [B, V] after the tokens start_B ... start_B + length_B - 1 of each row.

    They are read in `count` pieces of `chunk` tokens, enough for the longest row; `count` may be traced. ctx:
    the memory of `cross` mixers, for the first piece.
    """
    model = bind(config, params)
    T = tokens_BT.shape[1]
    count_B = -(-length_B // chunk)

    def piece(j, carry, ctx=Context()):  # noqa: B008 (frozen)
        i_B1 = (j - count + count_B)[:, None]  # the piece's index in each row, negative before its first
        first_B1 = jnp.where(i_B1 == count_B[:, None] - 1, length_B[:, None] - chunk, i_B1 * chunk)
        index_BC = first_B1 + jnp.arange(chunk, dtype=jnp.int32)[None]
        valid_BC = (i_B1 >= 0) & (index_BC >= i_B1 * chunk)
        columns_BC = jnp.clip(start_B[:, None] + index_BC, 0, T - 1)
        tokens_BC, positions_BC = (
            jnp.take_along_axis(x, columns_BC, axis=1) for x in (tokens_BT, positions_BT)
        )
        ctx = dataclasses.replace(ctx, positions_BT=jnp.where(valid_BC, positions_BC, -1))
        out = model.run(jnp.where(valid_BC, tokens_BC, 0), carry[0], ctx=ctx, last_only=True)
        return out.state, out.logits[:, 0]

    carry = (state.caches, state.logits_BV)
    if (
        ctx.memory_BSD is not None
    ):  # the first piece fills caches that have no keys, and another shape, before
        return jax.lax.fori_loop(1, count, piece, piece(0, carry, ctx))
    return jax.lax.fori_loop(0, count, piece, carry)


def _checked_tokens(tokens_BT: Any) -> Any:
    tokens_BT = tokens_BT if isinstance(tokens_BT, jax.Array) else np.asarray(tokens_BT)
    shape = tokens_BT.shape
    if len(shape) != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(f"tokens_BT must be integers [B, T], got {tokens_BT.dtype} {list(shape)}")
    if 0 in shape:
        raise ValueError(f"tokens must hold at least one row and one token, got {list(shape)}: skip the call")
    return tokens_BT


def _check_ids(config: ModelConfig, tokens_BT: Any, positions_BT: jax.Array) -> None:
    """ValueError for an id outside the vocabulary where its value is known, as that of `apply`."""
    if isinstance(tokens_BT, jax.core.Tracer) or isinstance(positions_BT, jax.core.Tracer):
        return
    ids = np.asarray(tokens_BT)[np.asarray(positions_BT) >= 0]
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"token id {outside[0]} is outside 0..{config.vocab_size - 1}, the model's vocabulary"
        )


def _positions(positions_BT: Any, B: int, T: int) -> Any:
    """The positions of prompts as int32 [B, T]; ValueError for other shapes and for padding on the right.

    A NumPy array unless they are traced.
    """
    if positions_BT is None:
        return np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    traced = isinstance(positions_BT, jax.core.Tracer)
    positions_BT = positions_BT if traced else np.asarray(positions_BT)
    shape = positions_BT.shape
    if shape not in ((T,), (1, T), (B, T)) or not jnp.issubdtype(positions_BT.dtype, jnp.integer):
        raise ValueError(f"positions_BT must be integers [{B}, {T}], got {positions_BT.dtype} {shape}")
    if not traced and ((positions_BT[..., -1:] < 0) & (positions_BT >= 0)).any():
        raise ValueError("prompts must be left-padded: a row of positions_BT ends in padding (-1)")
    if traced:
        return jnp.broadcast_to(positions_BT.astype(jnp.int32), (B, T))
    if (positions_BT > _LARGEST).any():
        raise ValueError(f"positions_BT must be int32, got {positions_BT.max()}")
    return np.broadcast_to(positions_BT.astype(np.int32), (B, T))


def decode_step(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_B: jax.Array,
    active_B: jax.Array | None = None,
) -> DecodeState:
    """The state after one more token of each row.

    active_B: boolean; the caches and the position of an inactive row do not change, and its logits are
    undefined.

    Raises: ValueError for a row past the capacity, or within the prefix in which the mask is bidirectional:
    `prefill` reads that whole. Where positions are traced, such a row gives NaN logits, and one within the
    prefix from then on.
    """
    check_kept(state)
    tokens_B = _of_rows("tokens_B", tokens_B, state, jnp.integer, "integers")
    if active_B is not None:
        active_B = _of_rows("active_B", active_B, state, jnp.bool_, "boolean")
    if any(isinstance(x, jax.core.Tracer) for x in (state.positions_B, active_B)):
        state = _without_short_rows(config, state, True if active_B is None else active_B)
    else:
        positions_B = np.asarray(state.positions_B)[... if active_B is None else np.asarray(active_B)]
        check_prefix(config, np.asarray(state.positions_B), active_B)
        if state.capacity is not None and positions_B.max(initial=-1) >= state.capacity:
            raise ValueError(
                f"position {positions_B.max()} exceeds the state's capacity {state.capacity}: prefill with "
                "more"
            )
    return next_state(config, params, state, tokens_B, active_B)


def _of_rows(name: str, x: Any, state: DecodeState, kind: Any, what: str) -> jax.Array | np.ndarray:
    """An array with one entry per row; ValueError for another shape or dtype."""
    x, shape = x if isinstance(x, jax.Array) else np.asarray(x), state.positions_B.shape
    if x.shape != shape or not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{name} must be {what} {list(shape)}, got {x.dtype} {list(x.shape)}")
    return x


def next_state(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_B: jax.Array,
    active_B: jax.Array | None = None,
) -> DecodeState:
    """`decode_step` without its checks, for loops over states that were checked before."""
    positions_B = state.positions_B
    if active_B is not None:
        positions_B = jnp.where(active_B, positions_B, -1)
        tokens_B = jnp.where(active_B, tokens_B, 0)
    ctx = Context(positions_BT=positions_B[:, None])
    logits_B1V, caches, _ = bind(config, params).run(tokens_B[:, None], state.caches, ctx=ctx)
    step_B = 1 if active_B is None else active_B.astype(jnp.int32)
    return DecodeState(caches, state.positions_B + step_B, logits_B1V[:, 0])
