"""The backward over keys: a thread block owns keys and sweeps queries for dK = dZ^T Q and dV = P^T dO.

Tiles are held transposed, so that P and dZ enter their products from registers. A thread block walks all
query heads of its kv head, so that no gradient per query head is ever stored.
"""

from __future__ import annotations

from typing import Any

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
    weights_alone,
)
from attention_jax.ops.softmax.mosaic_gpu.launch import (
    COLUMNS,
    ROWS,
    Row,
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
    vectors_scratch,
    zero_rows,
    zeros,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import HopperPlan
from attention_jax.ops.softmax.mosaic_gpu.registers import dv_product_fits_early
from attention_jax.ops.softmax.mosaic_gpu.scores import HopperTile


def gradient_kv(
    plan: HopperPlan, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """(dK [B, S, K, H], dV [B, S, K, M], sums for the bias [B, N, S padded]), as in `gradient_q`."""
    kernel = KeyKernel if plan.key_rows == 2 * GROUP else _SplitKernel
    return over_keys(kernel, plan, plan.tiles.block, dout=dout, lse=lse, delta=delta)


def over_keys(
    kind: type[KeyKernel], plan: HopperPlan, swizzle_block: int, **more: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """As `gradient_kv`, by a kernel over keys; swizzle_block: the columns of what it reads in pieces."""
    call = plan.call
    B, _, S, N, K, H, M = call.sizes
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
        "q_vectors": vectors_scratch(plan, plan.q),
        "bits": bits_scratch(plan, plan.key_rows),
        "dbias": [plgpu.SMEM((parts, GROUP), jnp.float32) for _ in _pulls(plan)],
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=parts),
        "ready": plgpu.Barrier(num_arrivals=4 + plan.copies(plan.q), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        **kind.more_scratch(plan, swizzle_block),
    }
    rows = -(-S // plan.key_rows)
    outs = {
        "dk": jax.ShapeDtypeStruct((B, S, K, H), dtype),
        "dv": jax.ShapeDtypeStruct((B, S, K, M), dtype),
        "dbias": [jax.ShapeDtypeStruct((B, N, rows * plan.key_rows), jnp.float32) for _ in _pulls(plan)],
    }

    def body(refs, smem):
        kernel = kind(plan, refs, smem)
        group = lax.axis_index("group")
        kernel.roles(group)
        pl.when(group == 2)(kernel.load)

    found = launch(
        body, operands, outs, scratch, name=f"flash_backward_{kind.name}", groups=3,
        grid={"kv_head": K, "row": rows, "batch": B},
    )  # fmt: skip
    return found["dk"], found["dv"], found["dbias"]


def _pulls(plan: HopperPlan) -> list[Traced]:
    """The gradients of a bias that are summed over queries."""
    return plan.scores.bias.by_key if plan.scores.bias else []


def accumulating(sums: dict[str, Any]) -> dict[str, Any]:
    """The sums of a step as accumulators of products, those for the bias apart."""
    return {name: x if name == "bias" else plgpu.ACC.init(x) for name, x in sums.items()}


class KeyKernel(ThreadBlock):
    """Two warpgroups that each own 64 keys of a kv head, and one that loads.

    A step is a block of queries of one head: the listed blocks in turn, for each the heads of the group.
    Where the bias reads a number per key and query head it is the heads in turn, for each the blocks.
    """

    name = "kv"

    @staticmethod
    def more_scratch(plan: HopperPlan, swizzle_block: int) -> dict:
        return {}

    def roles(self, group: jax.Array) -> None:
        """Starts `compute` on the first two warpgroups."""
        pl.when(group < 2)(lambda: self.compute(group, group, ("dk", "dv")))

    @property
    def kv_head(self) -> jax.Array:
        return lax.axis_index("kv_head")

    def visit(self, row: Row, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(query block, query head) of step i."""
        _, start, _, end = row
        groups = jnp.int32(self.plan.groups)
        if self.plan.head_by_head:
            at, head = lax.rem(i, end - start), lax.div(i, end - start)
        else:
            at, head = lax.div(i, groups), lax.rem(i, groups)
        return self.item(start + at), self.kv_head * groups + head

    def keys(self, k_block: jax.Array, part: jax.Array | int) -> jax.Array:
        """The first of a part's 64 keys."""
        return k_block * self.plan.key_rows + part * GROUP

    def load(self) -> None:
        self.leave_registers()
        row = k_block, start, _, end = self.row()
        self.load_keys(k_block)
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block

        def copy(i, slot):
            q_block, head = self.visit(row, i)
            tokens, ready = pl.ds(q_block * block, block), smem["ready"].at[slot]
            at = (self.batch, tokens, head)
            plgpu.copy_gmem_to_smem(refs["q_tokens"].at[at], smem["q"].at[slot], ready)
            plgpu.copy_gmem_to_smem(refs["dout"].at[at], smem["dout"].at[slot], ready)
            for name in ("lse", "delta"):
                plgpu.copy_gmem_to_smem(refs[name].at[self.batch, head, tokens], smem[name].at[slot], ready)
            for ref, buffer in zip(refs["q"], smem["q_vectors"], strict=True):
                plgpu.copy_gmem_to_smem(self.per_token(ref, tokens, head), buffer.at[slot], ready)
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
        self.take_registers()
        refs, smem, plan = self.refs, self.smem, self.plan
        row = k_block, start, full_end, end = self.row()
        k_start = self.keys(k_block, part)
        rows = pl.ds(k_start, GROUP)
        plgpu.barrier_wait(smem["own_ready"].at[part])

        def sweep(sums, first, heads, head):
            """The steps of some heads, of which the first is number `first`."""
            k_vectors = loaded([loader(self.per_token(ref, rows, head), ROWS) for ref in refs["k"]])

            def body(masked):
                return lambda i, sums: self.step(i, sums, masked, row, group, part, k_start, k_vectors)

            full, steps = first + (full_end - start) * heads, first + (end - start) * heads
            if plan.schedule.some_full:
                sums = lax.fori_loop(first, full, body(False), sums)
            if plan.schedule.some_partial:
                sums = lax.fori_loop(full, steps, body(True), sums)
            return sums

        def one_head(i, sums):
            head = self.kv_head * plan.groups + i
            biases = [zero_rows() for _ in smem["dbias"]] if "dk" in sums else []
            found = sweep(sums | {"bias": biases}, i * (end - start), 1, head)
            self.put_bias(group, found.pop("bias"), rows, head)
            return found

        widths = dict(zip(("dk", "dv"), self.widths, strict=True))
        sums = {name: zeros(widths[name]) for name in wanted}
        if plan.head_by_head:
            sums = lax.fori_loop(jnp.int32(0), jnp.int32(plan.groups), one_head, sums)
        else:
            sums = sweep(sums | {"bias": []}, jnp.int32(0), plan.groups, None)
            sums.pop("bias")
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

    def put_bias(self, group: jax.Array, sums: list[jax.Array], rows: Any, head: jax.Array) -> None:
        """Stores the sums for the bias of one head."""
        buffers = [x.at[group] for x in self.smem["dbias"][: len(sums)]]
        if not buffers:
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for buffer, x in zip(buffers, sums, strict=True):
            buffer[...] = x
        plgpu.commit_smem()
        for buffer, out in zip(buffers, self.refs["dbias"], strict=True):
            plgpu.copy_smem_to_gmem(buffer, out.at[self.batch, head, rows])

    def step(self, i, sums, masked, row, group, part, k_start, k_vectors):
        plan, smem = self.plan, self.smem
        dtype, (stages, block) = plan.call.q_BTNH.dtype, (plan.tiles.stages, plan.tiles.block)
        slot, shape, part = remainder(i, stages), (GROUP, block), fresh(part)
        tile = self.tile(i, slot, masked, row, part, k_start, k_vectors)
        q_smem, dout_smem = smem["q"].at[slot], smem["dout"].at[slot]
        lse, delta = (lambda x=smem[x].at[slot]: vector(x, COLUMNS) for x in ("lse", "delta"))

        def products(accumulators):
            qk_pair, dp_pair = (smem["k"].at[part], q_smem), (smem["v"].at[part], dout_smem)
            if "dk" not in sums:
                p = weights_alone(shape, qk_pair, tile, lse, masked)
                plgpu.wgmma(accumulators["dv"], p.astype(dtype), dout_smem)
                return

            def values(p):
                plgpu.wgmma(accumulators["dv"], p.astype(dtype), dout_smem)

            def then(qk, dp):
                return gradient(tile, qk, dp, lse, delta, masked)

            # Under dP and what it is used for, where registers have room for the P that this product reads.
            early = "dv" in sums and dv_product_fits_early(plan.scores, masked)
            p, ds, dz = both_products(shape, qk_pair, dp_pair, then, values if early else None)
            if "dv" in sums and not early:
                values(p)
            add_rows(accumulators["bias"], tile.bias_gradients(_pulls(plan), ds))
            dz = dz.astype(dtype)
            plgpu.wgmma(accumulators["dk"], dz, q_smem)
            self.share(i, part, dz)
            self.add_queries(i, row, group)

        found = pl.run_state(products)(accumulating(sums))
        release(smem["free"].at[slot], read="dk" not in sums)  # `share` has set a fence
        return found

    def tile(self, i, slot, masked, row, part, k_start, k_vectors) -> HopperTile:
        """The scores of a step, transposed, once its queries are there."""
        plan, smem, block = self.plan, self.smem, self.plan.tiles.block
        q_block = head = jnp.int32(0)
        if plan.scores.needs_position(masked):
            q_block, head = self.visit(row, i)
        plgpu.barrier_wait(smem["ready"].at[slot])
        q_vectors = []
        if plan.scores.needs_position(masked):
            q_vectors = [loader(x.at[slot], COLUMNS) for x in smem["q_vectors"]]
        bits = self.own_bits(slot, part) if masked else []
        return HopperTile(
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
        """What else is to happen with dZ^T [keys, queries] while it is in registers, under the last products.

        After it a slot may be released: what threads have read of it is fenced off here.
        """
        plgpu.commit_smem()

    def add_queries(self, i: jax.Array, row: Row, group: jax.Array) -> None:
        """What else a step gives."""


class _SplitKernel(KeyKernel):
    """Where registers cannot hold both sums of a wide head, both warpgroups own the same 64 keys.

    The first sums their dK, the second their dV, whose scores are computed twice.
    """

    name = "split"

    @staticmethod
    def more_scratch(plan: HopperPlan, swizzle_block: int) -> dict:
        return {"done": plgpu.Barrier(num_arrivals=2)}

    def roles(self, group: jax.Array) -> None:
        pl.when(group == 0)(lambda: self.compute(group, group * 0, ("dk",)))
        pl.when(group == 1)(lambda: self.compute(group, group * 0, ("dv",)))

    def before_output(self) -> None:
        self.meet()
