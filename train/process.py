"""The allocator's settings with which a training process runs."""

from __future__ import annotations

import os
import sys

# Without these glibc returns the step's temporaries to the system after every call, and the next call pays
# for their page faults again: a fifth of the time of a small step on a CPU. Read at process start only.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
PREPARED = "ATTENTION_JAX_PREPARED"


def prepare_process() -> None:
    """Start this process anew with the allocator's settings, once, on Linux with glibc.

    Settings that the user has made stay; where all are made nothing happens.
    """
    missing = {name: value for name, value in ALLOCATOR.items() if name not in os.environ}
    if not missing or PREPARED in os.environ or not has_glibc():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, **missing, PREPARED: "1"}
    # orig_argv keeps what sys.argv has lost: -m train and the interpreter's own options.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def has_glibc() -> bool:
    """Whether this is Linux with glibc, whose allocator has these settings."""
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
