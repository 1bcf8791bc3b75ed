"""What a tile of the blocked form reads of its call, and the loop over the tiles.

A kv head of a batch row (`KVHead`) meets tiles of `key_tile` keys one after another; for each, `sweep` visits
the strips of `q_block` queries that the block map lists: full ones without mask code, partial ones cut to the
key units between their first and last live one. `chunked` says what happens on a `ChunkedTile`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.dtypes import wider
from attention_jax.ops.softmax.blocks import Tokens
from attention_jax.ops.softmax.chunked_plan import ChunkedPlan, Piece
from attention_jax.ops.softmax.common import dropout_keep

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class KVHead:
    """A kv head of a batch row and its G query heads.

    q holds the G heads one after another, in float32 or wider with invalid slots selected to 0, scaled so
    that q . k is the base-2 exponent (with a softcap c: the argument of tanh).
    """

    plan: ChunkedPlan
    batch: jax.Array
    kv_head: jax.Array
    q_RH: jax.Array  # R = G * T_pad rows

    def query_head(self, g: jax.Array) -> jax.Array:
        return self.kv_head * self.plan.G + g


def load_head(plan: ChunkedPlan, i: jax.Array) -> KVHead:
    call = plan.call
    K = call.sizes[4]
    b, kv = i // K, i % K
    scale = call.scale * LOG2E if call.softcap is None else call.scale / call.softcap
    return KVHead(plan, b, kv, load_queries(plan, plan.q, call.q_BTNH, b, kv) * scale)


def load_queries(plan: ChunkedPlan, tokens: Tokens | None, x_BTNH: jax.Array, b, kv) -> jax.Array:
    """The G heads of a group as float32 [G * T_pad, H]."""
    x_GTH = _load(x_BTNH, tokens, b, kv, plan.G, 0, plan.T)
    return jnp.pad(x_GTH, ((0, 0), (0, plan.T_pad - plan.T), (0, 0))).reshape(plan.G * plan.T_pad, -1)


def _load(x_BLNH, tokens: Tokens | None, b, group, G: int, start, size: int) -> jax.Array:
    """Heads [group * G, (group + 1) * G) of `size` tokens as float32 [G, size, H], invalid ones 0."""
    sizes = (1, size, G, x_BLNH.shape[3])
    x_LGH = wider(_block(x_BLNH, (b, start, group * G), sizes)[0])
    if tokens is not None:
        x_LGH = jnp.where(cut(_row(tokens.valid, b), start, size)[:, None, None], x_LGH, 0.0)
    return x_LGH.swapaxes(0, 1)


def store(x_BLNH: jax.Array, x_GLH: jax.Array, b: jax.Array, group: jax.Array, start=0) -> jax.Array:
    """The inverse of `_load`, in x_BLNH's dtype."""
    x_LGH = x_GLH.swapaxes(0, 1).astype(x_BLNH.dtype)
    return paste(x_BLNH, x_LGH[None], (b, start, group * x_GLH.shape[0]))


def _row(x: jax.Array, b: jax.Array) -> jax.Array:
    return x[0] if x.shape[0] == 1 else _block(x, (b,), (1, *x.shape[1:]))[0]


def _block(x: jax.Array, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    """x[start : start + size, ...]; missing starts are 0. All in int32, whatever the default is."""
    starts = [jnp.int32(i) for i in (*starts, *[0] * (x.ndim - len(starts)))]
    return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def paste(x: jax.Array, block: jax.Array, starts: Sequence[Any]) -> jax.Array:
    """x with `block` written at the starts."""
    starts = [jnp.int32(i) for i in (*starts, *[0] * (x.ndim - len(starts)))]
    return lax.dynamic_update_slice(x, block, starts, allow_negative_indices=False)


def cut(x: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """x[start : start + size] along one axis."""
    sizes = [size if i == axis else n for i, n in enumerate(x.shape)]
    return _block(x, [0] * axis + [start], sizes)


@dataclasses.dataclass(frozen=True)
class ChunkedTile:
    """A strip of queries against some key units of one head."""

    head: KVHead
    g: jax.Array  # query head within the group
    q_start: jax.Array  # token index of the strip
    k_start: jax.Array
    keys: int
    masked: bool
    k_KH: jax.Array
    k_HK: jax.Array
    v_KM: jax.Array

    @property
    def rows(self) -> jax.Array:
        """Where the strip starts in arrays of G * T_pad rows."""
        return self.g * self.head.plan.T_pad + self.q_start

    def take(self, x_R: jax.Array, axis: int = 0) -> jax.Array:
        return cut(x_R, self.rows, self.head.plan.q_block, axis)

    def put(self, x_R: jax.Array, strip: jax.Array, axis: int = 0) -> jax.Array:
        return paste(x_R, strip, [0] * axis + [self.rows])

    @property
    def positions(self) -> tuple[jax.Array, jax.Array]:
        plan = self.head.plan
        if plan.q is None or plan.k is None:
            return self.q_start + jnp.arange(plan.q_block, dtype=jnp.int32), self.k_start + jnp.arange(
                self.keys, dtype=jnp.int32
            )
        return self._q(plan.q.positions), self._k(plan.k.positions)

    def _q(self, x_BT: jax.Array) -> jax.Array:
        return cut(_row(x_BT, self.head.batch), self.q_start, self.head.plan.q_block)

    def _k(self, x_BS: jax.Array) -> jax.Array:
        return cut(_row(x_BS, self.head.batch), self.k_start, self.keys)

    def keep(self, transposed: bool) -> jax.Array:
        """Which pairs are kept, broadcastable to [q_block, keys] ([keys, q_block] where transposed)."""
        plan, call = self.head.plan, self.head.plan.call

        def pair(q, k):
            return (q[None], k[:, None]) if transposed else (q[:, None], k[None])

        q_pos, k_pos = pair(*self.positions)
        kept = call.mask.keep(q_pos, k_pos)
        if plan.q is not None and plan.k is not None:
            q_valid, k_valid = pair(self._q(plan.q.valid), self._k(plan.k.valid))
            kept = kept & q_valid & k_valid
            if plan.q.segments is not None and plan.k.segments is not None:
                q_seg, k_seg = pair(self._q(plan.q.segments), self._k(plan.k.segments))
                kept = kept & (q_seg == k_seg)
        elif plan.S_pad != plan.S:
            kept = kept & (k_pos < plan.S)
        if call.mask_BNTS is not None:
            block = self._dense_block(call.mask_BNTS)
            kept = kept & (block.T if transposed else block)
        return kept

    def _dense_block(self, x_BNTS: jax.Array) -> jax.Array:
        """The tile's [q_block or 1, keys or 1] of a padded array broadcastable to BNTS."""
        at = (self.head.batch, self.head.query_head(self.g), self.q_start, self.k_start)
        sizes = (1, 1, self.head.plan.q_block, self.keys)
        starts = [0 if n == 1 else i for n, i in zip(x_BNTS.shape, at, strict=True)]
        sizes = [1 if n == 1 else size for n, size in zip(x_BNTS.shape, sizes, strict=True)]
        return _block(x_BNTS, starts, sizes)[0, 0]

    def windows(self) -> dict[str, tuple[jax.Array, int]]:
        """Where the tile lies in the leaves of a bias."""
        return {
            "batch": (self.head.batch.astype(int), 1),
            "query": (self.q_start.astype(int), self.head.plan.q_block),
            "key": (self.k_start.astype(int), self.keys),
        }

    def bias_scores(self, bias: Any, transposed: bool) -> jax.Array:
        q_pos, k_pos = self.positions
        n = jnp.reshape(self.head.plan.call.head_ids(self.head.query_head(self.g)), (1,)).astype(jnp.int32)
        score = bias.score(n, q_pos[None], k_pos[None]).astype(self.head.q_RH.dtype)
        score = jnp.broadcast_to(score, (1, 1, q_pos.size, k_pos.size))[0, 0]
        return score.T if transposed else score

    def dropped(self, transposed: bool) -> jax.Array | None:
        """True where dropout removes an entry; None without dropout."""
        call = self.head.plan.call
        if call.dropout_rate == 0:
            return None
        ids = call.row_ids(self.head.batch), call.head_ids(self.head.query_head(self.g))
        b, n = (jnp.reshape(x, (1,)) for x in ids)
        q_pos, k_pos = self.positions
        kept = dropout_keep(call.dropout_words, call.dropout_rate, b, n, q_pos[None], k_pos[None])[0, 0]
        return ~(kept.T if transposed else kept)


def sweep(head: KVHead, step: Callable[..., Any], j: jax.Array, state: Any) -> Any:
    """`state = step(tile_of, at, state)` for every live strip of key tile j and each query head of the group.

    tile_of(at) is the tile of an entry of the block list.
    """
    plan, tile_start = head.plan, j * head.plan.key_tile
    keys = _load_key_tile(head, tile_start)

    def query_head(g: jax.Array, state: Any) -> Any:
        for piece in plan.pieces:
            start, stop = piece.csr.row(head.batch, j)
            tile_of = functools.partial(_tile, head, keys, piece, g, tile_start)
            state = lax.fori_loop(start, stop, functools.partial(step, tile_of), state)
        return state

    if plan.G == 1:
        return query_head(jnp.int32(0), state)
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.G), query_head, state)


def _load_key_tile(head: KVHead, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """k [keys, H], its transpose, and v [keys, M] of the key tile that begins at `start`."""
    plan = head.plan
    k_KH, v_KM = (
        _load(x, plan.k, head.batch, head.kv_head, 1, start, plan.key_tile)[0]
        for x in (plan.call.k_BSKH, plan.call.v_BSKM)
    )
    return k_KH, k_KH.T, v_KM


def _tile(
    head: KVHead, keys, piece: Piece, g: jax.Array, tile_start: jax.Array, at: jax.Array
) -> ChunkedTile:
    """The tile of entry `at` of the piece's list."""
    plan, item = head.plan, piece.csr.item(head.batch, at)
    strip, unit = item // plan.units, item % plan.units
    count, offset = piece.units * plan.k_unit, unit * plan.k_unit
    held = [x if count == plan.key_tile else cut(x, offset, count, axis)
            for x, axis in zip(keys, (0, 1, 0), strict=True)]  # fmt: skip
    return ChunkedTile(head, g, strip * plan.q_block, tile_start + offset, count, piece.masked, *held)
