"""What every command line shares: how options are read, and what a mistake, Ctrl-C and a closed pipe do.

A command is a module of `train.commands` with a frozen dataclass of options, from which tyro makes the
command line, and `main(argv)`. At the end stand the entry points that an installed package has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train import compilation_cache
from train.process import prepare_process

Options = TypeVar("Options")

_OURS = ("train", "attention_jax", "scripts")
_INSTALL = 'pip install "attention_jax[train]"'


class UsageError(ValueError):
    """A mistake in a command line, described in one line."""


def guard(run: Callable[[], int]) -> int:
    """The exit status of `run()`: its own, 2 for a user's mistake, 130 if interrupted.

    A mistake is one line on stderr: a ValueError or NotImplementedError that this project raised, what the
    operating system refuses, or a package that is not installed. Any other exception is a defect and leaves
    with its traceback. A reader of stdout that has closed it, such as head, ends the program with status 0.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *_OURS):
            raise
        return _mistake(f"the package {package} is not installed: {_INSTALL} brings it")
    except (ValueError, NotImplementedError, OSError) as error:
        if not _is_users(error):
            raise
        return _mistake(str(error))


def run(
    options: type[Options], body: Callable[[Options], int | None], text: str, argv: Sequence[str] | None
) -> int:
    """Read a command line, the process's own if `argv` is None, and run `body` on it: the exit status.

    text: the description that --help prints, at most 80 columns wide.
    """
    own = argv is None
    return guard(lambda: _run(options, body, text, sys.argv[1:] if own else list(argv), own_process=own))


def _run(
    options: type[Options],
    body: Callable[[Options], int | None],
    text: str,
    argv: list[str],
    *,
    own_process: bool,
) -> int:
    if {"-h", "--help"} & set(argv):
        print(_help(options, text), end="")
        return 0
    chosen = parse(options, argv)
    if own_process:
        compilation_cache.enable()
    if "jax" in sys.modules:  # `_is_users` looks at the frame that raised
        sys.modules["jax"].config.update("jax_traceback_filtering", "off")
    return body(chosen) or 0


def parse(options: type[Options], argv: Sequence[str]) -> Options:
    """The options that a command line gives. UsageError names the mistake in one line."""
    import tyro

    # tyro draws a box around an error and exits: what it says is read from there, in long lines.
    with _captured(columns=1000, encoding="utf-8") as said:
        try:
            return tyro.cli(options, prog=_program(), args=argv, config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit:
            pass
    raise UsageError(_sentence(said()))


def _help(options: type[Any], text: str) -> str:
    """The usage line, the description and the options, at most 80 columns wide."""
    import tyro

    columns = min(80, shutil.get_terminal_size().columns)
    with _captured(columns, (sys.stdout.encoding or "ascii").lower()) as said:
        with contextlib.suppress(SystemExit):
            settings = {"description": "", "config": (tyro.conf.FlagCreatePairsOff,)}
            tyro.cli(options, prog=_program(), args=["--help"], **settings)
    usage, _, rest = said().partition("\n\n")
    usage = textwrap.fill(usage, columns, subsequent_indent=" " * 7, break_on_hyphens=False)
    return f"{usage}\n\n{text.strip()}\n\n{rest.lstrip()}"


def _sentence(box: str) -> str:
    """The message in a box of tyro's, without its frame and the help below it."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        words = line.strip("│─ ")
        if line.startswith("│") and not words:
            parts.append([])
        elif line.startswith("│"):
            parts[-1].append(words)
    sentence = " ".join(parts[0])
    if len(parts) > 1 and parts[1][:1] == ["Perhaps you meant:"]:
        sentence += f"; did you mean {parts[1][1].split()[0]}?"
    return sentence


@contextlib.contextmanager
def _captured(columns: int, encoding: str) -> Iterator[Callable[[], str]]:
    """What is printed within, as if to a terminal of this width and encoding."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="\n")
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield lambda: (file.seek(0), file.read())[1]
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _program() -> str:
    return Path(sys.argv[0]).name


def _mistake(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _is_users(error: BaseException) -> bool:
    """Whether an error is a user's mistake: raised by our own code, or the operating system's refusal.

    A ValueError that jax or NumPy raised is a defect of ours, and its traceback is what is needed.
    """
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in (*_OURS, "__main__")


def _launch(name: str) -> int:
    """Run the command of this name with the process's own command line."""
    # Imported within the guard: a package that is not installed is a mistake like any other.
    return guard(lambda: importlib.import_module(f"train.commands.{name}").main())


def benchmark() -> int:
    """Run the benchmarks, with the allocator's settings of training: a step is timed as it is trained."""
    prepare_process()
    return _launch("benchmark")


compare = functools.partial(_launch, "compare")
generate = functools.partial(_launch, "generate")
recall = functools.partial(_launch, "recall")
visualize = functools.partial(_launch, "visualize")
