"""Calls timed in turn: machines are shared and swing, so every figure is a ratio of neighbours in time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {}
    for name in ("jax", "jaxlib", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0], **versions}


def interleave(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each contestant's calls, taken in turn, after two calls to warm up."""
    times = {name: [] for name in contestants}
    for call in contestants.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def table(title: str, times: dict[str, np.ndarray], base: str) -> list[dict[str, Any]]:
    """Print and return a row per contestant: median, minimum, and the median ratio to `base`."""
    rows = []
    for name, ms in times.items():
        ratio = float(np.median(ms / times[base]))
        row = {"case": title, "name": name, "median_ms": float(np.median(ms)), "min_ms": float(ms.min())}
        rows.append(row | {f"ratio_to_{base}": ratio})
        print(f"{title:34} {name:10} {np.median(ms):10.1f} ms  min {ms.min():10.1f}  x{ratio:.3f} {base}")
    return rows


def matmul_peak(dtype: str, n: int = 2048) -> float:
    """TFLOP/s of a product of n x n matrices: what attention's share of the peak is measured by."""
    import jax
    import jax.numpy as jnp

    n = n if jax.default_backend() == "cpu" else 4 * n
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    times = interleave({"matmul": lambda: jax.block_until_ready(product(a, b))}, 11)["matmul"]
    return 2 * n**3 / float(np.min(times)) / 1e9
