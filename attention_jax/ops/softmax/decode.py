"""Softmax attention of a few queries to a cache, in blocks of keys up to the last key that is seen.

    m' = max(m, max_s z_s),  l' = l e^(m-m') + sum_s e^(z_s-m'),  a' = a e^(m-m') + sum_s e^(z_s-m') v_s

over blocks of keys (Milakov & Gimelshein 2018, arXiv 1805.02867). A traced number of blocks is visited, from
the first to the last that holds a key which some query sees, so that a step costs what the tokens present
cost, whatever the capacity of the cache is.

A block of the cache [C, J, H] of J kv heads is read as the matrix [C, J H] that it is in memory. The query of
a head has its features in its own H columns and zeros in the others. This takes J times the operations and
no transposed copy of the keys, which XLA's CPU backend makes for a product over a batch of heads.

Derivatives are those of the dense form, a single block with all keys.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.biases import slice_leaves
from attention_jax.ops import varying
from attention_jax.ops.softmax.common import SoftmaxCall, platform
from attention_jax.ops.tokens import positions_or_arange, select_valid

_MOST_QUERIES = 16
_BLOCK = 256  # keys; k and v of 12 heads of width 64 then take 1.5 MB, which a core's cache holds
_COLUMNS = 256  # the width of the heads that are read side by side
_FULL = lax.Precision.HIGHEST


def unsupported(call: SoftmaxCall) -> str | None:
    """Why the call does not run here, or None."""
    return "dropout" if call.dropout_rate > 0 else None


def unwanted(call: SoftmaxCall) -> str | None:
    """Why another implementation runs the call better, or None."""
    T = call.sizes[1]
    if platform(call) != "cpu":
        return "blocks of keys one after another leave an accelerator idle"
    if T > _MOST_QUERIES:
        return f"T = {T} > {_MOST_QUERIES}: it is for a few queries against a cache"
    if call.k_positions_BS is None:
        return "no k_positions, which a cache has"
    return None


def attend(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _attend(call)


@jax.custom_jvp
def _attend(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    S = call.sizes[2]
    size = min(_BLOCK, -(-S // 2))
    kept_BNTS = _kept(call)
    live_S = kept_BNTS.any((0, 1, 2))
    first = jnp.argmax(live_S).astype(jnp.int32)
    last = (S - 1 - jnp.argmax(live_S[::-1])).astype(jnp.int32)
    # Without any key both are 0 or S - 1: one block, or all, in which nothing is kept.
    stop = jnp.where(live_S.any(), last // size + 1, 0)
    body = functools.partial(_block, call, kept_BNTS, size)
    carry = varying.like(call.q_BTNH, _start(call))
    return _finish(call, lax.fori_loop(first // size, stop, body, carry))


@_attend.defjvp
def _attend_jvp(primals, tangents):
    return jax.jvp(_dense, primals, tangents)


def _dense(call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    return _finish(call, _block(call, _kept(call), call.sizes[2], jnp.int32(0), _start(call)))


def _kept(call: SoftmaxCall) -> jax.Array:
    """What may be seen, broadcastable to [B, N, T, S], with S as its last axis."""
    _, T, S, *_ = call.sizes
    q_pos_BT, k_pos_BS = (
        positions_or_arange(x, n) for x, n in ((call.q_positions_BT, T), (call.k_positions_BS, S))
    )
    kept = call.mask.dense(q_pos_BT, k_pos_BS)[:, None]
    if call.q_segments_BT is not None:
        kept = kept & (call.q_segments_BT[:, None, :, None] == call.k_segments_BS[:, None, None, :])
    for valid, axes in ((call.q_valid_BT, (1, 3)), (call.k_valid_BS, (1, 2))):
        if valid is not None:
            kept = kept & jnp.expand_dims(valid, axes)
    if call.mask_BNTS is not None:
        kept = kept & call.mask_BNTS
    return jnp.broadcast_to(kept, (*kept.shape[:2], T, S))


def _start(call: SoftmaxCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, denominator and numerator before the first key; a sink is a key without a value."""
    B, T, _, N, _, _, M = call.sizes
    m_BNT = jnp.full((B, N, T), -jnp.inf, jnp.float32)
    if call.sink_logits_N is not None:
        m_BNT = jnp.maximum(m_BNT, call.sink_logits_N.astype(jnp.float32)[None, :, None])
    return m_BNT, jnp.where(m_BNT == -jnp.inf, 0.0, 1.0), jnp.zeros((B, N, T, M), jnp.float32)


def _block(call: SoftmaxCall, kept_BNTS: jax.Array, size: int, i: jax.Array, carry: Any) -> Any:
    """The carry after the keys of block i; the last block begins earlier, so that it is whole."""
    S = call.sizes[2]
    start = jnp.minimum(i * size, S - size)
    m_BNT, l_BNT, a_BNTM = carry
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    own_C = start + jnp.arange(size, dtype=jnp.int32) >= i * size
    kept_BNTC = cut(kept_BNTS, axis=3) & own_C[None, None, None]
    valid_BC = None if call.k_valid_BS is None else cut(call.k_valid_BS, axis=1)
    heads = _heads_side_by_side(call)

    def block(x_BSKH: jax.Array, first: int, count: int) -> jax.Array:
        """The block of `count` kv heads, float32 [B, C, J, H], with 0 in slots without a token."""
        (B, _, _, width), zero = x_BSKH.shape, jnp.int32(0)  # all indices of one type under x64
        x_BCJH = lax.dynamic_slice(x_BSKH, (zero, start, zero + first, zero), (B, size, count, width))
        return select_valid(x_BCJH, valid_BC).astype(jnp.float32)

    z_BNTC = jnp.concatenate([_scores(call, block(call.k_BSKH, *j), *j) for j in heads], axis=1)
    z_BNTC = jnp.where(kept_BNTC, _exponents(call, z_BNTC, start, size), -jnp.inf)
    new_BNT = lax.stop_gradient(jnp.maximum(m_BNT, z_BNTC.max(-1)))
    shift_BNT = jnp.where(new_BNT == -jnp.inf, 0.0, new_BNT)
    # The selections change no value; they keep an overflowing gradient of a hidden entry from 0 * Inf.
    p_BNTC = jnp.where(kept_BNTC, jnp.exp(z_BNTC - shift_BNT[..., None]), 0.0)
    decay_BNT = jnp.exp(m_BNT - shift_BNT)
    sums = [_weighed(call, p_BNTC, block(call.v_BSKM, *j), *j) for j in heads]
    return (
        new_BNT,
        l_BNT * decay_BNT + p_BNTC.sum(-1),
        a_BNTM * decay_BNT[..., None] + jnp.concatenate(sums, axis=1),
    )


def _heads_side_by_side(call: SoftmaxCall) -> list[tuple[int, int]]:
    """(first, number) of the kv heads that are read as one matrix."""
    *_, K, H, M = call.sizes
    count = max(1, _COLUMNS // max(H, M))
    return [(first, min(count, K - first)) for first in range(0, K, count)]


def _scores(call: SoftmaxCall, k_BCJH: jax.Array, first: int, J: int) -> jax.Array:
    """q . k * scale of the query heads of J kv heads, [B, J G, T, C]."""
    B, T, _, N, K, H, _ = call.sizes
    G, C = N // K, k_BCJH.shape[1]
    q_BTnH = select_valid(call.q_BTNH[:, :, first * G : (first + J) * G], call.q_valid_BT)
    q_BJGTH = (q_BTnH.astype(jnp.float32) * call.scale).reshape(B, T, J, G, H).transpose(0, 2, 3, 1, 4)
    own_JJ = jnp.eye(J, dtype=bool)[None, :, None, None, :, None]
    rows = jnp.where(own_JJ, q_BJGTH[:, :, :, :, None], 0.0).reshape(B, J * G * T, J * H)
    z_BRC = lax.dot_general(rows, k_BCJH.reshape(B, C, J * H), (((2,), (2,)), ((0,), (0,))), precision=_FULL)
    return z_BRC.reshape(B, J * G, T, C)


def _weighed(call: SoftmaxCall, p_BNTC: jax.Array, v_BCJM: jax.Array, first: int, J: int) -> jax.Array:
    """sum_s p_s v_s of the query heads of J kv heads, [B, J G, T, M]."""
    B, T, _, N, K, _, M = call.sizes
    G, C = N // K, v_BCJM.shape[1]
    rows = p_BNTC[:, first * G : (first + J) * G].reshape(B, J * G * T, C)
    a = lax.dot_general(rows, v_BCJM.reshape(B, C, J * M), (((2,), (1,)), ((0,), (0,))), precision=_FULL)
    # Of a head's row only its own columns count. A sum over the others would add 0 * Inf.
    a = a.reshape(B, J, G * T, J, M)
    return jnp.stack([a[:, j, :, j] for j in range(J)], axis=1).reshape(B, J * G, T, M)


def _exponents(call: SoftmaxCall, z_BNTC: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Scores after the softcap and the bias."""
    _, T, S, N, *_ = call.sizes
    if call.softcap is not None:
        z_BNTC = call.softcap * jnp.tanh(z_BNTC / call.softcap)
    if call.bias is None:
        return z_BNTC
    q_pos_BT = positions_or_arange(call.q_positions_BT, T)
    k_pos_BS = positions_or_arange(call.k_positions_BS, S)
    k_pos_BC = lax.dynamic_slice_in_dim(k_pos_BS, start, size, axis=1)
    bias = slice_leaves(call.bias, key=(start, size))
    return z_BNTC + bias.score(call.head_ids(jnp.arange(N, dtype=jnp.int32)), q_pos_BT, k_pos_BC)


def _finish(call: SoftmaxCall, carry: Any) -> tuple[jax.Array, jax.Array]:
    m_BNT, l_BNT, a_BNTM = carry
    some_BNT = l_BNT > 0
    l_BNT = jnp.where(some_BNT, l_BNT, 1.0)
    out_BNTM = a_BNTM / l_BNT[..., None]
    lse_BNT = jnp.where(some_BNT, m_BNT + jnp.log(l_BNT), -jnp.inf)
    return out_BNTM.swapaxes(1, 2).astype(call.q_BTNH.dtype), lse_BNT.swapaxes(1, 2)
