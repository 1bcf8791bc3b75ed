"""What the kernels share: layouts, scratch, and a launch over pytrees of operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Layouts of a vector along the rows and along the columns of an accumulator.
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the swizzled tiles that both the copy engine and wgmma read."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def remainder(i: jax.Array, n: int) -> jax.Array:
    """i % n for i >= 0."""
    return lax.rem(i, jnp.asarray(n, i.dtype))


def times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * factor


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

    The first axis of the grid runs fastest.
    """
    flat, treedef = jax.tree.flatten(operands, is_leaf=lambda x: x is None)
    arrays = [x for x in flat if x is not None]
    out_flat, out_treedef = jax.tree.flatten(outs)
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
    return out_treedef.unflatten(found)
