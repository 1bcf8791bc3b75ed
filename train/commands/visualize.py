"""Draws masks.

    python scripts/visualize.py masks    draws a gallery of every pattern
    python scripts/visualize.py mask "SlidingWindow(16) | Sinks(2)"

The colours show full, partial and empty blocks; every panel gives its density.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attention_jax import masks
from train import command_line
from train.commands.types import Count, MaybePath, MaybeText, Positional
from train.run.files import writing

# What the gallery shows, at 64 positions.
GALLERY = {
    "Full": "Full()",
    "Causal": "Causal()",
    "SlidingWindow": "SlidingWindow(12)",
    "SlidingWindow, bidirectional": "SlidingWindow(8, right=7)",
    "Dilated": "Dilated(5, 4)",
    "Strided & Causal": "Strided(8) & Causal()",
    "Strided | window, causal": "(Strided(8) | SlidingWindow(8)) & Causal()",
    "Chunked": "Chunked(16)",
    "Chunked & Causal": "Chunked(16) & Causal()",
    "BlockLocal": "BlockLocal(8)",
    "Sinks | window, causal": "(Sinks(4) | SlidingWindow(12)) & Causal()",
    "Global": "Global((0, 1, 30, 31))",
    "Prefix | Causal": "Prefix(16) | Causal()",
    "Longformer": "Longformer(12, (0, 1))",
    "Longformer & Causal": "Longformer(12, (0, 1)) & Causal()",
    "RandomBlocks": "RandomBlocks(4, 2)",
    "BigBird": "BigBird(4, 3, 1, 2)",
    "BigBird & Causal": "BigBird(4, 3, 1, 2) & Causal()",
    "far past": "~SlidingWindow(16) & Causal()",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    command: Positional[Literal["masks", "mask"]]  #: masks: a gallery of every pattern; mask: one of your own
    expression: Positional[MaybeText] = None  #: of mask, such as "SlidingWindow(16) | Sinks(2)"
    out: MaybePath = None  #: the PNG to write; none: masks.png or mask.png
    length: Count = 64  #: positions
    block: Count = 4  #: width of a block of the block map


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> None:
    if (options.command == "mask") != (options.expression is not None):
        raise ValueError('give masks alone, or mask and an expression such as "SlidingWindow(16) | Sinks(2)"')
    path = options.out or Path(f"{options.command}.png")
    figure = _draw(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()  # to a path without a suffix matplotlib would add one
    figure.savefig(image, format=path.suffix.removeprefix(".") or "png")
    with writing(path):
        path.write_bytes(image.getvalue())
    print(path)


def _draw(options: Options):
    from attention_jax.masks.picture import gallery

    if options.expression is not None:
        return masks.parse(options.expression).plot(options.length, block=options.block)
    drawn = {name: masks.parse(text) for name, text in GALLERY.items()}
    return gallery(drawn, options.length, block=options.block)
