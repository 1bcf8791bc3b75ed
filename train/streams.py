"""Standard output and standard error: a process prints without failing, whatever they are connected to.

`prepare` opens what is closed and lets no character fail to encode. `Lasting` is an output whose loss (a pipe
that its reader has closed, a full disk, a terminal that is gone) does not end a run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from typing import TextIO

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories that a terminal may obey, or not show


def prepare() -> None:
    """Open the standard streams that are closed, and write what cannot be encoded as escapes such as \\xe9.

    A closed descriptor would be given to the next file that is opened, and libraries that write to 1 or 2
    would then write into that file. What goes to a stream that was closed at the start is discarded.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)  # `train.process` starts the process anew
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, open(nowhere, "w", encoding="utf-8", closefd=False))
        elif getattr(sys, name) is getattr(sys, f"__{name}__"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def report(text: str) -> None:
    """Print a line to standard error; where that fails, nothing can be reported."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(" ".join(text.splitlines())), file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """Let the stream's descriptor lead to nowhere: what it holds back cannot fail when the process ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def printable(text: str) -> str:
    """The text with escapes such as \\x1b in place of what a terminal would obey; newlines and tabs stay.

    These are control characters, C1 codes included, and the invisible ones that change the direction or the
    joining of what follows.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _OBEYED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Lasting:
    """A text stream whose failure is reported once, on standard error, and does not end the run."""

    def __init__(self, stream: TextIO, progress: str):
        """`progress`: where the run's progress can be read instead, for the message."""
        self._stream, self._progress = stream, progress
        self._lost = False

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal that works."""
        return not self._lost and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write the text, what cannot be encoded as escapes."""
        if not self._lost:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        if self._stream is sys.__stdout__:
            discard(self._stream)
        reason = getattr(error, "strerror", None) or error
        report(
            f"note: standard output failed ({reason}): the run goes on, its progress is in {self._progress}"
        )
