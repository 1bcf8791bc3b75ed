"""Softmax attention beside every peer that is installed, over lengths, widths and masks.

A contestant is a name and a maker: maker(case, backward) gives a call, or a reason (str) why it cannot take
part. Work is counted over the pairs that the mask keeps: 4 B N pairs H floating-point operations forward,
3.5 times that with the backward.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.calls import jitted, ours, qkv
from scripts.benchmarks.timing import interleave, matmul_peak

_DENSE_LIMIT = 2**26  # scores of all heads; more is the dense forms' memory, not their speed


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed: B rows, N heads of width H over T tokens under a mask."""

    B: int
    T: int
    N: int
    H: int
    mask: Any
    dtype: str

    @functools.cached_property
    def inputs(self) -> list[Any]:
        return qkv(self.T, self.N, self.H, self.B, self.dtype)

    @functools.cached_property
    def density(self) -> float:
        """The share of pairs that the mask keeps."""
        return float(self.mask.density(self.T))

    @functools.cached_property
    def live_blocks(self) -> float:
        """The share of 128 x 128 blocks with a kept pair."""
        from attention_jax.ops.softmax.blocks import static_map

        return float(static_map(self.mask, self.T, self.T, 128, 128).some.mean())

    def teraflops(self, ms: float, backward: bool) -> float:
        flop = 4 * self.B * self.N * self.T**2 * self.density * self.H * (3.5 if backward else 1)
        return flop / ms / 1e9

    @property
    def causal(self) -> bool:
        from attention_jax import Causal

        return self.mask == Causal()

    @property
    def full(self) -> bool:
        from attention_jax import Full

        return self.mask == Full()

    def dense(self) -> np.ndarray:
        positions = np.arange(self.T)
        return np.broadcast_to(self.mask.keep(positions[:, None], positions[None]), (self.T, self.T))

    @property
    def dense_too_large(self) -> str | None:
        scores = self.B * self.N * self.T**2
        return f"{scores:,} scores > {_DENSE_LIMIT:,}" if scores > _DENSE_LIMIT else None


def attention(args) -> list[dict[str, Any]]:
    """Every contestant on every case, forward and forward + backward: a table, rows, and a plot."""
    import jax

    from attention_jax.masks import parse

    device = jax.devices()[0]
    dtype = args.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    peak = matmul_peak(dtype)
    print(f"{device.device_kind}, {dtype}; products of matrices reach {peak:.3g} TFLOP/s")
    rows, told = [], set()
    for text in args.masks:
        for H in args.widths:
            for T in args.lengths:
                case = Case(args.batch, T, args.heads, H, parse(text), dtype)
                for backward in (False, True):
                    rows += _compare(case, backward, peak, args, told)
    if args.plot:
        plot(rows, args.plot)
    return rows


def _compare(case: Case, backward: bool, peak: float, args, told: set) -> list[dict[str, Any]]:
    what = "forward+backward" if backward else "forward"
    print(f"\n{case.mask} T={case.T} B={case.B} N={case.N} H={case.H} {what}: density {case.density:.3f}, "
          f"live blocks {case.live_blocks:.3f}")  # fmt: skip
    made = {name: make(case, backward) for name, make in _contestants().items()}
    calls = {name: call for name, call in made.items() if callable(call)}
    for name, reason in made.items():
        if not callable(reason) and (name, reason) not in told:
            told.add((name, reason))
            print(f"  {name:18} not here: {reason}")
    times = interleave(calls, args.rounds)
    base = next(iter(times))
    rows = []
    for name, ms in times.items():
        median = float(np.median(ms))
        low, high = (float(x) for x in np.percentile(ms, (25, 75)))
        tflops = case.teraflops(median, backward)
        temporaries = getattr(calls[name], "temporaries", None)
        ratio = float(np.median(ms / times[base]))
        rows.append({
            "mask": str(case.mask), "T": case.T, "B": case.B, "N": case.N, "H": case.H, "dtype": case.dtype,
            "what": what, "name": name, "median_ms": median, "quartiles_ms": [low, high],
            f"ratio_to_{base}": ratio, "tflops": tflops, "share_of_peak": tflops / peak,
            "temporary_bytes": temporaries, "density": case.density, "live_blocks": case.live_blocks,
        })  # fmt: skip
        memory = "" if temporaries is None else f"{temporaries / 1e6:9.1f} MB"
        print(f"  {name:18} {median:9.2f} ms [{low:.2f}, {high:.2f}]  {tflops:8.3f} TFLOP/s "
              f"{tflops / peak:6.1%} of peak  x{ratio:.3f} {base} {memory}")  # fmt: skip
    return rows


def _contestants() -> dict[str, Callable[[Case, bool], Any]]:
    from attention_jax.ops.softmax.api import implementations

    names = {f"ours {name}": functools.partial(_ours, name) for name in implementations()}
    return {"torch": _torch, "flex": _flex, **names, "jax.nn": functools.partial(_jax_nn, "xla"),
            "jax.nn cudnn": functools.partial(_jax_nn, "cudnn"), "tokamax": _tokamax,
            "splash": _splash}  # fmt: skip


def _ours(impl: str, case: Case, backward: bool) -> Any:
    from attention_jax import explain

    try:
        explain(*case.inputs, mask=case.mask, impl=impl)
    except NotImplementedError as error:
        return str(error).split(": ", 1)[-1]
    if impl == "reference" and case.dense_too_large:
        return case.dense_too_large
    return ours(impl, case.mask, *case.inputs, backward)


def _jax_nn(implementation: str, case: Case, backward: bool) -> Any:
    import jax

    if implementation == "cudnn" and jax.default_backend() != "gpu":
        return "needs an NVIDIA GPU"
    if implementation == "cudnn" and not (case.causal or case.full):
        return "takes no such mask without a dense array"
    if implementation == "xla" and case.dense_too_large:
        return case.dense_too_large
    kept = None if case.causal or case.full else case.dense()[None, None]

    def forward(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, mask=kept, is_causal=case.causal, implementation=implementation
        )

    return jitted(forward, *case.inputs, backward=backward)


def _torch_inputs(case: Case, backward: bool) -> tuple[Any, list[Any]]:
    """torch and q, k, v [B, N, T, H] on its device; a result is awaited with `synchronize`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = [
        torch.from_numpy(np.array(x, np.float32).transpose(0, 2, 1, 3).copy()).to(
            device, getattr(torch, case.dtype)
        )
        for x in case.inputs
    ]
    return torch, [x.requires_grad_(backward) for x in arrays]


def _torch_call(torch, forward: Callable, arrays: list[Any], backward: bool) -> Callable[[], Any]:
    d = torch.randn_like(arrays[0])

    def call():
        out = forward(*arrays)
        result = torch.autograd.grad(out, arrays, d) if backward else out
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return call


def _torch(case: Case, backward: bool) -> Any:
    """scaled_dot_product_attention: its fused form on a CPU, cuDNN's on a GPU."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (extra `parity`)"
    plain = case.causal or case.full
    if not plain and case.dense_too_large:
        return f"only as a dense mask: {case.dense_too_large}"
    torch, arrays = _torch_inputs(case, backward)
    kept = None if plain else torch.from_numpy(case.dense().copy()).to(arrays[0].device)
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=kept, is_causal=case.causal
    )

    def forward(q, k, v):
        if not torch.cuda.is_available():
            return sdpa(q, k, v)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return _torch_call(torch, forward, arrays, backward)


def _flex(case: Case, backward: bool) -> Any:
    """FlexAttention, compiled; the block mask is made beforehand."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (extra `parity`)"
    import torch

    if not torch.cuda.is_available():
        return "runs compiled on NVIDIA GPUs"
    from torch.nn.attention import flex_attention as flex

    _, arrays = _torch_inputs(case, backward)
    kept = torch.from_numpy(case.dense().copy()).cuda()
    blocks = None
    if not case.full:
        rule = (lambda b, h, q, k: q >= k) if case.causal else (lambda b, h, q, k: kept[q, k])
        blocks = flex.create_block_mask(rule, None, None, case.T, case.T)
    compiled = torch.compile(flex.flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return _torch_call(torch, lambda q, k, v: compiled(q, k, v, block_mask=blocks), arrays, backward)


def _tokamax(case: Case, backward: bool) -> Any:
    import jax

    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    if jax.default_backend() != "gpu":
        return "its Mosaic kernel needs an NVIDIA GPU"
    if not (case.causal or case.full):
        return "takes no such mask without a dense array"
    import tokamax

    def forward(q, k, v):
        return tokamax.dot_product_attention(q, k, v, is_causal=case.causal, implementation="mosaic")

    return jitted(forward, *case.inputs, backward=backward)


def _splash(case: Case, backward: bool) -> Any:
    import jax

    if jax.default_backend() != "tpu":
        return "needs a TPU"
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.NumpyMask(np.array(case.dense())) for _ in range(case.N)])
    run = jax.vmap(kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1))

    def forward(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q * case.H**-0.5, k, v))
        return run(q, k, v).swapaxes(1, 2)

    return jitted(forward, *case.inputs, backward=backward)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s over the length: a panel per mask, width and direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["mask"], row["H"], row["what"]) for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False)
    for panel, ax in zip(panels, axes.flat, strict=False):
        here = [row for row in rows if (row["mask"], row["H"], row["what"]) == panel]
        for name in dict.fromkeys(row["name"] for row in here):
            points = [(row["T"], row["tflops"]) for row in here if row["name"] == name]
            ax.plot(*zip(*points, strict=True), marker="o", label=name)
        ax.set(xlabel="tokens", ylabel="TFLOP/s of kept pairs")
        ax.set_title(f"{panel[0]}, H {panel[1]}, {panel[2]}", fontsize="medium")
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
