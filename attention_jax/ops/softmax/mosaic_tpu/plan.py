"""How a call is cut for the TPU kernels, and what the two kernels share: grid, index maps, layouts."""

from __future__ import annotations

import contextlib
import dataclasses
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
from attention_jax.ops.softmax import blocks
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_tpu import steps as steps_of
from attention_jax.ops.softmax.mosaic_tpu.bias import Split, mask_refusal, split
from attention_jax.ops.softmax.mosaic_tpu.config import MosaicTPUConfig
from attention_jax.ops.softmax.mosaic_tpu.scores import Operand, TPUTile, make_operands
from attention_jax.ops.softmax.mosaic_tpu.steps import LANES, Steps, balanced, round_up
from attention_jax.ops.tokens import select_valid

NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))

_MIB = 2**20
# VMEM of a core by device kind. Older chips have 16 MiB, which these blocks do not fit.
_VMEM = {
    "TPU v5 lite": 128 * _MIB, "TPU v5e": 128 * _MIB, "TPU v6 lite": 128 * _MIB, "TPU v6e": 128 * _MIB,
    "TPU v5": 64 * _MIB, "TPU v5p": 64 * _MIB,
}  # fmt: skip

_forced: Any = None  # None: only on a TPU. False: compile, wherever. Else: interpret

_traced_so = jax.make_user_context("None")


@contextlib.contextmanager
def forced(interpret: Any) -> Iterator[None]:
    """For tests: interpret with pltpu.InterpretParams, or (False) compile for a TPU that is not there.

    JAX's caches keep what is traced inside apart.
    """
    global _forced
    before, _forced = _forced, interpret
    try:
        with _traced_so(repr(interpret)):
            yield
    finally:
        _forced = before


def only_on_tpu() -> bool:
    """True outside `forced`."""
    return _forced is None


def interpret() -> Any:
    """What pallas_call takes."""
    return False if _forced is None else _forced


def chip() -> str:
    """The device kind that is compiled for."""
    if _forced is not None and _forced is not False:
        return "TPU v5 lite"  # interpreted
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return device.device_kind


def vmem(config: MosaicTPUConfig) -> int | None:
    """Bytes of VMEM of that chip; None where its blocks have not been chosen."""
    return config.vmem_bytes or _VMEM.get(chip())


@dataclasses.dataclass(frozen=True)
class TPUGeometry:
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
    vmem: int

    @classmethod
    def of(cls, call: SoftmaxCall, config: MosaicTPUConfig, backward: bool) -> TPUGeometry:
        _, T, S, N, K, H, M = call.sizes
        itemsize, G = call.q_BTNH.dtype.itemsize, N // K
        q_block, k_block = config.blocks(max(H, M), itemsize, backward)
        q_block, k_block = balanced(T, q_block), balanced(S, k_block)
        H, M = round_up(H, 16), round_up(M, 16)
        nq, parts, memory = -(-T // q_block), 1, vmem(config)
        assert memory is not None, chip()
        if backward:
            # A quarter of VMEM for dQ, float32 and transposed; the parts are equal.
            parts = -(-G * nq * q_block * H * 4 // (memory // 4))
            nq = round_up(nq, parts // math.gcd(parts, G))
        return cls(q_block, k_block, nq * q_block, round_up(S, k_block), G, H, M, parts, itemsize, memory)

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
    def all_blocks(self) -> blocks.BlockMap:
        ones = np.ones((1, self.nq, self.nk), bool)
        return blocks.BlockMap(ones, ones)

    def vmem_limit(self, backward: bool) -> int:
        """What to ask the compiler for: blocks twice (the pipeline loads ahead), accumulators, scores."""
        q, k, H, M = self.q_block, self.k_block, round_up(self.H, LANES), round_up(self.M, LANES)
        size = 2 * self.itemsize * (2 * q + 2 * k) * (H + M) + 10 * 4 * q * k
        size += 4 * (q + 2 * k) * (H + M + 2 * LANES)
        if backward:
            size += 4 * self.part_rows * self.q_block * self.H
        return min(max(size + 8 * _MIB, 16 * _MIB), self.vmem * 15 // 16)


def static_map(call: SoftmaxCall, geometry: TPUGeometry) -> blocks.BlockMap:
    """The map of implicit positions over the padded lengths."""
    _, T, S, *_ = call.sizes
    found = blocks.static_map(call.mask, T, S, geometry.q_block, geometry.k_block)
    all_kept = found.all_kept & False if call.mask_BNTS is not None else found.all_kept
    more = ((0, 0), (0, geometry.nq - found.any_kept.shape[1]), (0, 0))
    return blocks.BlockMap(np.pad(found.any_kept, more), np.pad(all_kept, more))


def runtime_map(call: SoftmaxCall, geometry: TPUGeometry) -> blocks.BlockMap:
    _, T, S, *_ = call.sizes
    q = blocks.padded_tokens(call.q_positions_BT, call.q_segments_BT, T, geometry.T_pad)
    k = blocks.padded_tokens(call.k_positions_BS, call.k_segments_BS, S, geometry.S_pad)
    found = blocks.runtime_map(call.mask, q, k, geometry.q_block, geometry.k_block)
    all_kept = found.all_kept & False if call.mask_BNTS is not None else found.all_kept
    return blocks.BlockMap(found.any_kept, all_kept)


@dataclasses.dataclass(frozen=True)
class TPUPlan:
    """What both kernels share: the call, its geometry, its steps and the operands beside q, k and v."""

    call: SoftmaxCall
    geometry: TPUGeometry
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

    def tile(self, refs: dict[str, Any], lists: tuple[Any, ...]) -> TPUTile:
        at = (pl.program_id(0), pl.program_id(1), pl.program_id(2))
        *_, i, j = self.where(*at, *lists)
        blocks = self.geometry.q_block, self.geometry.k_block
        return TPUTile(self.call, self.split, self.mask_inside, self.operands, refs, blocks, i, j,
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


def make_plan(call: SoftmaxCall, config: MosaicTPUConfig, backward: bool) -> TPUPlan:
    geometry = TPUGeometry.of(call, config, backward)
    block_map = static_map(call, geometry) if call.arange_positions else runtime_map(call, geometry)
    if backward:
        steps = steps_of.backward_steps(block_map, geometry.G, geometry.parts)
    else:
        steps = steps_of.forward_steps(block_map)
    cut = None if call.bias is None else split(call.bias)
    mask_BNTS, inside = call.mask_BNTS, call.mask != Full()
    if inside and mask_refusal(call.mask):
        # Positions are implicit: the mask is an array.
        _, T, S, *_ = call.sizes
        table = jnp.asarray(call.mask.dense(np.arange(T), np.arange(S)))[None, None]
        mask_BNTS = table if mask_BNTS is None else table & mask_BNTS
        inside = False
    operands = make_operands(call, cut, mask_BNTS, geometry.T_pad, geometry.S_pad, backward)
    return TPUPlan(call, geometry, steps, cut, inside, operands, backward)


def _heads_first(x_BLNH: jax.Array, valid: jax.Array | None, length: int, width: int) -> jax.Array:
    """[B, N, padded length, padded width], invalid slots selected to 0."""
    x = select_valid(x_BLNH, valid).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - x.shape[3])))


def queries(plan: TPUPlan, x_BTNH: jax.Array, width: int) -> jax.Array:
    valid = plan.call.q_valid_BT
    return _heads_first(x_BTNH, valid, plan.geometry.T_pad, width)


def keys(plan: TPUPlan, x_BSKH: jax.Array, width: int) -> jax.Array:
    valid = plan.call.k_valid_BS
    return _heads_first(x_BSKH, valid, plan.geometry.S_pad, width)


def params(plan: TPUPlan) -> dict[str, Any]:
    return {
        "interpret": interpret(),
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.geometry.vmem_limit(plan.backward),
        ),
    }
