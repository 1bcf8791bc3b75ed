"""Pictures of mechanisms.

python scripts/visualize.py masks [--out masks.png] [--length 64] [--block 4]     a gallery of every pattern
python scripts/visualize.py mask "SlidingWindow(16) | Sinks(2)" [--out mask.png]   one expression

Colours tell full, partial and empty blocks apart; every panel gives its density.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attention_jax import masks

# What the gallery shows, at 64 positions.
GALLERY = {
    "Full": "Full()",
    "Causal": "Causal()",
    "SlidingWindow": "SlidingWindow(12)",
    "SlidingWindow, two-sided": "SlidingWindow(8, right=7)",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status: 0, or 2 for a mistake told in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("masks", "mask"):
        command = commands.add_parser(name)
        if name == "mask":
            command.add_argument("expression", help='such as "SlidingWindow(16) | Sinks(2)"')
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the PNG to write")
        command.add_argument("--length", type=int, default=64, help="positions (default 64)")
        command.add_argument("--block", type=int, default=4, help="tile of the block map (default 4)")
    args = parser.parse_args(argv)
    try:
        figure = _draw(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _draw(args: argparse.Namespace):
    from attention_jax.masks.picture import gallery

    if args.command == "mask":
        return masks.parse(args.expression).plot(args.length, block=args.block)
    return gallery({name: masks.parse(text) for name, text in GALLERY.items()}, args.length, block=args.block)


if __name__ == "__main__":
    sys.exit(main())
