"""The backward in one kernel of five products a tile: dQ beside the dK and dV of backward_kv.

A thread block owns keys, so that dQ is a sum over thread blocks: the copy engine adds terms to a float32
buffer, in whatever order they arrive. The tile's dZ goes through shared memory, and each of the two computing
warpgroups makes half the columns of its dZ K.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops import varying
from attention_jax.ops.softmax.mosaic_gpu.backward_kv import KeyKernel, accumulating, over_keys
from attention_jax.ops.softmax.mosaic_gpu.config import GROUP
from attention_jax.ops.softmax.mosaic_gpu.gradients import (
    gradient_of_handed,
    handed,
    product,
)
from attention_jax.ops.softmax.mosaic_gpu.launch import (
    COLUMNS,
    TILE_ROWS,
    WGMMA,
    Row,
    fresh,
    release,
    remainder,
    tiled,
    vector,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import HopperPlan, round_up


def gradients_fused(
    plan: HopperPlan, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dQ float32, dK, dV) of a clean call and its `fused_plan`; arguments as in `gradient_q`."""
    call = plan.call
    B, T, _, N, _, H, _ = call.sizes
    dq = jax.new_ref(jnp.zeros((B, round_up(T, TILE_ROWS), N, H), jnp.float32))
    kernel = _PairKernel if plan.key_rows == 2 * GROUP else _RelayKernel
    # Each warpgroup reads half the columns of K: the tiles in shared memory split there.
    dk, dv, _ = over_keys(kernel, plan, H // 2, dout=dout, lse=lse, delta=delta, dq=dq)
    # A kernel takes no reference that varies over mesh axes; what it wrote there does.
    dq = varying.like(call.q_BTNH, jax.freeze(dq))
    return dq[:, :T] * plan.scores.scale, dk, dv


class _FusedKernel(KeyKernel):
    """Half the columns of dQ by each warpgroup, whose terms wait in shared memory for the copy engine."""

    @staticmethod
    def piece(plan: HopperPlan) -> int:
        """The columns of dQ that a warpgroup makes at a time."""
        half = plan.call.sizes[5] // 2
        return half if half <= 96 else half // 2

    @classmethod
    def more_scratch(cls, plan: HopperPlan, swizzle_block: int) -> dict:
        return {
            "dq": tiled((2, plan.tiles.block, cls.piece(plan)), jnp.float32),
            "done": plgpu.Barrier(num_arrivals=2),
        }

    def before_output(self) -> None:
        self.meet()

    def add(self, i: jax.Array, row: Row, group: jax.Array, terms: list) -> None:
        """Adds this warpgroup's half of the columns of dZ K to dQ; terms: pairs (dZ^T, part of the keys)."""
        block, half, width = self.plan.tiles.block, self.widths[0] // 2, self.piece(self.plan)
        own = self.smem["dq"].at[group]
        q_block, head = self.visit(row, i)
        for column in range(0, half, width):
            columns = pl.ds(group * half + column, width)

            def product(acc, columns=columns):
                for dz_T, part in terms:
                    plgpu.wgmma(acc, dz_T.transpose((1, 0)), self.smem["k"].at[part, :, columns])
                return acc[...]

            dq = pl.run_scoped(product, plgpu.ACC((block, width), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own[...] = dq
            plgpu.commit_smem()
            at = (self.batch, pl.ds(q_block * block, block), head, columns)
            plgpu.copy_smem_to_gmem(own, self.refs["dq"].at[at], reduction_op="add")


class _PairKernel(_FusedKernel):
    """Two warpgroups of 64 keys each, which put their dZ^T side by side.

    dZ has two buffers, so that one meeting a step suffices: whoever writes a buffer again has met the other
    after its last read.
    """

    name = "fused"

    @classmethod
    def more_scratch(cls, plan: HopperPlan, swizzle_block: int) -> dict:
        dtype, block = plan.call.q_BTNH.dtype, plan.tiles.block
        return super().more_scratch(plan, swizzle_block) | {
            "dz": tiled((2, 2, GROUP, block), dtype, swizzle_block),
            "met": plgpu.Barrier(num_arrivals=2),
        }

    def share(self, i, part, dz):
        self.smem["dz"].at[remainder(i, 2), part][...] = dz
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem["met"])

    def add_queries(self, i, row, group):
        smem = self.smem
        plgpu.barrier_wait(smem["met"])
        self.add(i, row, group, [(smem["dz"].at[remainder(i, 2), part], part) for part in range(2)])


class _RelayKernel(_FusedKernel):
    """Where registers cannot hold both sums or what the scores need: both warpgroups own the same 64 keys.

        first:   S^T = K Q^T,    P^T          dV += P^T dO     dQ[:, :H/2] += dZ K[:, :H/2]
        second:  dP^T = V dO^T,  P^T -> dZ^T  dK += dZ^T Q     dQ[:, H/2:] += dZ K[:, H/2:]

    The first hands P over in float32 (`handed`), the second gives dZ back. One buffer of each suffices: the
    second reads P before it gives dZ, for which the first waits before its next P; the first reads dZ before
    it hands its next P over, for which the second waits before its next dZ.
    """

    name = "relay"

    @staticmethod
    def dout_stages(plan: HopperPlan) -> int:
        """Blocks of dO in flight. Shared memory has room for one beside two of Q at a width of 256."""
        return plan.tiles.stages if max(plan.call.sizes[5:]) <= 192 else 1

    @classmethod
    def more_scratch(cls, plan: HopperPlan, swizzle_block: int) -> dict:
        dtype, block, M = plan.call.q_BTNH.dtype, plan.tiles.block, plan.call.sizes[6]
        stages, given = cls.dout_stages(plan), 2 + plan.copies(plan.q)
        return super().more_scratch(plan, swizzle_block) | {
            "dout": tiled((stages, block, M), dtype, swizzle_block),
            "delta": plgpu.SMEM((stages, block), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=given, num_barriers=plan.tiles.stages),
            "dout_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "dout_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "p": tiled((GROUP, block), jnp.float32),
            "p_ready": plgpu.Barrier(),
            "dz": tiled((GROUP, block), dtype, swizzle_block),
            "dz_ready": plgpu.Barrier(),
        }

    def roles(self, group: jax.Array) -> None:
        pl.when(group == 0)(lambda: self.compute(group, group * 0, ("dv",)))
        pl.when(group == 1)(lambda: self.compute(group, group * 0, ("dk",)))

    def load(self) -> None:
        """Q and dO apart: they are not free at the same time, nor need they have as many buffers."""
        self.leave_registers()
        row = k_block, start, _, end = self.row()
        self.load_keys(k_block)
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block
        copy = plgpu.copy_gmem_to_smem

        def queries(i, slot):
            (q_block, head), ready = self.visit(row, i), smem["ready"].at[slot]
            tokens = pl.ds(q_block * block, block)
            copy(refs["q_tokens"].at[self.batch, tokens, head], smem["q"].at[slot], ready)
            copy(refs["lse"].at[self.batch, head, tokens], smem["lse"].at[slot], ready)
            for ref, buffer in zip(refs["q"], smem["q_vectors"], strict=True):
                copy(self.per_token(ref, tokens, head), buffer.at[slot], ready)
            self.copy_bits(head, q_block, k_block, slot, ready)

        def cotangents(i, slot):
            (q_block, head), ready = self.visit(row, i), smem["dout_ready"].at[slot]
            tokens = pl.ds(q_block * block, block)
            copy(refs["dout"].at[self.batch, tokens, head], smem["dout"].at[slot], ready)
            copy(refs["delta"].at[self.batch, head, tokens], smem["delta"].at[slot], ready)

        def slot_of(i, free, stages):
            slot = remainder(i, stages)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem[free].at[slot]))
            return slot

        steps = (end - start) * self.plan.groups
        q, dout = ("free", self.plan.tiles.stages), ("dout_free", self.dout_stages(self.plan))

        def step(i, _):
            queries(i, slot_of(i, *q))
            cotangents(i, slot_of(i, *dout))

        lax.fori_loop(jnp.int32(0), steps, step, None)
        for free, stages in (q, dout):  # so that no barrier dies with someone behind it

            def drain(i, _, free=free, stages=stages):
                slot_of(i, free, stages)

            lax.fori_loop(steps, steps + stages, drain, None)

    def step(self, i, sums, masked, row, group, part, k_start, k_vectors):
        smem, part, slot = self.smem, fresh(part), remainder(i, self.plan.tiles.stages)
        first, dout_slot = "dv" in sums, remainder(i, self.dout_stages(self.plan))
        if first:
            tile = self.tile(i, slot, masked, row, part, k_start, k_vectors)

        def products(accumulators):
            if first:
                self.hand_over(accumulators["dv"], tile, slot, dout_slot, part, masked)
            else:
                self.give_back(accumulators["dk"], slot, dout_slot, part, masked)

        found = pl.run_state(products)(accumulating(sums))
        release(smem["free"].at[slot], read=first)
        if first:
            plgpu.barrier_arrive(smem["dout_free"].at[dout_slot])
            plgpu.barrier_wait(smem["dz_ready"])
        self.add(i, row, group, [(smem["dz"], part)])
        return found

    def hand_over(self, dv_acc, tile, slot, dout_slot, part, masked) -> None:
        """The first warpgroup's work before dQ."""
        smem = self.smem
        qk = product(tile.shape, smem["k"].at[part], smem["q"].at[slot])
        smem["p"][...], p = handed(tile, qk, lambda: vector(smem["lse"].at[slot], COLUMNS), masked)
        # Threads write and threads read: the barrier alone orders that, no fence between proxies is needed.
        plgpu.barrier_arrive(smem["p_ready"])
        plgpu.barrier_wait(smem["dout_ready"].at[dout_slot])
        plgpu.wgmma(dv_acc, p.astype(self.plan.call.q_BTNH.dtype), smem["dout"].at[dout_slot])

    def give_back(self, dk_acc, slot, dout_slot, part, masked) -> None:
        """The second warpgroup's work before dQ."""
        smem, plan = self.smem, self.plan
        shape = (GROUP, plan.tiles.block)
        plgpu.barrier_wait(smem["dout_ready"].at[dout_slot])

        def products(acc):
            plgpu.wgmma(acc, smem["v"].at[part], smem["dout"].at[dout_slot].transpose((1, 0)))
            plgpu.barrier_wait(smem["p_ready"])
            dp = acc[...]
            p = plgpu.load(smem["p"], layout=WGMMA)  # not before, for registers' sake
            delta = lax.broadcast_in_dim(vector(smem["delta"].at[dout_slot], COLUMNS), shape, (1,))
            return gradient_of_handed(p, dp, delta, plan.scores.dropout_rate, masked)

        dz = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32)).astype(plan.call.q_BTNH.dtype)
        release(smem["dout_free"].at[dout_slot], read=True)
        smem["dz"][...] = dz
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem["dz_ready"])
        plgpu.barrier_wait(smem["ready"].at[slot])
        plgpu.wgmma(dk_acc, dz, smem["q"].at[slot])
