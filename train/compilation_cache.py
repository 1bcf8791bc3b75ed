"""Compiled programs kept on disk, so that a command's second run compiles nothing.

The folder is `attention_jax/compiled` in `$XDG_CACHE_HOME` or `~/.cache`. It has a subfolder for each
combination of the versions of jax and jaxlib and the CPU's instruction set, since XLA compiles for the
machine it runs on and JAX's keys do not name that machine. `ATTENTION_JAX_COMPILATION_CACHE` is another
folder, or `off`. Where the user has set JAX's own variables, `JAX_COMPILATION_CACHE_DIR` or
`JAX_ENABLE_COMPILATION_CACHE`, those hold.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

from train.processor import first_core

VARIABLE = "ATTENTION_JAX_COMPILATION_CACHE"
#: When the folder holds more bytes, entries not used for the longest time are deleted at the next start.
MAX_BYTES = 1 << 30
_OFF = ("off", "0", "false", "no")


def enable() -> None:
    """Let this process read and write compiled programs. Where that is impossible, one line says so."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in _OFF:
        return
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    try:
        root = Path(chosen) if chosen else default_folder()
        folder = root / machine()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
        prune(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        print(
            f"compiled programs are not kept: {error}; {VARIABLE} names a folder or is off", file=sys.stderr
        )
        return
    # A disk that fills up later is no reason to stop, or for a warning per program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    reset_cache()  # JAX looks for a folder once, when it compiles for the first time


def default_folder() -> Path:
    """The folder in the user's cache folder. XDG: a relative path in the variable counts as none."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "attention_jax" / "compiled"


def machine() -> str:
    """What a compiled program depends on beside itself: the versions, and the CPU's instruction set."""
    import jax
    import jaxlib

    digest = hashlib.sha256(_instruction_set().encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform.machine()}-{digest}"


def _instruction_set() -> str:
    """The features of the first core as Linux lists them; elsewhere what Python knows of the processor."""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    core = first_core()
    parts = {name: core[name] for name in core if name in names}
    return repr(parts) if parts else platform.processor()


def prune(root: Path, limit: int = MAX_BYTES) -> None:
    """Delete the entries that were last used the longest ago until those left take at most `limit` bytes."""
    entries = []
    for path in root.glob("jax-*/*"):
        try:
            found = path.stat()
        except FileNotFoundError:  # another process prunes as well
            continue
        if path.is_file():
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
