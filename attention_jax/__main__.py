"""`python -m attention_jax` and `attention-jax` print the catalogue and the list of commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from attention_jax.catalogue import table

COMMANDS = {
    "train": "trains a language model from a YAML configuration",
    "generate": "continues a prompt with a trained model",
    "compare": "trains one model per mechanism on the same text",
    "recall": "trains mechanisms on associative recall",
    "visualize": "draws masks",
    "benchmark": "times attention against other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the catalogue and the commands; return the exit status, 141 if the reader has closed the pipe."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and set(words) != {"--help"} and set(words) != {"-h"}:
        print(f"error: attention-jax takes no arguments, got {' '.join(words)}", file=sys.stderr)
        return 2
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    try:
        print(help_text() if words else f"{table()}\n\n{commands()}", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def help_text() -> str:
    """The text of --help."""
    return f"usage: attention-jax\n\nPrints every mechanism with its paper, cost and cache.\n\n{commands()}"


def commands() -> str:
    """The commands of an installed package, one per line."""
    lines = [f"attention-jax-{name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["commands (they need the extra `train`; each takes --help)", *lines])


if __name__ == "__main__":
    sys.exit(main())
