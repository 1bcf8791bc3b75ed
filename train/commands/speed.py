"""What commands that generate say of time: what each program took to compile, and tokens per second."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from attention_jax.generation import Increment


class Clock(logging.Handler):
    """Prints on stderr what a program took to compile, as it happens, and counts it apart from the rest."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._began, self._compiled, self._tokens = time.perf_counter(), 0.0, 0
        self._first: tuple[float, float, int] | None = None
        self._last = self._began

    def count(self, tokens: int) -> None:
        """So many tokens have come."""
        self._last = time.perf_counter()
        self._tokens += tokens
        if self._first is None:
            self._first = self._last, self._compiled, self._tokens

    def counted(self, parts: Iterator[list[Increment]]) -> Iterator[list[Increment]]:
        """The parts, with their tokens counted."""
        for row in parts:
            self.count(sum(len(part.tokens) for part in row))
            yield row

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of `attention_jax.generation`, whose last argument is a time in seconds."""
        with contextlib.suppress(OSError, ValueError):
            print(f"note: {record.getMessage()}", file=sys.stderr, flush=True)
        self._compiled += record.args[-1]

    def speed(self) -> str:
        """How many tokens came, how many per second, and how long it took to compile.

        Tokens per second are those after the first increment, which waits for the prompt to be read; of one
        increment alone all of its time counts but for the compilation.
        """
        began, compiled, tokens = self._first or (self._began, 0.0, 0)
        if self._tokens == tokens:
            began, compiled, tokens = self._began, 0.0, 0
        seconds = max(self._last - began - (self._compiled - compiled), 1e-9)
        more = f", compiled in {self._compiled:.1f} s" if self._compiled else ""
        return f"{self._tokens:,} tokens, {(self._tokens - tokens) / seconds:,.0f} tokens/s{more}"


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """A clock, within which the programs of generation say what they took to compile."""
    log, handler = logging.getLogger("attention_jax.generation"), Clock()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a package that trains brings may have given the root logger a handler
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def drafts_kept(drafts: tuple[int, int] | None) -> str:
    """How many drafts of speculative decoding the model has read, and how many it has kept."""
    return "" if drafts is None else f", {drafts[1]:,} of {drafts[0]:,} drafts kept"
