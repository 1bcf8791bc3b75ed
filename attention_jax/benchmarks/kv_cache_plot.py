"""The figure of `benchmark kv_cache`: time per step and cumulative time, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.benchmarks.timing import naming
from attention_jax.optional import need

# Okabe and Ito's colours, which people with any colour vision tell apart.
_STYLES = {"MHA": ("#0072B2", "o"), "GQA": ("#D55E00", "s"), "MQA": ("#009E73", "^"), "MLA": ("#CC79A7", "D")}
_APART = 0.062  # of the height of a panel, between two labels


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figure to `path`: both axes logarithmic, a label at the end of each line."""
    need("matplotlib", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9.6, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, key, scale, title in zip(
        figure.subplots(1, 2), ("step_ms", "total_ms"), (1.0, 1e3),
        ("Time of one step (ms)", "Cumulative time (s)"), strict=True,
    ):  # fmt: skip
        _panel(axes, rows, key, scale)
        axes.set_title(title, fontsize=11)
    form = path.suffix.removeprefix(".") or "png"
    with naming(path):
        figure.savefig(path, format=form)


def _panel(axes: Any, rows: list[dict[str, Any]], key: str, scale: float) -> None:
    ends = []
    for way, line, fill in (("uncached", "--", "white"), ("cached", "-", None)):
        for name, (colour, marker) in _STYLES.items():
            points = [(row["tokens"], row[way][key] / scale) for row in rows if row["mechanism"] == name]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, line, color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                      markerfacecolor=fill or colour)  # fmt: skip
            ends.append((y[-1], f"{name} {'cached' if way == 'cached' else 'uncached'}", colour))
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(n) for n in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("generated tokens", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(True, color="#00000018", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)


def _label(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """A label beside the last point of each line, moved up or down where two would overlap."""
    ends = sorted(ends)
    low, high = np.log(axes.get_ylim())
    wanted = [(np.log(y) - low) / (high - low) for y, *_ in ends]
    for height, (y, text, colour) in zip(spread(wanted, _APART), ends, strict=True):
        axes.annotate(
            text, (1.0, wanted[ends.index((y, text, colour))]), xytext=(1.03, height),
            xycoords="axes fraction", textcoords="axes fraction", va="center", fontsize=8, color=colour,
            annotation_clip=False,
        )  # fmt: skip


def spread(wanted: list[float], apart: float) -> list[float]:
    """Ascending heights at least `apart` from one another, near the ascending ones that are wanted.

    Labels that would overlap form a block, whose middle is the mean of what its labels want.
    """
    blocks: list[list[float]] = []
    for height in wanted:
        blocks.append([height])
        while len(blocks) > 1 and _bottom(blocks[-1], apart) < _top(blocks[-2], apart) + apart:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_bottom(block, apart) + apart * i for block in blocks for i in range(len(block))]


def _bottom(block: list[float], apart: float) -> float:
    return sum(block) / len(block) - apart * (len(block) - 1) / 2


def _top(block: list[float], apart: float) -> float:
    return _bottom(block, apart) + apart * (len(block) - 1)
