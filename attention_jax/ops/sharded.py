"""One call under a mesh: every implementation runs on the batch rows and heads of its own shard.

XLA cannot partition a loop over heads or a kernel: it would gather every shard on every device. Where q's
mesh axes are Explicit its sharding is known while tracing, and `shard_map` gives each device its rows and
heads; the gradients of what all shards share are the only communication. Rows and heads keep their global
indices, so that biases and dropout do not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.ops import varying


class Shards(NamedTuple):
    """The mesh axes that batch rows and heads are split over (None, a name or several)."""

    mesh: Any
    rows: Any
    heads: Any

    def __str__(self) -> str:
        parts = [
            f"{what} over {axes!r}" for what, axes in zip(("rows", "heads"), self[1:], strict=True) if axes
        ]
        return "split by shard_map: " + ", ".join(parts)


def shards(call: Any) -> Shards | None:
    """How q is split, None where it is not. ValueError: split along another axis, or k cannot follow."""
    sharding = jax.typeof(call.q_BTNH).sharding
    mesh = sharding.mesh
    if mesh.empty or not any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return None
    rows, queries, heads, width = sharding.spec
    for name, axes in (("T", queries), ("H", width)):
        if axes is not None:
            raise ValueError(
                f"q is sharded over its axis {name} by mesh axis {axes!r}: only batch rows and heads can be"
            )
    if rows is None and heads is None:
        return None
    K, parts = call.sizes[4], _size(mesh, heads)
    if K != 1 and K % parts:
        raise ValueError(
            f"{K} kv heads cannot be split over the {parts} shards of the query heads ({heads!r})"
        )
    return Shards(mesh, rows, heads)


def per_shard(attend: Callable[[Any], Any], call: Any, split: Shards) -> tuple[jax.Array | None, ...]:
    """What `attend` returns, from each shard's part of the call, sharded as q is.

    call: `leaf_axes` and `output_axes` name the axes of its arrays and of what is returned: B is split as
      batch rows are, N as query heads, K as kv heads.
    """
    kv_heads = split.heads if call.sizes[4] != 1 else None
    by_axis = {"B": split.rows, "N": split.heads, "K": kv_heads}
    leaves, treedef = jax.tree.flatten(call)
    specs = [
        # An axis of length 1 broadcasts, and every shard has it whole.
        P(*(by_axis.get(axis) if n != 1 else None for axis, n in zip(axes, x.shape, strict=True)))
        for x, axes in zip(leaves, call.leaf_axes(), strict=True)
    ]
    leaves = [
        jax.sharding.reshard(x, NamedSharding(split.mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]

    def part(*leaves):
        local = jax.tree.unflatten(treedef, leaves)
        B, _, _, N, *_ = local.sizes
        first_row = None if split.rows is None else jax.lax.axis_index(split.rows) * B
        first_head = None if split.heads is None else jax.lax.axis_index(split.heads) * N
        outs = attend(varying.aligned(dataclasses.replace(local, first_row=first_row, first_head=first_head)))
        return [x for x, axes in zip(outs, call.output_axes, strict=True) if axes is not None]

    # Unchecked, since JAX's interpreter of kernels indexes by no scalars that vary, such as block lists.
    found = jax.shard_map(
        part, mesh=split.mesh, in_specs=tuple(specs), check_vma=False,
        out_specs=[P(*map(by_axis.get, axes)) for axes in call.output_axes if axes is not None],
    )(*leaves)  # fmt: skip
    outs = iter(found)
    return tuple(None if axes is None else next(outs) for axes in call.output_axes)


def _size(mesh: Any, axes: Any) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
