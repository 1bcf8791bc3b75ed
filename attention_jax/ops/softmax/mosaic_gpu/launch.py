"""What the kernels share: layouts, scratch, and a launch over pytrees of operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops import varying
from attention_jax.ops.softmax.mosaic_gpu.config import GROUP
from attention_jax.ops.softmax.mosaic_gpu.plan import HopperPlan
from attention_jax.ops.softmax.mosaic_gpu.schedule import Side
from attention_jax.ops.softmax.mosaic_gpu.scores import Vector

# Layouts of an accumulator, and of a vector along its rows and along its columns.
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
# Rows of a tile of swizzled shared memory. The copy engine cuts what lies past an array's end, but the array
# must be one of whole tiles.
TILE_ROWS = 8


def tiled(shape: tuple[int, ...], dtype: Any, block: int = 64) -> Any:
    """Shared memory in the swizzled tiles that both the copy engine and wgmma read.

    block: the scores' columns where they enter a product from registers, in pieces as wide as the swizzle.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = min(plgpu.find_swizzle(shape[-1] * bits), plgpu.find_swizzle(block * bits))
    transforms = (plgpu.TilingTransform((TILE_ROWS, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(width: int) -> jax.Array:
    """An accumulator of a warpgroup's rows before the first product."""
    return plgpu.layout_cast(jnp.zeros((GROUP, width), jnp.float32), WGMMA)


def zero_rows() -> jax.Array:
    """A zero for each row of a tile."""
    return plgpu.layout_cast(jnp.zeros((GROUP,), jnp.float32), ROWS)


def remainder(i: jax.Array, n: int) -> jax.Array:
    """i % n for i >= 0."""
    return lax.rem(i, jnp.asarray(n, i.dtype))


def times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * factor


def fresh(x: jax.Array) -> jax.Array:
    """x, hidden from the compiler: addresses made from it are not kept in registers across a loop."""
    return lax.optimization_barrier(x)


def release(barrier: Any, read: bool) -> None:
    """Hands a slot back to the loader. read: threads have read it themselves, not only matrix instructions.

    Such reads and the copy engine's next write go through different proxies, which a fence must order.
    """
    if read:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def vectors_scratch(plan: HopperPlan, side: Side) -> list[Any]:
    """Shared memory for what a step reads per token of the side it sweeps."""
    return [plgpu.SMEM((plan.tiles.stages, plan.tiles.block), x.dtype) for x in side.vectors]


def bits_scratch(plan: HopperPlan, own: int) -> Any:
    """Shared memory for the bits of `own` tokens, a row a word; None where the kernel computes the mask."""
    return plgpu.SMEM((plan.tiles.stages * plan.words, own), jnp.int32) if plan.words else None


def vector(ref: Any, layout: Any) -> jax.Array:
    """A vector from global or shared memory, spread over the threads as rows or columns of a tile are."""
    return plgpu.load(ref, layout=layout, optimized=False)


def loader(ref: Any, layout: Any) -> Vector:
    """Loads a vector where it is called."""
    return lambda: vector(ref, layout)


def loaded(loaders: list[Vector]) -> list[Vector]:
    """The same vectors, loaded now."""
    found = [load() for load in loaders]
    return [lambda x=x: x for x in found]


Row = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # of `Schedule.rows`


@dataclasses.dataclass(frozen=True)
class ThreadBlock:
    """The body of one thread block; `refs` are arrays in global memory, `smem` scratch."""

    plan: HopperPlan
    refs: dict[str, Any]
    smem: dict[str, Any]

    # Of a thread that computes and of one that loads, by how many warpgroups compute; 65,536 are shared out.
    registers: ClassVar[dict[int, tuple[int, int]]] = {2: (240, 24), 3: (160, 32)}

    def take_registers(self) -> None:
        """Before a warpgroup computes."""
        plgpu.set_max_registers(self.registers[self.plan.tiles.warpgroups][0], action="increase")

    def leave_registers(self) -> None:
        """Before a warpgroup loads, which needs few."""
        plgpu.set_max_registers(self.registers[self.plan.tiles.warpgroups][1], action="decrease")

    @property
    def batch(self) -> jax.Array:
        return lax.axis_index("batch")

    @property
    def widths(self) -> tuple[int, int]:
        """(H, M)."""
        return self.plan.call.sizes[5:]

    def _shared(self, ref: Any) -> jax.Array:
        """The batch index into an array whose batch rows may all be one."""
        # Not a constant 0: a region inside a loop cannot close over one.
        return self.batch if ref.shape[0] > 1 else self.batch * 0

    def row(self) -> Row:
        """(row's block, start, end of the full blocks, end) of the list this thread block works off."""
        rows = self.refs["rows"]
        return tuple(rows[self._shared(rows), lax.axis_index("row"), i] for i in range(4))

    def item(self, at: jax.Array) -> jax.Array:
        items = self.refs["items"]
        return items[self._shared(items), at]

    def produce(self, steps: jax.Array, copies: dict[str, Callable[[jax.Array, jax.Array], None]]) -> None:
        """The loader's loop: for each step i and barrier, once slot i % stages is free, the copies.

        At the end it waits until all has been read, so that no barrier dies with someone behind it.
        """
        stages = self.plan.tiles.stages

        def step(i, _):
            slot = remainder(i, stages)
            for free, copy in copies.items():
                pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(self.smem[free].at[slot]))
                copy(i, slot)

        def drain(i, _):
            for free in copies:
                slot = remainder(i, stages)
                pl.when(i >= stages)(
                    lambda free=free, slot=slot: plgpu.barrier_wait(self.smem[free].at[slot])
                )

        lax.fori_loop(jnp.int32(0), steps, step, None)
        lax.fori_loop(steps, steps + stages, drain, None)

    def copy_bits(self, head, swept_block: jax.Array, own_block: jax.Array, slot: jax.Array, ready) -> None:
        """Fetches a step's words for the tokens that the thread block owns, where there are any."""
        words = self.plan.words
        if not words:
            return
        ref, buffer = self.refs["bits"], self.smem["bits"]
        own = buffer.shape[1]
        at = (pl.ds(swept_block * words, words), pl.ds(own_block * own, own))
        source = ref.at[self._shared(ref), head if ref.shape[1] > 1 else 0, *at]
        plgpu.copy_gmem_to_smem(source, buffer.at[pl.ds(slot * words, words)], ready)

    def own_bits(self, slot: jax.Array, part: jax.Array) -> list[Vector]:
        """A step's words for one warpgroup's rows."""
        rows, words = pl.ds(part * GROUP, GROUP), self.plan.words
        return [loader(self.smem["bits"].at[slot * words + i, rows], ROWS) for i in range(words)]

    def per_token(self, ref: Any, tokens: Any, head: Any) -> Any:
        """One of `Side.vectors` of some tokens, in global memory."""
        at = (head, tokens) if len(ref.shape) == 3 else (tokens,)
        return ref.at[self._shared(ref), *at]


def launch(
    body: Callable[[dict, dict], None],
    operands: dict[str, Any],
    outs: dict[str, Any],
    scratch: dict[str, Any],
    *,
    name: str,
    groups: int,
    grid: dict[str, int],
) -> dict[str, jax.Array]:
    """Runs `body(refs, smem)` on a grid of thread blocks of `groups` warpgroups; refs hold operands and outs.

    The last axis of the grid runs fastest. An operand may be a `jax.Ref`, which the kernel adds to; one of
    tokens then has whole tiles of `TILE_ROWS`, to which other operands and outputs are padded here.
    """
    flat, treedef = jax.tree.flatten(operands, is_leaf=lambda x: x is None)
    arrays = [x if isinstance(x, jax.Ref) else _whole_tiles(x) for x in flat if x is not None]
    wanted, out_treedef = jax.tree.flatten(outs)
    out_flat = [jax.eval_shape(_whole_tiles, x) for x in wanted]
    scratch_flat, scratch_treedef = jax.tree.flatten(scratch, is_leaf=lambda x: x is None)

    def kernel(*refs):
        inputs, outputs, rest = (
            iter(refs[: len(arrays)]),
            refs[len(arrays) : len(arrays) + len(out_flat)],
            iter(refs[len(arrays) + len(out_flat) :]),
        )
        named = treedef.unflatten([None if x is None else next(inputs) for x in flat])
        smem = scratch_treedef.unflatten([None if x is None else next(rest) for x in scratch_flat])
        body(named | out_treedef.unflatten(outputs), smem)

    kernel.__name__ = name
    found = plgpu.kernel(
        kernel,
        out_type=out_flat,
        scratch_types=[x for x in scratch_flat if x is not None],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)
    # `plgpu.kernel` leaves out which mesh axes its results vary over.
    found = varying.like([x for x in flat if isinstance(x, jax.Array)], found)
    return out_treedef.unflatten([x[:, : y.shape[1]] for x, y in zip(found, wanted, strict=True)])


def _whole_tiles(x: jax.Array) -> jax.Array:
    """Tokens [B, L, heads, width] up to a multiple of `TILE_ROWS`; anything else (bits too) as it is."""
    if x.ndim != 4 or x.dtype == jnp.int32 or x.shape[1] % TILE_ROWS == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE_ROWS), (0, 0), (0, 0)))
