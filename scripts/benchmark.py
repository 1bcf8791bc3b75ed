"""Timings beside other systems, interleaved in one process: medians, ratios of pairs, peak memory.

python scripts/benchmark.py attention [--lengths 2048 4096] [--json FILE]   needs torch (extra `parity`)
python scripts/benchmark.py memory --length 32768                           forward + backward of `chunked`
python scripts/benchmark.py window --length 16384 --window 512              against our own causal time
python scripts/benchmark.py crossover                                       dense against chunked, by length
python scripts/benchmark.py blocks [--length 131072]                        the block map of each kind of mask
python scripts/benchmark.py step --nanogpt FOLDER                           a training step beside nanoGPT's

Machines are shared and swing: every figure is a ratio of neighbours in time, the median over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ROUNDS = 11


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=list(_BENCHMARKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--length", type=int)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--config", type=Path, default=Path("configs/shakespeare_char.yaml"))
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args(argv)
    rows = _BENCHMARKS[args.what](args)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


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


def _qkv(T: int, N: int = 8, H: int = 64):
    import jax

    return [jax.random.normal(key, (1, T, N, H)) for key in jax.random.split(jax.random.key(0), 3)]


def _ours(impl: str | None, mask, q, k, v, backward: bool) -> Callable[[], Any]:
    import jax

    from attention_jax import dot_product_attention

    def forward(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, impl=impl)

    return _jitted(jax, forward, q, k, v, backward)


def _jitted(jax, forward, q, k, v, backward: bool) -> Callable[[], Any]:
    if not backward:
        call = jax.jit(forward)
        return lambda: jax.block_until_ready(call(q, k, v))

    def both(q, k, v, d):
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(d)

    call, d = jax.jit(both), q + 0.5
    return lambda: jax.block_until_ready(call(q, k, v, d))


def _torch_sdpa(q, k, v, backward: bool) -> Callable[[], Any]:
    import torch

    q, k, v = (torch.from_numpy(np.array(x).transpose(0, 2, 1, 3).copy()) for x in (q, k, v))
    d = q + 0.5
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not backward:
        return lambda: sdpa(q, k, v, is_causal=True)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return lambda: torch.autograd.grad(sdpa(q, k, v, is_causal=True), (q, k, v), d)


def _attention(args) -> list:
    """B1 H8 D64 float32, causal: ours, torch's fused CPU attention and jax.nn."""
    import jax

    from attention_jax import Causal

    rows = []
    for T in args.lengths:
        q, k, v = _qkv(T)
        for backward in (False, True):
            contestants = {
                "torch": _torch_sdpa(q, k, v, backward),
                "chunked": _ours("chunked", Causal(), q, k, v, backward),
                "jax.nn": _jitted(jax, _jax_nn, q, k, v, backward),
            }
            title = f"T={T} {'forward+backward' if backward else 'forward'}"
            rows += table(title, interleave(contestants, args.rounds), "torch")
    return rows


def _jax_nn(q, k, v):
    import jax

    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _memory(args) -> list:
    """Temporaries of one forward + backward: what the compiler plans and what the process reaches."""
    import jax

    from attention_jax import Causal, dot_product_attention

    T = args.length or 32768
    q, k, v = _qkv(T)

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


def _window(args) -> list:
    """A sliding window against full causal attention of the same length."""
    from attention_jax import Causal, SlidingWindow

    T = args.length or 16384
    q, k, v = _qkv(T)
    rows = []
    for backward in (False, True):
        contestants = {
            "causal": _ours("chunked", Causal(), q, k, v, backward),
            "window": _ours("chunked", SlidingWindow(args.window), q, k, v, backward),
        }
        title = f"T={T} W={args.window} {'forward+backward' if backward else 'forward'}"
        rows += table(title, interleave(contestants, min(args.rounds, 5)), "causal")
    return rows


def _crossover(args) -> list:
    """Dense against blocked, forward + backward, by length at 16 rows x 256 tokens of 4 heads each."""
    import jax

    from attention_jax import Causal

    rows = []
    for T in (32, 64, 128, 256, 512):
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (4096 // T, T, 4, 32)) for key in keys)
        contestants = {name: _ours(name, Causal(), q, k, v, True) for name in ("reference", "chunked")}
        title = f"B={4096 // T} T={T} forward+backward"
        rows += table(title, interleave(contestants, args.rounds), "reference")
    return rows


def _blocks(args) -> list:
    """The static map of 128 x 128 tiles, made while tracing: NumPy on one core."""
    from attention_jax.masks import parse
    from attention_jax.ops.softmax.blocks import static_map

    T, rows = args.length or 2**17, []
    for text in _MAPPED:
        mask = parse(text)
        times = interleave({text: lambda mask=mask: static_map(mask, T, T, 128, 128)}, args.rounds)[text]
        rows.append({"mask": text, "length": T, "median_ms": float(np.median(times))})
        print(f"{np.median(times):8.1f} ms  min {times.min():8.1f}  {text}")
    return rows


_MAPPED = (
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


def _step(args) -> list:
    """One optimiser step of configs/shakespeare_char.yaml and of nanoGPT's model in torch eager mode."""
    if args.nanogpt is None:
        print("error: --nanogpt FOLDER is needed: a checkout of nanoGPT", file=sys.stderr)
        raise SystemExit(2)
    contestants = {"nanoGPT": _nanogpt_step(args.nanogpt), "ours": _our_step(args.config)}
    calls = {name: (lambda step=step: [step() for _ in range(8)]) for name, step in contestants.items()}
    times = {name: ms / 8 for name, ms in interleave(calls, args.rounds).items()}
    return table("training step", times, "nanoGPT")


def _nanogpt_step(folder: Path) -> Callable[[], float]:
    import torch

    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        sizes = {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128}
        model = GPT(GPTConfig(**sizes, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens = torch.randint(0, 65, (12, 65))

    def step() -> float:
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _our_step(path: Path) -> Callable[[], float]:
    import jax

    from train import config as config_lib
    from train.restore import fresh_state, with_vocabulary
    from train.step import make_train_step

    config = config_lib.load(path, [])
    model = with_vocabulary(config.model, 65)
    state = fresh_state(config, model, jax.random.key(0))
    train_step = make_train_step(model, config.optimizer, config.steps)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, 65, shape).astype(np.int32)
    batch = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
    key, held = jax.random.key(0), [state["params"], state["opt_state"], 0]

    def step() -> float:
        params, opt_state, metrics = train_step(held[0], held[1], batch, np.int32(held[2]), key)
        held[:] = [params, opt_state, held[2] + 1]
        return float(metrics["train/loss"])

    return step


_BENCHMARKS = {
    "attention": _attention,
    "memory": _memory,
    "window": _window,
    "crossover": _crossover,
    "blocks": _blocks,
    "step": _step,
}


if __name__ == "__main__":
    # The allocator's settings of `python -m train`, so that a step is timed as it is trained.
    from train.cli import _prepare_process

    _prepare_process()
    sys.exit(main())
