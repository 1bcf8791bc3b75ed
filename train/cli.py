"""`python -m train CONFIG [key.path=value ...]`: from the command line to `train.loop.train`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from train.command_line import UsageError, guard
from train.process import prepare_process

_FLAGS = ("--help", "--print-config", "--start-over", "--accept-environment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status.

    0: done. Other statuses, each with one line on stderr: see `train.command_line.guard`. A run that SIGINT,
    SIGTERM or SIGHUP ends has 128 and the number of the signal. A defect leaves as an exception.
    """
    return guard(lambda: _run(sys.argv[1:] if argv is None else list(argv), own_process=argv is None))


def leave(status: int) -> NoReturn:
    """End the process with this exit status.

    After a failure or an interrupt a step may still run on the device, and jaxlib's own end of life can
    then crash, which would replace the status: so nothing is torn down. Files are closed by now.
    """
    if status == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def entry() -> NoReturn:
    """`attention-jax-train`: the same as `python -m train`."""
    leave(main())


def _run(argv: list[str], *, own_process: bool) -> int:
    if "--help" in argv or "-h" in argv:
        from train.config.help import help_text

        print(help_text(), end="")
        return 0
    path, overrides = _parse(argv)
    print_only = "--print-config" in argv
    if own_process and not print_only:
        prepare_process()
    # Imported late: a mistyped flag need not wait for jax.
    from train import config

    run = config.load(path, overrides)
    if run.init_from is not None:  # this loads jax
        from train.run.initial import resolved

        run = resolved(run)
    if print_only:
        print(config.dump_yaml(run), end="")
        return 0
    import jax

    from train import compilation_cache, loop
    from train.memory import check_memory

    if own_process:
        compilation_cache.enable()

    check_memory(run)
    jax.config.update("jax_traceback_filtering", "off")  # `guard` looks at the frame that raised
    options = {name.replace("-", "_"): f"--{name}" in argv for name in ("start-over", "accept-environment")}
    return loop.train(run, **options)


def _parse(argv: list[str]) -> tuple[str, list[str]]:
    """(config path or name, overrides)."""
    words = []
    for word in argv:
        if not word.startswith("-"):
            words.append(word)
        elif word not in _FLAGS:
            from attention_jax.hints import near  # this loads jax

            meant = near(word, _FLAGS)
            more = f"did you mean {meant}?" if meant else f"there are {', '.join(_FLAGS)}"
            raise UsageError(f"unknown option {word}; {more}")
    if not words:
        raise UsageError("no configuration given: python -m train CONFIG [key.path=value ...]; see --help")
    if "=" in words[0] and not os.path.exists(words[0]):
        raise UsageError(f"the configuration comes first, then overrides such as {words[0]}")
    return words[0], words[1:]
