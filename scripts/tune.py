"""Times the Hopper kernels on a card: tile sizes, and beside cuDNN. Without a card it only compiles.

python scripts/tune.py tiles --rehearse --json FILE   without a card: compiles the candidates for an H100
python scripts/tune.py tiles [--compiled FILE]        times those that do not spill, best first
python scripts/tune.py peers [--lengths 1024 4096]    beside torch's and jax.nn's cuDNN
python scripts/tune.py sparse                         windows and block-sparse masks beside our causal time

Random normal inputs; contestants in turn, each after a warm-up; medians of device times. TFLOP/s count
4 B N T S H products a forward, 2.5 times that a backward, by the share of pairs that the mask keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ROUNDS = 15
_TOKENS = 16384  # batch rows x length of a timed call
_KERNELS = ("forward", "q", "kv", "fused")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=list(_PROGRAMS))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--kernels", nargs="+", choices=_KERNELS, default=list(_KERNELS))
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--rehearse", action="store_true", help="compile for an H100, time nothing")
    parser.add_argument("--compiled", type=Path, help="the candidates, as --rehearse wrote them")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args(argv)
    if args.compiled and not args.compiled.exists():
        parser.error(f"--compiled {args.compiled}: no such file; --rehearse --json writes it, without a card")
    rows = []
    for row in _PROGRAMS[args.what](args):
        rows.append(row)
        if args.json:  # after every row: a card's time may end at any of them
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return int(any("error" in row and row["name"].startswith("ours") for row in rows))


@functools.cache
def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import importlib.metadata
    import time

    import jax

    found = {"date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
    found["device"] = jax.devices()[0].device_kind
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "triton", "nvidia-cudnn-cu13"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["nvidia-smi"] = "none"
    return found


def device_time(run: Callable, *arguments: Any) -> float:
    """Milliseconds on the device of one call of a jitted function.

    Its arguments are given apart: closed over they would be constants of the program, which XLA folds.
    """
    from jax.experimental.mosaic.gpu import profiler

    _, ms = profiler.measure(run)(*arguments)
    if ms is None:
        raise RuntimeError("CUPTI saw no kernel")
    return float(ms)


def interleave(contestants: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float | str]:
    """The median of each contestant's times, taken in turn after three calls to warm up, or its error."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    errors: dict[Any, str] = {}
    for i in range(rounds + 3):
        for name, call in contestants.items():
            if name in errors:
                continue
            try:
                ms = call()
            except Exception as error:  # who refuses a shape shall not cost the others their times
                errors[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            if i >= 3:
                times[name].append(ms)
    return {name: float(np.median(values)) for name, values in times.items() if name not in errors} | errors


def inputs(T: int, H: int, N: int = 16, K: int = 16) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    B = max(1, _TOKENS // T)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "do": (B, T, N, H)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def flops(shape: tuple[int, ...], density: float, backward: bool) -> float:
    B, T, N, H = shape
    return 4 * B * N * T * T * H * density * (2.5 if backward else 1.0)


def _call(arrays: dict[str, Any], mask: Any) -> Any:
    from attention_jax.ops.softmax.common import Call

    names = {f.name for f in dataclasses.fields(Call)}
    given = {"q_BTNH": arrays["q"], "k_BSKH": arrays["k"], "v_BSKM": arrays["v"], "mask": mask}
    given |= {"scale": arrays["q"].shape[-1] ** -0.5, "dropout_rate": 0.0}
    return Call(**dict.fromkeys(names) | given)


def candidates(kernel: str) -> list[tuple[int, int]]:
    """(block, stages) worth compiling; what does not fit shared memory the compiler refuses."""
    blocks = {"forward": (64, 128, 192, 256), "fused": (64,)}.get(kernel, (32, 64, 128))
    return [(block, stages) for block in blocks for stages in (2, 3, 4)]


def _compiled(name: str, kernel: str, H: int, block: int, stages: int) -> dict[str, Any] | None:
    """What the compiler says of a candidate, None where it refuses it; in a process of its own."""
    code = (
        "import json, os, tempfile; os.environ['JAX_PLATFORMS'] = 'cpu';"
        "os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1';"
        "os.environ['MOSAIC_GPU_DUMP_TO'] = tempfile.mkdtemp();"
        "from tests.aot_gpu import Config, measure;"
        f"print(json.dumps(measure(Config(({kernel!r},), ({H}, {H}), mask={name!r},"
        f" tiles={{{kernel!r}: ({block}, {stages})}}), {kernel!r})))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def compiled_tiles(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The candidates that an H100's compiler takes, with what it says of them."""
    for H in args.widths:
        for mask in ("Full()", "Causal()"):
            for kernel in args.kernels:
                for block, stages in candidates(kernel):
                    found = _compiled(mask, kernel, H, block, stages)
                    if found is not None:
                        row = {"width": H, "mask": mask, "kernel": kernel, "block": block, "stages": stages}
                        row |= {name: found[name] for name in ("spills", "shared", "most_registers")}
                        print(row, flush=True)
                        yield row


def tiles(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every candidate without a spill, timed at 4096 tokens, best first."""
    rows = json.loads(args.compiled.read_text())["rows"] if args.compiled else compiled_tiles(args)
    if args.rehearse:
        yield from rows
        return
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["spills"] and row["width"] in args.widths and row["kernel"] in args.kernels:
            groups.setdefault((row["width"], row["mask"], row["kernel"]), []).append(row)
    for group, found in groups.items():
        sizes = [(row["block"], row["stages"]) for row in found]
        contestants = {size: _kernel(*group, *size) for size in sizes}
        times = interleave(contestants, args.rounds)
        timed = []
        for row in found:
            ms = times[row["block"], row["stages"]]
            timed.append(row | ({"error": ms, "name": "ours"} if isinstance(ms, str) else {"ms": ms}))
        for row in sorted(timed, key=lambda row: row.get("ms", math.inf)):
            print(*group, f"{row['block']} x {row['stages']}: {row.get('ms', row.get('error'))}", flush=True)
            yield row


def _kernel(H: int, mask: str, kernel: str, block: int, stages: int) -> Callable[[], float]:
    """One kernel alone with given tiles, timed."""
    import jax
    import jax.numpy as jnp

    from attention_jax.masks import parse
    from attention_jax.ops.softmax.mosaic_gpu import backward_fused, backward_kv, backward_q, forward, plan

    arrays, size = inputs(4096, H), plan.Tiles(block, stages)
    B, T, N, _ = arrays["q"].shape
    saved = jnp.zeros((B, N, T), jnp.float32)

    def run(arrays, saved):
        call, rest = _call(arrays, parse(mask)), (arrays["do"], saved, saved)
        if kernel == "forward":
            return forward.forward(plan.forward_plan(call, size))
        if kernel == "q":
            return backward_q.gradient_q(plan.backward_q_plan(call, size), *rest)
        if kernel == "kv":
            return backward_kv.gradient_kv(plan.backward_k_plan(call, size), *rest)
        return backward_fused.gradients_fused(plan.fused_plan(call, size), *rest)

    return functools.partial(device_time, jax.jit(run), arrays, saved)


def _ours(
    arrays: dict[str, Any], mask: Any, backward: bool, deterministic: bool = True
) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    from attention_jax.ops.softmax import mosaic_gpu

    def run(q, k, v, do):
        def attend(q, k, v):
            call = _call({"q": q, "k": k, "v": v}, mask)
            return mosaic_gpu.attend(call, deterministic)

        if not backward:
            return attend(q, k, v)
        (_, lse), vjp = jax.vjp(attend, q, k, v)
        return vjp((do, jnp.zeros_like(lse)))

    return functools.partial(device_time, jax.jit(run), *(arrays[x] for x in ("q", "k", "v", "do")))


def _jax_nn(arrays: dict[str, Any], causal: bool, backward: bool) -> Callable[[], float]:
    import jax

    def run(q, k, v, do):
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        if not backward:
            return attend(q, k, v)
        _, vjp = jax.vjp(attend, q, k, v)
        return vjp(do)

    return functools.partial(device_time, jax.jit(run), *(arrays[x] for x in ("q", "k", "v", "do")))


def _torch(shape: tuple[int, ...], causal: bool, backward: bool) -> Callable[[], float] | None:
    """torch's cuDNN attention timed by CUDA events, None without torch."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.cuda.init()
    except (ImportError, OSError, RuntimeError):
        return None
    B, T, N, H = shape
    q, k, v, do = (torch.randn(B, N, T, H, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if backward:
            torch.autograd.grad(out, (q, k, v), do)

    def timed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles, 10 ms in which the host queues what is timed
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    return timed


def peers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, beside cuDNN through jax.nn and through torch."""
    from attention_jax.masks import Causal, Full

    for H in args.widths:
        for causal in (False, True):
            for T in args.lengths:
                arrays, mask = inputs(T, H), Causal() if causal else Full()
                for backward in (False, True):
                    contestants = {
                        "ours": _ours(arrays, mask, backward),
                        "jax.nn": _jax_nn(arrays, causal, backward),
                    }
                    if backward:
                        contestants["ours, fused"] = _ours(arrays, mask, True, deterministic=False)
                    if (torch := _torch(arrays["q"].shape, causal, backward)) is not None:
                        contestants["torch"] = torch
                    yield from _report(args, contestants, arrays["q"].shape, T, H, str(mask), backward)


def sparse(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Sparse masks at 16k tokens beside our own dense and causal times, by live pair."""
    from attention_jax.masks import Causal, Full, parse

    T, H = 16384, 128
    arrays = inputs(T, H)
    masks = [Full(), Causal(), *map(parse, (
        "SlidingWindow(1024)", "SlidingWindow(4096)", "Chunked(2048)", "BigBird(128, 3, 1, 3)",
        "(SlidingWindow(1024) | Sinks(64)) & Causal()", "Longformer(1024, (0, 1, 2, 3))",
    ))]  # fmt: skip
    for mask in masks:
        for backward in (False, True):
            contestants = {"ours": _ours(arrays, mask, backward)}
            density = float(mask.density(T))
            yield from _report(args, contestants, arrays["q"].shape, T, H, str(mask), backward, density)


def _report(args, contestants, shape, T, H, mask, backward, density=None) -> Iterator[dict[str, Any]]:
    if density is None:
        density = 0.5 if mask.startswith("Causal") else 1.0
    work = flops(shape, density, False) + (flops(shape, density, True) if backward else 0.0)
    for name, ms in interleave(contestants, args.rounds).items():
        row = {"length": T, "width": H, "mask": mask, "backward": backward, "name": name, "density": density}
        if isinstance(ms, str):
            row["error"] = found = ms
        else:
            row |= {"ms": ms, "tflops": work / ms / 1e9}
            found = f"{ms:8.3f} ms {row['tflops']:6.0f} TFLOP/s"
        what = "forward + backward" if backward else "forward"
        print(f"{H:>4} {T:>6} {mask:<40} {what:<18} {name:<12} {found}", flush=True)
        yield row


_PROGRAMS = {"tiles": tiles, "peers": peers, "sparse": sparse}

if __name__ == "__main__":
    sys.exit(main())
