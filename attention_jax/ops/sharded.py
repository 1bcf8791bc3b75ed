"""One call under a mesh: every implementation runs on the batch rows and heads of its own shard.

A loop over heads, or a kernel, is nothing that XLA can cut: left alone it would gather every shard
everywhere. Where q's mesh axes are Explicit its sharding is known while tracing, and `shard_map` gives each
device its rows and heads; nothing is communicated but the gradients of what all shards share. Rows and heads
keep their global indices, so that biases and dropout do not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.biases import Axes


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


def per_shard(attend: Callable[[Any], Any], call: Any, split: Shards) -> tuple[jax.Array, jax.Array | None]:
    """`attend` of each shard's part of the call: (out_BTNM, lse_BTN or None), sharded as q is."""
    rows, heads = split.rows, split.heads
    leaves, treedef = jax.tree.flatten(call)
    specs = jax.tree.leaves(_specs(call, rows, heads), is_leaf=lambda x: isinstance(x, P))
    assert len(specs) == len(leaves)
    leaves = [
        jax.sharding.reshard(x, NamedSharding(split.mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]

    def part(*leaves):
        local = jax.tree.unflatten(treedef, leaves)
        B, _, _, N, *_ = local.sizes
        first_row = None if rows is None else jax.lax.axis_index(rows) * B
        first_head = None if heads is None else jax.lax.axis_index(heads) * N
        out, lse = attend(dataclasses.replace(local, first_row=first_row, first_head=first_head))
        return (out, lse) if call.lse else out

    # Unchecked, since JAX's interpreter of kernels indexes by no scalars that vary, such as block lists.
    out_specs = P(rows, None, heads, None), P(rows, None, heads)
    found = jax.shard_map(
        part, mesh=split.mesh, in_specs=tuple(specs), check_vma=False,
        out_specs=out_specs if call.lse else out_specs[0],
    )(*leaves)  # fmt: skip
    return found if call.lse else (found, None)


def _specs(call: Any, rows: Any, heads: Any) -> list[Any]:
    """A spec per leaf of the call, in the order of its leaves; a field that is None has none."""
    kv = heads if call.sizes[4] != 1 else None

    def array(x: jax.Array | None, *axes: Any) -> P | None:
        # An axis of length 1 broadcasts, and every shard has it whole.
        return None if x is None else P(*(a if n != 1 else None for a, n in zip(axes, x.shape, strict=True)))

    def leaf(x: jax.Array, axes: Axes) -> P:
        """A bias is told global heads, so that its leaves are split by rows alone."""
        at = [None] * x.ndim
        if axes.batch is not None:
            at[axes.batch] = rows
        return array(x, *at)

    bias = call.bias
    biased = [] if bias is None else [
        leaf(x, axes) for x, axes in zip(jax.tree.leaves(bias), bias.axes(), strict=True)
    ]  # fmt: skip
    return [
        array(call.q_BTNH, rows, None, heads, None),
        array(call.k_BSKH, rows, None, kv, None),
        array(call.v_BSKM, rows, None, kv, None),
        *(
            array(x, rows, None)
            for x in (call.q_positions_BT, call.k_positions_BS, call.q_segments_BT, call.k_segments_BS)
        ),
        array(call.mask_BNTS, rows, heads, None, None),
        *biased,
        array(call.sink_logits_N, heads),
        array(call.dropout_words, None),
    ]


def _size(mesh: Any, axes: Any) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
