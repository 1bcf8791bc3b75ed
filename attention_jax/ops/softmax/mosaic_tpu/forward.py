"""The forward kernel: online softmax over the live key blocks of one query block after another."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention_jax.ops import varying
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_tpu import steps as steps_of
from attention_jax.ops.softmax.mosaic_tpu.config import MosaicTPUConfig
from attention_jax.ops.softmax.mosaic_tpu.plan import NN, NT, TPUPlan, keys, make_plan, params, queries
from attention_jax.ops.softmax.mosaic_tpu.scores import LOG2E, operand
from attention_jax.ops.softmax.mosaic_tpu.steps import LANES

# A finite start for the running maximum: -inf - -inf never appears.
_LOWEST = float(np.finfo(np.float32).min)


def forward(config: MosaicTPUConfig, call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    plan = make_plan(call, config, backward=False)
    geometry, lists = plan.geometry, plan.steps.lists
    B, T, _, N, _, _, M = call.sizes
    if call.sink_logits_N is not None:
        sinks = call.sink_logits_N.astype(jnp.float32).reshape(1, N, 1, 1) * LOG2E
        plan.operands["sinks"] = operand(sinks, geometry.T_pad, geometry.S_pad, False)

    def lse_index(*at):
        b, n, _, i, _ = plan.where(*at)
        return b, n, 0, i

    q_block, dtype = geometry.q_block, call.q_BTNH.dtype
    out_BNTM, lse_BN1T = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=plan.grid,
            in_specs=[
                plan.query_spec(geometry.H), plan.key_spec(geometry.H), plan.key_spec(geometry.M),
                *plan.operand_specs(),
            ],
            out_specs=[
                plan.query_spec(geometry.M), pl.BlockSpec((None, None, 1, q_block), lse_index),
            ],
            scratch_shapes=[
                pltpu.VMEM((q_block, LANES), jnp.float32),
                pltpu.VMEM((q_block, LANES), jnp.float32),
                pltpu.VMEM((q_block, geometry.M), jnp.float32),
            ],
        ),
        out_shape=[
            varying.shape_like(call.q_BTNH, (B, N, geometry.T_pad, geometry.M), dtype),
            varying.shape_like(call.q_BTNH, (B, N, 1, geometry.T_pad), jnp.float32),
        ],
        name="attention_forward",
        **params(plan),
    )(
        *lists,
        queries(plan, call.q_BTNH, geometry.H),
        keys(plan, call.k_BSKH, geometry.H),
        keys(plan, call.v_BSKM, geometry.M),
        *(x.array for x in plan.operands.values()),
    )  # fmt: skip
    return out_BNTM.swapaxes(1, 2)[:, :T, :, :M], lse_BN1T[:, :, 0, :T].swapaxes(1, 2)


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] of equal columns as [rows, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _forward_kernel(plan: TPUPlan, *refs: Any) -> None:
    """Rows of scores run along the sublanes; the maximum stands in all lanes, the sum is one per lane."""
    lists, refs = refs[: len(plan.steps.lists)], refs[len(plan.steps.lists) :]
    q_ref, k_ref, v_ref, *more = refs
    extra = dict(zip(plan.operands, more[: len(plan.operands)], strict=True))
    out_ref, lse_ref, m_ref, l_ref, acc_ref = more[len(plan.operands) :]
    flags = lists[2][plan.at(pl.program_id(0), pl.program_id(2))]
    tile = plan.tile(extra, lists)

    @pl.when(flags & steps_of.FIRST != 0)
    def start():
        m, total = jnp.full(m_ref.shape, _LOWEST, jnp.float32), jnp.zeros(l_ref.shape, jnp.float32)
        if "sinks" in extra:
            # The sink is a key without a value that every row has seen before its first block.
            sink = jnp.broadcast_to(extra["sinks"][...], m.shape)
            m, total = jnp.maximum(m, sink), jnp.where(sink == -jnp.inf, 0.0, 1 / LANES)
        m_ref[...], l_ref[...] = m, total
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def block(masked: bool):
        x, _ = tile.exponents(plan.dot(q_ref[...], k_ref[...], NT), masked)
        old = m_ref[...]
        m = jnp.maximum(old, x.max(1, keepdims=True))
        decay = jnp.exp2(old - m)
        p = jnp.exp2(x - _lanes(m, x.shape[1]))
        m_ref[...] = m
        l_ref[...] = l_ref[...] * decay + sum(jnp.split(p, p.shape[1] // LANES, axis=1))
        survives = tile.survives()
        if survives is not None:
            p = jnp.where(survives, p, 0.0)
        acc_ref[...] = acc_ref[...] * _lanes(decay, acc_ref.shape[1]) + plan.dot(p, v_ref[...], NN)

    pl.when(flags & steps_of.FULL != 0)(lambda: block(False))
    pl.when(flags & steps_of.PARTIAL != 0)(lambda: block(True))

    @pl.when(flags & steps_of.LAST != 0)
    def finish():
        total = jnp.broadcast_to(l_ref[...].sum(1, keepdims=True), l_ref.shape)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        scale = _lanes(1 / (total * (1 - plan.call.dropout_rate)), acc_ref.shape[1])
        out_ref[...] = (acc_ref[...] * scale).astype(out_ref.dtype)
        lse = jnp.where(some, (m_ref[...] + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
        lse_ref[...] = lse.T[:1]
