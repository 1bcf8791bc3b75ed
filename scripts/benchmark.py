"""Timings beside other systems, interleaved in one process: medians, ratios of pairs, peak memory.

python scripts/benchmark.py attention [--lengths 2048 4096] [--widths 64] [--masks "Causal()"] [--plot FILE]
                                                          ours beside every peer that is installed; on a GPU
                                                          by its own clock
python scripts/benchmark.py memory --length 32768         forward + backward of `chunked`
python scripts/benchmark.py window --length 16384         a window of --window 512 against causal
python scripts/benchmark.py crossover                     dense against chunked, by length
python scripts/benchmark.py blocks [--length 131072]      the block map of each kind of mask
python scripts/benchmark.py linear [--lengths ...]        time and memory of the linear engines over T
python scripts/benchmark.py overtake [--lengths ...]      the linear engines against softmax attention
python scripts/benchmark.py step --nanogpt FOLDER         a training step beside nanoGPT's

Machines are shared and swing: every figure is a ratio of neighbours in time, the median over rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_jax import masks
from scripts.benchmarks import linear, softmax, training
from scripts.benchmarks.attention import attention
from scripts.benchmarks.contestants import contestants
from scripts.benchmarks.timing import save

_BENCHMARKS = {
    "attention": attention,
    "memory": softmax.memory,
    "window": softmax.window,
    "crossover": softmax.crossover,
    "blocks": softmax.blocks,
    "linear": linear.linear,
    "overtake": linear.overtake,
    "step": training.step,
}


def _count(text: str) -> int:
    """An argument that is an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _mask(text: str) -> str:
    """An argument that is a mask expression."""
    try:
        masks.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status: 1 where one of ours failed. A mistake in it exits with 2."""
    args = _arguments(argv)
    rows = []
    for row in _BENCHMARKS[args.what](args):
        rows.append(row)
        if args.json:  # after every row: a card's time may end at any of them
            save(args.json, rows)
    return int(any("error" in row and row["name"].startswith("ours") for row in rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=list(_BENCHMARKS))
    parser.add_argument("--lengths", type=_count, nargs="+", help="tokens")
    parser.add_argument("--widths", type=_count, nargs="+", default=[64], help="of a head")
    parser.add_argument(
        "--masks", type=_mask, nargs="+", default=["Causal()"], help="expressions, as in YAML"
    )
    parser.add_argument("--batch", type=_count, default=1)
    parser.add_argument("--tokens", type=_count, help="attention: rows x length, in place of --batch")
    parser.add_argument("--heads", type=_count, default=8)
    parser.add_argument("--kv-heads", type=_count, help="attention: default --heads")
    parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", choices=list(contestants()),
        help="attention: " + ", ".join(contestants()),
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--length", type=_count)
    parser.add_argument("--window", type=_count, default=512)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--config", type=Path, default=Path("configs/shakespeare_char.yaml"))
    parser.add_argument("--rounds", type=_count, default=11)
    parser.add_argument("--seconds", type=_count, help="attention: begin nothing after so many")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--plot", type=Path, help="attention: a picture of TFLOP/s over the length")
    args = parser.parse_args(argv)
    if args.what == "attention" and args.lengths is None:
        args.lengths = [2048, 4096]
    if args.heads % (args.kv_heads or 1):
        parser.error(f"--kv-heads {args.kv_heads} does not divide --heads {args.heads}")
    return args


if __name__ == "__main__":
    # The allocator's settings of `python -m train`, so that a step is timed as it is trained.
    from train.cli import _prepare_process

    _prepare_process()
    sys.exit(main())
