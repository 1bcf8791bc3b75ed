"""Which mesh axes arrays vary over, inside a `jax.shard_map` that checks it (`check_vma=True`, the default).

There an array that is the same on all devices along a mesh axis has another type than one that varies over
the axis. Two places need care. A loop's carry keeps one type, so that the constants it starts from are cast
to vary as what is added to them does. A custom derivative returns a cotangent of each argument's own type, so
that all arguments are cast to vary alike before it; the transpose of the cast sums the cotangents of what
devices share. Outside of such a shard_map arrays vary over nothing, and the casts do nothing.
"""

from __future__ import annotations

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset[Any]:
    """The mesh axes that any array of a pytree varies over."""
    return frozenset().union(*(_type(leaf).varying for leaf in jax.tree.leaves(tree)))


def aligned(tree: Any) -> Any:
    """The pytree with each of its arrays varying over the axes that any of them varies over."""
    return like(tree, tree)


def like(tree: Any, constants: Any) -> Any:
    """The pytree `constants` with each array varying over the axes of `tree` too."""
    axes = axes_of(tree)
    return jax.tree.map(lambda x: _cast(x, axes), constants) if axes else constants


def shape_like(tree: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """What a kernel returns: an array of this shape that varies over the axes of `tree`."""
    kind = jax.sharding.ManualAxisType(varying=axes_of(tree))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _cast(x: Any, axes: frozenset[Any]) -> Any:
    missing = tuple(sorted(axes - _type(x).varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _type(x: Any) -> Any:
    return jax.typeof(x).manual_axis_type
