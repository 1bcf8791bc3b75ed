"""The backward kernel: dQ, dK and dV, and the gradient of the bias, in one sweep over key blocks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention_jax.ops import varying
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_tpu import steps as steps_of
from attention_jax.ops.softmax.mosaic_tpu.config import MosaicTPUConfig
from attention_jax.ops.softmax.mosaic_tpu.plan import (
    NN,
    NT,
    TPUGeometry,
    TPUPlan,
    keys,
    make_plan,
    params,
    queries,
)  # fmt: skip
from attention_jax.ops.softmax.mosaic_tpu.scores import LOG2E, Operand, TPUTile, operand
from attention_jax.ops.softmax.mosaic_tpu.steps import LANES
from attention_jax.ops.tokens import positions_or_arange, select_valid


def backward(
    config: MosaicTPUConfig, call: SoftmaxCall, out_BTNM, lse_BTN, dout_BTNM, dlse_BTN
) -> SoftmaxCall:
    plan = make_plan(call, config, backward=True)
    geometry = plan.geometry
    _, T, S, _, _, H, M = call.sizes
    # A row without a key (lse = -inf) has P = 0 and passes no gradient, and so have rows of padding:
    # +inf does that, 2^(x - inf).
    q_valid = call.q_valid_BT
    out_BTNM, dout_BTNM = (select_valid(x, q_valid) for x in (out_BTNM, dout_BTNM))
    dead_BTN = lse_BTN == -jnp.inf
    delta_BTN = (out_BTNM.astype(jnp.float32) * dout_BTNM.astype(jnp.float32)).sum(-1)
    delta_BTN = delta_BTN - jnp.where(dead_BTN, 0.0, dlse_BTN)
    lse_BTN = jnp.where(dead_BTN, jnp.inf, lse_BTN * LOG2E)
    for name, x_BTN, fill in (("lse", lse_BTN, jnp.inf), ("delta", delta_BTN, 0)):
        x_BNT1 = x_BTN.swapaxes(1, 2)[..., None]
        plan.operands[name] = operand(x_BNT1, geometry.T_pad, geometry.S_pad, True, fill, queries=True)
    dq_BNTH, dk_PBKSH, dv_PBKSM, *dcut = _backward_call(plan, dout_BTNM)
    dk_BKSH, dv_BKSM = (x[0] if len(x) == 1 else x.sum(0) for x in (dk_PBKSH, dv_PBKSM))
    dtype = call.q_BTNH.dtype
    # None stands for the zero cotangents of integer and boolean arrays.
    return dataclasses.replace(
        call,
        q_BTNH=dq_BNTH.swapaxes(1, 2)[:, :T, :, :H],
        k_BSKH=dk_BKSH.swapaxes(1, 2)[:, :S, :, :H].astype(dtype),
        v_BSKM=dv_BKSM.swapaxes(1, 2)[:, :S, :, :M].astype(dtype),
        sink_logits_N=_sinks_gradient(call, lse_BTN, delta_BTN),
        bias=_bias_gradient(plan, dcut),
        q_positions_BT=None,
        k_positions_BS=None,
        q_segments_BT=None,
        k_segments_BS=None,
        mask_BNTS=None,
        dropout_words=None,
        first_row=None,
        first_head=None,
    )


def _sinks_gradient(call: SoftmaxCall, lse_BTN: jax.Array, delta_BTN: jax.Array) -> jax.Array | None:
    """lse in base 2, +inf where a row has none."""
    if call.sink_logits_N is None:
        return None
    sinks_N = call.sink_logits_N.astype(jnp.float32) * LOG2E
    return -(jnp.exp2(sinks_N - lse_BTN) * delta_BTN).sum((0, 1)).astype(call.sink_logits_N.dtype)


@dataclasses.dataclass(frozen=True)
class _CutGradient:
    """Where the gradient of one learned value of the bias's cut gathers.

    By query: like dQ, a row per query block; by key: per head while its key block is in place; else per head.
    """

    value: Operand
    number: int  # within the cut

    @property
    def by_key(self) -> bool:
        return self.value.by_key

    @property
    def by_query(self) -> bool:
        return self.value.by_query

    def scratch(self, geometry: TPUGeometry) -> Any:
        if self.by_key:
            return pltpu.VMEM((geometry.G, geometry.k_block, 1), jnp.float32)
        rows = geometry.part_rows if self.by_query else geometry.G
        return pltpu.VMEM((rows, 1, geometry.q_block), jnp.float32)

    def out(self, plan: TPUPlan, closing: Any, part: Any) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        B, _, _, N, K, *_ = plan.call.sizes
        g = plan.geometry
        if self.by_query:
            spec = pl.BlockSpec(
                (None, None, 1, g.q_block), lambda *at: (*closing(*at)[:2], 0, closing(*at)[2])
            )
            shape = (B, N, 1, g.T_pad)
        elif self.by_key:
            spec = pl.BlockSpec(
                (None, None, None, g.G, 1, g.k_block),
                lambda *at: (part(*at), at[0], at[1], 0, 0, plan.where(*at)[4]),
            )
            shape = (g.parts, B, K, g.G, 1, g.S_pad)
        else:
            spec = pl.BlockSpec((None, None, g.G, 1, g.q_block), lambda *at: (at[0], at[1], 0, 0, 0))
            shape = (B, K, g.G, 1, g.q_block)
        return spec, varying.shape_like(plan.call.q_BTNH, shape, jnp.float32)

    def whole(self, plan: TPUPlan, found: jax.Array) -> jax.Array:
        """The kernel's output as the gradient of the value, [B, N, T or 1, S or 1]."""
        B, T, S, N, *_ = plan.call.sizes
        if self.by_query:
            return found[:, :, 0, :T, None]
        if self.by_key:
            return found.sum(0).reshape(B, N, 1, -1)[..., :S]
        return found.sum(-1).reshape(B, N, 1, 1)


def _cut_gradients(plan: TPUPlan) -> list[_CutGradient]:
    learned = [] if plan.split is None else plan.split.learned
    return [_CutGradient(plan.operands[f"bias{i}"], i) for i in learned]


def _bias_gradient(plan: TPUPlan, found: list[jax.Array]) -> Any:
    """The cotangent of the bias from those of the learned values of its cut."""
    if not found:
        return None
    call = plan.call
    _, T, S, N, *_ = call.sizes
    q_pos, k_pos = positions_or_arange(call.q_positions_BT, T), positions_or_arange(call.k_positions_BS, S)
    values, vjp = jax.vjp(lambda bias: plan.split.outside(bias, N, q_pos, k_pos), call.bias)
    cotangents = [varying.like(x, jnp.zeros_like(x)) if jnp.issubdtype(x.dtype, jnp.floating)
                  else np.zeros(x.shape, jax.dtypes.float0) for x in values]  # fmt: skip
    for gradient, x in zip(_cut_gradients(plan), found, strict=True):
        x = gradient.whole(plan, x)
        missing = [i for i, n in enumerate(values[gradient.number].shape) if n == 1 and x.shape[i] > 1]
        cotangents[gradient.number] = x.sum(missing, keepdims=True)
    return vjp(cotangents)[0]


def _backward_call(plan: TPUPlan, dout_BTNM: jax.Array) -> list[jax.Array]:
    call, geometry, lists = plan.call, plan.geometry, plan.steps.lists
    B, _, _, N, K, *_ = call.sizes
    q, k, H, M = geometry.q_block, geometry.k_block, geometry.H, geometry.M
    # Partial sums stay in float32 until they are added.
    dtype = call.q_BTNH.dtype
    key_dtype = dtype if geometry.parts == 1 else jnp.float32

    def closing(b, h, s, *lists):
        """(b, query head, query block) that is written at this step or next."""
        row = lists[3][plan.at(b, s)]
        return b, h * geometry.G + lax.div(row, np.int32(geometry.nq)), lax.rem(row, np.int32(geometry.nq))

    def part(b, h, s, *lists):
        return lax.div(lists[0][plan.at(b, s)], np.int32(geometry.part_rows))

    def by_key(*at):
        b, _, kv, _, j = plan.where(*at)
        return part(*at), b, kv, j, 0

    cut = _cut_gradients(plan)
    cut_specs, cut_shapes = zip(*(x.out(plan, closing, part) for x in cut), strict=True) if cut else ((), ())
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=plan.grid,
            in_specs=[
                plan.query_spec(H), plan.key_spec(H), plan.key_spec(M), plan.query_spec(M),
                *plan.operand_specs(),
            ],
            out_specs=[
                pl.BlockSpec((None, None, q, H), lambda *at: (*closing(*at), 0)),
                pl.BlockSpec((None, None, None, k, H), by_key),
                pl.BlockSpec((None, None, None, k, M), by_key),
                *cut_specs,
            ],
            scratch_shapes=[
                pltpu.VMEM((geometry.part_rows, H, q), jnp.float32),
                pltpu.VMEM((k, H), jnp.float32),
                pltpu.VMEM((k, M), jnp.float32),
                pltpu.VMEM((H, k), dtype),
                *(x.scratch(geometry) for x in cut),
            ],
        ),
        out_shape=[
            varying.shape_like(call.q_BTNH, (B, N, geometry.T_pad, H), dtype),
            varying.shape_like(call.q_BTNH, (geometry.parts, B, K, geometry.S_pad, H), key_dtype),
            varying.shape_like(call.q_BTNH, (geometry.parts, B, K, geometry.S_pad, M), key_dtype),
            *cut_shapes,
        ],
        name="attention_backward",
        **params(plan),
    )(
        *lists,
        queries(plan, call.q_BTNH, H),
        keys(plan, call.k_BSKH, H),
        keys(plan, call.v_BSKM, M),
        queries(plan, dout_BTNM, M),
        *(x.array for x in plan.operands.values()),
    )  # fmt: skip


def _backward_kernel(plan: TPUPlan, *refs: Any) -> None:
    """Scores are transposed: keys along the sublanes, queries along the lanes."""
    geometry, call, cut = plan.geometry, plan.call, _cut_gradients(plan)
    lists, refs = refs[: len(plan.steps.lists)], refs[len(plan.steps.lists) :]
    q_ref, k_ref, v_ref, do_ref, *more = refs
    extra = dict(zip(plan.operands, more[: len(plan.operands)], strict=True))
    more = more[len(plan.operands) :]
    dq_ref, dk_ref, dv_ref, *more = more
    dcut_refs, more = more[: len(cut)], more[len(cut) :]
    dq_acc, dk_acc, dv_acc, kt_ref, *cut_accs = more
    at = plan.at(pl.program_id(0), pl.program_id(2))
    flags, row = lists[2][at], lists[0][at]
    head = lax.div(row, np.int32(geometry.nq))
    row = lax.rem(row, np.int32(geometry.part_rows))
    tile = plan.tile(extra, lists)

    @pl.when(flags & steps_of.FIRST != 0)
    def new_keys():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)
        kt_ref[...] = k_ref[...].T
        for gradient, acc in zip(cut, cut_accs, strict=True):
            if gradient.by_key:
                acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(flags & steps_of.OPENS != 0)
    def new_queries():
        dq_acc[row] = jnp.zeros(dq_acc.shape[1:], jnp.float32)
        for gradient, acc in zip(cut, cut_accs, strict=True):
            if gradient.by_query:
                acc[row] = jnp.zeros(acc.shape[1:], jnp.float32)

    @pl.when(pl.program_id(2) == 0)
    def new_heads():
        for gradient, acc in zip(cut, cut_accs, strict=True):
            if not (gradient.by_query or gradient.by_key):
                acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def block(masked: bool):
        q, do = q_ref[...], do_ref[...]
        x, tanh = tile.exponents(plan.dot(k_ref[...], q, NT), masked)
        p = jnp.exp2(x - extra["lse"][...])
        survives = tile.survives()
        survivors = p if survives is None else jnp.where(survives, p, 0.0)
        dv_acc[...] += plan.dot(survivors, do, NN)
        dp = plan.dot(v_ref[...], do, NT)
        if survives is not None:
            dp = jnp.where(survives, dp * (1 / (1 - call.dropout_rate)), 0.0)
        ds = _visible(p, p * (dp - extra["delta"][...]), masked)
        _add_cut_gradients(tile, cut, cut_accs, ds, row, head)
        if tanh is not None:
            ds = _visible(p, ds * (1 - tanh * tanh), masked)
        dk_acc[...] += plan.dot(ds, q, NN)
        dq_acc[row] += plan.dot(kt_ref[...], ds, NN)

    pl.when(flags & steps_of.FULL != 0)(lambda: block(False))
    pl.when(flags & steps_of.PARTIAL != 0)(lambda: block(True))

    @pl.when(flags & steps_of.LAST != 0)
    def write_keys():
        dk_ref[...] = (dk_acc[...] * call.scale).astype(dk_ref.dtype)
        dv_ref[...] = (dv_acc[...] * (1 / (1 - call.dropout_rate))).astype(dv_ref.dtype)
        for gradient, acc, ref in zip(cut, cut_accs, dcut_refs, strict=True):
            if gradient.by_key:
                for g in range(geometry.G):
                    ref[g] = jnp.broadcast_to(acc[g], (geometry.k_block, LANES)).T[:1]

    @pl.when(flags & steps_of.CLOSES != 0)
    def write_queries():
        dq_ref[...] = (dq_acc[row].T * call.scale).astype(dq_ref.dtype)
        for gradient, acc, ref in zip(cut, cut_accs, dcut_refs, strict=True):
            if gradient.by_query:
                ref[...] = acc[row]

    @pl.when(pl.program_id(2) == plan.steps.length - 1)
    def write_heads():
        for gradient, acc, ref in zip(cut, cut_accs, dcut_refs, strict=True):
            if not (gradient.by_query or gradient.by_key):
                ref[...] = acc[...]


def _visible(p: jax.Array, ds: jax.Array, masked: bool) -> jax.Array:
    """ds, 0 where p is: where a pair is hidden its products may have overflowed, and 0 * Inf is NaN."""
    return jnp.where(p == 0, 0.0, ds) if masked else ds


def _add_cut_gradients(tile: TPUTile, cut: list[_CutGradient], accs: list[Any], ds, row, head) -> None:
    """Differentiates the block's bias and adds what the learned values of the cut get of it."""
    if not cut:
        return
    inputs = [jnp.broadcast_to(x, ds.shape) for x in tile.bias_inputs()]

    def score(learned):
        given = list(inputs)
        for gradient, x in zip(cut, learned, strict=True):
            given[gradient.number] = x
        return jnp.broadcast_to(tile.bias(given), ds.shape)

    _, vjp = jax.vjp(score, [inputs[gradient.number] for gradient in cut])
    for gradient, acc, dx in zip(cut, accs, vjp(ds)[0], strict=True):
        if gradient.by_key:
            acc[head] += dx.sum(1, keepdims=True)
        else:
            acc[row if gradient.by_query else head] += dx.sum(0, keepdims=True)
