"""Text from a trained run, printed as it is drawn.

python scripts/generate.py RUN_DIR --prompt "def main(" [--tokens 300] [--temperature 0.8] [--top-k 40] ...

For a run of objective seq2seq the prompt is the source, and what is drawn is its target.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

import jax

from attention_jax.generation import Sampling, stream
from train.data.tokenizers import StreamDecoder
from train.run.restore import TrainedRun, load_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status: 0, or 2 for a user's mistake told in one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        step = int(args.step) if args.step.isdecimal() else args.step
        if step not in ("latest", "best") and not isinstance(step, int):
            raise ValueError(f"--step must be a number, latest or best, got {args.step}")
        if args.seed is not None and not 0 <= args.seed < 2**32:
            raise ValueError(f"--seed must be in [0, {2**32}), got {args.seed}")
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
        _print_text(load_run(args.run_dir, step=step), args, sampling)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_text(run: TrainedRun, args: argparse.Namespace, sampling: Sampling) -> None:
    seed = secrets.randbits(32) if args.seed is None else args.seed
    requests = run.requests([args.prompt])
    decoder = StreamDecoder(run.tokenizer)
    pieces = stream(
        run.model,
        run.params,
        requests.prompts,
        sources=requests.sources,
        max_new_tokens=args.tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        eos_id=run.tokenizer.end_of_document,
    )
    sys.stdout.write(requests.heads[0])
    for [ids] in pieces:
        sys.stdout.write("".join(decoder.push(int(token)) for token in ids))
        sys.stdout.flush()
    sys.stdout.write(decoder.finish() + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Text from a trained run, printed as it is drawn.")
    parser.add_argument("run_dir", help="the folder of a run of `python -m train`")
    parser.add_argument("--prompt", default="", help="what the text starts with; for seq2seq: the source")
    parser.add_argument("--tokens", type=int, default=300, help="how many to draw at most (default 300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="keep the fewest tokens that reach this probability")
    parser.add_argument("--min-p", type=float, help="keep tokens of this share of the largest probability")
    parser.add_argument("--seed", type=int, help="same seed, same text; default: a new one each time")
    parser.add_argument("--step", default="latest", help="a checkpoint's step, latest or best")
    return parser


if __name__ == "__main__":
    sys.exit(main())
