"""The linear engines: time and memory over the length, and where they overtake softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attention_jax.benchmarks.calls import jitted, ours, qkv
from attention_jax.benchmarks.timing import interleave

_KINDS = (
    "no decay",
    "decay per head",
    "decay per step",
    "decay per channel",
    "delta rule",
    "gated delta rule",
    "channel-gated delta rule",
)


def engine(kind: str, T: int, N: int = 8, H: int = 64) -> tuple[Callable, list[Any]]:
    """forward(q, k, v, ...) of an engine at B1, and its arrays."""
    import jax
    import jax.numpy as jnp

    from attention_jax.ops.decay_scan import decay_scan
    from attention_jax.ops.delta_rule import delta_rule

    q, k, v = qkv(T, N, H)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    gates = {"per head": (N,), "per step": (1, T, N), "per channel": (1, T, N, H), "gated": (1, T, N),
             "channel-gated": (1, T, N, H)}  # fmt: skip
    found = [shape for name, shape in gates.items() if kind.endswith(name) or kind.split(" ")[0] == name]
    decay = [-jax.nn.softplus(jax.random.normal(jax.random.key(5), found[0]) - 3)] if found else []
    if "delta" not in kind:
        return lambda q, k, v, *g: decay_scan(q, k, v, log_decay=g[0] if g else None), [q, k, v, *decay]
    beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(6), (1, T, N)))
    return lambda q, k, v, b, *g: delta_rule(q, k, v, b, log_decay=g[0] if g else None), [
        q,
        k,
        v,
        beta,
        *decay,
    ]


def linear(args) -> list[dict[str, Any]]:
    """Time and planned temporaries of every engine from 1k to 64k tokens, with the fitted exponents."""
    lengths = args.lengths or [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    rows = []
    for backward in (False, True):
        for kind in _KINDS:
            calls = {}
            for T in lengths:
                forward, arrays = engine(kind, T)
                calls[T] = jitted(forward, *arrays, backward=backward)
            times = {T: float(np.median(ms)) for T, ms in interleave(calls, min(args.rounds, 5)).items()}
            memory = {T: calls[T].temporaries for T in lengths}
            fitted = {"time": _exponent(times), "memory": _exponent(memory)}
            what = "forward+backward" if backward else "forward"
            rows.append(
                {"kind": kind, "what": what, "ms": times, "temporary_bytes": memory, "exponent": fitted}
            )
            print(f"{kind:26} {what:17} ~ T^{fitted['time']:.2f}  memory ~ T^{fitted['memory']:.2f}  "
                  + "  ".join(f"{T // 1024}k {times[T]:.0f} ms {memory[T] / 1e6:.0f} MB" for T in lengths),
                  flush=True)  # fmt: skip
    return rows


def overtake(args) -> list[dict[str, Any]]:
    """Each engine against our own causal softmax attention of the same heads, forward + backward."""
    from attention_jax import Causal

    rows = []
    for T in args.lengths or [256, 512, 1024, 2048, 4096]:
        calls = {"softmax": ours(None, Causal(), *qkv(T), True)}
        for kind in _KINDS:
            forward, arrays = engine(kind, T)
            calls[kind] = jitted(forward, *arrays, backward=True)
        times = interleave(calls, args.rounds)
        ratios = {name: float(np.median(ms / times["softmax"])) for name, ms in times.items()}
        rows.append({"T": T, "softmax_ms": float(np.median(times["softmax"])), "ratio_to_softmax": ratios})
        print(f"T={T:6} softmax {np.median(times['softmax']):8.1f} ms  "
              + "  ".join(f"{name} x{x:.2f}" for name, x in ratios.items() if name != "softmax"))  # fmt: skip
    return rows


def _exponent(by_length: dict[int, float]) -> float:
    """The slope of log(value) over log(length), least squares."""
    lengths, values = np.log(list(by_length)), np.log(np.maximum(list(by_length.values()), 1e-9))
    return float(np.polyfit(lengths, values, 1)[0])
