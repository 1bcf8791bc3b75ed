"""Our own softmax attention: memory, windows, where the dense form ends, block maps."""

from __future__ import annotations

import resource

import numpy as np

from attention_jax.benchmarks.calls import ours, qkv
from attention_jax.benchmarks.timing import interleave, table


def memory(args) -> list:
    """Temporaries of one forward + backward: what the compiler plans and what the process reaches."""
    import jax

    from attention_jax import Causal, dot_product_attention

    T = args.length or 32768
    q, k, v = qkv(T)

    def both(q, k, v, d):
        out, pullback = jax.vjp(
            lambda q, k, v: dot_product_attention(q, k, v, mask=Causal(), impl="chunked"), q, k, v
        )
        return out, pullback(d)

    compiled = jax.jit(both).lower(q, k, v, q).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes / 1e6
    outputs = 4 * q.nbytes / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    jax.block_until_ready(compiled(q, k, v, q))
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before - outputs
    print(f"T={T} forward+backward: {planned:.0f} MB of temporaries planned, {measured:.0f} MB measured")
    return [{"length": T, "planned_mb": planned, "measured_mb": measured}]


def window(args) -> list:
    """A sliding window against full causal attention of the same length."""
    from attention_jax import Causal, SlidingWindow

    T = args.length or 16384
    q, k, v = qkv(T)
    rows = []
    for backward in (False, True):
        contestants = {
            "causal": ours("chunked", Causal(), q, k, v, backward),
            "window": ours("chunked", SlidingWindow(args.window), q, k, v, backward),
        }
        title = f"T={T} W={args.window} {'forward+backward' if backward else 'forward'}"
        rows += table(title, interleave(contestants, min(args.rounds, 5)), "causal")
    return rows


def crossover(args) -> list:
    """Dense against blocked, forward + backward, by length at 16 rows x 256 tokens of 4 heads each."""
    import jax

    from attention_jax import Causal

    rows = []
    for T in (32, 64, 128, 256, 512):
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (4096 // T, T, 4, 32)) for key in keys)
        contestants = {name: ours(name, Causal(), q, k, v, True) for name in ("reference", "chunked")}
        title = f"B={4096 // T} T={T} forward+backward"
        rows += table(title, interleave(contestants, args.rounds), "reference")
    return rows


def blocks(args) -> list:
    """The static map of 128 x 128 tiles, made while tracing: NumPy on one core."""
    from attention_jax.masks import parse
    from attention_jax.ops.softmax.blocks import static_map

    T, rows = args.length or 2**17, []
    for text in MAPPED:
        mask = parse(text)
        times = interleave({text: lambda mask=mask: static_map(mask, T, T, 128, 128)}, args.rounds)[text]
        rows.append({"mask": text, "length": T, "median_ms": float(np.median(times))})
        print(f"{np.median(times):8.1f} ms  min {times.min():8.1f}  {text}")
    return rows


MAPPED = (
    "Causal()",
    "SlidingWindow(4096)",
    "Dilated(512, 8) & Causal()",
    "Strided(128) & Causal()",
    "Chunked(8192) & Causal()",
    "(SlidingWindow(4096) | Sinks(4)) & Causal()",
    "Longformer(512, (0, 1, 2))",
    "BigBird(128, 3, 2, 3)",
    "BigBird(64, 3, 2, 3) & Causal()",
)
