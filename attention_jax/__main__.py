"""`python -m attention_jax` and `attention-jax` print the catalogue and the list of commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from attention_jax.catalogue import catalogue, described, table
from attention_jax.hints import hint

COMMANDS = {
    "train": "trains a language model from a YAML configuration",
    "generate": "continues a prompt with a model, or chats with it",
    "convert": "writes a model as a folder of Hugging Face",
    "compare": "trains one model per mechanism on the same text",
    "recall": "trains mechanisms on associative recall",
    "visualize": "draws masks",
    "benchmark": "times attention against other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the catalogue, or the mechanisms named; the exit status, 141 if the reader closed the pipe."""
    words = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks
    try:
        text, status = _answer(words)
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        _silence()
        return 128 + signal.SIGPIPE
    except OSError as error:  # such as a full disk
        _silence()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _answer(words: list[str]) -> tuple[str, int]:
    """(what to print, the exit status)."""
    if {"--help", "-h"} & set(words):
        return help_text(), 0
    if not words:
        return f"{table()}\n\n{commands()}", 0
    known = {entry.name.lower(): entry for entry in catalogue()}
    for word in words:
        if word.startswith("-"):
            return f"error: unknown option {word}; there is --help", 2
        if word.lower() not in known:
            more = hint("kind", word, [entry.name for entry in known.values()])
            more = more or "; `attention-jax` without a name lists all"
            return f"error: there is no mechanism {word!r}{more}", 2
    return "\n\n".join(described(known[word.lower()]) for word in words), 0


def _silence() -> None:
    """Let what is still to be flushed at the end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """The text of --help."""
    return (
        "usage: attention-jax [NAME ...]\n\n"
        "Prints every mechanism with its paper, cost and cache, or those that are named.\n\n"
        f"{commands()}"
    )


def commands() -> str:
    """The commands of an installed package, one per line."""
    lines = [f"attention-jax-{name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["commands (they need the extra `train`; each takes --help)", *lines])


if __name__ == "__main__":
    sys.exit(main())
