"""The tables of docs/parity.md from docs/results/parity.json: `python -m tests.parity.table`.

With --write it puts them into the page, between its markers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.parity.not_expressible import NOT_EXPRESSIBLE

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs/results/parity.json", ROOT / "docs/parity.md"
MODELS = "transformers model"
BEGIN, END = "<!-- tables: python -m tests.parity.table --write -->\n", "<!-- end of tables -->\n"


def _number(x: float | None, digits: int = 1) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.{digits}e}".replace("e-0", "e-")


def _bounds(row: dict) -> str:
    return " / ".join(_number(bound, 0) for bound in row["bounds"])


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _layers(rows: list[dict]) -> str:
    header = ("layer", "written by", "forward", "decoded", "input gradient", "weight gradients", "allowed")
    kinds = ("forward", "decoded", "input gradient", "weight gradients")
    return _rows(header, [
        (row["name"], row["source"], *(_number(row["errors"].get(kind)) for kind in kinds), _bounds(row))
        for row in rows
    ])  # fmt: skip


def _ops(rows: list[dict]) -> str:
    """One line for each function; of several implementations of ours, the largest error."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"].split(" (")[0], []).append(row)
    lines = []
    for name, same in by_name.items():
        implementations = ", ".join(sorted(row["name"].split("(")[1].rstrip(")") for row in same))
        worst = [max(row["errors"][kind] for row in same) for kind in ("forward", "input gradients")]
        lines.append((name, f"`{same[0]['op']}`: {implementations}", *map(_number, worst), _bounds(same[0])))
    return _rows(("function of fla", "ours", "forward", "input gradients", "allowed"), lines)


def _models(rows: list[dict]) -> str:
    """One line for each model, from the rows of its comparisons."""
    kinds = ("logits", "gradients", "hidden states")
    kinds = ("float32 logits", "float32 gradients", *(f"float64 {kind}" for kind in kinds))
    errors: dict[str, dict] = {}
    for row in rows:
        errors.setdefault(row["name"], {}).update(row["errors"])
    lines = [(name, *(_number(found.get(kind)) for kind in kinds)) for name, found in errors.items()]
    return "### Models\n\n" + _rows(("model", *kinds), lines)


def tables(results: dict) -> str:
    """The page's generated part, Markdown."""
    rows = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    layers = [row for row in rows if "decoded" in row["errors"] or "weight gradients" in row["errors"]]
    ropes = [row for row in rows if "frequencies" in row["errors"]]
    worst = max(row["errors"]["frequencies"] for row in ropes)
    choice = next(row for row in rows if row["name"] == "nsa-choice")["errors"]["rows chosen differently"]
    return "\n".join([
        f"Measured with {versions}.\n",
        "### Layers\n",
        _layers(layers),
        "### Ops\n",
        _ops([row for row in rows if "op" in row]),
        f"Blocks that NSA chooses: {_number(choice)} of the rows differ from fla's choice.\n",
        *([_models(models)] if (models := [row for row in rows if row["source"] == MODELS]) else []),
        "### RoPE scalings\n",
        f"{len(ropes)} cases of linear, dynamic NTK, YaRN, Llama 3 and LongRoPE scalings: frequencies differ "
        f"by at most {_number(worst)}, attention factors by "
        f"{_number(max(row['errors']['attention factor'] for row in ropes))}.\n",
        "### Not expressible\n",
        _rows(("what", "why"), [(name, reason) for name, reason in NOT_EXPRESSIBLE.items()]),
    ])  # fmt: skip


def page(text: str, generated: str) -> str:
    """The page with its generated part replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


def main() -> None:
    generated = tables(json.loads(RESULTS.read_text("utf-8")))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text("utf-8"), generated), "utf-8")
    else:
        print(generated)


if __name__ == "__main__":
    main()
