"""Blocked softmax attention in plain XLA: O(T) memory, no kernel, forward and backward.

    m' = max(m, max_s z_s),  l' = l 2^(m-m') + sum_s 2^(z_s-m'),  a' = a 2^(m-m') + sum_s 2^(z_s-m') v_s

over tiles of keys, with z = scores * log2(e), out = a / l and lse = (m + log2 l) / log2(e): the online
softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867) as in Rabe & Staats 2021 (arXiv 2112.05682) and
Dao et al. 2022 (arXiv 2205.14135). The backward recomputes P = 2^(z - lse log2 e) tile by tile and uses
dZ = P * (dP - delta), delta_t = out_t . d out_t - d lse_t, so that only q, k, v, out and lse are saved.

Both directions sweep one kv head after another, then tiles of keys, then the strips of queries that are live
for the tile (`tiles`). Keys and values of a tile then stay in cache while small strips of queries and
accumulators pass by.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.biases import add_to_slices, slice_leaves
from attention_jax.dtypes import accumulator
from attention_jax.ops import derivatives, sharded, varying
from attention_jax.ops.softmax.chunked_plan import ChunkedConfig, make_plan
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.tiles import (
    LOG2E,
    ChunkedTile,
    KVHead,
    cut,
    load_head,
    load_queries,
    paste,
    store,
    sweep,
)

DEFAULT = ChunkedConfig()

_NO_FORWARD = derivatives.no_forward_mode("chunked", "dot_product_attention", use="reference")
_NO_SECOND_REVERSE = (
    "the gradient of impl='chunked' of dot_product_attention has no reverse-mode derivative (grad of grad): "
    "use impl='reference', or jax.jvp of jax.grad, as jax.hessian does"
)

# A finite start for the running maximum: -inf - -inf never appears, and 2^(z - _LOWEST) cannot be reached
# by a masked z = -inf, whose probability is exactly 0.
_LOWEST = float(np.finfo(np.float32).min)


def _exponents(tile: ChunkedTile, z: jax.Array, transposed: bool) -> tuple[jax.Array, jax.Array | None]:
    """Base-2 exponents from q . k, and tanh of the softcap: softcap, bias, mask, in that order."""
    call = tile.head.plan.call
    tanh = None
    if call.softcap is not None:
        tanh = jnp.tanh(z)
        z = tanh * (call.softcap * LOG2E)
    if call.bias is not None:
        z = z + tile.bias_scores(slice_leaves(call.bias, **tile.windows()), transposed) * LOG2E
    if tile.masked:
        z = jnp.where(tile.keep(transposed), z, -jnp.inf)
    return z, tanh


# Products contract axis i of the left factor with axis j of the right one, in full float32 on every platform.
_ROWS, _COLUMNS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
_FULL = lax.Precision.HIGHEST


def _forward(call: SoftmaxCall, config: ChunkedConfig) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    plan = make_plan(call, config)
    B, T, _, N, K, _, M = call.sizes
    G, R, sums = plan.G, plan.G * plan.T_pad, accumulator(call.q_BTNH)
    out_BTNM = varying.like(call.q_BTNH, jnp.zeros((B, T, N, M), call.q_BTNH.dtype))
    lse_BTN1 = varying.like(call.q_BTNH, jnp.zeros((B, T, N, 1), sums))

    def kv_head(i, carry):
        out_BTNM, lse_BTN1 = carry
        head = load_head(plan, i)
        # The sink is a key without a value that every row has seen before the first tile.
        m_GT = jnp.full((G, plan.T_pad), _LOWEST, sums)
        l_GT = jnp.zeros((G, plan.T_pad), sums)
        if call.sink_logits_N is not None:
            sinks_G = cut(call.sink_logits_N, head.kv_head * G, G).astype(sums)
            m_GT = jnp.maximum(m_GT, sinks_G[:, None] * LOG2E)
            l_GT = l_GT + jnp.where(sinks_G == -jnp.inf, 0.0, 1.0)[:, None]
        state = (m_GT.reshape(-1), l_GT.reshape(-1), jnp.zeros((R, M), sums))
        key_tile = functools.partial(sweep, head, _forward_step)
        m_R, l_R, acc_RM = lax.fori_loop(*plan.key_tiles, key_tile, varying.like(call.q_BTNH, state))
        some_R = l_R > 0
        l_R = jnp.where(some_R, l_R, 1.0)
        out_RM = acc_RM * (1 / (l_R * (1 - call.dropout_rate)))[:, None]
        lse_R = jnp.where(some_R, (m_R + jnp.log2(l_R)) * (1 / LOG2E), -jnp.inf)
        out_GTM, lse_GT1 = (x.reshape(G, plan.T_pad, -1)[:, : plan.T] for x in (out_RM, lse_R))
        return (
            store(out_BTNM, out_GTM, head.batch, head.kv_head),
            store(lse_BTN1, lse_GT1, head.batch, head.kv_head),
        )

    out_BTNM, lse_BTN1 = lax.fori_loop(jnp.int32(0), jnp.int32(B * K), kv_head, (out_BTNM, lse_BTN1))
    return out_BTNM, lse_BTN1[..., 0]


def _forward_step(tile_of, at, state):
    tile = tile_of(at)
    m_R, l_R, acc_RM = state
    m_Q, l_Q, acc_QM = (tile.take(x) for x in state)
    z_QK, _ = _exponents(
        tile, lax.dot_general(tile.take(tile.head.q_RH), tile.k_HK, _ROWS, _FULL), transposed=False
    )
    new_Q = jnp.maximum(m_Q, z_QK.max(1))
    decay_Q = _exp2(m_Q - new_Q)
    p_QK = _exp2(z_QK - new_Q[:, None])
    l_Q = l_Q * decay_Q + p_QK.sum(1)
    dropped = tile.dropped(transposed=False)
    kept_QK = p_QK if dropped is None else jnp.where(dropped, 0.0, p_QK)
    acc_QM = acc_QM * decay_Q[:, None] + lax.dot_general(kept_QK, tile.v_KM, _ROWS, _FULL)
    return tile.put(m_R, new_Q), tile.put(l_R, l_Q), tile.put(acc_RM, acc_QM)


# (1 + t) / (1 - t) is 2^f for t = tanh(f ln2 / 2), here f (b0 + b1 f^2) / (1 + a1 f^2), the continued
# fraction of tanh cut where it is exact to 6e-9 on [-1/2, 1/2].
_TANH_A1, _TANH_B0, _TANH_B1 = 0.0480453014, 0.3465735903, 0.00277520543


@jax.custom_jvp
def _exp2(x: jax.Array) -> jax.Array:
    """2^x for x <= 0, cheaper than XLA's exp on a CPU; exactly 0 below 2^-126, exactly 1 at 0.

    x = n + f with n integer; n is added to the exponent bits of the numerator of 2^f. Adding 1.5 * 2^23
    leaves n in the low bits of the sum. NaN stays NaN. A polynomial would take fewer instructions, but
    XLA repeats cheap arithmetic in every consumer of its result; a division it evaluates once.
    """
    if x.dtype == jnp.float64:
        return jnp.exp2(x)
    x = jnp.maximum(x, -127.0)
    n = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    f = x - n
    f2 = f * f
    a = f2 * _TANH_A1 + 1.0
    b = f * (f2 * _TANH_B1 + _TANH_B0)
    shift = lax.bitcast_convert_type(n + 1.5 * 2.0**23, jnp.int32) << 23
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a + b, jnp.int32) + shift, jnp.float32) / (a - b)


# JAX takes the derivative of a bitcast for 0, in silence. First derivatives never ask (`attend` has its own),
# second ones do: forward-mode over `attend`'s gradient differentiates both of its passes.
_exp2.defjvps(lambda dx, y, x: dx * y * (1 / LOG2E))


def attend(call: SoftmaxCall, config: ChunkedConfig = DEFAULT) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _attend(derivatives.reverse_only(_NO_FORWARD, call), config)


def _partitioned(call: SoftmaxCall, config: ChunkedConfig) -> tuple[jax.Array, jax.Array]:
    return sharded.partitioned(functools.partial(_forward, config=config), ("BTNM", "BTN"))(call)


def _residuals(call: SoftmaxCall, config: ChunkedConfig):
    out_BTNM, lse_BTN = derivatives.forward_only(_NO_SECOND_REVERSE, _partitioned(call, config))
    return (out_BTNM, lse_BTN), (call, out_BTNM, lse_BTN)


def _cotangent(config: ChunkedConfig, residuals, cotangents) -> tuple[SoftmaxCall]:
    call, *arrays = (*residuals, *cotangents)

    def backward(call, *arrays):
        return _backward(config, (call, *arrays[:2]), arrays[2:])

    cotangent = sharded.partitioned(backward, ("BTNM", "BTN") * 2)(call, *arrays)
    return (derivatives.forward_only(_NO_SECOND_REVERSE, cotangent),)


def _backward(config: ChunkedConfig, residuals, cotangents) -> SoftmaxCall:
    call, out_BTNM, lse_BTN = residuals
    dout_BTNM, dlse_BTN = cotangents
    plan = make_plan(call, config)
    B, _, S, _, K, _, _ = call.sizes
    sums = accumulator(call.q_BTNH)
    totals = (
        jnp.zeros_like(call.q_BTNH),
        jnp.zeros_like(plan.call.k_BSKH),
        jnp.zeros_like(plan.call.v_BSKM),
        None if call.sink_logits_N is None else jnp.zeros(call.sink_logits_N.shape, sums),
        _bias_zeros(plan.call.bias, sums),
    )
    totals = varying.like(call.q_BTNH, totals)
    saved = (out_BTNM, lse_BTN[..., None], dout_BTNM, dlse_BTN[..., None])

    def body(i, totals):
        return _backward_head(load_head(plan, i), saved, totals)

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
        first_row=None,
        first_head=None,
    )


_attend = jax.custom_vjp(_partitioned, nondiff_argnums=(1,))
_attend.defvjp(_residuals, _cotangent)


def _backward_head(head: KVHead, saved, totals):
    plan, call, G = head.plan, head.plan.call, head.plan.G
    sums = accumulator(call.q_BTNH)
    *_, H, M = call.sizes
    b, kv = head.batch, head.kv_head
    dq_BTNH, dk_BSKH, dv_BSKM, dsinks_N, dbias = totals
    out_RM, do_RM = (load_queries(plan, plan.q, saved[x], b, kv) for x in (0, 2))
    lse_R, dlse_R = (load_queries(plan, None, saved[x], b, kv)[:, 0] for x in (1, 3))
    # A row without a key (lse = -inf) has P = 0 and passes no gradient, and so have rows of padding:
    # +inf does that, 2^(z - inf).
    padding_GT = jnp.broadcast_to(jnp.arange(plan.T_pad) >= plan.T, (G, plan.T_pad))
    dead_R = padding_GT.reshape(-1) | (lse_R == -jnp.inf)
    lse_R = jnp.where(dead_R, jnp.inf, lse_R * LOG2E)
    delta_R = (out_RM * do_RM).sum(1) - jnp.where(dead_R, 0.0, dlse_R)
    if dsinks_N is not None:
        sinks_G1 = cut(call.sink_logits_N, kv * G, G).astype(sums)[:, None]
        dsinks_G = -(_exp2(sinks_G1 * LOG2E - lse_R.reshape(G, -1)) * delta_R.reshape(G, -1)).sum(1)
        dsinks_N = paste(dsinks_N, cut(dsinks_N, kv * G, G) + dsinks_G, [kv * G])
    rows = (do_RM, lse_R, delta_R)

    def key_tile(j, carry):
        dq_HR, dk_BSKH, dv_BSKM, dbias = carry
        zeros = (jnp.zeros((plan.key_tile, H), sums), jnp.zeros((plan.key_tile, M), sums))
        zeros = varying.like(call.q_BTNH, zeros)
        start = j * plan.key_tile

        step = functools.partial(_backward_step, rows, start)
        dq_HR, dk_KH, dv_KM, dbias = sweep(head, step, j, (dq_HR, *zeros, dbias))
        # q was loaded times scale * log2 e (scale / softcap), and the softcap's slope carries its c.
        dk_KH = dk_KH * (1 / LOG2E if call.softcap is None else 1.0)
        dv_KM = dv_KM * (1 / (1 - call.dropout_rate))
        dk_BSKH = store(dk_BSKH, dk_KH[None], b, kv, start)
        return dq_HR, dk_BSKH, store(dv_BSKM, dv_KM[None], b, kv, start), dbias

    dq_HR = varying.like(call.q_BTNH, jnp.zeros((H, G * plan.T_pad), sums))
    dq_HR, dk_BSKH, dv_BSKM, dbias = lax.fori_loop(
        *plan.key_tiles, key_tile, (dq_HR, dk_BSKH, dv_BSKM, dbias)
    )
    dq_RH = dq_HR.T * (call.scale if call.softcap is None else call.scale / call.softcap)
    dq_BTNH = store(dq_BTNH, dq_RH.reshape(G, plan.T_pad, H)[:, : plan.T], b, kv)
    return dq_BTNH, dk_BSKH, dv_BSKM, dsinks_N, dbias


def _backward_step(rows, tile_start, tile_of, at, state):
    """Scores are transposed, [keys, queries], and so is dq: then no product transposes a tile."""
    tile = tile_of(at)
    call = tile.head.plan.call
    do_QM, lse_Q, delta_Q = (tile.take(x) for x in rows)
    dq_HR, dk_KH, dv_KM, dbias = state
    q_QH = tile.take(tile.head.q_RH)
    z_KQ, tanh_KQ = _exponents(tile, lax.dot_general(tile.k_KH, q_QH, _COLUMNS, _FULL), transposed=True)
    p_KQ = _exp2(z_KQ - lse_Q[None])
    dp_KQ = lax.dot_general(tile.v_KM, do_QM, _COLUMNS, _FULL)
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
    dv_KM = _add_rows(dv_KM, lax.dot_general(kept_KQ, do_QM, _ROWS, _FULL), offset)
    dk_KH = _add_rows(dk_KH, lax.dot_general(ds_KQ, q_QH, _ROWS, _FULL), offset)
    dq_HR = tile.put(dq_HR, tile.take(dq_HR, 1) + lax.dot_general(tile.k_HK, ds_KQ, _ROWS, _FULL), 1)
    return dq_HR, dk_KH, dv_KM, dbias


def _add_rows(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    if part.shape == total.shape:
        return total + part
    return paste(total, cut(total, start, part.shape[0]) + part, [start])


def _bias_zeros(bias: Any, sums: Any) -> Any:
    """Where the bias gradient is gathered: the bias's structure; None if nothing is learned."""
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(bias)):
        return None
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, sums if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), bias
    )


def _add_bias_gradient(tile: ChunkedTile, dbias: Any, ds_KQ: jax.Array) -> Any:
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
