"""Calls timed in turn: machines are shared and swing, so every figure is a ratio of neighbours in time.

On a CPU by the wall clock. On a GPU by the device's own clock, for there a call takes less time than the host
needs to launch it and to hear that it has ended: JAX's programs by CUPTI, which adds up what their kernels
take, torch's between two CUDA events, whose gaps between kernels count.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = (
    "jax", "jaxlib", "flax", "jax-cuda13-plugin", "torch", "triton", "tokamax", "nvidia-cudnn-cu13", "numpy",
)  # fmt: skip
_QUEUED = 20
SETTLE = 1.0  # seconds of work until a GPU's clocks are where they stay


@functools.cache
def machine() -> dict[str, Any]:
    """What a figure depends on beside the arguments."""
    import jax

    found = {"date": time.strftime("%Y-%m-%d"), "device": jax.devices()[0].device_kind}
    if commit := _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude", "*"):
        found["commit"] = commit
    query = ("driver_version", "clocks.max.sm", "power.limit")
    if said := _said("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"):
        found |= dict(zip(query, said.splitlines()[0].split(", "), strict=False))
    if on_gpu():
        found["jax clock"] = jax_clock()
    about = Path("/proc/cpuinfo").read_text().splitlines()
    found["cpu"] = next((x.split(":")[1].strip() for x in about if "model name" in x), "?")
    found |= {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _said(*command: str) -> str:
    """What a program prints, nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows beside the machine, whole or not at all: a program may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with naming(path):
        part.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    part.replace(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an OSError of writing, such as that of a full disk, names `path` if it names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def one_line(error: Exception) -> str:
    """An error as a row holds it."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]


def wall_clock(call: Callable[[], Any]) -> float:
    """Milliseconds until a call returns."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def cpu_clock(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time of all threads of the process until a call returns."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def device_clock(call: Any) -> float:
    """Milliseconds of a call on the GPU; each system has its own clock for its calls."""
    return call.device_time()


def device_time(run: Callable, *arguments: Any) -> float:
    """Milliseconds on the GPU of one call of a jitted or compiled function.

    Its arguments are given apart: closed over they would be constants of the program, which XLA folds.
    """
    import jax
    from jax.experimental.mosaic.gpu import profiler

    if jax_clock() == "CUPTI":
        _, ms = profiler.measure(run)(*arguments)
        if ms is None:
            raise RuntimeError("CUPTI saw no kernel")
        return float(ms)
    jax.block_until_ready(run(*arguments))
    return wall_clock(lambda: jax.block_until_ready([run(*arguments) for _ in range(_QUEUED)])) / _QUEUED


@functools.cache
def jax_clock() -> str:
    """ "CUPTI", or where a driver keeps that from us the wall clock over a queue of calls: one for all."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, ms = profiler.measure(jax.jit(lambda x: x + 1))(jnp.zeros(2**20))
    except Exception as error:
        print(f"no CUPTI: {one_line(error)}")
        ms = None
    return "CUPTI" if ms else f"wall, {_QUEUED} calls queued"


def event_time(torch: Any, run: Callable[[], Any]) -> float:
    """Milliseconds between two CUDA events around what `run` queues.

    It runs once before, as CUPTI's measure does, and is queued while the GPU sleeps: otherwise the host's
    time to launch would count.
    """
    run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # cycles: 10 ms
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def interleave(
    contestants: dict[Any, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[Any], float] = wall_clock,
    settle: float = 0.0,
    errors: dict[Any, str] | None = None,
) -> dict[Any, np.ndarray]:
    """Milliseconds of each contestant's calls, taken in turn, after two calls to warm up.

    clock: milliseconds of one call.
    settle: seconds of further rounds before those that count: a GPU's clocks rise with its work.
    errors: where given, a contestant that raises leaves the others their times, and its error goes there.
    """
    times: dict[Any, list[float]] = {name: [] for name in contestants}

    def take(name: Any) -> None:
        try:
            times[name].append(clock(contestants[name]))
        except Exception as error:
            if errors is None:
                raise
            errors[name] = one_line(error)
            del times[name]

    for name in contestants:
        take(name)
        if name in times:
            take(name)
    end = time.monotonic() + settle
    while times and time.monotonic() < end:
        for name in tuple(times):
            take(name)
    for values in times.values():
        values.clear()
    for _ in range(rounds):
        for name in tuple(times):
            take(name)
    return {name: np.array(values) for name, values in times.items()}


def at_once(makers: dict[Any, Callable[[], Any]], errors: dict[Any, str]) -> dict[Any, Any]:
    """What each maker makes, side by side, since compiling takes most of a card's time; or its error."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = {name: pool.submit(make) for name, make in makers.items()}
    for name, future in made.items():
        if isinstance(error := future.exception(), Exception):
            errors[name] = one_line(error)
    return {name: future.result() for name, future in made.items() if name not in errors}


def flops(B: int, N: int, T: int, H: int, density: float) -> dict[str, float]:
    """Operations over the pairs that a mask keeps: two products forward, five backward."""
    forward = 4.0 * B * N * T**2 * H * density
    return {"forward": forward, "backward": 2.5 * forward, "forward+backward": 3.5 * forward}


def table(title: str, times: dict[str, np.ndarray], base: str) -> list[dict[str, Any]]:
    """Print and return a row per contestant: median, minimum, and the median ratio to `base`."""
    rows = []
    for name, ms in times.items():
        ratio = float(np.median(ms / times[base]))
        row = {"case": title, "name": name, "median_ms": float(np.median(ms)), "min_ms": float(ms.min())}
        rows.append(row | {f"ratio_to_{base}": ratio})
        print(f"{title:34} {name:14} {np.median(ms):10.2f} ms  min {ms.min():10.2f}  x{ratio:.3f} {base}")
    return rows


def matmul_peak(dtype: str, n: int = 2048) -> float:
    """TFLOP/s of a product of n x n matrices: what attention's share of the peak is measured by."""
    import jax
    import jax.numpy as jnp

    n = n if jax.default_backend() == "cpu" else 4 * n
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)

    def call():
        return jax.block_until_ready(product(a, b))

    call.device_time = functools.partial(device_time, product, a, b)
    clock, settle = (device_clock, SETTLE) if on_gpu() else (wall_clock, 0.0)
    times = interleave({"matmul": call}, 11, clock=clock, settle=settle)["matmul"]
    return 2 * n**3 / float(np.min(times)) / 1e9
