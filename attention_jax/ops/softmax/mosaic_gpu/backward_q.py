"""The backward over queries: a thread block owns queries and sweeps keys for dQ = dZ K.

Deterministic: every row of dQ is summed by one warpgroup, in the order of its list.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops.softmax.mosaic_gpu.config import GROUP
from attention_jax.ops.softmax.mosaic_gpu.elementwise import Traced
from attention_jax.ops.softmax.mosaic_gpu.gradients import (
    add_rows,
    both_products,
    gradient,
)
from attention_jax.ops.softmax.mosaic_gpu.launch import (
    COLUMNS,
    ROWS,
    ThreadBlock,
    bits_scratch,
    fresh,
    launch,
    loaded,
    loader,
    release,
    remainder,
    tiled,
    vector,
    vectors_scratch,
    zero_rows,
    zeros,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import HopperPlan, round_up
from attention_jax.ops.softmax.mosaic_gpu.scores import HopperTile


def gradient_q(
    plan: HopperPlan, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """(dQ [B, T, N, H], sums for the bias [B, N, T padded]) of a clean call.

    dout [B, T, N, M], lse / ln 2 and delta float32 [B, N, T or more].
    """
    call = plan.call
    B, T, _, N, _, H, M = call.sizes
    dtype, tiles = call.q_BTNH.dtype, plan.tiles
    stages, block, groups = tiles.stages, tiles.block, tiles.warpgroups
    T_pad = round_up(T, tiles.rows)
    missing = ((0, 0), (0, 0), (0, max(0, T_pad - lse.shape[2])))
    lse, delta = (jnp.pad(x, missing, constant_values=c) for x, c in ((lse, jnp.inf), (delta, 0.0)))
    operands = plan.operands(
        q_tokens=call.q_BTNH, k_tokens=call.k_BSKH, v_tokens=call.v_BSKM, dout=dout, lse=lse, delta=delta
    )
    scratch = {
        "q": tiled((groups, GROUP, H), dtype, block),
        "dout": tiled((groups, GROUP, M), dtype, block),
        "k": tiled((stages, block, H), dtype, block),
        "v": tiled((stages, block, M), dtype, block),
        "k_vectors": vectors_scratch(plan, plan.k),
        "bits": bits_scratch(plan, tiles.rows),
        "dbias": [plgpu.SMEM((groups, GROUP), jnp.float32) for _ in _pulls(plan)],
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        "ready": plgpu.Barrier(num_arrivals=2 + plan.copies(plan.k), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }

    def body(refs, smem):
        kernel = _QueryKernel(plan, refs, smem)
        group = lax.axis_index("group")
        pl.when(group < groups)(lambda: kernel.compute(group))
        pl.when(group == groups)(kernel.load)

    outs = {
        "dq": jax.ShapeDtypeStruct((B, T, N, H), dtype),
        "dbias": [jax.ShapeDtypeStruct((B, N, T_pad), jnp.float32) for _ in _pulls(plan)],
    }
    found = launch(
        body, operands, outs, scratch, name="flash_backward_q", groups=groups + 1,
        grid={"head": N, "row": T_pad // tiles.rows, "batch": B},
    )  # fmt: skip
    return found["dq"], found["dbias"]


def _pulls(plan: HopperPlan) -> list[Traced]:
    """The gradients of a bias that are summed over keys."""
    return plan.scores.bias.by_query if plan.scores.bias else []


class _QueryKernel(ThreadBlock):
    """Warpgroups that each own 64 queries of a head, and one that loads keys and values."""

    @property
    def head(self) -> jax.Array:
        return lax.axis_index("head")

    def load(self) -> None:
        self.leave_registers()
        q_block, start, _, end = self.row()
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block
        kv_head = lax.div(self.head, jnp.int32(self.plan.groups))

        def copy(i, slot):
            tokens = pl.ds(self.item(start + i) * block, block)
            at, ready = (self.batch, tokens, kv_head), smem["ready"].at[slot]
            plgpu.copy_gmem_to_smem(refs["k_tokens"].at[at], smem["k"].at[slot], ready)
            plgpu.copy_gmem_to_smem(refs["v_tokens"].at[at], smem["v"].at[slot], ready)
            for ref, buffer in zip(refs["k"], smem["k_vectors"], strict=True):
                plgpu.copy_gmem_to_smem(self.per_token(ref, tokens, self.head), buffer.at[slot], ready)
            self.copy_bits(self.head, self.item(start + i), q_block, slot, ready)

        self.produce(end - start, {"free": copy})

    def compute(self, group: jax.Array) -> None:
        self.take_registers()
        refs, smem, plan = self.refs, self.smem, self.plan
        H = plan.call.sizes[5]
        q_block, start, full_end, end = self.row()
        q_start = q_block * plan.tiles.rows + group * GROUP
        rows = pl.ds(q_start, GROUP)
        q_smem, dout_smem, own_ready = (smem[x].at[group] for x in ("q", "dout", "own_ready"))
        at = (self.batch, rows, self.head)
        plgpu.copy_gmem_to_smem(refs["q_tokens"].at[at], q_smem, own_ready)
        plgpu.copy_gmem_to_smem(refs["dout"].at[at], dout_smem, own_ready)
        lse, delta = (vector(refs[x].at[self.batch, self.head, rows], ROWS) for x in ("lse", "delta"))
        q_vectors = loaded([loader(self.per_token(ref, rows, self.head), ROWS) for ref in refs["q"]])
        plgpu.barrier_wait(own_ready)

        def body(masked):
            own = (q_start, q_vectors, lse, delta)
            return lambda i, sums: self.step(i, sums, masked, start, group, own)

        sums = {"dq": zeros(H), "bias": [zero_rows() for _ in smem["dbias"]]}
        if plan.schedule.some_full:
            sums = lax.fori_loop(jnp.int32(0), full_end - start, body(False), sums)
        if plan.schedule.some_partial:
            sums = lax.fori_loop(full_end - start, end - start, body(True), sums)
        q_smem[...] = (sums["dq"] * plan.scores.scale).astype(plan.call.q_BTNH.dtype)
        for buffer, x in zip(smem["dbias"], sums["bias"], strict=True):
            buffer.at[group][...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, refs["dq"].at[at])
        for out, buffer in zip(refs["dbias"], smem["dbias"], strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[group], out.at[self.batch, self.head, rows])
        plgpu.wait_smem_to_gmem(0)

    def step(self, i, sums, masked, start, group, own):
        plan, smem = self.plan, self.smem
        q_start, q_vectors, lse, delta = own
        group = fresh(group)
        q_smem = smem["q"].at[group]
        stages, block = plan.tiles.stages, plan.tiles.block
        slot, shape = remainder(i, stages), (GROUP, block)
        k_block = self.item(start + i) if plan.scores.needs_position(masked) else jnp.int32(0)
        k_smem = smem["k"].at[slot]
        plgpu.barrier_wait(smem["ready"].at[slot])
        k_vectors = []
        if plan.scores.needs_position(masked):
            k_vectors = [loader(x.at[slot], COLUMNS) for x in smem["k_vectors"]]
        bits = self.own_bits(slot, group) if masked else []
        tile = HopperTile(
            plan.scores, self.refs, self.batch, self.head, q_start, k_block * block, q_vectors, k_vectors,
            shape, 0, (ROWS, COLUMNS), bits,
        )  # fmt: skip

        def products(state):
            pair = (q_smem, k_smem), (smem["dout"].at[fresh(group)], smem["v"].at[slot])
            _, ds, dz = both_products(
                shape, *pair, lambda qk, dp: gradient(tile, qk, dp, lambda: lse, lambda: delta, masked)
            )
            add_rows(state["bias"], tile.bias_gradients(_pulls(plan), ds))
            plgpu.wgmma(state["dq"], dz.astype(plan.call.q_BTNH.dtype), smem["k"].at[fresh(slot)])

        sums = pl.run_state(products)(sums | {"dq": plgpu.ACC.init(sums["dq"])})
        release(smem["free"].at[slot], read=bool(k_vectors or bits))
        return sums
