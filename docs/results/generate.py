"""Writes the table of every page of this folder from the JSON file of the same name.

    python docs/results/generate.py

The text above the line that says so is written by hand; what stands below it is generated.
`tests/test_docs.py` compares the committed pages with what this program makes of the JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
Row = dict[str, Any]
Cell = Callable[[Row], str]


def field(key: str, form: str = "") -> Cell:
    """The cell of a key; empty where a row lacks it."""
    return lambda row: format(row[key], form) if key in row else ""


def bodies(key: str) -> Cell:
    """The cell of a kernel's bodies: full blocks, then partial ones where they have code of their own."""
    return lambda row: " / ".join(str(body[key]) for body in row["bodies"])


def timed(T: int) -> Cell:
    """The cell of a length: milliseconds and temporaries."""
    return lambda row: f"{row['ms'][str(T)]} ({row['temporary_mb'][str(T)]} MB)"


def mask(row: Row) -> str:
    """The mask as code, without the arguments' names."""
    return f"`{row['mask'].replace('window=', '').replace(', right=0', '')}`"


def timing(way: str, key: str, divisor: float, form: str) -> Cell:
    """The cell of a time or rate of generation, `way` cached or uncached."""
    return lambda row: format(row[way][key] / divisor, form)


def cache_megabytes(key: str) -> Cell:
    """The cell of a number of bytes."""
    return lambda row: f"{row[key] / 1e6:.2f} MB"


def megabytes(row: Row) -> str:
    """The compiler's temporaries; empty where it plans none."""
    return f"{row['temporary_bytes'] / 1e6:.1f} MB" if row["temporary_bytes"] else ""


_TILES: dict[str, Cell] = {
    "kernel": field("kernel"),
    "block": field("block"),
    "stages": field("stages"),
    "warpgroups": field("warpgroups"),
    "registers": field("most_registers"),
    "shared memory": field("shared", ","),
    "spills": field("spills", ","),
}
# Page -> heading -> cell of a row.
TABLES: dict[str, dict[str, Cell]] = {
    "cpu-attention": {
        "mask": mask,
        "T": field("T"),
        "head width": field("H"),
        "direction": field("what"),
        "implementation": field("name"),
        "ms": field("median_ms", ".1f"),
        "quartiles": lambda row: " to ".join(f"{ms:.1f}" for ms in row["quartiles_ms"]),
        "/ torch": field("ratio_to_torch", ".2f"),
        "temporaries": megabytes,
    },
    "cpu-linear": {
        "engine": field("kind"),
        "direction": field("what"),
        "1k": timed(1024),
        "4k": timed(4096),
        "16k": timed(16384),
        "64k": timed(65536),
        "time ~ T^": lambda row: f"{row['exponent']['time']:.2f}",
        "memory ~ T^": lambda row: f"{row['exponent']['memory']:.2f}",
    },
    "kv-cache": {
        "tokens": field("tokens"),
        "mechanism": field("mechanism"),
        "step, cache": timing("cached", "step_ms", 1, ".2f"),
        "total, cache": timing("cached", "total_ms", 1e3, ".3f"),
        "tokens/s, cache": timing("cached", "tokens_per_s", 1, ".0f"),
        "step, none": timing("uncached", "step_ms", 1, ".2f"),
        "total, none": timing("uncached", "total_ms", 1e3, ".3f"),
        "tokens/s, none": timing("uncached", "tokens_per_s", 1, ".1f"),
        "ratio, step": field("step_ratio", ".1f"),
        "ratio, total": field("total_ratio", ".1f"),
        "cache": cache_megabytes("cache_bytes"),
        "formula": cache_megabytes("formula_bytes"),
        "parameters": field("parameters", ","),
    },
    "mechanisms": {
        "mechanism": field("mechanism"),
        "parameters": field("parameters", ","),
        "bits per byte": field("bits", ".3f"),
        "state, 256 tokens": field("state_256", ","),
        "state, 4096 tokens": field("state_4096", ","),
    },
    "h100-compiled": {"width": field("width"), "mask": mask} | _TILES,
    "h100-kernels": {"configuration": field("name")} | _TILES | {"wgmma": field("HGMMA")},
    "h100-steps": {
        "kernel": field("kernel"),
        "loop": field("loop"),
        "tensor": field("tensor"),
        "issued": field("issued"),
        "issued, jax": field("jax_issued"),
        "alone": field("alone"),
        "alone, jax": field("jax_alone"),
        "bare": field("bare"),
        "bare, jax": field("jax_bare"),
        "together": field("together"),
        "together, jax": field("jax_together"),
    },
    "tpu-blocks": {
        "chip": field("topology"),
        "head width": field("width"),
        "direction": field("direction"),
        "kernel": field("system"),
        "bundles": bodies("bundles"),
        "cycles": bodies("cycles"),
        "spills": bodies("spills"),
    },
}


def page(name: str) -> str:
    """The text of `name`.md with the rows of `name`.json below its generated line."""
    line = f"<!-- The rest is generated from {name}.json by `python docs/results/generate.py`. -->\n"
    written, found, _ = (FOLDER / f"{name}.md").read_text("utf-8").partition(line)
    if not found:
        raise ValueError(f"docs/results/{name}.md lacks the line {line.strip()}")
    data = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    cells = TABLES[name].values()
    rows = [
        list(TABLES[name]),
        ["---"] * len(cells),
        *([cell(row) for cell in cells] for row in data["rows"]),
    ]
    machine = ", ".join(re.sub(r"\s+", " ", f"{key} {value}") for key, value in data["machine"].items())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{written}{line}\nData: [{name}.json]({name}.json). Measured with: {machine}.\n\n{table}\n"


if __name__ == "__main__":
    for name in TABLES:
        (FOLDER / f"{name}.md").write_text(page(name), "utf-8")
