"""Plots of masks: the kept pairs and the full, partial and empty blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attention_jax.masks.algebra import Mask
from attention_jax.optional import need

# Colours of: empty block, masked pair of a partial block, kept pair of a partial block, full block.
_SHADES = ("#ffffff", "#f7e3c5", "#e08e2b", "#2a6f97")
_LEGEND = (("full block", _SHADES[3]), ("partial block, kept", _SHADES[2]),
           ("partial block, masked", _SHADES[1]), ("empty block, not visited", _SHADES[0]))  # fmt: skip
_MAX_LENGTH = 4096  # larger plots would be unreadable and slow


def plot(
    mask: Mask, T: int, S: int | None = None, *, block: int | None = None, axes: Any = None, title: str = ""
) -> Any:
    """The matplotlib figure of a mask over positions 0..T-1 x 0..S-1; also the method `mask.plot`.

    block: the block size for the colours of full, partial and empty blocks; T // 16 by default.
    axes: matplotlib axes to draw on; a new figure by default.
    Raises: ValueError for lengths below 1 or above 4096; ModuleNotFoundError without matplotlib.
    """
    S = T if S is None else S
    if not (1 <= T <= _MAX_LENGTH and 1 <= S <= _MAX_LENGTH):
        raise ValueError(f"plot: T and S must be 1 to {_MAX_LENGTH}, got {T} and {S}; plot a smaller range")
    block = max(1, T // 16) if block is None else block
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    ListedColormap = need("matplotlib.colors", "a plot of a mask").ListedColormap

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


Mask.plot = plot  # set here, so that the algebra does not import the plots


def gallery(masks: Mapping[str, Mask], T: int = 64, *, block: int = 4, columns: int = 4) -> Any:
    """A matplotlib figure with one plot per mask, their densities and a legend."""
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
    """The class of every pair, int8 [T, S].

    0: in an empty block, 1: masked in a partial block, 2: kept in a partial block, 3: in a full block. Blocks
    are classified by `bounds`, as implementations do.
    """
    q, k = np.arange(T), np.arange(S)
    q_lo, k_lo = q // block * block, k // block * block
    q_hi, k_hi = np.minimum(q_lo + block, T) - 1, np.minimum(k_lo + block, S) - 1
    any_kept, all_kept = mask.bounds(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
    any_kept, all_kept = (np.broadcast_to(x, (T, S)) for x in (any_kept, all_kept))
    kept = np.broadcast_to(mask.dense(q, k), (T, S))
    return np.where(all_kept, 3, np.where(any_kept, 1 + kept, 0)).astype(np.int8)


def _figure(width: float, height: float) -> Any:
    """A new figure that is not registered with pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure
