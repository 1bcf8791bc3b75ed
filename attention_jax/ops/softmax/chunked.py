"""Blocked softmax attention in plain XLA: O(T) memory, no kernel, forward and backward.

    m' = max(m, max_s z_s),  l' = l 2^(m-m') + sum_s 2^(z_s-m'),  a' = a 2^(m-m') + sum_s 2^(z_s-m') v_s

over tiles of keys, with z = scores * log2(e), out = a / l and lse = (m + log2 l) / log2(e): the online
softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867) as in Rabe & Staats 2021 (arXiv 2112.05682) and
Dao et al. 2022 (arXiv 2205.14135). The backward recomputes P = 2^(z - lse log2 e) tile by tile and uses
dZ = P * (dP - delta), delta_t = out_t . d out_t - d lse_t, so that only q, k, v, out and lse are saved.

Both directions sweep one kv head after another, then tiles of `key_tile` keys, then the strips of
`q_block` queries that the block map lists for the tile: full ones without mask code, partial ones cut to
the key units between their first and last live one. Keys and values of a tile then stay in cache while
small strips of queries and accumulators pass by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.biases import add_to_slices, slice_leaves
from attention_jax.ops.softmax.blocks import (
    BlockMap,
    Lists,
    Tokens,
    lists,
    runtime_map,
    static_map,
)
from attention_jax.ops.softmax.common import Call, dropout_keep, positions_of, valid_slots

_LOG2E = math.log2(math.e)
# A finite start for the running maximum: -inf - -inf never appears, and 2^(z - _LOWEST) cannot be reached
# by a masked z = -inf, whose probability is exactly 0.
_LOWEST = float(np.finfo(np.float32).min)

# Tiles measured on 2 cores that share a 1 MiB L2 cache (docs/results.md): a strip of scores is 256 x 1024.
_Q_BLOCK = 256
_KEY_UNIT = 256
_UNITS = 4


def unsupported(call: Call) -> str | None:
    """Why this implementation cannot run the call: it runs every call."""
    del call
    return None


@jax.custom_vjp
def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _forward(call)


def _attend_fwd(call: Call):
    out_BTNM, lse_BTN = _forward(call)
    return (out_BTNM, lse_BTN), (call, out_BTNM, lse_BTN)


def _attend_bwd(residuals, cotangents):
    return (_backward(*residuals, *cotangents),)


attend.defvjp(_attend_fwd, _attend_bwd)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One kind of work: strips of queries against `units` key units, with or without mask code.

    The lists have a row per key tile; an item is strip * units per tile + first unit within the tile.
    """

    units: int
    masked: bool
    lists: Lists


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The call cut into tiles. Both sides are padded to whole tiles: T_pad, S_pad.

    Keys, values, the leaves of the bias and the dense mask of `call` have been padded, queries have not.
    """

    call: Call
    T: int
    S: int
    q_block: int
    k_unit: int
    units: int
    q: Tokens | None  # None where positions are implicit and every slot is valid
    k: Tokens | None
    pieces: tuple[_Piece, ...]

    @property
    def key_tile(self) -> int:
        return self.k_unit * self.units

    @property
    def T_pad(self) -> int:
        return _round_up(self.T, self.q_block)

    @property
    def S_pad(self) -> int:
        return _round_up(self.S, self.key_tile)

    @property
    def G(self) -> int:
        """Query heads per kv head."""
        return self.call.q_BTNH.shape[2] // self.call.k_BSKH.shape[2]


def _plan(call: Call) -> _Plan:
    _, T, S, *_ = call.sizes
    q_block = _balanced(T, _Q_BLOCK)
    # Short sequences take one kind of piece: there, compiling several costs more than they save.
    k_unit = _balanced(S, _KEY_UNIT if S > 2 * _KEY_UNIT else 2 * _KEY_UNIT)
    units = min(_UNITS, -(-S // k_unit))
    if call.arange_positions:
        block_map = static_map(call.mask, T, S, q_block, k_unit)
        q = k = None
    else:
        k_unit, units = k_unit * units, 1
        q = _tokens(call.q_positions_BT, call.q_segments_BT, T, _round_up(T, q_block))
        k = _tokens(call.k_positions_BS, call.k_segments_BS, S, _round_up(S, k_unit))
        block_map = runtime_map(call.mask, q, k, q_block, k_unit)
    if call.mask_BNTS is not None:
        block_map = BlockMap(block_map.some, block_map.every & False)
    pieces = tuple(p for p in _pieces(block_map.transpose, units) if not p.lists.empty)
    plan = _Plan(call, T, S, q_block, k_unit, units, q, k, pieces)
    return dataclasses.replace(plan, call=_padded(call, plan.T_pad, plan.S_pad))


def _balanced(length: int, most: int) -> int:
    """The block that cuts `length` into the fewest equal parts <= most, a multiple of 8."""
    return _round_up(-(-length // -(-length // most)), 8)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _tokens(positions, segments, length: int, padded: int) -> Tokens:
    valid = valid_slots(positions, segments)
    valid = jnp.ones((1, length), bool) if valid is None else valid
    pad = ((0, 0), (0, padded - length))
    segments = None if segments is None else jnp.pad(segments, pad, constant_values=-1)
    return Tokens(
        jnp.pad(positions_of(positions, length), pad, constant_values=-1), jnp.pad(valid, pad), segments
    )


def _pieces(by_key: BlockMap, units: int) -> list[_Piece]:
    """The work of a map with key units as rows, as lists with key tiles as rows."""
    if units == 1:
        return [_Piece(1, False, by_key.full), _Piece(1, True, by_key.partial)]
    some, every = (_tiled(x, units) for x in (by_key.some, by_key.every))
    full = every.all(-1)
    live = some.any(-1) & ~full
    first = some.argmax(-1)
    count = units - some[..., ::-1].argmax(-1) - first
    names = np.arange(some.shape[2]) * units + first
    found = [_Piece(units, False, lists(full, names))]
    for width in range(1, units + 1):
        found.append(_Piece(width, True, lists(live & (count == width), names)))
    return found


def _tiled(x: np.ndarray, units: int) -> np.ndarray:
    """[1, key units, strips] to [1, key tiles, strips, units]; missing units of the last tile are empty."""
    _, n, strips = x.shape
    x = np.pad(x, ((0, 0), (0, -n % units), (0, 0)))
    return x.reshape(1, -1, units, strips).swapaxes(2, 3)


@dataclasses.dataclass(frozen=True)
class _Head:
    """A kv head of a batch row and its G query heads.

    q holds the G heads one after another, in float32 with invalid slots selected to 0, scaled so that
    q . k is the base-2 exponent (with a softcap c: the argument of tanh).
    """

    plan: _Plan
    batch: jax.Array
    kv_head: jax.Array
    q_RH: jax.Array  # R = G * T_pad rows

    def query_head(self, g: jax.Array) -> jax.Array:
        return self.kv_head * self.plan.G + g


def _load_head(plan: _Plan, i: jax.Array) -> _Head:
    call = plan.call
    K = call.sizes[4]
    b, kv = i // K, i % K
    scale = call.scale * _LOG2E if call.softcap is None else call.scale / call.softcap
    return _Head(plan, b, kv, _load_queries(plan, plan.q, call.q_BTNH, b, kv) * scale)


def _load_queries(plan: _Plan, tokens: Tokens | None, x_BTNH: jax.Array, b, kv) -> jax.Array:
    """The G heads of a group as float32 [G * T_pad, H]."""
    x_GTH = _load(x_BTNH, tokens, b, kv, plan.G, 0, plan.T)
    return jnp.pad(x_GTH, ((0, 0), (0, plan.T_pad - plan.T), (0, 0))).reshape(plan.G * plan.T_pad, -1)


def _load(x_BLNH, tokens: Tokens | None, b, group, G: int, start, size: int) -> jax.Array:
    """Heads [group * G, (group + 1) * G) of `size` tokens as float32 [G, size, H], invalid ones 0."""
    sizes = (1, size, G, x_BLNH.shape[3])
    x_LGH = _block(x_BLNH, (b, start, group * G), sizes)[0].astype(jnp.float32)
    if tokens is not None:
        x_LGH = jnp.where(_cut(_row(tokens.valid, b), start, size)[:, None, None], x_LGH, 0.0)
    return x_LGH.swapaxes(0, 1)


def _store(x_BLNH: jax.Array, x_GLH: jax.Array, b: jax.Array, group: jax.Array, start=0) -> jax.Array:
    """The inverse of `_load`, in x_BLNH's dtype."""
    x_LGH = x_GLH.swapaxes(0, 1).astype(x_BLNH.dtype)
    return _paste(x_BLNH, x_LGH[None], (b, start, group * x_GLH.shape[0]))


def _row(x: jax.Array, b: jax.Array) -> jax.Array:
    return x[0] if x.shape[0] == 1 else _block(x, (b,), (1, *x.shape[1:]))[0]


def _block(x: jax.Array, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    """x[start : start + size, ...]; missing starts are 0. All in int32, whatever the default is."""
    starts = [jnp.int32(i) for i in (*starts, *[0] * (x.ndim - len(starts)))]
    return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def _paste(x: jax.Array, block: jax.Array, starts: Sequence[Any]) -> jax.Array:
    """x with `block` written at the starts."""
    starts = [jnp.int32(i) for i in (*starts, *[0] * (x.ndim - len(starts)))]
    return lax.dynamic_update_slice(x, block, starts, allow_negative_indices=False)


def _cut(x: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """x[start : start + size] along one axis."""
    sizes = [size if i == axis else n for i, n in enumerate(x.shape)]
    return _block(x, [0] * axis + [start], sizes)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A strip of queries against some key units of one head."""

    head: _Head
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
        return _cut(x_R, self.rows, self.head.plan.q_block, axis)

    def put(self, x_R: jax.Array, strip: jax.Array, axis: int = 0) -> jax.Array:
        return _paste(x_R, strip, [0] * axis + [self.rows])

    @property
    def positions(self) -> tuple[jax.Array, jax.Array]:
        plan = self.head.plan
        if plan.q is None or plan.k is None:
            return self.q_start + jnp.arange(plan.q_block, dtype=jnp.int32), self.k_start + jnp.arange(
                self.keys, dtype=jnp.int32
            )
        return self._q(plan.q.positions), self._k(plan.k.positions)

    def _q(self, x_BT: jax.Array) -> jax.Array:
        return _cut(_row(x_BT, self.head.batch), self.q_start, self.head.plan.q_block)

    def _k(self, x_BS: jax.Array) -> jax.Array:
        return _cut(_row(x_BS, self.head.batch), self.k_start, self.keys)

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
        n = jnp.reshape(self.head.query_head(self.g), (1,)).astype(jnp.int32)
        score = bias.score(n, q_pos[None], k_pos[None]).astype(jnp.float32)
        score = jnp.broadcast_to(score, (1, 1, q_pos.size, k_pos.size))[0, 0]
        return score.T if transposed else score

    def dropped(self, transposed: bool) -> jax.Array | None:
        """True where dropout removes an entry; None without dropout."""
        call = self.head.plan.call
        if call.dropout_rate == 0:
            return None
        b, n = (jnp.reshape(x, (1,)) for x in (self.head.batch, self.head.query_head(self.g)))
        q_pos, k_pos = self.positions
        kept = dropout_keep(call.dropout_words, call.dropout_rate, b, n, q_pos[None], k_pos[None])[0, 0]
        return ~(kept.T if transposed else kept)


def _exponents(tile: _Tile, z: jax.Array, transposed: bool) -> tuple[jax.Array, jax.Array | None]:
    """Base-2 exponents from q . k, and tanh of the softcap: softcap, bias, mask, in that order."""
    call = tile.head.plan.call
    tanh = None
    if call.softcap is not None:
        tanh = jnp.tanh(z)
        z = tanh * (call.softcap * _LOG2E)
    if call.bias is not None:
        z = z + tile.bias_scores(slice_leaves(call.bias, **tile.windows()), transposed) * _LOG2E
    if tile.masked:
        z = jnp.where(tile.keep(transposed), z, -jnp.inf)
    return z, tanh


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts axis contract[0] of a with contract[1] of b, in full float32 on every platform."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)


def _key_tiles(plan: _Plan, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.S_pad // plan.key_tile), body, state)


def _sweep(head: _Head, j: jax.Array, step: Callable[[_Tile, Any], Any], state: Any) -> Any:
    """`step` over every live strip of key tile j, for each query head of the group."""
    plan = head.plan
    tile_start = j * plan.key_tile
    k_KH, v_KM = (
        _load(x, plan.k, head.batch, head.kv_head, 1, tile_start, plan.key_tile)[0]
        for x in (plan.call.k_BSKH, plan.call.v_BSKM)
    )
    k_HK = k_KH.T

    def one(piece: _Piece, g: jax.Array, at: jax.Array, state: Any) -> Any:
        item = piece.lists.item(head.batch, at)
        strip, unit = item // plan.units, item % plan.units
        keys, offset = piece.units * plan.k_unit, unit * plan.k_unit
        cut = [x if keys == plan.key_tile else _cut(x, offset, keys, axis)
               for x, axis in ((k_KH, 0), (k_HK, 1), (v_KM, 0))]  # fmt: skip
        tile = _Tile(head, g, strip * plan.q_block, tile_start + offset, keys, piece.masked, *cut)
        return step(tile, state)

    def query_head(g: jax.Array, state: Any) -> Any:
        for piece in plan.pieces:
            start, stop = piece.lists.row(head.batch, j)
            state = lax.fori_loop(start, stop, lambda at, state, piece=piece: one(piece, g, at, state), state)
        return state

    if plan.G == 1:
        return query_head(jnp.int32(0), state)
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.G), query_head, state)


def _forward(call: Call) -> tuple[jax.Array, jax.Array]:
    plan = _plan(call)
    B, T, _, N, K, _, M = call.sizes
    out_BTNM = jnp.zeros((B, T, N, M), call.q_BTNH.dtype)
    lse_BTN1 = jnp.zeros((B, T, N, 1), jnp.float32)

    def body(i, carry):
        out_BTNM, lse_BTN1 = carry
        head = _load_head(plan, i)
        out_GTM, lse_GT1 = _forward_head(head)
        return (
            _store(out_BTNM, out_GTM, head.batch, head.kv_head),
            _store(lse_BTN1, lse_GT1, head.batch, head.kv_head),
        )

    out_BTNM, lse_BTN1 = lax.fori_loop(jnp.int32(0), jnp.int32(B * K), body, (out_BTNM, lse_BTN1))
    return out_BTNM, lse_BTN1[..., 0]


def _forward_head(head: _Head) -> tuple[jax.Array, jax.Array]:
    plan, call, G = head.plan, head.plan.call, head.plan.G
    M = call.sizes[6]
    # The sink is a key without a value that every row has seen before the first tile.
    m_GT = jnp.full((G, plan.T_pad), _LOWEST, jnp.float32)
    l_GT = jnp.zeros((G, plan.T_pad), jnp.float32)
    if call.sink_logits_N is not None:
        sinks_G = _cut(call.sink_logits_N, head.kv_head * G, G).astype(jnp.float32)
        m_GT = jnp.maximum(m_GT, sinks_G[:, None] * _LOG2E)
        l_GT = l_GT + jnp.where(sinks_G == -jnp.inf, 0.0, 1.0)[:, None]
    state = (m_GT.reshape(-1), l_GT.reshape(-1), jnp.zeros((G * plan.T_pad, M), jnp.float32))

    def key_tile(j, state):
        return _sweep(head, j, _forward_step, state)

    m_R, l_R, acc_RM = _key_tiles(plan, key_tile, state)
    some_R = l_R > 0
    l_R = jnp.where(some_R, l_R, 1.0)
    out_RM = acc_RM * (1 / (l_R * (1 - call.dropout_rate)))[:, None]
    lse_R = jnp.where(some_R, (m_R + jnp.log2(l_R)) * (1 / _LOG2E), -jnp.inf)
    return tuple(x.reshape(G, plan.T_pad, -1)[:, : plan.T] for x in (out_RM, lse_R))


def _forward_step(tile: _Tile, state):
    m_R, l_R, acc_RM = state
    m_Q, l_Q, acc_QM = (tile.take(x) for x in state)
    z_QK, _ = _exponents(tile, _dot(tile.take(tile.head.q_RH), tile.k_HK, (1, 0)), transposed=False)
    new_Q = jnp.maximum(m_Q, z_QK.max(1))
    decay_Q = _exp2(m_Q - new_Q)
    p_QK = _exp2(z_QK - new_Q[:, None])
    l_Q = l_Q * decay_Q + p_QK.sum(1)
    dropped = tile.dropped(transposed=False)
    kept_QK = p_QK if dropped is None else jnp.where(dropped, 0.0, p_QK)
    acc_QM = acc_QM * decay_Q[:, None] + _dot(kept_QK, tile.v_KM, (1, 0))
    return tile.put(m_R, new_Q), tile.put(l_R, l_Q), tile.put(acc_RM, acc_QM)


# (1 + t) / (1 - t) is 2^f for t = tanh(f ln2 / 2), here f (b0 + b1 f^2) / (1 + a1 f^2), the continued
# fraction of tanh cut where it is exact to 6e-9 on [-1/2, 1/2].
_TANH_A1, _TANH_B0, _TANH_B1 = 0.0480453014, 0.3465735903, 0.00277520543


def _exp2(x: jax.Array) -> jax.Array:
    """2^x for x <= 0, cheaper than XLA's exp on a CPU; exactly 0 below 2^-126, exactly 1 at 0.

    x = n + f with n integer; n is added to the exponent bits of the numerator of 2^f. Adding 1.5 * 2^23
    leaves n in the low bits of the sum. NaN stays NaN. A polynomial would take fewer instructions, but
    XLA repeats cheap arithmetic in every consumer of its result; a division it evaluates once.
    """
    x = jnp.maximum(x, -127.0)
    n = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    f = x - n
    f2 = f * f
    a = f2 * _TANH_A1 + 1.0
    b = f * (f2 * _TANH_B1 + _TANH_B0)
    shift = lax.bitcast_convert_type(n + 1.5 * 2.0**23, jnp.int32) << 23
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a + b, jnp.int32) + shift, jnp.float32) / (a - b)


def _backward(call: Call, out_BTNM, lse_BTN, dout_BTNM, dlse_BTN) -> Call:
    plan = _plan(call)
    B, _, S, _, K, _, _ = call.sizes
    totals = (
        jnp.zeros_like(call.q_BTNH),
        jnp.zeros_like(plan.call.k_BSKH),
        jnp.zeros_like(plan.call.v_BSKM),
        None if call.sink_logits_N is None else jnp.zeros(call.sink_logits_N.shape, jnp.float32),
        _bias_zeros(plan.call.bias),
    )
    saved = (out_BTNM, lse_BTN[..., None], dout_BTNM, dlse_BTN[..., None])

    def body(i, totals):
        return _backward_head(_load_head(plan, i), saved, totals)

    dq_BTNH, dk_BSKH, dv_BSKM, dsinks_N, dbias = lax.fori_loop(jnp.int32(0), jnp.int32(B * K), body, totals)
    if dsinks_N is not None:
        dsinks_N = dsinks_N.astype(call.sink_logits_N.dtype)
    # None stands for the zero cotangents of integer and boolean arrays.
    return dataclasses.replace(
        call,
        q_BTNH=dq_BTNH,
        k_BSKH=dk_BSKH[:, :S],
        v_BSKM=dv_BSKM[:, :S],
        sink_logits_N=dsinks_N,
        bias=_bias_cotangent(call.bias, dbias),
        q_positions_BT=None,
        k_positions_BS=None,
        q_segments_BT=None,
        k_segments_BS=None,
        mask_BNTS=None,
        dropout_words=None,
    )


def _backward_head(head: _Head, saved, totals):
    plan, call, G = head.plan, head.plan.call, head.plan.G
    *_, H, M = call.sizes
    b, kv = head.batch, head.kv_head
    dq_BTNH, dk_BSKH, dv_BSKM, dsinks_N, dbias = totals
    out_RM, do_RM = (_load_queries(plan, plan.q, saved[x], b, kv) for x in (0, 2))
    lse_R, dlse_R = (_load_queries(plan, None, saved[x], b, kv)[:, 0] for x in (1, 3))
    # A row without a key (lse = -inf) has P = 0 and passes no gradient, and so have rows of padding:
    # +inf does that, 2^(z - inf).
    padding_GT = jnp.broadcast_to(jnp.arange(plan.T_pad) >= plan.T, (G, plan.T_pad))
    dead_R = padding_GT.reshape(-1) | (lse_R == -jnp.inf)
    lse_R = jnp.where(dead_R, jnp.inf, lse_R * _LOG2E)
    delta_R = (out_RM * do_RM).sum(1) - jnp.where(dead_R, 0.0, dlse_R)
    if dsinks_N is not None:
        sinks_G1 = _cut(call.sink_logits_N, kv * G, G).astype(jnp.float32)[:, None]
        dsinks_G = -(_exp2(sinks_G1 * _LOG2E - lse_R.reshape(G, -1)) * delta_R.reshape(G, -1)).sum(1)
        dsinks_N = _paste(dsinks_N, _cut(dsinks_N, kv * G, G) + dsinks_G, [kv * G])
    rows = (do_RM, lse_R, delta_R)

    def key_tile(j, carry):
        dq_HR, dk_BSKH, dv_BSKM, dbias = carry
        zeros = (jnp.zeros((plan.key_tile, H), jnp.float32), jnp.zeros((plan.key_tile, M), jnp.float32))
        start = j * plan.key_tile

        def step(tile, state):
            return _backward_step(tile, rows, start, state)

        dq_HR, dk_KH, dv_KM, dbias = _sweep(head, j, step, (dq_HR, *zeros, dbias))
        # q was loaded times scale * log2 e (scale / softcap), and the softcap's slope carries its c.
        dk_KH = dk_KH * (1 / _LOG2E if call.softcap is None else 1.0)
        dv_KM = dv_KM * (1 / (1 - call.dropout_rate))
        dk_BSKH = _store(dk_BSKH, dk_KH[None], b, kv, start)
        return dq_HR, dk_BSKH, _store(dv_BSKM, dv_KM[None], b, kv, start), dbias

    dq_HR = jnp.zeros((H, G * plan.T_pad), jnp.float32)
    dq_HR, dk_BSKH, dv_BSKM, dbias = _key_tiles(plan, key_tile, (dq_HR, dk_BSKH, dv_BSKM, dbias))
    dq_RH = dq_HR.T * (call.scale if call.softcap is None else call.scale / call.softcap)
    dq_BTNH = _store(dq_BTNH, dq_RH.reshape(G, plan.T_pad, H)[:, : plan.T], b, kv)
    return dq_BTNH, dk_BSKH, dv_BSKM, dsinks_N, dbias


def _backward_step(tile: _Tile, rows, tile_start, state):
    """Scores are transposed, [keys, queries], and so is dq: then no product transposes a tile."""
    call = tile.head.plan.call
    do_QM, lse_Q, delta_Q = (tile.take(x) for x in rows)
    dq_HR, dk_KH, dv_KM, dbias = state
    q_QH = tile.take(tile.head.q_RH)
    z_KQ, tanh_KQ = _exponents(tile, _dot(tile.k_KH, q_QH, (1, 1)), transposed=True)
    p_KQ = _exp2(z_KQ - lse_Q[None])
    dp_KQ = _dot(tile.v_KM, do_QM, (1, 1))
    dropped = tile.dropped(transposed=True)
    kept_KQ = p_KQ
    if dropped is not None:
        kept_KQ = jnp.where(dropped, 0.0, p_KQ)
        dp_KQ = jnp.where(dropped, 0.0, dp_KQ * (1 / (1 - call.dropout_rate)))
    # Where a pair is hidden its products may have overflowed: select, since 0 * Inf is NaN.
    hidden_KQ = z_KQ == -jnp.inf if tile.masked else False
    ds_KQ = jnp.where(hidden_KQ, 0.0, p_KQ * (dp_KQ - delta_Q[None]))
    if dbias is not None:
        dbias = _add_bias_gradient(tile, dbias, ds_KQ)
    if tanh_KQ is not None:
        ds_KQ = jnp.where(hidden_KQ, 0.0, ds_KQ * (call.softcap * (1 - tanh_KQ * tanh_KQ)))
    offset = tile.k_start - tile_start
    dv_KM = _add_rows(dv_KM, _dot(kept_KQ, do_QM, (1, 0)), offset)
    dk_KH = _add_rows(dk_KH, _dot(ds_KQ, q_QH, (1, 0)), offset)
    dq_HR = tile.put(dq_HR, tile.take(dq_HR, 1) + _dot(tile.k_HK, ds_KQ, (1, 0)), 1)
    return dq_HR, dk_KH, dv_KM, dbias


def _add_rows(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    if part.shape == total.shape:
        return total + part
    return _paste(total, _cut(total, start, part.shape[0]) + part, [start])


def _padded(call: Call, T_pad: int, S_pad: int) -> Call:
    """Keys, values, per-query and per-key leaves of the bias and the dense mask in whole tiles."""

    def pad(x: jax.Array, query: int | None, key: int | None) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        for axis, to in ((query, T_pad), (key, S_pad)):
            if axis is not None and x.shape[axis] != 1:
                widths[axis] = (0, to - x.shape[axis])
        return jnp.pad(x, widths)

    bias, mask = call.bias, call.mask_BNTS
    if bias is not None:
        leaves, treedef = jax.tree.flatten(bias)
        leaves = [pad(x, axes.query, axes.key) for x, axes in zip(leaves, bias.axes(), strict=True)]
        bias = jax.tree.unflatten(treedef, leaves)
    k_BSKH, v_BSKM = (
        jnp.pad(x, ((0, 0), (0, S_pad - x.shape[1]), (0, 0), (0, 0))) for x in (call.k_BSKH, call.v_BSKM)
    )
    mask = None if mask is None else pad(mask, 2, 3)
    return dataclasses.replace(call, k_BSKH=k_BSKH, v_BSKM=v_BSKM, bias=bias, mask_BNTS=mask)


def _bias_zeros(bias: Any) -> Any:
    """Where the bias gradient is gathered: float32, the bias's structure; None if nothing is learned."""
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(bias)):
        return None
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), bias
    )


def _add_bias_gradient(tile: _Tile, dbias: Any, ds_KQ: jax.Array) -> Any:
    """dbias plus the tile's share: the block's score is differentiated, its leaves added where cut."""
    leaves, treedef = jax.tree.flatten(slice_leaves(tile.head.plan.call.bias, **tile.windows()))
    learned = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def score(floats):
        floats = iter(floats)
        merged = [next(floats) if is_learned else x for x, is_learned in zip(leaves, learned, strict=True)]
        return tile.bias_scores(jax.tree.unflatten(treedef, merged), transposed=True)

    _, vjp = jax.vjp(score, [x for x, is_learned in zip(leaves, learned, strict=True) if is_learned])
    grads = iter(vjp(ds_KQ)[0])
    block = [next(grads) if is_learned else x * 0 for x, is_learned in zip(leaves, learned, strict=True)]
    return add_to_slices(dbias, jax.tree.unflatten(treedef, block), **tile.windows())


def _bias_cotangent(bias: Any, dbias: Any) -> Any:
    """The gathered gradient without the padding, in the leaves' dtypes; None for integer leaves."""
    if dbias is None:
        return None
    leaves, treedef = jax.tree.flatten(bias)
    cut = [
        g[tuple(slice(n) for n in x.shape)].astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None
        for x, g in zip(leaves, jax.tree.leaves(dbias), strict=True)
    ]
    return jax.tree.unflatten(treedef, cut)
