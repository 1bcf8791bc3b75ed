"""The forward kernel: warpgroups of queries take turns on the tensor cores, another one loads.

For each block of 128 or 192 queries of a head and each listed block of keys

    m' = max(m, max_s z_s),  l' = l 2^(m-m') + sum_s 2^(z_s-m'),  a' = a 2^(m-m') + sum_s 2^(z_s-m') v_s

as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): the scores of one warpgroup are exponentiated
under the matrix products of another, and P enters the second product from registers. A turn on the tensor
cores is P V of one step and Q K^T of the next, issued together: they do not idle between the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops.softmax.mosaic_gpu.config import GROUP
from attention_jax.ops.softmax.mosaic_gpu.launch import (
    COLUMNS,
    ROWS,
    ThreadBlock,
    bits_scratch,
    launch,
    loaded,
    loader,
    release,
    remainder,
    tiled,
    times,
    vectors_scratch,
    zeros,
)
from attention_jax.ops.softmax.mosaic_gpu.plan import HopperPlan, round_up
from attention_jax.ops.softmax.mosaic_gpu.scores import LOG2E, LOWEST, HopperTile


def forward(plan: HopperPlan) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, M], lse / ln 2 as float32 [B, N, T]) of a clean call."""
    call = plan.call
    B, T, _, N, _, H, M = call.sizes
    dtype, tiles = call.q_BTNH.dtype, plan.tiles
    stages, block, groups = tiles.stages, tiles.block, tiles.warpgroups
    sinks = None
    if call.sink_logits_N is not None:
        sinks = call.sink_logits_N.astype(jnp.float32) * LOG2E
    operands = plan.operands(q_tokens=call.q_BTNH, k_tokens=call.k_BSKH, v_tokens=call.v_BSKM, sinks=sinks)
    scratch = {
        "q": tiled((groups, GROUP, H), dtype, block),
        "k": tiled((stages, block, H), dtype, block),
        "v": tiled((stages, block, M), dtype, block),
        "out": None if H == M else tiled((groups, GROUP, M), dtype, block),
        "lse": plgpu.SMEM((groups, GROUP), jnp.float32),
        "k_vectors": vectors_scratch(plan, plan.k),
        "bits": bits_scratch(plan, tiles.rows),
        "q_ready": plgpu.Barrier(num_barriers=groups),
        "k_ready": plgpu.Barrier(num_arrivals=1 + plan.copies(plan.k), num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=groups),
    }
    T_pad = round_up(T, tiles.rows)
    outs = {
        "out": jax.ShapeDtypeStruct((B, T, N, M), dtype),
        "lse": jax.ShapeDtypeStruct((B, N, T_pad), jnp.float32),
    }

    def body(refs, smem):
        kernel = _Kernel(plan, refs, smem)
        group = lax.axis_index("group")
        pl.when(group < groups)(lambda: kernel.compute(group))
        pl.when(group == groups)(kernel.load)

    found = launch(
        body, operands, outs, scratch, name="flash_forward", groups=groups + 1,
        grid={"head": N, "row": T_pad // tiles.rows, "batch": B},
    )  # fmt: skip
    return found["out"], found["lse"][..., :T]


class _Kernel(ThreadBlock):
    """Warpgroups that each own 64 queries of a head, and one that loads."""

    registers = ThreadBlock.registers | {2: (232, 40)}

    @property
    def head(self) -> jax.Array:
        return lax.axis_index("head")

    def load(self) -> None:
        """The last warpgroup: keys and values of the listed blocks, `stages` steps ahead."""
        self.leave_registers()
        q_block, start, _, end = self.row()
        refs, smem, block = self.refs, self.smem, self.plan.tiles.block
        kv_head = lax.div(self.head, jnp.int32(self.plan.groups))

        def tokens(i):
            return pl.ds(self.item(start + i) * block, block)

        def keys(i, slot):
            at, ready = tokens(i), smem["k_ready"].at[slot]
            plgpu.copy_gmem_to_smem(refs["k_tokens"].at[self.batch, at, kv_head], smem["k"].at[slot], ready)
            for ref, buffer in zip(refs["k"], smem["k_vectors"], strict=True):
                plgpu.copy_gmem_to_smem(self.per_token(ref, at, self.head), buffer.at[slot], ready)
            self.copy_bits(self.head, self.item(start + i), q_block, slot, ready)

        def values(i, slot):
            at = (self.batch, tokens(i), kv_head)
            plgpu.copy_gmem_to_smem(refs["v_tokens"].at[at], smem["v"].at[slot], smem["v_ready"].at[slot])

        self.produce(end - start, {"k_free": keys, "v_free": values})

    def compute(self, group: jax.Array) -> None:
        """One of the warpgroups that each own 64 queries."""
        self.take_registers()
        refs, smem, plan = self.refs, self.smem, self.plan
        M = plan.call.sizes[6]
        q_block, start, full_end, end = self.row()
        q_start = q_block * plan.tiles.rows + group * GROUP
        rows = pl.ds(q_start, GROUP)
        q_smem = smem["q"].at[group]
        plgpu.copy_gmem_to_smem(
            refs["q_tokens"].at[self.batch, rows, self.head], q_smem, smem["q_ready"].at[group]
        )
        q_vectors = loaded([loader(self.per_token(ref, rows, self.head), ROWS) for ref in refs["q"]])
        plgpu.barrier_wait(smem["q_ready"].at[group])
        steps = end - start
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(smem["k_ready"].at[0]))
        pl.when(group > 0)(lambda: plgpu.barrier_wait(smem["turn"].at[group]))

        def first(qk_ref):
            self.start_scores(qk_ref, q_smem, 0, group)
            return qk_ref[...]

        # In an empty row these are scores of whatever memory holds, and go unused.
        qk = pl.run_scoped(first, plgpu.ACC((GROUP, plan.tiles.block), jnp.float32))
        carry = (qk, zeros(M), *self.first_maximum())

        def body(masked):
            return lambda i, carry: self.step(
                i, carry, masked, start, steps, group, q_start, q_smem, q_vectors
            )

        if plan.schedule.some_full:
            carry = lax.fori_loop(jnp.int32(0), full_end - start, body(False), carry)
        if plan.schedule.some_partial:
            carry = lax.fori_loop(full_end - start, steps, body(True), carry)
        self.finish(group, q_start, *carry[1:])

    def start_scores(self, qk_ref, q_smem, slot, group) -> None:
        """Issues Q K^T, the last product of a turn, and passes the turn on."""
        plgpu.wgmma(qk_ref, q_smem, self.smem["k"].at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(self.next_turn(group))

    def next_turn(self, group: jax.Array):
        """The barrier in front of the next warpgroup's turn; the first one follows the last."""
        return self.smem["turn"].at[remainder(group + 1, self.plan.tiles.warpgroups)]

    def first_maximum(self) -> tuple[jax.Array, jax.Array]:
        """(maximum, sum of exponentials) before the first key; a sink is one without a value."""
        m, norm = jnp.float32(LOWEST), jnp.float32(0)
        if self.refs["sinks"] is not None:
            sink = self.refs["sinks"][self.head]
            m, norm = jnp.maximum(m, sink), jnp.where(sink == -jnp.inf, 0.0, 1.0)
        return tuple(plgpu.layout_cast(lax.broadcast(x, (GROUP,)), ROWS) for x in (m, norm))

    def step(self, i, carry, masked, start, steps, group, q_start, q_smem, q_vectors):
        plan, smem = self.plan, self.smem
        stages, block = plan.tiles.stages, plan.tiles.block
        qk, acc, m, norm = carry
        slot, ahead = remainder(i, stages), remainder(i + 1, stages)
        shape = (GROUP, block)
        k_block = self.item(start + i) if plan.scores.needs_position(masked) else jnp.int32(0)
        k_vectors = []
        if plan.scores.needs_position(masked):
            k_vectors = loaded([loader(x.at[slot], COLUMNS) for x in smem["k_vectors"]])
        bits = loaded(self.own_bits(slot, group)) if masked else []
        release(smem["k_free"].at[slot], read=bool(k_vectors or bits))

        tile = HopperTile(
            plan.scores, self.refs, self.batch, self.head, q_start, k_block * block, q_vectors, k_vectors,
            shape, 0, (ROWS, COLUMNS), bits,
        )  # fmt: skip
        z, factor, _ = tile.exponents(qk, masked)
        new_m = jnp.maximum(m, times(z.max(axis=1), factor))
        decay = jnp.exp2(m - new_m)
        p = jnp.exp2(times(z, factor) - lax.broadcast_in_dim(new_m, shape, (0,)))
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, (0,))
        norm = norm * decay + p.sum(axis=1)
        kept = p if plan.scores.dropout is None else jnp.where(tile.surviving(), p, 0.0)
        p16 = kept.astype(plan.call.q_BTNH.dtype)

        def values(then):
            """acc + P V, with `then` issued behind it."""

            def inner(acc_ref):
                plgpu.wgmma(acc_ref, p16, smem["v"].at[slot])
                then()

            return pl.run_state(inner)(plgpu.ACC.init(acc))

        # Called in each branch: ptxas moves arithmetic behind a wait, but not into both branches.
        def await_turn():
            plgpu.barrier_wait(smem["v_ready"].at[slot])
            plgpu.barrier_wait(smem["turn"].at[group])

        def more():
            plgpu.barrier_wait(smem["k_ready"].at[ahead])
            await_turn()

            def both(qk_ref):
                found = values(lambda: self.start_scores(qk_ref, q_smem, ahead, group))
                return qk_ref[...], found

            return pl.run_scoped(both, plgpu.ACC(shape, jnp.float32))

        def last():
            await_turn()
            # The next warpgroups have their last products to make. No scores follow: p stands for them.
            pass_on = pl.when(group < plan.tiles.warpgroups - 1)
            return p, values(lambda: pass_on(lambda: plgpu.barrier_arrive(self.next_turn(group))))

        qk, acc = lax.cond(i + 1 < steps, more, last)
        plgpu.barrier_arrive(smem["v_free"].at[slot])
        return qk, acc, new_m, norm

    def finish(self, group, q_start, acc, m, norm) -> None:
        smem, refs = self.smem, self.refs
        out_smem = (smem["q"] if smem["out"] is None else smem["out"]).at[group]
        lse_smem = smem["lse"].at[group]
        # A row without a key has norm = 0: its output is 0 and log2 gives -inf.
        share = 1.0 / (jnp.where(norm > 0.0, norm, 1.0) * (1 - self.plan.scores.dropout_rate))
        out = acc * lax.broadcast_in_dim(share, acc.shape, (0,))
        out_smem[...] = out.astype(self.plan.call.q_BTNH.dtype)
        lse_smem[...] = m + jnp.log(norm) * LOG2E
        plgpu.commit_smem()
        rows = pl.ds(q_start, GROUP)
        plgpu.copy_smem_to_gmem(out_smem, refs["out"].at[self.batch, rows, self.head])
        plgpu.copy_smem_to_gmem(lse_smem, refs["lse"].at[self.batch, self.head, rows])
        plgpu.wait_smem_to_gmem(0)
