"""`python -m train CONFIG [key.path=value ...]`: from the command line to `train.loop.train`."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

_FLAGS = ("--help", "--print-config")
_OURS = ("train", "attention_jax")

# Without these glibc returns the step's temporaries to the system after every call, and the next call pays
# for their page faults again: a fifth of the time of a small step on a CPU. Read at process start only.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_PREPARED = "ATTENTION_JAX_PREPARED"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status.

    0: done. 2: a mistake of the user, told in one line on stderr. 130: interrupted. Anything else that
    goes wrong is ours and leaves as an exception.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv), own_process=argv is None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, NotImplementedError, OSError) as error:
        if not _is_users(error):
            raise
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


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


def _run(argv: list[str], *, own_process: bool) -> int:
    if "--help" in argv or "-h" in argv:
        from train.config.help import help_text

        print(help_text(), end="")
        return 0
    path, overrides, print_only = _parse(argv)
    if own_process and not print_only:
        _prepare_process()
    # Imported late: --help and a mistyped flag need not wait for jax.
    from train import config

    run = config.load(path, overrides)
    if print_only:
        print(config.dump_yaml(run), end="")
        return 0
    import jax

    from train import loop

    jax.config.update("jax_traceback_filtering", "off")  # `_is_users` looks at the frame that raised
    return loop.train(run)


def _parse(argv: list[str]) -> tuple[str, list[str], bool]:
    """(config path, overrides, whether to print only)."""
    words = []
    for word in argv:
        if not word.startswith("-"):
            words.append(word)
        elif word not in _FLAGS:
            near = difflib.get_close_matches(word, _FLAGS, 1, 0.0)[0]
            raise ValueError(f"unknown option {word}; did you mean {near}?")
    if not words:
        raise ValueError("no configuration: python -m train CONFIG [key.path=value ...]; --help tells more")
    if "=" in words[0] and not os.path.exists(words[0]):
        raise ValueError(f"the configuration file comes first, then overrides such as {words[0]}")
    return words[0], words[1:], "--print-config" in argv


def _is_users(error: BaseException) -> bool:
    """Whether an error is a user's mistake: raised by our own code, or the operating system's refusal.

    A ValueError that jax or NumPy raised is a defect of ours, and its traceback is what is needed.
    """
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS


def _prepare_process() -> None:
    """Start this process anew with the allocator's settings, once, on Linux with glibc.

    What the user set stays; where all are set nothing happens.
    """
    missing = {name: value for name, value in _ALLOCATOR.items() if name not in os.environ}
    if not missing or _PREPARED in os.environ or not _has_glibc():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, **missing, _PREPARED: "1"}
    # orig_argv keeps what sys.argv has lost: -m train and the interpreter's own options.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _has_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
