"""Compares attention on eight virtual CPU devices with attention on one: `python -m tests.on_mesh NAME ...`.

NAME is `errors`; or a case of CASES and an implementation, as in "heads: chunked", with "auto" in front where
the mesh axes are Auto and XLA splits the call; or "auto" and the kind of a mixer. The kernels refuse biases
and dropout of a sharded call.
"""

import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import Causal, SlidingWindow, dot_product_attention, explain, make_mixer
from attention_jax.biases import ALiBi
from attention_jax.ops.softmax import mosaic_tpu

B, T, N, H = 2, 40, 8, 16
KEPT = np.random.default_rng(0).random((1, N, T, T)) < 0.7

# name: (kv heads, axes of rows, axes of heads, options)
CASES = {
    "rows": (2, "data", None, {"mask": SlidingWindow(7), "bias": ALiBi(N)}),
    "heads": (4, None, "model", {"mask": Causal(), "bias": ALiBi(N), "softcap": 5.0}),
    "rows and heads, dropout": (
        4,
        "data",
        "model",
        {"mask": Causal(), "mask_BNTS": KEPT, "dropout_rate": 0.2},
    ),
    "one kv head": (1, None, ("data", "model"), {"mask": Causal(), "bias": ALiBi(N), "softcap": 5.0}),
    "rows and heads": (4, "data", "model", {"mask": SlidingWindow(9), "softcap": 5.0, "bias": False}),
    "rows over all": (8, ("data", "model"), None, {}),
}  # fmt: skip


def main(*names: str) -> None:
    """A line of JSON: for each case and implementation the largest differences from one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    found = {}
    with mosaic_tpu.forced(True):
        for name in names:
            if name == "errors":
                found[name] = _errors(mesh)
            elif name.startswith("auto ") and ":" not in name:
                found[name] = _compare_mixer(name.removeprefix("auto "))
            else:
                found[name] = (_compare_auto if name.startswith("auto ") else _compare)(mesh, name)
    print(json.dumps(found))


def _compare_auto(mesh, name: str) -> dict:
    """The same over Auto axes, of which nothing is known while tracing; `gathers`: what is gathered."""
    case, impl = name.removeprefix("auto ").split(": ")
    K, rows, heads, options = CASES[case]
    arrays, specs = _arrays(8 if rows == ("data", "model") else B, K, rows, heads)
    call = jax.jit(jax.value_and_grad(_loss(impl, **options), has_aux=True, argnums=tuple(range(5))))
    (_, outs), grads = call(*arrays)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    compiled = call.lower(*placed).compile()
    (_, split_outs), split_grads = compiled(*placed)
    return {
        "outputs": _furthest(outs, split_outs),
        "gradients": _furthest(grads, split_grads),
        "sharding": all(
            x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
            for x, spec in zip((split_outs[0], *split_grads[:3]), (specs[0], *specs[:3]), strict=True)
        ),
        "gathers": _gathers(compiled),
    }


def _gathers(compiled) -> list[str]:
    """The shapes that a program gathers or moves between devices."""
    return re.findall(r"(\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())


def _compare_mixer(kind: str) -> dict:
    """A mixer, its rows over Auto axes, beside the mixer on one device; its parameters are not split."""
    x = jax.random.normal(jax.random.key(0), (8, 136, 32))
    options = {"impl": "chunked", "num_heads": 4} if kind not in ("mla", "gla") else {}
    mixer = make_mixer(kind, 32, rngs=nnx.Rngs(0), causal=True, **options)
    graph, state = nnx.split(mixer)

    def loss(state, x):
        y = nnx.merge(graph, state)(x)
        return jnp.sin(y).sum(), y

    call = jax.jit(jax.value_and_grad(loss, has_aux=True, argnums=(0, 1)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    (_, y), grads = call(state, x)
    sharding = NamedSharding(mesh, P("data"))
    placed = jax.device_put(state, NamedSharding(mesh, P())), jax.device_put(x, sharding)
    compiled = call.lower(*placed).compile()
    (_, split_y), split_grads = compiled(*placed)
    return {
        "outputs": _furthest([y], [split_y]),
        "gradients": _furthest(*map(jax.tree.leaves, (grads, split_grads))),
        "sharding": all(z.sharding.is_equivalent_to(sharding, 3) for z in (split_y, split_grads[1])),
        "gathers": _gathers(compiled),
    }


def _compare(mesh, name: str) -> dict:
    case, impl = name.split(": ")
    K, rows, heads, options = CASES[case]
    arrays, specs = _arrays(8 if rows == ("data", "model") else B, K, rows, heads)
    call = jax.jit(jax.value_and_grad(_loss(impl, **options), has_aux=True, argnums=tuple(range(5))))
    (_, outs), grads = call(*arrays)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        (_, split_outs), split_grads = call(*placed)
    return {
        "outputs": _furthest(outs, split_outs),
        "gradients": _furthest(grads, split_grads),
        "sharding": str(split_outs[0].sharding.spec) == str(P(rows, None, heads, None)),
    }


def _arrays(B, K, rows, heads):
    keys = jax.random.split(jax.random.key(0), 5)
    kv = None if K == 1 else heads
    placed = [
        ((B, T, N, H), P(rows, None, heads)),
        ((B, T, K, H), P(rows, None, kv)),
        ((B, T, K, H + 8), P(rows, None, kv)),
        ((N,), P(heads)),
        ((1, N, T, T), P()),
    ]
    arrays = [jax.random.normal(key, shape) for key, (shape, _) in zip(keys, placed, strict=True)]
    return arrays, [spec for _, spec in placed]


def _loss(impl, bias=None, **options):
    def loss(q, k, v, sinks, array):
        segments = jnp.tile(jnp.repeat(jnp.arange(2), T // 2), (q.shape[0], 1))
        key = {"dropout_key": jax.random.key(3)} if "dropout_rate" in options else {}
        out, lse = dot_product_attention(
            q, k, v, sink_logits_N=sinks, bias={None: array, False: None}.get(bias, bias), impl=impl,
            segment_ids=segments, return_lse=True, **options, **key,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    return loss


def _furthest(a, b) -> float:
    """The largest difference, in units of the largest entry where that exceeds 1."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]
    return max(float(np.max(np.abs(x - y)) / max(1, np.max(np.abs(x)))) for x, y in pairs)


def _errors(mesh) -> list[str]:
    said = []
    with jax.set_mesh(mesh):
        for spec, kv_heads in ((P(None, "data"), N), (P(None, None, "model"), 2)):
            q = jax.device_put(jnp.ones((B, T, N, H)), NamedSharding(mesh, spec))
            k = jnp.ones((B, T, kv_heads, H))
            try:
                dot_product_attention(q, k, k)
            except ValueError as error:
                said.append(str(error))
        q = jax.device_put(jnp.ones((B, T, N, H)), NamedSharding(mesh, P("data", None, "model")))
        said.append(str(explain(q, q, q, mask=Causal())))
    return said


if __name__ == "__main__":
    main(*sys.argv[1:])
