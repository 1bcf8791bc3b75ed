"""The backward as two kernels, both deterministic: one sweeps keys for dQ, one sweeps queries for dK and dV.

    P = 2^(z - lse),  dZ = P * (dP - delta),  dQ = dZ K,  dK = dZ^T Q,  dV = P^T dO,  dP = dO V^T

with delta_t = out_t . d out_t - d lse_t (Dao et al. 2022, arXiv 2205.14135). The second kernel holds its
tiles transposed, so that P and dZ enter their products from registers, and walks all query heads of a kv
head, so that no gradient per query head is ever stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops.softmax.mosaic_gpu.launch import (
    COLUMNS,
    ROWS,
    ThreadBlock,
    fresh,
    launch,
    release,
    remainder,
    tiled,
    times,
    vector,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import GROUP, Plan, round_up
from attention_jax.ops.softmax.mosaic_gpu.scores import Tile

WGMMA = plgpu.Layout.WGMMA
REGISTERS = 240  # of a thread that computes; 24 of one that loads


def _zeros(width: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((GROUP, width), jnp.float32), WGMMA)


def _gradient(tile: Tile, qk, dp, lse, delta, masked: bool) -> tuple[jax.Array, jax.Array]:
    """(P with dropout, d(q . k) / scale) of a tile, from its two products and its queries' lse and delta.

    dp, lse, delta: functions, called as late as possible, since registers are short.
    """
    p, share, slope = _weights(tile, qk, lse, masked)
    dp = dp()
    if share is not None:
        dp = dp * share
    dz = p * (dp - tile.along_queries(delta()))
    if slope is not None:
        dz = dz * slope
    if masked:
        # What is hidden (p = 0) may have overflowed, and 0 * Inf is NaN: select.
        dz = jnp.where(p > 0.0, dz, 0.0)
    return p if share is None else p * share, dz


def _weights(tile: Tile, qk, lse, masked: bool) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(P, the factor dropout puts on each entry, the softcap's slope); None where there is none."""
    scores = tile.scores
    z, factor, slope = tile.exponents(qk, masked)
    p = jnp.exp2(times(z, factor) - tile.along_queries(lse()))
    share = None
    if scores.dropout is not None:
        share = jnp.where(tile.surviving(), 1 / (1 - scores.dropout_rate), 0.0)
    return p, share, slope


def _weights_alone(shape, pair, tile: Tile, lse, masked: bool) -> jax.Array:
    """P with dropout, where nothing else is wanted of the scores."""

    def product(acc):
        plgpu.wgmma(acc, pair[0], pair[1].transpose((1, 0)))
        return acc[...]

    p, share, _ = _weights(tile, pl.run_scoped(product, plgpu.ACC(shape, jnp.float32)), lse, masked)
    return p if share is None else p * share


def _products(shape, qk_pair, dp_pair, then):
    """then(q . k, function of dP), products a b^T of shared memory: dP is computed under what uses q . k."""

    def inner(qk_acc, dp_acc):
        for acc, (a, b) in ((qk_acc, qk_pair), (dp_acc, dp_pair)):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        qk = plgpu.wgmma_accumulator_load(qk_acc, wait_n=1)
        return then(qk, lambda: plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(inner, acc, acc)


def gradient_q(plan: Plan, dout: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """dQ [B, T, N, H] of a clean call; dout [B, T, N, M], lse / ln 2 and delta float32 [B, N, T padded]."""
    call = plan.call
    B, T, _, N, _, H, M = call.sizes
    dtype, (stages, block) = call.q_BTNH.dtype, (plan.tiles.stages, plan.tiles.block)
    operands = plan.operands(
        q_tokens=call.q_BTNH, k_tokens=call.k_BSKH, v_tokens=call.v_BSKM, dout=dout, lse=lse, delta=delta
    )
    vectors = len(plan.k.vectors)
    scratch = {
        "q": tiled((2, GROUP, H), dtype, block),
        "dout": tiled((2, GROUP, M), dtype, block),
        "k": tiled((stages, block, H), dtype, block),
        "v": tiled((stages, block, M), dtype, block),
        "k_vectors": [plgpu.SMEM((stages, block), jnp.int32) for _ in range(vectors)],
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "ready": plgpu.Barrier(num_arrivals=2 + vectors, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }

    def body(refs, smem):
        kernel = _QueryKernel(plan, refs, smem)
        group = lax.axis_index("group")
        pl.when(group < 2)(lambda: kernel.compute(group))
        pl.when(group == 2)(kernel.load)

    return launch(
        body, operands, {"dq": jax.ShapeDtypeStruct((B, T, N, H), dtype)}, scratch,
        name="flash_backward_q", groups=3,
        grid={"head": N, "row": round_up(T, 2 * GROUP) // (2 * GROUP), "batch": B},
    )["dq"]  # fmt: skip


class _QueryKernel(ThreadBlock):
    """Two warpgroups that each own 64 queries of a head, and one that loads keys and values."""

    @property
    def head(self) -> jax.Array:
        return lax.axis_index("head")

    def load(self) -> None:
        plgpu.set_max_registers(24, action="decrease")
        _, start, _, end = self.row()
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block
        kv_head = lax.div(self.head, jnp.int32(self.plan.groups))

        def copy(i, slot):
            tokens = pl.ds(self.item(start + i) * block, block)
            at, ready = (self.batch, tokens, kv_head), smem["ready"].at[slot]
            plgpu.copy_gmem_to_smem(refs["k_tokens"].at[at], smem["k"].at[slot], ready)
            plgpu.copy_gmem_to_smem(refs["v_tokens"].at[at], smem["v"].at[slot], ready)
            for ref, buffer in zip(refs["k"], smem["k_vectors"], strict=True):
                plgpu.copy_gmem_to_smem(self.per_token(ref, tokens), buffer.at[slot], ready)

        self.produce(end - start, {"free": copy})

    def compute(self, group: jax.Array) -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        refs, smem, plan = self.refs, self.smem, self.plan
        H = plan.call.sizes[5]
        q_block, start, full_end, end = self.row()
        q_start = q_block * (2 * GROUP) + group * GROUP
        rows = pl.ds(q_start, GROUP)
        q_smem, dout_smem, own_ready = (smem[x].at[group] for x in ("q", "dout", "own_ready"))
        at = (self.batch, rows, self.head)
        plgpu.copy_gmem_to_smem(refs["q_tokens"].at[at], q_smem, own_ready)
        plgpu.copy_gmem_to_smem(refs["dout"].at[at], dout_smem, own_ready)
        lse, delta = (vector(refs[x].at[self.batch, self.head, rows], ROWS) for x in ("lse", "delta"))
        q_vectors = [vector(self.per_token(ref, rows), ROWS) for ref in refs["q"]]
        plgpu.barrier_wait(own_ready)

        def body(masked):
            own = (q_start, q_vectors, lse, delta)
            return lambda i, dq: self.step(i, dq, masked, start, group, own)

        dq = _zeros(H)
        if plan.schedule.some_full:
            dq = lax.fori_loop(jnp.int32(0), full_end - start, body(False), dq)
        if plan.schedule.some_partial:
            dq = lax.fori_loop(full_end - start, end - start, body(True), dq)
        q_smem[...] = (dq * plan.scores.scale).astype(plan.call.q_BTNH.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, refs["dq"].at[at])
        plgpu.wait_smem_to_gmem(0)

    def step(self, i, dq, masked, start, group, own):
        plan, smem = self.plan, self.smem
        q_start, q_vectors, lse, delta = own
        group = fresh(group)
        q_smem = smem["q"].at[group]
        stages, block = plan.tiles.stages, plan.tiles.block
        slot, shape = remainder(i, stages), (GROUP, block)
        k_block = self.item(start + i) if plan.scores.placed(masked) else jnp.int32(0)
        k_smem = smem["k"].at[slot]
        plgpu.barrier_wait(smem["ready"].at[slot])
        k_vectors = []
        if plan.scores.placed(masked):
            k_vectors = [vector(x.at[slot], COLUMNS) for x in smem["k_vectors"]]
        tile = Tile(
            plan.scores, self.refs, self.batch, self.head, q_start, k_block * block, q_vectors, k_vectors,
            shape, 0, (ROWS, COLUMNS),
        )  # fmt: skip

        def products(dq_acc):
            pair = (q_smem, k_smem), (smem["dout"].at[fresh(group)], smem["v"].at[slot])
            _, dz = _products(
                shape, *pair, lambda qk, dp: _gradient(tile, qk, dp, lambda: lse, lambda: delta, masked)
            )
            plgpu.wgmma(dq_acc, dz.astype(plan.call.q_BTNH.dtype), smem["k"].at[fresh(slot)])

        dq = pl.run_state(products)(plgpu.ACC.init(dq))
        release(smem["free"].at[slot], read=bool(k_vectors))
        return dq


def gradient_kv(plan: Plan, dout: jax.Array, lse: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dK [B, S, K, H], dV [B, S, K, M]) of a clean call; arguments as in `gradient_q`."""
    kernel = _KeyKernel if plan.key_rows == 2 * GROUP else _SplitKernel
    return _over_keys(kernel, plan, plan.tiles.block, dout=dout, lse=lse, delta=delta)


def gradients_fused(
    plan: Plan, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dQ float32, dK, dV) in one pass of five products a tile; dQ's sums run in no fixed order."""
    call = plan.call
    B, T, _, N, _, H, _ = call.sizes
    dq = jax.new_ref(jnp.zeros((B, T, N, H), jnp.float32))
    # Each warpgroup makes half of the columns of a tile of dQ: the tiles in shared memory split there.
    dk, dv = _over_keys(_FusedKernel, plan, H // 2, dout=dout, lse=lse, delta=delta, dq=dq)
    return jax.freeze(dq) * plan.scores.scale, dk, dv


def _over_keys(
    kind: type[_KeyKernel], plan: Plan, swizzle_block: int, **more: jax.Array
) -> tuple[jax.Array, jax.Array]:
    call = plan.call
    B, _, S, _, K, H, M = call.sizes
    dtype, (stages, block) = call.q_BTNH.dtype, (plan.tiles.stages, plan.tiles.block)
    parts = plan.key_rows // GROUP
    operands = plan.operands(q_tokens=call.q_BTNH, k_tokens=call.k_BSKH, v_tokens=call.v_BSKM, **more)
    vectors = len(plan.q.vectors)
    scratch = {
        "k": tiled((parts, GROUP, H), dtype, swizzle_block),
        "v": tiled((parts, GROUP, M), dtype, swizzle_block),
        "q": tiled((stages, block, H), dtype, swizzle_block),
        "dout": tiled((stages, block, M), dtype, swizzle_block),
        "lse": plgpu.SMEM((stages, block), jnp.float32),
        "delta": plgpu.SMEM((stages, block), jnp.float32),
        "q_vectors": [plgpu.SMEM((stages, block), jnp.int32) for _ in range(vectors)],
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=parts),
        "ready": plgpu.Barrier(num_arrivals=4 + vectors, num_barriers=stages),
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


class _KeyKernel(ThreadBlock):
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
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block
        for part in range(self.plan.key_rows // GROUP):
            at = (self.batch, pl.ds(self.keys(k_block, part), GROUP), self.kv_head)
            for name, tokens in (("k", "k_tokens"), ("v", "v_tokens")):
                plgpu.copy_gmem_to_smem(refs[tokens].at[at], smem[name].at[part], smem["own_ready"].at[part])

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

        self.produce((end - start) * self.plan.groups, {"free": copy})

    def compute(self, group: jax.Array, part: jax.Array, wanted: tuple[str, ...]) -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        refs, smem, plan = self.refs, self.smem, self.plan
        k_block, start, full_end, end = self.row()
        k_start = self.keys(k_block, part)
        rows = pl.ds(k_start, GROUP)
        k_vectors = [vector(self.per_token(ref, rows), ROWS) for ref in refs["k"]]
        plgpu.barrier_wait(smem["own_ready"].at[part])

        def body(masked):
            return lambda i, sums: self.step(i, sums, masked, start, group, part, k_start, k_vectors)

        widths = dict(zip(("dk", "dv"), self.widths, strict=True))
        sums = {name: _zeros(widths[name]) for name in wanted}
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
        q_block = head = jnp.int32(0)
        if plan.scores.placed(masked):
            q_block, head = self.visit(start, i)
        plgpu.barrier_wait(smem["ready"].at[slot])
        q_vectors = []
        if plan.scores.placed(masked):
            q_vectors = [vector(x.at[slot], COLUMNS) for x in smem["q_vectors"]]
        tile = Tile(
            plan.scores, self.refs, self.batch, head, q_block * block, k_start, q_vectors, k_vectors,
            shape, 1, (ROWS, COLUMNS),
        )  # fmt: skip
        q_smem, dout_smem = smem["q"].at[slot], smem["dout"].at[slot]
        lse, delta = (lambda x=smem[x].at[slot]: vector(x, COLUMNS) for x in ("lse", "delta"))

        def products(accumulators):
            qk_pair, dp_pair = (smem["k"].at[part], q_smem), (smem["v"].at[part], dout_smem)
            if "dk" not in sums:
                p = _weights_alone(shape, qk_pair, tile, lse, masked)
                plgpu.wgmma(accumulators["dv"], p.astype(dtype), dout_smem)
                return
            p, dz = _products(
                shape, qk_pair, dp_pair, lambda qk, dp: _gradient(tile, qk, dp, lse, delta, masked)
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


class _SplitKernel(_KeyKernel):
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


class _FusedKernel(_KeyKernel):
    """Also dQ: both warpgroups put their dZ^T side by side, and each adds half the columns of dZ K to dQ.

    dZ has two buffers, so that one meeting a step suffices: whoever writes a buffer again has met the other
    after its last read.
    """

    name = "fused"

    @staticmethod
    def more_scratch(plan: Plan, swizzle_block: int) -> dict:
        H, dtype, block = plan.call.sizes[5], plan.call.q_BTNH.dtype, plan.tiles.block
        return {
            "dz": tiled((2, 2, GROUP, block), dtype, swizzle_block),
            "dq": tiled((2, block, H // 2), jnp.float32),
            "met": plgpu.Barrier(num_arrivals=2),
            "done": plgpu.Barrier(num_arrivals=2),
        }

    def before_output(self):
        self.meet()

    def share(self, i, part, dz):
        self.smem["dz"].at[remainder(i, 2), part][...] = dz
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem["met"])

    def add_queries(self, i, start, group):
        smem, block = self.smem, self.plan.tiles.block
        half = self.widths[0] // 2
        q_block, head = self.visit(start, i)
        columns = pl.ds(group * half, half)
        plgpu.barrier_wait(smem["met"])

        def product(acc):
            for part in range(2):
                dz_T = smem["dz"].at[remainder(i, 2), part]
                plgpu.wgmma(acc, dz_T.transpose((1, 0)), smem["k"].at[part, :, columns])
            return acc[...]

        dq = pl.run_scoped(product, plgpu.ACC((block, half), jnp.float32))
        own = smem["dq"].at[group]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = dq
        plgpu.commit_smem()
        at = (self.batch, pl.ds(q_block * block, block), head, columns)
        plgpu.copy_smem_to_gmem(own, self.refs["dq"].at[at], reduction_op="add")
