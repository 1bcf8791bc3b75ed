"""Selected attention by gathering: each query's blocks are copied side by side, a chunk of queries at a time.

With n blocks of C tokens the work is O(T n C) whatever S is, and so is the memory of a chunk. The backward
keeps q, k, v alone: it gathers once more, differentiates the chunk and adds what its keys and values get to
the totals, so that a gradient costs a chunk too.

Where a token stands follows from its position: the tokens of a document stand in a row, so slot - position
is one number for each document. Rows of which that is not true give NaN.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.dtypes import accumulator, wider
from attention_jax.ops import derivatives, varying
from attention_jax.ops.arguments import positive_integer
from attention_jax.ops.selected.common import (
    CHUNK_ELEMENTS,
    SelectedCall,
    chunk_length,
    cut,
    join,
    over_chunks,
)
from attention_jax.ops.tokens import select_valid

_NO_FORWARD = derivatives.no_forward_mode("gathered", "selected_attention", use="reference")


class _Rows(NamedTuple):
    """Queries and what each needs to find its keys; `first_BT` is the slot of position 0 of its document."""

    q_BTNH: jax.Array
    blocks_BTKn: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None
    first_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class GatheredConfig:
    """Sizes of "gathered"."""

    #: Elements of keys and values that are gathered at once, which decides how many queries a chunk has.
    chunk_elements: int = CHUNK_ELEMENTS

    def __post_init__(self) -> None:
        positive_integer("chunk_elements", self.chunk_elements)


def attend(call: SelectedCall, config: GatheredConfig) -> jax.Array:
    """out_BTNM in q's dtype."""
    return _attend(config, derivatives.reverse_only(_NO_FORWARD, call))


def _forward(config: GatheredConfig, call: SelectedCall) -> jax.Array:
    call, rows, broken_B, length = _prepared(config, call)
    out_BTNM = over_chunks(lambda rows: _attend_rows(call, rows), rows, call.sizes[1], length)
    # A traced position cannot raise; NaN is seen, keys left out are not.
    return jnp.where(broken_B[:, None, None, None], jnp.nan, out_BTNM)


def _residuals(config: GatheredConfig, call: SelectedCall):
    return _forward(config, call), call


def _backward(config: GatheredConfig, given: SelectedCall, dout_BTNM: jax.Array):
    call, rows, _, length = _prepared(config, given)
    batch, heads = _batch_and_head(call)

    def body(totals, chunk):
        rows, dout_BTNM = chunk
        slots_BTKL, seen_BTKL = _find(call, rows)
        # In float32 or wider from here on, so that every part is rounded once, in the total.
        learned = [wider(x) for x in (rows.q_BTNH, *_gathered(call, slots_BTKL, seen_BTKL))]
        _, pull = jax.vjp(lambda *qkv: _softmax_attention(call, *qkv, seen_BTKL), *learned)
        dq_BTNH, *parts = pull(wider(dout_BTNM))
        totals = [
            total.at[batch, slots_BTKL, heads].add(part) for total, part in zip(totals, parts, strict=True)
        ]
        return totals, dq_BTNH

    totals = [jnp.zeros(x.shape, accumulator(x)) for x in (call.k_BSKH, call.v_BSKM)]
    totals = varying.like(call.q_BTNH, totals)
    (dk_BSKH, dv_BSKM), dq = jax.lax.scan(body, totals, cut((rows, dout_BTNM), length))
    # None stands for the zero cotangents of integer arrays.
    gradient = dataclasses.replace(
        given,
        q_BTNH=join(dq, call.sizes[1]).astype(given.q_BTNH.dtype),
        k_BSKH=dk_BSKH.astype(given.k_BSKH.dtype),
        v_BSKM=dv_BSKM.astype(given.v_BSKM.dtype),
        block_indices_BTKn=None, q_positions_BT=None, k_positions_BS=None,
        q_segments_BT=None, k_segments_BS=None,
    )  # fmt: skip
    return (gradient,)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attend.defvjp(_residuals, _backward)


def _prepared(config: GatheredConfig, call: SelectedCall) -> tuple[SelectedCall, _Rows, jax.Array, int]:
    """The call with empty queries set to 0, its queries, rows that cannot be served, the chunk length."""
    B, T, _, _, K, H, M = call.sizes
    q = select_valid(call.q_BTNH, call.q_positions_BT >= 0)
    call = dataclasses.replace(call, q_BTNH=q)
    first_BT, broken_B = _first_slots(call)
    rows = _Rows(q, call.block_indices_BTKn, call.q_positions_BT, call.q_segments_BT, first_BT)
    gathered = call.block_indices_BTKn.shape[-1] * call.block_size
    return call, rows, broken_B, chunk_length(T, B * K * gathered * (H + M), config.chunk_elements)


def _first_slots(call: SelectedCall) -> tuple[jax.Array, jax.Array]:
    """The slot [B, T] of position 0 of each query's document, and rows whose documents are not contiguous."""
    k_pos_BS = call.k_positions_BS
    valid_BS = k_pos_BS >= 0
    first_BS = jnp.arange(k_pos_BS.shape[1], dtype=jnp.int32)[None] - k_pos_BS
    if call.q_segments_BT is None:
        some_B1 = jnp.argmax(valid_BS, axis=1, keepdims=True)
        own_B1 = jnp.take_along_axis(first_BS, some_B1, axis=1)
        first_BT, expected_BS = jnp.broadcast_to(own_B1, call.q_positions_BT.shape), own_B1
    else:
        none = jnp.iinfo(jnp.int32).max

        def look_up(ids_S, first_S, q_ids_T):
            # Any key of the document will do: sorted by document, the first is found by bisection.
            order_S = jnp.argsort(ids_S)
            at_T, at_S = (jnp.searchsorted(ids_S[order_S], ids) for ids in (q_ids_T, ids_S))
            return tuple(first_S[order_S[jnp.minimum(at, ids_S.size - 1)]] for at in (at_T, at_S))

        ids_BS = jnp.where(valid_BS, call.k_segments_BS, none)
        first_BT, expected_BS = jax.vmap(look_up)(ids_BS, first_BS, call.q_segments_BT)
    return first_BT, (valid_BS & (first_BS != expected_BS)).any(1)


def _attend_rows(call: SelectedCall, rows: _Rows) -> jax.Array:
    slots_BTKL, seen_BTKL = _find(call, rows)
    k_BTKLH, v_BTKLM = _gathered(call, slots_BTKL, seen_BTKL)
    return _softmax_attention(call, rows.q_BTNH, k_BTKLH, v_BTKLM, seen_BTKL)


def _gathered(call: SelectedCall, slots_BTKL: jax.Array, seen_BTKL: jax.Array) -> list[jax.Array]:
    """Keys and values of the slots, 0 where nothing is seen, since an empty slot may hold NaN.

    They are read in the order of a cache, [B, K, S, H]: a step would else transpose all of it.
    """
    batch, heads = _batch_and_head(call)
    found = (x.swapaxes(1, 2)[batch, heads, slots_BTKL] for x in (call.k_BSKH, call.v_BSKM))
    return [jnp.where(seen_BTKL[..., None], x, jnp.zeros((), x.dtype)) for x in found]


def _batch_and_head(call: SelectedCall) -> tuple[jax.Array, jax.Array]:
    """Indices that with slots [B, T, K, L] pick features from [B, S, K, H]."""
    B, _, _, _, K, _, _ = call.sizes
    rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (B, K))
    return rows[:, None, None, None], heads[None, None, :, None]


def _find(call: SelectedCall, rows: _Rows) -> tuple[jax.Array, jax.Array]:
    """Slots [B, T, K, n * block_size] of the named blocks' tokens, all in range, and which are seen."""
    B, _, S, *_ = call.sizes
    blocks, q_pos_BT11 = rows.blocks_BTKn, rows.positions_BT[..., None, None]
    n = blocks.shape[-1]
    before = jnp.tril(jnp.ones((n, n), bool), -1)
    repeated_BTKn = ((blocks[..., :, None] == blocks[..., None, :]) & before[None, None, None]).any(-1)
    # An index past the query's own block is hidden anyway; as a product it might overflow.
    live_BTKn = (blocks >= 0) & (blocks <= q_pos_BT11 // call.block_size) & (repeated_BTKn == False)  # noqa: E712
    within_1111C = jnp.arange(call.block_size, dtype=jnp.int32)[None, None, None, None]
    positions = jnp.where(live_BTKn, blocks, 0)[..., None] * call.block_size + within_1111C
    positions_BTKL = positions.reshape(*blocks.shape[:3], -1)
    slots_BTKL = positions_BTKL + rows.first_BT[..., None, None]
    inside_BTKL = (slots_BTKL >= 0) & (slots_BTKL < S)
    slots_BTKL = jnp.clip(slots_BTKL, 0, S - 1)
    batch = jnp.arange(B)[:, None, None, None]
    seen_BTKL = (
        jnp.repeat(live_BTKn, call.block_size, axis=-1)
        & inside_BTKL
        & (positions_BTKL <= q_pos_BT11)
        & (call.k_positions_BS[batch, slots_BTKL] == positions_BTKL)
    )
    if rows.segments_BT is not None:
        seen_BTKL &= call.k_segments_BS[batch, slots_BTKL] == rows.segments_BT[..., None, None]
    return slots_BTKL, seen_BTKL


def _softmax_attention(call: SelectedCall, q_BTNH, k_BTKLH, v_BTKLM, seen_BTKL) -> jax.Array:
    """Attention of each query over its own keys, in float32; a row without a key gives 0."""
    B, T, K, _, H = k_BTKLH.shape
    q_BTKGH = wider(q_BTNH).reshape(B, T, K, -1, H) * call.scale
    s_BTKGL = jnp.einsum("btkgh,btklh->btkgl", q_BTKGH, wider(k_BTKLH), precision="highest")
    seen_BTK1L = seen_BTKL[:, :, :, None]
    s_BTKGL = jnp.where(seen_BTK1L, s_BTKGL, -jnp.inf)
    m_BTKG1 = s_BTKGL.max(-1, keepdims=True)
    # The maximum only shifts the exponent, so no gradient flows through it.
    m_BTKG1 = jax.lax.stop_gradient(jnp.where(m_BTKG1 == -jnp.inf, 0.0, m_BTKG1))
    p_BTKGL = jnp.exp(s_BTKGL - m_BTKG1)
    l_BTKG1 = p_BTKGL.sum(-1, keepdims=True)
    w_BTKGL = jnp.where(seen_BTK1L, p_BTKGL / jnp.where(l_BTKG1 > 0, l_BTKG1, 1.0), 0.0)
    out = jnp.einsum("btkgl,btklm->btkgm", w_BTKGL, wider(v_BTKLM), precision="highest")
    return out.reshape(B, T, -1, v_BTKLM.shape[-1]).astype(q_BTNH.dtype)
