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
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train import compilation_cache, streams
from train.process import prepare_process
from train.run.failure import FULL

Options = TypeVar("Options")

_OURS = ("train", "attention_jax", "scripts")


class UsageError(ValueError):
    """A mistake in a command line, described in one line."""


def guard(run: Callable[[], int]) -> int:
    """The exit status of `run()`: its own, or what its exception stands for. No traceback but a defect's.

    2    a mistake of the user, in one line: a ValueError or NotImplementedError that this project raised,
         what the operating system refuses, a package that is not installed
    1    a run that cannot go on, in one line: a full disk, memory that is used up, losses that are not finite
    130  interrupted (128 and the number of the signal)
    141  the reader of standard output has closed it, such as head: nothing is said

    Any other exception is a defect and leaves with its traceback.
    """
    streams.prepare()
    try:
        with _threads_reported():
            status = run()
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as error:
        streams.report(str(error) or "interrupted")
        return 128 + getattr(error, "number", signal.SIGINT)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *_OURS):
            raise
        return _failed(f"the package {package} is not installed: {_install_line(package)} brings it")
    except OSError as error:
        return _refused(error)
    except FloatingPointError as error:  # jax_debug_nans
        return _failed(f"{error} ({_place(error)})", 1)
    except (ValueError, NotImplementedError) as error:
        if not is_users(error):
            raise
        return _failed(str(error), getattr(error, "exit_status", 2))
    except (RuntimeError, AssertionError, MemoryError) as error:
        if _platform_is_absent(error):
            return _failed(_absent_platform())
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        first = next(iter(str(error).splitlines()), "out of memory")
        return _failed(f"{first}; less memory is needed with fewer rows, shorter ones or a smaller model", 1)


def _refused(error: OSError) -> int:
    """The exit status of what the operating system refused, after saying so."""
    if isinstance(error, BrokenPipeError):
        streams.discard(sys.stdout)
        return 128 + signal.SIGPIPE
    if error.errno not in FULL:
        return _failed(str(error))
    if error.filename is None:  # every file is written within `files.writing` or the like, which names it
        streams.discard(sys.stdout)
    return _failed(f"{error.filename or 'standard output'}: {error.strerror}", 1)


@contextlib.contextmanager
def _threads_reported() -> Iterator[None]:
    """Within, a thread that ends by an exception is reported in one line."""

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            name = arguments.thread.name if arguments.thread else "unknown"
            what = f"{arguments.exc_type.__name__}: {arguments.exc_value}"
            streams.report(f"error: the thread {name} ended by {what}")

    before = threading.excepthook
    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _install_line(package: str) -> str:
    """The pip command that brings a package."""
    try:
        from attention_jax.optional import install_line  # not at the top: it loads jax
    except ModuleNotFoundError:  # jax itself is missing
        return "pip install attention_jax"
    return install_line(package)


def _platform_is_absent(error: BaseException) -> bool:
    """Whether jax raised the error because it lacks the platform of JAX_PLATFORMS."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return bool(os.environ.get("JAX_PLATFORMS")) and frame.f_globals.get("__name__") == "jax._src.xla_bridge"


def _absent_platform() -> str:
    from attention_jax.hints import near

    platforms = os.environ["JAX_PLATFORMS"]
    meant = near(platforms, ("cpu", "cuda", "rocm", "tpu"))
    more = f"; did you mean {meant}?" if meant and meant != platforms.lower() else ""
    return (
        f"JAX_PLATFORMS={platforms}: jax cannot use this platform here{more}; without the variable it "
        "chooses one"
    )


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
    if "jax" in sys.modules:  # `is_users` looks at the frame that raised
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


def _failed(message: str, status: int = 2) -> int:
    streams.report(f"error: {message}")
    return status


def _place(error: BaseException) -> str:
    """The innermost line of this project that an exception has passed."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if _is_ours(f.f_globals)]
    return f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "elsewhere"


def _is_ours(names: dict[str, Any]) -> bool:
    return names.get("__name__", "").partition(".")[0] in (*_OURS, "__main__")


def is_users(error: BaseException) -> bool:
    """Whether an error is a user's mistake: raised by our own code.

    A ValueError that jax or NumPy raised is a defect of ours, and its traceback is what is needed.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _is_ours(frame.f_globals)


def _launch(name: str) -> int:
    """Run the command of this name with the process's own command line."""

    def run() -> int:
        if name == "benchmark":  # with the allocator's settings of training: a step is timed as it is trained
            prepare_process()
        # Imported within the guard: a package that is not installed is a mistake like any other.
        return importlib.import_module(f"train.commands.{name}").main()

    return guard(run)


benchmark = functools.partial(_launch, "benchmark")
compare = functools.partial(_launch, "compare")
convert = functools.partial(_launch, "convert")
generate = functools.partial(_launch, "generate")
recall = functools.partial(_launch, "recall")
visualize = functools.partial(_launch, "visualize")
