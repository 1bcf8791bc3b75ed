"""One call under a mesh: every implementation runs on the batch rows and heads of its own shard.

XLA cannot partition a loop over heads or a kernel: it would gather every shard on every device. Where q's
mesh axes are Explicit its sharding is known while tracing, and `shard_map` gives each device its rows and
heads (`per_shard`). Over Auto axes it is known only when XLA compiles: `partitioned` states how to split the
call then. In both cases the gradients of what all shards share are the only communication, and rows and heads
keep their global indices, so that biases and dropout do not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
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


def partitioned(function: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """function(call, *others), of which XLA gives each device the batch rows and heads of its shards.

    The function returns arrays with the axes that `axes` names after those of `others`, or the call's
    cotangent, whose arrays that several shards have are summed over them.
    """
    if jax.device_count() == 1 or not _all_auto(jax.sharding.get_abstract_mesh()):
        return function
    return functools.partial(_partition, function, axes)


def _partition(function: Callable[..., Any], axes: tuple[str, ...], call: Any, *others: jax.Array) -> Any:
    given, treedef = jax.tree.flatten((call, *others))
    names = [*call.leaf_axes(), *axes[: len(others)]]
    B, _, _, N, K, *_ = call.sizes

    def flat(*arrays, first_row=None, first_head=None):
        local, *rest = jax.tree.unflatten(treedef, arrays)
        if local.first_row is None and first_row is not None:
            local = dataclasses.replace(local, first_row=first_row)
        if local.first_head is None and first_head is not None:
            local = dataclasses.replace(local, first_head=first_head)
        found.append(function(local, *rest))
        return jax.tree.leaves(found[-1])

    found: list[Any] = []
    program = jax.make_jaxpr(flat)(*given)
    structure = jax.tree.structure(found[-1])
    results = list(axes[len(others) :]) or _axes_of_cotangent(call, found[-1])
    # custom_partitioning takes no constants, so that they become arguments. So does a hash of the program:
    # JAX's cache of compiled programs sees no difference between programs that differ only in what is called.
    constants = [*program.consts, _fingerprint(program.jaxpr)]
    count = len(given)
    sizes = _Sizes(B, N, K, [*names, *("." * np.ndim(x) for x in constants)], results)
    run = custom_partitioning(lambda *x: jax.core.eval_jaxpr(program.jaxpr, x[count:-1], *x[:count]))
    rule, options = sizes.rule([*given, *constants], program.out_avals)
    run.def_partition(
        partition=lambda mesh, arguments, outputs: sizes.split(flat, count, mesh, arguments, outputs),
        sharding_rule=rule, **options,
    )  # fmt: skip
    return jax.tree.unflatten(structure, _transformable(run, flat, count)(*given, *constants))


def _all_auto(mesh: Any) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def _axes_of_cotangent(call: Any, cotangent: Any) -> list[str]:
    """The axes of the arrays of a call's cotangent, which has None for some arrays of the call."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(call)]
    by_path = dict(zip(paths, call.leaf_axes(), strict=True))
    return [by_path[path] for path, _ in jax.tree_util.tree_leaves_with_path(cotangent)]


def _fingerprint(jaxpr: Any) -> np.ndarray:
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)


def _transformable(run: Callable, flat: Callable, count: int) -> Callable:
    """run, with derivatives and `vmap` of the function itself, since custom_partitioning has none."""

    def plain(*arrays):
        return flat(*arrays[:count])

    batched = jax.custom_batching.custom_vmap(run.__call__)

    @batched.def_vmap
    def _batch(axis_size, is_batched, *arrays):
        outs = jax.vmap(plain, [0 if x else None for x in is_batched], axis_size=axis_size)(*arrays)
        return outs, [True] * len(outs)

    differentiable = jax.custom_jvp(lambda *arrays: batched(*arrays))
    differentiable.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return differentiable


class _Sizes(NamedTuple):
    """Which axes of a call's arrays and results are batch rows (B), query heads (N) and kv heads (K)."""

    B: int
    N: int
    K: int
    arguments: list[str]
    results: list[str]

    def rule(self, arguments: Any, results: Any) -> tuple[str, dict[str, Any]]:
        """Shardy's rule: rows and groups of heads may be split, every other axis is whole on each device."""
        whole = (f"x{i}" for i in itertools.count())
        shared, groups = {}, self.N // self.K
        if self.B > 1:
            shared["B"] = "b"
        if self.K > 1:
            shared |= {"K": "k", "N": "k" if groups == 1 else "(k g)"}
        elif self.N > 1:
            shared["N"] = "k"

        def factors(letters, x):
            return " ".join(
                shared[a] if a in shared and n != 1 else next(whole)
                for a, n in zip(letters, x.shape, strict=True)
            )

        sides = [
            ", ".join(factors(*pair) for pair in zip(letters, arrays, strict=True))
            for letters, arrays in ((self.arguments, arguments), (self.results, results))
        ]
        text = " -> ".join(sides)
        # In the order in which they first appear, as Shardy wants them.
        others = tuple(dict.fromkeys(name for name in re.findall(r"\w+", text) if name not in "bk"))
        return text, {"need_replication_factors": others} | ({"g": groups} if "g" in others else {})

    def split(self, flat: Callable, count: int, mesh: Any, arguments: Any, results: Any):
        """What custom_partitioning asks for: the mesh, each device's function, and how arrays are split."""
        spec = tuple(getattr(arguments[0].sharding, "spec", ())) + (None,) * 4
        rows = spec[0] if self.B % _size(mesh, spec[0]) == 0 else None
        parts = _size(mesh, spec[2])
        heads = spec[2] if self.N % parts == 0 and (self.K == 1 or self.K % parts == 0) else None
        by_axis = {"B": rows, "N": heads, "K": None if self.K == 1 else heads}

        def place(letters, x):
            return [by_axis.get(a) if n != 1 else None for a, n in zip(letters, x.shape, strict=True)]

        places = [place(*pair) for pair in zip(self.results, results, strict=True)]

        def part(*arrays):
            program = jax.make_jaxpr(local)(*arrays)
            return _unlocated_p.bind(*program.consts, *arrays, program=program)

        def local(*arrays):
            outs = flat(
                *arrays[:count],
                first_row=None if rows is None else jax.lax.axis_index(rows) * (self.B // _size(mesh, rows)),
                first_head=None if heads is None else jax.lax.axis_index(heads) * (self.N // parts),
            )
            return [_summed(x, [a for a in (rows, heads) if a is not None and a not in at])
                    for x, at in zip(outs, places, strict=True)]  # fmt: skip

        inside = [
            NamedSharding(mesh, P(*place(*pair))) for pair in zip(self.arguments, arguments, strict=True)
        ]
        return mesh, part, [NamedSharding(mesh, P(*at)) for at in places], tuple(inside)


# XLA puts the program of a shard into that of the mesh with the numbers of its source locations, which name
# others there; in XLA of jax 0.10 they can form a circle, in which compilation hangs. This has no locations.
_unlocated_p = Primitive("unlocated")
_unlocated_p.multiple_results = True
_unlocated_p.def_abstract_eval(lambda *_, program: program.out_avals)


def _lower_unlocated(ctx: Any, *arguments: Any, program: Any) -> Any:
    name, count = "jax_traceback_in_locations_limit", len(program.consts)
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        caches = type(ctx.module_context.traceback_caches)()  # reads the limit
    finally:
        jax.config.update(name, limit)

    def run(*x):
        return jax.core.eval_jaxpr(program.jaxpr, x[:count], *x[count:])

    ctx = ctx.replace(module_context=ctx.module_context.replace(traceback_caches=caches))
    return mlir.lower_fun(run, multiple_results=True)(ctx, *arguments)


mlir.register_lowering(_unlocated_p, _lower_unlocated)


def _summed(x: jax.Array, axes: list[Any]) -> jax.Array:
    names = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)]
    return jax.lax.psum(x, tuple(names)) if names else x


def _size(mesh: Any, axes: Any) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
