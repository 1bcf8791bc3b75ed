"""Softmax attention on a TPU: Pallas kernels over live blocks, forward and backward.

    x_s = log2(e) (softcap(q . k_s scale) + bias_s),  m' = max(m, max_s x_s),
    l' = l 2^(m-m') + sum_s 2^(x_s-m'),  a' = a 2^(m-m') + sum_s 2^(x_s-m') v_s,
    out = a / l,  lse = (m + log2 l) / log2(e)

over the key blocks that a query block sees (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
arXiv 2205.14135; block lists as in JAX's splash attention). The grid has one step per live block
(`mosaic_tpu_steps`); full blocks run no mask code, partial ones run `mask.keep` inside the kernel
(`mosaic_tpu_scores`).

The backward is one kernel with five matrix products per block. Scores are transposed, [keys, queries], so
that what belongs to a query (lse, delta) lies along the lanes and P and dS feed dV and dK as they are. The
query blocks of all heads of a group pass by one key block after another; dQ gathers in VMEM for all of them,
transposed, and each query block is written when its last key block has passed. Where dQ does not fit,
the queries come in parts, and partial sums of dK and dV are added afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention_jax.masks import Full
from attention_jax.ops.softmax import mosaic_tpu_steps as steps_of
from attention_jax.ops.softmax.blocks import BlockMap, Tokens, runtime_map, static_map
from attention_jax.ops.softmax.common import Call, positions_of, select_valid, valid_slots
from attention_jax.ops.softmax.mosaic_tpu_bias import Split, bias_refusal, split, untraceable
from attention_jax.ops.softmax.mosaic_tpu_scores import LOG2E, Operand, Tile, make_operands, operand
from attention_jax.ops.softmax.mosaic_tpu_steps import LANES, Steps, balanced, round_up

# A finite start for the running maximum: -inf - -inf never appears.
_LOWEST = float(np.finfo(np.float32).min)
_NN, _NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))

_MIB = 2**20
_VMEM = {"v4": 16 * _MIB, "v5p": 64 * _MIB, "7x": 64 * _MIB}  # of a core, by device kind; others have 128 MiB
_MAX_DENSE = 2**28  # entries of a dense mask made from a Mask object

_forced: Any = None  # None: only on a TPU. False: compile, wherever. Else: interpret


@contextlib.contextmanager
def forced(interpret: Any) -> Iterator[None]:
    """For tests: interpret with pltpu.InterpretParams, or (False) compile for a TPU that is not there.

    What is traced inside stays so: jit caches do not know of it.
    """
    global _forced
    before, _forced = _forced, interpret
    try:
        yield
    finally:
        _forced = before


def _interpret() -> Any:
    return False if _forced is None else _forced


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot run the call, forward or backward; None where they can."""
    if _forced is None and jax.default_backend() != "tpu":
        return f"needs a TPU, this is {jax.default_backend()}"
    _, T, S, _, _, H, M = call.sizes
    if call.q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{call.q_BTNH.dtype}; a TPU multiplies bfloat16 and float32"
    if max(H, M) > steps_of.WIDEST:
        return f"heads {max(H, M)} wide; the kernels hold at most {steps_of.WIDEST}"
    why_not = None if call.mask == Full() else untraceable(call.mask.keep)
    if why_not and not call.arange_positions:
        return f"{call.mask} needs {why_not} in a kernel, and positions are given"
    if why_not and T * S > _MAX_DENSE:
        return f"{call.mask} needs {why_not} in a kernel, and is no array beyond {_MAX_DENSE} entries"
    if call.bias is not None and (refused := bias_refusal(call.bias)):
        return refused
    return _too_long(call)


def _too_long(call: Call) -> str | None:
    """Do block lists fit scalar memory, dQ a bounded number of parts?"""
    geometry = _Geometry.of(call, backward=True)
    if geometry.parts > steps_of.MAX_PARTS:
        return f"dQ of {geometry.G} x {geometry.T_pad} queries needs {geometry.parts} sweeps, at most " + str(
            steps_of.MAX_PARTS
        )
    for backward in (False, True):
        geometry = _Geometry.of(call, backward)
        rows = 1 if call.arange_positions else call.sizes[0]
        block_map = _static_map(call, geometry) if call.arange_positions else geometry.all_blocks
        length = (
            steps_of.backward_length(block_map, geometry.G, geometry.parts)
            if backward
            else steps_of.forward_length(block_map)
        )
        size = rows * length * 4 * (4 if backward else 3)
        if size > steps_of.SCALAR_BYTES:
            return f"block lists of {size} bytes; scalar memory has room for {steps_of.SCALAR_BYTES}"
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


def _vmem() -> int:
    """Bytes of VMEM of the chip that is compiled for."""
    if _forced is not None and _forced is not False:
        return 128 * _MIB
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None) or jax.devices()[0]
    kind = device.device_kind
    return next((size for name, size in _VMEM.items() if name in kind.lower()), 128 * _MIB)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """How a call is cut: sizes of blocks, padded lengths and, in the backward, parts of the queries."""

    q_block: int
    k_block: int
    T_pad: int
    S_pad: int
    G: int
    H: int  # padded widths
    M: int
    parts: int
    itemsize: int

    @classmethod
    def of(cls, call: Call, backward: bool) -> _Geometry:
        _, T, S, N, K, H, M = call.sizes
        itemsize, G = call.q_BTNH.dtype.itemsize, N // K
        blocks = steps_of.blocks_for(max(H, M), itemsize)
        q_block, k_block = blocks.backward if backward else blocks.forward
        q_block, k_block = balanced(T, q_block), balanced(S, k_block)
        H, M = round_up(H, 16), round_up(M, 16)
        nq, parts = -(-T // q_block), 1
        if backward:
            # A quarter of VMEM for dQ, float32 and transposed; the parts are equal.
            parts = -(-G * nq * q_block * H * 4 // (_vmem() // 4))
            nq = round_up(nq, parts // math.gcd(parts, G))
        return cls(q_block, k_block, nq * q_block, round_up(S, k_block), G, H, M, parts, itemsize)

    @property
    def nq(self) -> int:
        return self.T_pad // self.q_block

    @property
    def nk(self) -> int:
        return self.S_pad // self.k_block

    @property
    def part_rows(self) -> int:
        """Query blocks of a part, over all heads of the group."""
        return self.G * self.nq // self.parts

    @property
    def all_blocks(self) -> BlockMap:
        ones = np.ones((1, self.nq, self.nk), bool)
        return BlockMap(ones, ones)

    def vmem_limit(self, backward: bool) -> int:
        """What to ask the compiler for: blocks twice (the pipeline loads ahead), accumulators, scores."""
        q, k, H, M = self.q_block, self.k_block, round_up(self.H, LANES), round_up(self.M, LANES)
        size = 2 * self.itemsize * (2 * q + 2 * k) * (H + M) + 10 * 4 * q * k
        size += 4 * (q + 2 * k) * (H + M + 2 * LANES)
        if backward:
            size += 4 * self.part_rows * self.q_block * self.H
        return min(max(size + 8 * _MIB, 16 * _MIB), _vmem() * 15 // 16)


def _static_map(call: Call, geometry: _Geometry) -> BlockMap:
    """The map of implicit positions over the padded lengths."""
    _, T, S, *_ = call.sizes
    found = static_map(call.mask, T, S, geometry.q_block, geometry.k_block)
    every = found.every & False if call.mask_BNTS is not None else found.every
    more = ((0, 0), (0, geometry.nq - found.some.shape[1]), (0, 0))
    return BlockMap(np.pad(found.some, more), np.pad(every, more))


def _runtime_map(call: Call, geometry: _Geometry) -> BlockMap:
    sides = []
    for positions, segments, length, padded in (
        (call.q_positions_BT, call.q_segments_BT, call.sizes[1], geometry.T_pad),
        (call.k_positions_BS, call.k_segments_BS, call.sizes[2], geometry.S_pad),
    ):
        valid = valid_slots(positions, segments)
        valid = jnp.ones((1, length), bool) if valid is None else valid
        pad = ((0, 0), (0, padded - length))
        segments = None if segments is None else jnp.pad(segments, pad, constant_values=-1)
        positions = jnp.pad(positions_of(positions, length), pad, constant_values=-1)
        sides.append(Tokens(positions, jnp.pad(valid, pad), segments))
    found = runtime_map(call.mask, *sides, geometry.q_block, geometry.k_block)
    every = found.every & False if call.mask_BNTS is not None else found.every
    return BlockMap(found.some, every)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What both kernels share: the call, its geometry, its steps and the operands beside q, k and v."""

    call: Call
    geometry: _Geometry
    steps: Steps
    split: Split | None
    mask_inside: bool  # `mask.keep` runs in the kernel
    operands: dict[str, Operand]
    backward: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        B, _, _, N, K, *_ = self.call.sizes
        return (B, K if self.backward else N, self.steps.length)

    @property
    def precision(self) -> lax.Precision:
        full = self.call.q_BTNH.dtype == jnp.float32
        return lax.Precision.HIGHEST if full else lax.Precision.DEFAULT

    def dot(self, a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
        """Factors in the call's dtype, float32 out."""
        dtype = self.call.q_BTNH.dtype
        return lax.dot_general(
            a.astype(dtype), b.astype(dtype), dims, precision=self.precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def at(self, b: Any, s: Any) -> Any:
        """Where step s of batch row b stands in the lists."""
        return s if self.steps.q_blocks.size == self.steps.length else b * self.steps.length + s

    def where(self, b: Any, h: Any, s: Any, q_blocks: Any, k_blocks: Any, *_: Any) -> tuple[Any, ...]:
        """(b, query head, kv head, query block, key block) of a grid step."""
        at, G, nq = self.at(b, s), self.geometry.G, self.geometry.nq
        if not self.backward:
            return b, h, lax.div(h, np.int32(G)), q_blocks[at], k_blocks[at]
        row = q_blocks[at]
        g, i = lax.div(row, np.int32(nq)), lax.rem(row, np.int32(nq))
        return b, h * G + g, h, i, k_blocks[at]

    def tile(self, refs: dict[str, Any], lists: tuple[Any, ...]) -> Tile:
        at = (pl.program_id(0), pl.program_id(1), pl.program_id(2))
        *_, i, j = self.where(*at, *lists)
        blocks = self.geometry.q_block, self.geometry.k_block
        return Tile(self.call, self.split, self.mask_inside, self.operands, refs, blocks, i, j,
                    self.geometry.S_pad, self.backward)  # fmt: skip

    def query_spec(self, width: int) -> pl.BlockSpec:
        def index(*at):
            b, n, _, i, _ = self.where(*at)
            return b, n, i, 0

        return pl.BlockSpec((None, None, self.geometry.q_block, width), index)

    def key_spec(self, width: int) -> pl.BlockSpec:
        def index(*at):
            b, _, kv, _, j = self.where(*at)
            return b, kv, j, 0

        return pl.BlockSpec((None, None, self.geometry.k_block, width), index)

    def operand_specs(self) -> list[pl.BlockSpec]:
        blocks = self.geometry.q_block, self.geometry.k_block
        return [x.spec(*blocks, self.backward, self.where) for x in self.operands.values()]


def _make_plan(call: Call, backward: bool) -> _Plan:
    geometry = _Geometry.of(call, backward)
    block_map = _static_map(call, geometry) if call.arange_positions else _runtime_map(call, geometry)
    if backward:
        steps = steps_of.backward_steps(block_map, geometry.G, geometry.parts)
    else:
        steps = steps_of.forward_steps(block_map)
    cut = None if call.bias is None else split(call.bias)
    mask_BNTS, inside = call.mask_BNTS, call.mask != Full()
    if inside and untraceable(call.mask.keep):
        # Positions are implicit: the mask is an array.
        _, T, S, *_ = call.sizes
        table = jnp.asarray(call.mask.dense(np.arange(T), np.arange(S)))[None, None]
        mask_BNTS = table if mask_BNTS is None else table & mask_BNTS
        inside = False
    operands = make_operands(call, cut, mask_BNTS, geometry.T_pad, geometry.S_pad, backward)
    return _Plan(call, geometry, steps, cut, inside, operands, backward)


def _heads_first(x_BLNH: jax.Array, valid: jax.Array | None, length: int, width: int) -> jax.Array:
    """[B, N, padded length, padded width], invalid slots selected to 0."""
    x = select_valid(x_BLNH, valid).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - x.shape[3])))


def _queries(plan: _Plan, x_BTNH: jax.Array, width: int) -> jax.Array:
    valid = valid_slots(plan.call.q_positions_BT, plan.call.q_segments_BT)
    return _heads_first(x_BTNH, valid, plan.geometry.T_pad, width)


def _keys(plan: _Plan, x_BSKH: jax.Array, width: int) -> jax.Array:
    valid = valid_slots(plan.call.k_positions_BS, plan.call.k_segments_BS)
    return _heads_first(x_BSKH, valid, plan.geometry.S_pad, width)


def _params(plan: _Plan) -> dict[str, Any]:
    return {
        "interpret": _interpret(),
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.geometry.vmem_limit(plan.backward),
        ),
    }


def _forward(call: Call) -> tuple[jax.Array, jax.Array]:
    plan = _make_plan(call, backward=False)
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
            jax.ShapeDtypeStruct((B, N, geometry.T_pad, geometry.M), dtype),
            jax.ShapeDtypeStruct((B, N, 1, geometry.T_pad), jnp.float32),
        ],
        name="attention_forward",
        **_params(plan),
    )(
        *lists,
        _queries(plan, call.q_BTNH, geometry.H),
        _keys(plan, call.k_BSKH, geometry.H),
        _keys(plan, call.v_BSKM, geometry.M),
        *(x.array for x in plan.operands.values()),
    )  # fmt: skip
    return out_BNTM.swapaxes(1, 2)[:, :T, :, :M], lse_BN1T[:, :, 0, :T].swapaxes(1, 2)


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] of equal columns as [rows, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _forward_kernel(plan: _Plan, *refs: Any) -> None:
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
        x, _, _ = tile.exponents(plan.dot(q_ref[...], k_ref[...], _NT), masked)
        old = m_ref[...]
        m = jnp.maximum(old, x.max(1, keepdims=True))
        decay = jnp.exp2(old - m)
        p = jnp.exp2(x - _lanes(m, x.shape[1]))
        m_ref[...] = m
        l_ref[...] = l_ref[...] * decay + sum(jnp.split(p, p.shape[1] // LANES, axis=1))
        survives = tile.survives()
        if survives is not None:
            p = jnp.where(survives, p, 0.0)
        acc_ref[...] = acc_ref[...] * _lanes(decay, acc_ref.shape[1]) + plan.dot(p, v_ref[...], _NN)

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


def _backward(call: Call, out_BTNM, lse_BTN, dout_BTNM, dlse_BTN) -> Call:
    plan = _make_plan(call, backward=True)
    geometry = plan.geometry
    _, T, S, _, _, H, M = call.sizes
    # A row without a key (lse = -inf) has P = 0 and passes no gradient, and so have rows of padding:
    # +inf does that, 2^(x - inf).
    q_valid = valid_slots(call.q_positions_BT, call.q_segments_BT)
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
    )


def _sinks_gradient(call: Call, lse_BTN: jax.Array, delta_BTN: jax.Array) -> jax.Array | None:
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

    def scratch(self, geometry: _Geometry) -> Any:
        if self.by_key:
            return pltpu.VMEM((geometry.G, geometry.k_block, 1), jnp.float32)
        rows = geometry.part_rows if self.by_query else geometry.G
        return pltpu.VMEM((rows, 1, geometry.q_block), jnp.float32)

    def out(self, plan: _Plan, closing: Any, part: Any) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
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
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    def whole(self, plan: _Plan, found: jax.Array) -> jax.Array:
        """The kernel's output as the gradient of the value, [B, N, T or 1, S or 1]."""
        B, T, S, N, *_ = plan.call.sizes
        if self.by_query:
            return found[:, :, 0, :T, None]
        if self.by_key:
            return found.sum(0).reshape(B, N, 1, -1)[..., :S]
        return found.sum(-1).reshape(B, N, 1, 1)


def _cut_gradients(plan: _Plan) -> list[_CutGradient]:
    learned = [] if plan.split is None else plan.split.learned
    return [_CutGradient(plan.operands[f"bias{i}"], i) for i in learned]


def _bias_gradient(plan: _Plan, found: list[jax.Array]) -> Any:
    """The cotangent of the bias from those of the learned values of its cut."""
    if not found:
        return None
    call = plan.call
    _, T, S, N, *_ = call.sizes
    q_pos, k_pos = positions_of(call.q_positions_BT, T), positions_of(call.k_positions_BS, S)
    values, vjp = jax.vjp(lambda bias: plan.split.outside(bias, N, q_pos, k_pos), call.bias)
    cotangents = [jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating)
                  else np.zeros(x.shape, jax.dtypes.float0) for x in values]  # fmt: skip
    for gradient, x in zip(_cut_gradients(plan), found, strict=True):
        x = gradient.whole(plan, x)
        missing = [i for i, n in enumerate(values[gradient.number].shape) if n == 1 and x.shape[i] > 1]
        cotangents[gradient.number] = x.sum(missing, keepdims=True)
    return vjp(cotangents)[0]


def _backward_call(plan: _Plan, dout_BTNM: jax.Array) -> list[jax.Array]:
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
            jax.ShapeDtypeStruct((B, N, geometry.T_pad, H), dtype),
            jax.ShapeDtypeStruct((geometry.parts, B, K, geometry.S_pad, H), key_dtype),
            jax.ShapeDtypeStruct((geometry.parts, B, K, geometry.S_pad, M), key_dtype),
            *cut_shapes,
        ],
        name="attention_backward",
        **_params(plan),
    )(
        *lists,
        _queries(plan, call.q_BTNH, H),
        _keys(plan, call.k_BSKH, H),
        _keys(plan, call.v_BSKM, M),
        _queries(plan, dout_BTNM, M),
        *(x.array for x in plan.operands.values()),
    )  # fmt: skip


def _backward_kernel(plan: _Plan, *refs: Any) -> None:
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
        x, tanh, kept = tile.exponents(plan.dot(k_ref[...], q, _NT), masked)
        p = jnp.exp2(x - extra["lse"][...])
        dp = plan.dot(v_ref[...], do, _NT)
        survives, survivors = tile.survives(), p
        if survives is not None:
            survivors = jnp.where(survives, p, 0.0)
            dp = jnp.where(survives, dp * (1 / (1 - call.dropout_rate)), 0.0)
        dv_acc[...] += plan.dot(survivors, do, _NN)
        ds = p * (dp - extra["delta"][...])
        # Where a pair is hidden its products may have overflowed: select, since 0 * Inf is NaN.
        ds = ds if kept is None else jnp.where(kept, ds, 0.0)
        _add_cut_gradients(tile, cut, cut_accs, ds, row, head)
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
            ds = ds if kept is None else jnp.where(kept, ds, 0.0)
        dk_acc[...] += plan.dot(ds, q, _NN)
        dq_acc[row] += plan.dot(kt_ref[...], ds, _NN)

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


def _add_cut_gradients(tile: Tile, cut: list[_CutGradient], accs: list[Any], ds, row, head) -> None:
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
