"""What SIGINT, SIGTERM and SIGHUP do to a training run: it saves a checkpoint and ends with 128 + the number.

    nothing to save (set-up, compilation, final scoring)   the run ends at once, at the latest after _PATIENCE
    between the first step and the last                    the step is completed and saved
    a second signal, a second or more after the first      the process ends at once

A signal that is ignored at the start, as SIGHUP is under nohup, stays ignored, and so does one that the
program around has given a handler of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from train.streams import report

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTHING_NEW = "there was no new step to save; the same command goes on"
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
_PATIENCE = 2.0  # seconds that a compilation may go on after a signal, where there is nothing to save
# timeout, srun and others signal a process and then its group: what follows so soon is the same request.
_REPEATED = 1.0


class Stopped(KeyboardInterrupt):
    """A signal ended the run. `text` says where, in one line."""

    def __init__(self, number: int, text: str = ""):
        super().__init__(text)
        self.number, self.text = number, text

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.text and ': '}{self.text}"


@contextlib.contextmanager
def handlers(handle: Callable[[int, Any], None]) -> Iterator[frozenset[int]]:
    """Within, `handle(number, frame)` is called for the signals that are neither ignored nor handled.

    Their numbers; none of them in any other thread than the main one, which alone may handle signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in NUMBERS if signal.getsignal(n) in _DEFAULT}
    try:
        for number in before:
            signal.signal(number, handle)
        yield frozenset(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """`with Signals() as signals:` handles the signals of this process in the block, in the main thread only.

    A signal raises `Stopped` where it arrives, or, after `defer(True)`, is only recorded in `number`, for
    `check` to raise. Python's handlers run between two of its instructions, never within a compilation, so a
    thread watches as well.
    """

    def __init__(self):
        self.number: int | None = None  # of the first signal
        self._deferred = self._handled = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Signals:
        with contextlib.ExitStack() as stack:
            self._numbers = stack.enter_context(handlers(self._handle))
            if self._numbers:
                stack.enter_context(self._watched())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Within, a thread reads the numbers of the signals as they arrive."""
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(write, b"\0")  # no signal has this number: the thread ends
            watcher.join()
            os.close(self._read)
            os.close(write)

    def defer(self, deferred: bool) -> None:
        """Whether a signal is recorded from now on instead of raising."""
        self._deferred = deferred

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.number is not None:
            raise Stopped(self.number)

    def _handle(self, number: int, _: Any) -> None:
        first, self._handled = not self._handled, True
        if first:
            self.number = number
            if not self._deferred:
                raise Stopped(number)

    def _watch(self) -> None:
        first = None  # (time, number)
        while True:
            waiting = first is not None and not self._handled and not self._deferred
            ready, _, _ = select.select([self._read], [], [], 0.1 if waiting else None)
            arrived = os.read(self._read, 64) if ready else b""
            if 0 in arrived:
                return
            now = time.monotonic()
            for number in arrived:
                if number not in self._numbers:
                    continue
                if first is None:
                    first = now, number
                elif now - first[0] >= _REPEATED:
                    _leave(number, "a second signal, so nothing was saved now")
            if waiting and now - first[0] >= _PATIENCE:
                _leave(first[1], NOTHING_NEW)


def _leave(number: int, text: str) -> NoReturn:
    """End the process from the watching thread: the main thread may be in a compilation."""
    if sys.stdout.isatty():
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a progress bar hides the cursor
    report(str(Stopped(number, text)))
    os._exit(128 + number)
