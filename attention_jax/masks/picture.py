"""Pictures of masks: what is kept, and how the blocks fall into full, partial and empty ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attention_jax.masks.algebra import Mask

# Empty, hidden in a partial block, kept in a partial block, kept in a full block.
_SHADES = ("#ffffff", "#f7e3c5", "#e08e2b", "#2a6f97")
_LEGEND = (("full block", _SHADES[3]), ("partial block, kept", _SHADES[2]), ("hidden", _SHADES[1]),
           ("empty block, never visited", _SHADES[0]))  # fmt: skip
_MOST = 4096  # a larger table would be no picture any more


def plot(
    mask: Mask, T: int, S: int | None = None, *, block: int | None = None, axes: Any = None, title: str = ""
) -> Any:
    """The matplotlib figure of a mask over positions 0..T-1 x 0..S-1; also the method `mask.plot`.

    block: the tile that the colours tell apart; about a sixteenth of T by default.
    axes: matplotlib axes to draw on; a new figure by default.
    Errors: ValueError for lengths below 1 or above 4096; ModuleNotFoundError without matplotlib.
    """
    S = T if S is None else S
    if not (1 <= T <= _MOST and 1 <= S <= _MOST):
        raise ValueError(f"a picture needs lengths from 1 to {_MOST}, got {T} and {S}; draw a smaller part")
    block = max(1, T // 16) if block is None else block
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    from matplotlib.colors import ListedColormap

    if axes is None:
        axes = _figure(4.2, 4.6).subplots()
    axes.imshow(
        shades(mask, T, S, block), cmap=ListedColormap(_SHADES), vmin=-0.5, vmax=3.5,
        interpolation="nearest", aspect="auto" if T != S else "equal",
    )  # fmt: skip
    if max(T, S) // block <= 64:
        grid = {"color": "#00000018", "linewidth": 0.5}
        for edge in range(block, S, block):
            axes.axvline(edge - 0.5, **grid)
        for edge in range(block, T, block):
            axes.axhline(edge - 0.5, **grid)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{title or mask}\ndensity {mask.density(T, S)}", fontsize=8, wrap=True)
    axes.set_xlabel("keys", fontsize=7)
    axes.set_ylabel("queries", fontsize=7)
    return axes.figure


Mask.plot = plot  # drawing depends on the algebra, not the algebra on drawing


def gallery(masks: Mapping[str, Mask], T: int = 64, *, block: int = 4, columns: int = 4) -> Any:
    """One picture of many masks, with their densities and a legend; the figure."""
    rows = -(-len(masks) // columns)
    figure = _figure(2.9 * columns, 3.2 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, mask) in zip(grid, masks.items(), strict=False):
        plot(mask, T, block=block, axes=axes, title=name)
    for axes in grid[len(masks) :]:
        axes.set_axis_off()
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=shade, edgecolor="#00000040", label=name) for name, shade in _LEGEND]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def shades(mask: Mask, T: int, S: int, block: int) -> np.ndarray:
    """[T, S] of 0 (empty block), 1 (hidden in a partial block), 2 (kept in one), 3 (full block).

    The block map is what `bounds` answers, as implementations see it.
    """
    q, k = np.arange(T), np.arange(S)
    q_lo, k_lo = q // block * block, k // block * block
    q_hi, k_hi = np.minimum(q_lo + block, T) - 1, np.minimum(k_lo + block, S) - 1
    some, every = mask.bounds(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
    some, every = (np.broadcast_to(x, (T, S)) for x in (some, every))
    kept = np.broadcast_to(mask.dense(q, k), (T, S))
    return np.where(every, 3, np.where(some, 1 + kept, 0)).astype(np.int8)


def _figure(width: float, height: float) -> Any:
    """A figure of its own, outside pyplot's list of windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure
