"""The backward over keys: a thread block owns keys and sweeps queries for dK = dZ^T Q and dV = P^T dO.

Tiles are held transposed, so that P and dZ enter their products from registers. A thread block walks all
query heads of its kv head, so that no gradient per query head is ever stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops.softmax.mosaic_gpu.gradients import (
    REGISTERS,
    both_products,
    gradient,
    weights_alone,
    zeros,
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
    times,
    vector,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import GROUP, Plan
from attention_jax.ops.softmax.mosaic_gpu.scores import Tile


def gradient_kv(plan: Plan, dout: jax.Array, lse: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dK [B, S, K, H], dV [B, S, K, M]) of a clean call; arguments as in `gradient_q`."""
    kernel = KeyKernel if plan.key_rows == 2 * GROUP else _SplitKernel
    return over_keys(kernel, plan, plan.tiles.block, dout=dout, lse=lse, delta=delta)


def over_keys(
    kind: type[KeyKernel], plan: Plan, swizzle_block: int, **more: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(dK, dV) by a kernel over keys; swizzle_block: the columns of what it reads in pieces."""
    call = plan.call
    B, _, S, _, K, H, M = call.sizes
    dtype, (stages, block) = call.q_BTNH.dtype, (plan.tiles.stages, plan.tiles.block)
    parts = plan.key_rows // GROUP
    operands = plan.operands(q_tokens=call.q_BTNH, k_tokens=call.k_BSKH, v_tokens=call.v_BSKM, **more)
    scratch = {
        "k": tiled((parts, GROUP, H), dtype, swizzle_block),
        "v": tiled((parts, GROUP, M), dtype, swizzle_block),
        "q": tiled((stages, block, H), dtype, swizzle_block),
        "dout": tiled((stages, block, M), dtype, swizzle_block),
        "lse": plgpu.SMEM((stages, block), jnp.float32),
        "delta": plgpu.SMEM((stages, block), jnp.float32),
        "q_vectors": [plgpu.SMEM((stages, block), jnp.int32) for _ in plan.q.vectors],
        "bits": bits_scratch(plan, plan.key_rows),
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=parts),
        "ready": plgpu.Barrier(num_arrivals=4 + plan.copies(plan.q), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        **kind.more_scratch(plan, swizzle_block),
    }
    outs = {
        "dk": jax.ShapeDtypeStruct((B, S, K, H), dtype),
        "dv": jax.ShapeDtypeStruct((B, S, K, M), dtype),
    }

    def body(refs, smem):
        kernel = kind(plan, refs, smem)
        group = lax.axis_index("group")
        kernel.roles(group)
        pl.when(group == 2)(kernel.load)

    found = launch(
        body, operands, outs, scratch, name=f"flash_backward_{kind.name}", groups=3,
        grid={"kv_head": K, "row": -(-S // plan.key_rows), "batch": B},
    )  # fmt: skip
    return found["dk"], found["dv"]


class KeyKernel(ThreadBlock):
    """Two warpgroups that each own 64 keys of a kv head, and one that loads.

    A step is a block of queries of one head: the listed blocks in turn, for each the heads of the group.
    """

    name = "kv"

    @staticmethod
    def more_scratch(plan: Plan, swizzle_block: int) -> dict:
        return {}

    def roles(self, group: jax.Array) -> None:
        """Starts `compute` on the first two warpgroups."""
        pl.when(group < 2)(lambda: self.compute(group, group, ("dk", "dv")))

    @property
    def kv_head(self) -> jax.Array:
        return lax.axis_index("kv_head")

    def visit(self, start: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(query block, query head) of step i."""
        groups = jnp.int32(self.plan.groups)
        return self.item(start + lax.div(i, groups)), self.kv_head * groups + lax.rem(i, groups)

    def keys(self, k_block: jax.Array, part: jax.Array | int) -> jax.Array:
        """The first of a part's 64 keys."""
        return k_block * self.plan.key_rows + part * GROUP

    def load(self) -> None:
        plgpu.set_max_registers(24, action="decrease")
        k_block, start, _, end = self.row()
        self.load_keys(k_block)
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block

        def copy(i, slot):
            q_block, head = self.visit(start, i)
            tokens, ready = pl.ds(q_block * block, block), smem["ready"].at[slot]
            at = (self.batch, tokens, head)
            plgpu.copy_gmem_to_smem(refs["q_tokens"].at[at], smem["q"].at[slot], ready)
            plgpu.copy_gmem_to_smem(refs["dout"].at[at], smem["dout"].at[slot], ready)
            for name in ("lse", "delta"):
                row = refs[name].at[self.batch, head, tokens]
                plgpu.copy_gmem_to_smem(row, smem[name].at[slot], ready)
            for ref, buffer in zip(refs["q"], smem["q_vectors"], strict=True):
                plgpu.copy_gmem_to_smem(self.per_token(ref, tokens), buffer.at[slot], ready)
            self.copy_bits(head, q_block, k_block, slot, ready)

        self.produce((end - start) * self.plan.groups, {"free": copy})

    def load_keys(self, k_block: jax.Array) -> None:
        """The keys and values that the thread block owns."""
        refs, smem = self.refs, self.smem
        for part in range(self.plan.key_rows // GROUP):
            at = (self.batch, pl.ds(self.keys(k_block, part), GROUP), self.kv_head)
            for name, tokens in (("k", "k_tokens"), ("v", "v_tokens")):
                plgpu.copy_gmem_to_smem(refs[tokens].at[at], smem[name].at[part], smem["own_ready"].at[part])

    def compute(self, group: jax.Array, part: jax.Array, wanted: tuple[str, ...]) -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        refs, smem, plan = self.refs, self.smem, self.plan
        k_block, start, full_end, end = self.row()
        k_start = self.keys(k_block, part)
        rows = pl.ds(k_start, GROUP)
        k_vectors = loaded([loader(self.per_token(ref, rows), ROWS) for ref in refs["k"]])
        plgpu.barrier_wait(smem["own_ready"].at[part])

        def body(masked):
            return lambda i, sums: self.step(i, sums, masked, start, group, part, k_start, k_vectors)

        widths = dict(zip(("dk", "dv"), self.widths, strict=True))
        sums = {name: zeros(widths[name]) for name in wanted}
        full, steps = (full_end - start) * plan.groups, (end - start) * plan.groups
        if plan.schedule.some_full:
            sums = lax.fori_loop(jnp.int32(0), full, body(False), sums)
        if plan.schedule.some_partial:
            sums = lax.fori_loop(full, steps, body(True), sums)
        self.before_output()
        for name, x in sums.items():
            buffer = smem[name[1:]].at[part]
            factor = plan.scores.scale if name == "dk" else 1.0
            buffer[...] = times(x, factor).astype(plan.call.q_BTNH.dtype)
        plgpu.commit_smem()
        for name in sums:
            out = refs[name].at[self.batch, rows, self.kv_head]
            plgpu.copy_smem_to_gmem(smem[name[1:]].at[part], out)
        plgpu.wait_smem_to_gmem(0)

    def step(self, i, sums, masked, start, group, part, k_start, k_vectors):
        plan, smem = self.plan, self.smem
        dtype, (stages, block) = plan.call.q_BTNH.dtype, (plan.tiles.stages, plan.tiles.block)
        slot, shape, part = remainder(i, stages), (GROUP, block), fresh(part)
        tile = self.tile(i, slot, masked, start, part, k_start, k_vectors)
        q_smem, dout_smem = smem["q"].at[slot], smem["dout"].at[slot]
        lse, delta = (lambda x=smem[x].at[slot]: vector(x, COLUMNS) for x in ("lse", "delta"))

        def products(accumulators):
            qk_pair, dp_pair = (smem["k"].at[part], q_smem), (smem["v"].at[part], dout_smem)
            if "dk" not in sums:
                p = weights_alone(shape, qk_pair, tile, lse, masked)
                plgpu.wgmma(accumulators["dv"], p.astype(dtype), dout_smem)
                return
            p, dz = both_products(
                shape, qk_pair, dp_pair, lambda qk, dp: gradient(tile, qk, dp, lse, delta, masked)
            )
            if "dv" in sums:
                plgpu.wgmma(accumulators["dv"], p.astype(dtype), dout_smem)
            dz = dz.astype(dtype)
            plgpu.wgmma(accumulators["dk"], dz, q_smem)
            self.share(i, part, dz)

        found = pl.run_state(products)({name: plgpu.ACC.init(x) for name, x in sums.items()})
        release(smem["free"].at[slot], read=True)
        if "dk" in sums:
            self.add_queries(i, start, group)
        return found

    def tile(self, i, slot, masked, start, part, k_start, k_vectors) -> Tile:
        """The scores of a step, transposed, once its queries are there."""
        plan, smem, block = self.plan, self.smem, self.plan.tiles.block
        q_block = head = jnp.int32(0)
        if plan.scores.placed(masked):
            q_block, head = self.visit(start, i)
        plgpu.barrier_wait(smem["ready"].at[slot])
        q_vectors = []
        if plan.scores.placed(masked):
            q_vectors = [loader(x.at[slot], COLUMNS) for x in smem["q_vectors"]]
        bits = self.own_bits(slot, part) if masked else []
        return Tile(
            plan.scores, self.refs, self.batch, head, q_block * block, k_start, q_vectors, k_vectors,
            (GROUP, block), 1, (ROWS, COLUMNS), bits,
        )  # fmt: skip

    def before_output(self) -> None:
        """Before the sums overwrite this warpgroup's keys and values in shared memory."""

    def meet(self) -> None:
        """Waits until the other warpgroup has also read its last keys and values."""
        plgpu.barrier_arrive(self.smem["done"])
        plgpu.barrier_wait(self.smem["done"])

    def share(self, i: jax.Array, part: jax.Array, dz: jax.Array) -> None:
        """What else is to happen with dZ^T [keys, queries] while it is in registers."""

    def add_queries(self, i: jax.Array, start: jax.Array, group: jax.Array) -> None:
        """What else a step gives."""


class _SplitKernel(KeyKernel):
    """Where registers cannot hold both sums of a wide head, both warpgroups own the same 64 keys.

    The first sums their dK, the second their dV, whose scores are computed twice.
    """

    name = "split"

    @staticmethod
    def more_scratch(plan: Plan, swizzle_block: int) -> dict:
        return {"done": plgpu.Barrier(num_arrivals=2)}

    def roles(self, group: jax.Array) -> None:
        pl.when(group == 0)(lambda: self.compute(group, group * 0, ("dk",)))
        pl.when(group == 1)(lambda: self.compute(group, group * 0, ("dv",)))

    def before_output(self) -> None:
        self.meet()
