"""Times the tile sizes of the Hopper kernels, or only compiles them.

    python scripts/tune.py tiles --rehearse --json FILE    compiles candidates
    python scripts/tune.py tiles --compiled FILE           times what fits

The candidates take turns after a warm-up, on random normal inputs; the figures
are medians of device times, the fastest first. `benchmark.py attention` times
the kernels beside other systems.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_jax.benchmarks.calls import jitted
from attention_jax.benchmarks.timing import SETTLE, at_once, device_clock, interleave, save
from train import command_line
from train.commands.types import Count, Counts, MaybePath, Positional, words

_ROUNDS = 15
_SHAPE = (4, 4096, 16)  # rows, tokens, heads of a timed call
_KERNELS = ("forward", "q", "kv", "fused")
_SIZE = ("block", "stages", "warpgroups")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    what: Positional[Literal["tiles"]]  #: what to tune
    widths: Counts = (64, 128, 256)  #: head widths
    kernels: words("NAME", _KERNELS) = _KERNELS  #: the kernels
    rounds: Count = _ROUNDS  #: how often the candidates take turns
    rehearse: bool = False  #: compile for an H100, time nothing
    compiled: MaybePath = None  #: the candidates, as --rehearse --json wrote them
    json: MaybePath = None  #: also write the rows to this file


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status: 1 where a candidate failed."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> int:
    if options.compiled and not options.compiled.exists():
        raise ValueError(
            f"--compiled {options.compiled}: no such file; --rehearse --json writes it, without a GPU"
        )
    rows = []
    for row in tiles(options):
        rows.append(row)
        if options.json:  # after every row: a card's time may end at any of them
            save(options.json, rows)
    return int(any("error" in row for row in rows))


def candidates(kernel: str) -> list[tuple[int, int, int]]:
    """(block, stages, warpgroups) worth compiling; what does not fit shared memory the compiler refuses."""
    blocks = {"forward": (64, 128, 192, 256), "fused": (64,)}.get(kernel, (32, 64, 128))
    found = [(block, stages, 2) for block in blocks for stages in (2, 3, 4)]
    three = {"forward": (64, 96, 128), "q": (32, 64)}.get(kernel, ())
    return found + [(block, stages, 3) for block in three for stages in (2, 3, 4)]


def _compiled(name: str, kernel: str, H: int, size: tuple[int, int, int]) -> dict[str, Any] | None:
    """What the compiler says of a candidate, None where it refuses it; in a process of its own."""
    code = (
        "import json, os, tempfile; os.environ['JAX_PLATFORMS'] = 'cpu';"
        "os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1';"
        "os.environ['MOSAIC_GPU_DUMP_TO'] = tempfile.mkdtemp();"
        "from tests.aot_gpu import Config, measure;"
        f"print(json.dumps(measure(Config(({kernel!r},), ({H}, {H}), mask={name!r},"
        f" tiles={{{kernel!r}: {size}}}), {kernel!r})))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def compiled_tiles(options: Options) -> Iterator[dict[str, Any]]:
    """The candidates that an H100's compiler takes, with what it says of them."""
    for H in options.widths:
        for mask in ("Full()", "Causal()"):
            for kernel in options.kernels:
                for size in candidates(kernel):
                    found = _compiled(mask, kernel, H, size)
                    if found is not None:
                        row = {"width": H, "mask": mask, "kernel": kernel}
                        said = (*_SIZE, "spills", "shared", "most_registers")
                        row |= {name: found[name] for name in said}
                        print(row, flush=True)
                        yield row


def tiles(options: Options) -> Iterator[dict[str, Any]]:
    """Every candidate without a spill, timed at 4096 tokens, best first."""
    rows = json.loads(options.compiled.read_text())["rows"] if options.compiled else compiled_tiles(options)
    if options.rehearse:
        yield from rows
        return
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["spills"] and row["width"] in options.widths and row["kernel"] in options.kernels:
            groups.setdefault((row["width"], row["mask"], row["kernel"]), []).append(row)
    for group, found in groups.items():
        errors: dict[Any, str] = {}
        sizes = [tuple(row[name] for name in _SIZE) for row in found]
        calls = at_once({size: functools.partial(kernel_call, *group, size) for size in sizes}, errors)
        times = interleave(calls, options.rounds, clock=device_clock, settle=SETTLE, errors=errors)
        timed = []
        for row, size in zip(found, sizes, strict=True):
            ms = {"error": errors[size]} if size in errors else {"ms": float(np.median(times[size]))}
            timed.append(row | ms)
        for row in sorted(timed, key=lambda row: row.get("ms", math.inf)):
            size = " x ".join(f"{row[name]}" for name in _SIZE)
            print(*group, f"{size}: {row.get('ms', row.get('error'))}", flush=True)
            yield row


def kernel_call(H: int, mask: str, kernel: str, size: tuple[int, int, int]) -> Callable[[], Any]:
    """One kernel alone with given tiles, compiled."""
    import jax
    import jax.numpy as jnp

    (B, T, N), keys = _SHAPE, jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys]
    run = functools.partial(kernel_program, mask, kernel, size)
    return jitted(run, *arrays, jnp.zeros((B, N, T), jnp.float32), backward=False)


def kernel_program(mask: str, kernel: str, size: tuple[int, int, int], q, k, v, do, saved) -> Any:
    """What one kernel computes of q, k, v, dO and what the forward saves of each row."""
    from attention_jax.masks import parse
    from attention_jax.ops.softmax.common import SoftmaxCall
    from attention_jax.ops.softmax.mosaic_gpu import backward_fused, backward_kv, backward_q, forward, plan
    from attention_jax.ops.softmax.mosaic_gpu.config import HopperTileSizes

    given = {"q_BTNH": q, "k_BSKH": k, "v_BSKM": v, "mask": parse(mask)}
    given |= {"scale": q.shape[-1] ** -0.5, "dropout_rate": 0.0}
    call = SoftmaxCall(**dict.fromkeys(f.name for f in dataclasses.fields(SoftmaxCall)) | given)
    tiles, rest = HopperTileSizes(*size), (do, saved, saved)
    if kernel == "forward":
        return forward.forward(plan.forward_plan(call, tiles))
    if kernel == "q":
        return backward_q.gradient_q(plan.backward_q_plan(call, tiles), *rest)
    if kernel == "kv":
        return backward_kv.gradient_kv(plan.backward_kv_plan(call, tiles), *rest)
    return backward_fused.gradients_fused(plan.fused_plan(call, tiles), *rest)


if __name__ == "__main__":
    sys.exit(main())
