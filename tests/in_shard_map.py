"""Every op inside `jax.shard_map` at its defaults, on two virtual CPU devices, beside the op on one.

`python -m tests.in_shard_map NAME ...` prints JSON: the largest differences of outputs and gradients by case;
with "all but" in front, for all other cases.
Batch rows are split over the devices; parameters, which all rows share, are not.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attention_jax import ALiBi, Causal, SlidingWindow, drop_in
from attention_jax.mixers.forgetting import ForgetBias
from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.delta_rule import delta_rule, delta_weights
from attention_jax.ops.selected import choose_blocks, selected_attention, selected_weights
from attention_jax.ops.softmax import attention_weights, dot_product_attention, mosaic_tpu

B, T, N, K, H, M = 4, 40, 4, 2, 8, 6
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


Q, KEYS, VALUES = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, M)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(-1, 3, (B, T))), jnp.int32)
POSITIONS = jnp.asarray(np.maximum(np.arange(T) - RNG.integers(0, 9, (B, 1)), -1), jnp.int32)
BLOCKS = jnp.asarray(RNG.integers(-1, 5, (B, T, K, 3)), jnp.int32)
ROWS = {"q": Q, "k": KEYS, "v": VALUES}
UNIT = ROWS | {"k": KEYS / jnp.linalg.norm(KEYS, axis=-1, keepdims=True), "v": normal(B, T, N, M)}
UNIT["beta"] = jax.nn.sigmoid(normal(B, T, N))
IDS = {"segment_ids": SEGMENTS}


def softmax(impl: str, rows: dict, shared: dict, bias: Any = None, mask: Any = None) -> Any:
    q = rows["q"]
    k, v = (
        rows[x] if x in rows else jnp.broadcast_to(shared[x], (len(q), T, *shared[x].shape[2:])) for x in "kv"
    )
    given = {"sink_logits_N": shared.get("sinks"), "segment_ids": rows.get("segment_ids")}
    given |= {"mask": shared.get("mask", mask), "bias": shared.get("bias", bias)}
    if "forget" in rows:
        given["bias"] = ForgetBias(rows["forget"], rows["forget"], 1e-3 * rows["forget"])
    if "key" in shared:
        given |= {"dropout_rate": 0.25, "dropout_key": shared["key"]}
    if "positions" in rows:
        given |= {"q_positions": rows["positions"], "k_positions": rows["positions"]}
    out, lse = dot_product_attention(q, k, v, return_lse=True, impl=impl, **given)
    return out, jnp.where(jnp.isfinite(lse), lse, 0.0)


def scan(impl: str, rows: dict, shared: dict, **options: Any) -> Any:
    rows = dict(rows)
    q, k, v = (rows.pop(name) for name in "qkv")
    return decay_scan(q, k, v, return_state=True, impl=impl, **rows, **shared, **options)


def delta(impl: str, rows: dict, shared: dict) -> Any:
    rows = dict(rows)
    q, k, v, beta = (rows.pop(name) for name in ("q", "k", "v", "beta"))
    return delta_rule(q, k, v, beta, return_state=True, chunk_size=8, impl=impl, **rows, **shared)


def selected(impl: str, rows: dict, shared: dict) -> Any:
    rows = dict(rows)
    q, k, v, blocks = (rows.pop(name) for name in ("q", "k", "v", "blocks"))
    return selected_attention(q, k, v, blocks, block_size=8, impl=impl, **rows, **shared)


def chosen(rows: dict, shared: dict) -> Any:
    """Blocks of the compressed branch, and attention to them."""
    q, k, v = (rows[name] for name in "qkv")
    positions = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    ends = jnp.broadcast_to(jnp.arange(3, T, 4), (q.shape[0], T // 4))
    short = k[:, 3::4]
    _, lse = dot_product_attention(
        q,
        short,
        short,
        mask=Causal(),
        q_positions=positions,
        k_positions=ends,
        return_lse=True,
        impl="reference",
    )
    blocks = choose_blocks(
        q, short, lse, scale=H**-0.5, compress_block=4, compress_stride=4, select_block=8, select_count=3,
        num_blocks=5, q_positions=positions, k_positions=ends,
    )  # fmt: skip
    return selected_attention(q, k, v, blocks, block_size=8, impl="gathered")


# The weights of each op; in one program they may block XLA's CPU threads for ever.
WEIGHTS = {
    "softmax": lambda x, ids: attention_weights(x["q"], x["k"], mask=Causal(), **ids),
    "selected": lambda x, ids: selected_weights(x["q"], x["k"], x["blocks"], block_size=8, **ids),
    "decay_scan": lambda x, ids: decay_weights(x["q"], x["k"], log_decay=x["log_decay"], **ids),
    "delta_rule": lambda x, ids: delta_weights(x["q"], x["k"], x["beta"], log_decay=x["log_decay"], **ids),
}


def weights(op: str, rows: dict, shared: dict) -> Any:
    del shared
    return WEIGHTS[op](rows, {"segment_ids": rows["segment_ids"]})


def drop(rows: dict, shared: dict) -> Any:
    del shared
    return drop_in.dot_product_attention(
        rows["q"], rows["k"], rows["k"], rows["bias"], is_causal=True, local_window_size=7,
        key_value_seq_lengths=rows["lengths"], query_seq_lengths=rows["lengths"], implementation="xla",
    )  # fmt: skip


DECAYS = {
    "head": ({}, {"log_decay": -jnp.abs(normal(N))}),
    "token": ({"log_decay": -jnp.abs(normal(B, T, N))}, {}),
    "channel": ({"log_decay": -jnp.abs(normal(B, T, N, H))}, {}),
}
# name: (function of (rows, shared), arrays split over the devices, arrays that all share)
CASES: dict[str, tuple[Callable, dict, dict]] = {
    "choose blocks": (chosen, ROWS, {}),
    "drop-in": (
        drop, {"q": Q, "k": KEYS, "bias": normal(B, 1, T, T), "lengths": jnp.array([9, 40, 1, 23])}, {}
    ),
}  # fmt: skip
for op in WEIGHTS:
    rows = UNIT | IDS | {"blocks": BLOCKS, "log_decay": -jnp.abs(normal(B, T, N))}
    CASES[f"weights of {op}"] = (functools.partial(weights, op), rows, {})
for impl in ("reference", "chunked"):
    run = functools.partial(softmax, impl)
    causal = functools.partial(run, mask=Causal())
    table = {"bias": normal(1, N, T, T), "sinks": normal(N)}
    CASES |= {
        f"softmax {impl}: a window": (functools.partial(run, mask=SlidingWindow(7)), ROWS, {}),
        f"softmax {impl}: shared bias and sinks": (causal, ROWS | IDS, table),
        f"softmax {impl}: padding": (
            functools.partial(causal, bias=ALiBi(N)),
            ROWS | {"positions": POSITIONS},
            {},
        ),
        f"softmax {impl}: forgetting": (causal, ROWS | {"forget": normal(B, T, N)}, {}),
        f"softmax {impl}: a mask": (run, ROWS, {"mask": jnp.tril(jnp.ones((T, T), bool))}),
        f"softmax {impl}: dropout": (run, ROWS, {"key": jax.random.key(0)}),
        f"softmax {impl}: shared keys": (causal, {"q": Q}, {"k": KEYS[:1], "v": VALUES[:1]}),
    }
# JAX's interpreter of kernels takes no scalars that vary, such as the block lists of given positions.
CASES["softmax mosaic_tpu: forgetting"] = (
    functools.partial(softmax, "mosaic_tpu", mask=Causal()),
    ROWS | {"forget": normal(B, T, N)},
    {"sinks": normal(N)},
)
for impl in ("recurrent", "chunked", "quadratic"):
    for name, (rows, shared) in DECAYS.items():
        run = functools.partial(scan, impl, chunk_size=16)
        CASES[f"decay_scan {impl}: {name}"] = (run, ROWS | IDS | rows, shared)
        if name != "head":
            CASES[f"delta_rule {impl}: {name}"] = (functools.partial(delta, impl), UNIT | IDS | rows, {})
    start = {"initial_state_BNHM": normal(B, N, H, M)}
    CASES[f"decay_scan {impl}: initial state"] = (functools.partial(scan, impl), ROWS | start, {})
    CASES[f"decay_scan {impl}: normalised"] = (functools.partial(scan, impl, normalize=True), ROWS, {})
    CASES[f"delta_rule {impl}: initial state"] = (functools.partial(delta, impl), UNIT | start, {})
for impl in ("reference", "gathered"):
    CASES[f"selected {impl}"] = (functools.partial(selected, impl), ROWS | IDS | {"blocks": BLOCKS}, {})


def main(*names: str) -> None:
    if names[:1] == ("all but",):
        names = tuple(name for name in CASES if name not in names)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with mosaic_tpu.forced(True):
        print(json.dumps({name: _compare(mesh, *CASES[name]) for name in names}))


def _compare(mesh, function: Callable, rows: dict, shared: dict) -> dict[str, float]:
    learned = [
        {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        for given in (rows, shared)
    ]

    def differentiated(rows, shared, mine, ours):
        """Outputs, and gradients of the local sum: shared arrays get theirs from all devices."""

        def loss(mine, ours):
            found = function(rows | mine, shared | ours)
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(found)), found

        grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(mine, ours)
        return found, *grads

    # Dropout numbers the rows of a shard from 0: beside it stand the shards, one after another.
    alone = jax.jit(differentiated)
    on_one = (
        _by_halves(lambda rows, mine: alone(rows, shared, mine, {}), rows, learned[0])
        if "key" in shared
        else alone(rows, shared, *learned)
    )
    jax.block_until_ready(on_one)
    on_two = jax.jit(
        jax.shard_map(
            differentiated, mesh=mesh, in_specs=(P("rows"), P(), P("rows"), P()),
            out_specs=(P("rows"), P("rows"), P()),
        )
    )(rows, shared, *learned)  # fmt: skip
    return {
        name: max([_furthest(*pair) for pair in zip(*map(jax.tree.leaves, both), strict=True)], default=0.0)
        for name, both in zip(
            ("outputs", "gradients", "shared"), zip(on_one, on_two, strict=True), strict=True
        )
    }


def _by_halves(function: Callable, *given: dict) -> Any:
    """function of each half of the rows, put together."""
    first, second = (
        function(*jax.tree.map(lambda x, at=at: x[at], given)) for at in (slice(B // 2), slice(B // 2, B))
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _furthest(x: jax.Array, y: jax.Array) -> float:
    """The largest difference, in units of the largest entry where that exceeds 1; NaN where there is one."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape, (x.shape, y.shape)
    return float(np.max(np.abs(x - y)) / max(1, np.max(np.abs(x))))


if __name__ == "__main__":
    main(*sys.argv[1:])
