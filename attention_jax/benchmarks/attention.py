"""Softmax attention beside every peer that is installed, over lengths, widths and masks.

Work is counted over the pairs that the mask keeps: 4 B N pairs H floating-point operations forward, 2.5 times
that backward. The backward alone is the difference of two medians.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.benchmarks.case import Case
from attention_jax.benchmarks.contestants import ON_GPU, SLOW, contestants
from attention_jax.benchmarks.timing import (
    SETTLE,
    at_once,
    device_clock,
    interleave,
    matmul_peak,
    naming,
    on_gpu,
    wall_clock,
)
from attention_jax.optional import need


@dataclasses.dataclass(frozen=True)
class Method:
    """How calls are timed, until when, beside which rate, and which reasons were printed already."""

    rounds: int
    clock: Callable[[Any], float]
    settle: float
    peak: float
    end: float  # of time.monotonic(): nothing is begun after it
    printed: set[tuple[str, str]] = dataclasses.field(default_factory=set)


def attention(args) -> Iterator[dict[str, Any]]:
    """Every contestant on every case, forward and forward + backward: a table, rows, and a plot."""
    import jax

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    clock, settle = (device_clock, SETTLE) if on_gpu() else (wall_clock, 0.0)
    end = time.monotonic() + (args.seconds or math.inf)
    method = Method(args.rounds, clock, settle, matmul_peak(dtype), end)
    print(f"{jax.devices()[0].device_kind}, {dtype}; products of matrices reach {method.peak:.3g} TFLOP/s")
    names = args.contestants or (ON_GPU if on_gpu() else [x for x in contestants() if x not in SLOW])
    rows: list[dict[str, Any]] = []
    for case, takers, beside in _plan(args, names, dtype):
        if time.monotonic() > method.end:
            print(f"stopped: the {args.seconds} seconds are over", flush=True)
            break
        for row in compare(case, takers, beside, method):
            rows.append(row)
            relate_to_full(rows)
            print(_line(row), flush=True)
            yield row
    if args.plot:
        plot(rows, args.plot)


def _plan(args, names: Sequence[str], dtype: str) -> Iterator[tuple[Case, list[str], list[str]]]:
    """(case, contestants, those timed beside them), the most wanted first, for time may run out.

    The first width of all masks comes before the second, and slow contestants come after all cases of the
    others, beside the first two of them, of which one at least can take part.
    """
    from attention_jax.masks import parse

    quick = [name for name in names if name not in SLOW]
    slow = [name for name in names if name in SLOW]
    for takers, beside in ((quick, []), (slow, quick[:2])):
        for H in args.widths if takers else ():
            for text in args.masks:
                for T in args.lengths:
                    B = args.batch if args.tokens is None else max(1, args.tokens // T)
                    K = args.kv_heads or args.heads
                    yield Case(B, T, args.heads, K, H, parse(text), dtype), takers, beside


def compare(case: Case, takers: list[str], beside: list[str], method: Method) -> Iterator[dict[str, Any]]:
    """Rows of the takers, timed in turn with `beside`, whose rows are elsewhere."""
    forward: dict[str, float] = {}
    for what in ("forward", "forward+backward"):
        if time.monotonic() > method.end:
            return
        errors: dict[str, str] = {}
        calls = _calls(case, takers, what, errors, method.printed)
        if not calls and not errors:
            continue
        print(f"\n{case.mask} T={case.T} B={case.B} N={case.N} K={case.K} H={case.H} {what}: density "
              f"{case.density:.3f}, live blocks {case.live_blocks:.3f}", flush=True)  # fmt: skip
        calls = _calls(case, beside, what, {}, method.printed) | calls
        times = interleave(calls, method.rounds, clock=method.clock, settle=method.settle, errors=errors)
        for name in takers:
            row = _described(case, what, name)
            if name in errors:
                yield row | {"error": errors[name]}
            elif name in times:
                row |= _figures(case, what, times, name, method.peak)
                row["temporary_bytes"] = getattr(calls[name], "temporaries", None)
                if note := getattr(calls[name], "note", None):
                    row["note"] = note
                if what == "forward":
                    forward[name] = row["median_ms"]
                elif name in forward:
                    row["backward_ms"] = ms = row["median_ms"] - forward[name]
                    row["backward_tflops"] = case.teraflops(ms, "backward") if ms > 0 else None
                yield row


def _calls(
    case: Case, names: list[str], what: str, errors: dict[str, str], printed: set[tuple[str, str]]
) -> dict[str, Callable[[], Any]]:
    """The calls of those who can take part. A reason why not is printed once, and an error noted."""
    known = contestants()
    case.inputs  # noqa: B018 (drawn before threads ask for them)
    makers = {name: functools.partial(known[name], case, what != "forward") for name in names}
    made = at_once(makers, errors)
    for name, reason in made.items():
        if isinstance(reason, str) and (name, reason) not in printed:
            printed.add((name, reason))
            print(f"  {name:22} not here: {reason}", flush=True)
    return {name: call for name, call in made.items() if not isinstance(call, str)}


def _described(case: Case, what: str, name: str) -> dict[str, Any]:
    return {
        "mask": str(case.mask), "T": case.T, "B": case.B, "N": case.N, "K": case.K, "H": case.H,
        "dtype": case.dtype, "what": what, "name": name, "density": case.density,
        "live_blocks": case.live_blocks,
    }  # fmt: skip


def _figures(case: Case, what: str, times: dict[str, np.ndarray], name: str, peak: float) -> dict[str, Any]:
    """A contestant's times beside those of the first."""
    ms, base = times[name], next(iter(times))
    median = float(np.median(ms))
    tflops = case.teraflops(median, what)
    return {
        "median_ms": median,
        "quartiles_ms": [float(x) for x in np.percentile(ms, (25, 75))],
        f"ratio_to_{base}": float(np.median(ms / times[base])),
        "tflops": tflops,
        "share_of_peak": tflops / peak,
    }


def relate_to_full(rows: list[dict[str, Any]]) -> None:
    """Notes the time per live block over that of the same contestant without a mask, where both are there.

    1 is a mask that costs nothing beside the pairs it keeps, by whole blocks.
    """

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[x] for x in ("name", "T", "B", "N", "K", "H", "dtype", "what"))

    timed = [row for row in rows if "median_ms" in row]
    full = {key(row): row["median_ms"] for row in timed if row["mask"] == "Full()"}
    for row in timed:
        if key(row) in full and row["mask"] != "Full()":
            row["block_time_to_full"] = row["median_ms"] / row["live_blocks"] / full[key(row)]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"  {row['name']:22} {row['error']}"
    low, high = row["quartiles_ms"]
    ratio = next(key for key in row if key.startswith("ratio_to_"))
    line = (f"  {row['name']:22} {row['median_ms']:9.3f} ms [{low:.3f}, {high:.3f}]  {row['tflops']:8.3f} "
            f"TFLOP/s {row['share_of_peak']:6.1%} of peak  x{row[ratio]:.3f} {ratio[9:]}")  # fmt: skip
    if row.get("backward_tflops"):
        line += f"; backward {row['backward_ms']:.3f} ms {row['backward_tflops']:.3f} TFLOP/s"
    if "block_time_to_full" in row:
        line += f"; a live block x{row['block_time_to_full']:.3f} full"
    if row["temporary_bytes"] is not None:
        line += f"  {row['temporary_bytes'] / 1e6:.1f} MB"
    return line + (f"  ({row['note']})" if "note" in row else "")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s over the length: a panel per mask, width and direction."""
    need("matplotlib", "--plot").use("Agg")
    import matplotlib.pyplot as plt

    if not (timed := [row for row in rows if "tflops" in row]):
        return
    panels = list(dict.fromkeys((row["mask"], row["H"], row["what"]) for row in timed))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False)
    for panel, ax in zip(panels, axes.flat, strict=False):
        here = [row for row in timed if (row["mask"], row["H"], row["what"]) == panel]
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
    with naming(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)
