"""`python -m train CONFIG [key.path=value ...]`: from the command line to `train.loop.train`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from train.command_line import UsageError, guard
from train.process import prepare_process

_FLAGS = ("--help", "--print-config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status.

    0: done. 2: a mistake of the user, described in one line on stderr. 130: interrupted. Any other failure
    is a defect and leaves as an exception.
    """
    return guard(lambda: _run(sys.argv[1:] if argv is None else list(argv), own_process=argv is None))


def leave(status: int) -> NoReturn:
    """End the process with this exit status.

    After a failure or an interrupt a step may still run on the device, and jaxlib's own end of life can
    then crash, which would replace the status: so nothing is torn down. Files are closed by now.
    """
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def entry() -> NoReturn:
    """`attention-jax-train`: the same as `python -m train`."""
    leave(main())


def _run(argv: list[str], *, own_process: bool) -> int:
    if "--help" in argv or "-h" in argv:
        from train.config.help import help_text

        print(help_text(), end="")
        return 0
    path, overrides, print_only = _parse(argv)
    if own_process and not print_only:
        prepare_process()
    # Imported late: a mistyped flag need not wait for jax.
    from train import config

    run = config.load(path, overrides)
    if print_only:
        print(config.dump_yaml(run), end="")
        return 0
    import jax

    from train import compilation_cache, loop

    if own_process:
        compilation_cache.enable()

    jax.config.update("jax_traceback_filtering", "off")  # `guard` looks at the frame that raised
    return loop.train(run)


def _parse(argv: list[str]) -> tuple[str, list[str], bool]:
    """(config path or name, overrides, whether to print only)."""
    words = []
    for word in argv:
        if not word.startswith("-"):
            words.append(word)
        elif word not in _FLAGS:
            near = difflib.get_close_matches(word, _FLAGS, 1, 0.0)[0]
            raise UsageError(f"unknown option {word}; did you mean {near}?")
    if not words:
        raise UsageError("no configuration given: python -m train CONFIG [key.path=value ...]; see --help")
    if "=" in words[0] and not os.path.exists(words[0]):
        raise UsageError(f"the configuration comes first, then overrides such as {words[0]}")
    return words[0], words[1:], "--print-config" in argv
