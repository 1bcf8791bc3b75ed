"""What the operating system says about the processor, on which compiled programs and sums depend."""

from __future__ import annotations

from pathlib import Path


def first_core() -> dict[str, str]:
    """The entries of the first core in /proc/cpuinfo, such as "flags"; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
