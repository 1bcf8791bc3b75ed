"""Metrics of a run: metrics.jsonl is authoritative; TensorBoard events and loss.png are made from it.

A row has `step` (updates done), then what was measured: losses in nats per scored token, `tokens` scored in
training so far, `tokens_per_second` of them, `time` (Unix seconds). Objective masked_lm scores the masked
tokens, a task the queried ones; both add val/accuracy, the share of them that have the largest logit. All
but `tokens_per_second` and `time` are bit-identical in every run of a configuration on a machine, whether or
not it was interrupted.
"""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from train.run.files import write_atomically

TIMING = ("tokens_per_second", "time")
BITS = "val/bits_per_byte"
_FLUSH_SECONDS = 5  # a thread of SummaryWriter writes the events; closing waits for it
FINAL = "val/full_loss"  # a row with this key was written after the last checkpoint


class MetricsWriter:
    """Appends rows to metrics.jsonl in `folder` and, as scalars, to TensorBoard events in tensorboard/."""

    def __init__(self, folder: Path, last_step: int):
        """Removes rows after `last_step`, the step of the checkpoint from which the run resumes."""
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= last_step and FINAL not in row]
        write_atomically(self._path, "".join(map(_line, self.rows)))
        self._file = open(self._path, "a", encoding="utf-8")
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # The events repeat the rows, so they are written anew instead of being cut.
        for stale in events.glob("events.out.tfevents.*"):
            stale.unlink()
        self._events = SummaryWriter(str(events), flush_secs=_FLUSH_SECONDS)
        for row in self.rows:
            self._add_events(row)

    def write(self, step: int, values: dict[str, float | int]) -> dict[str, Any]:
        """Append a row to metrics.jsonl, flushed when this returns. ValueError if a value is not finite."""
        row = {"step": step, **values, "time": round(time.time(), 3)}
        self._file.write(_line(row))
        self._file.flush()
        self.rows.append(row)
        self._add_events(row)
        return row

    def sync(self) -> None:
        """Wait until the rows are on disk, so that a power failure loses none from before a checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()

    def _add_events(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self._events.add_scalar(name, value, row["step"], walltime=row["time"])


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none without the file; an incomplete last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is incomplete
        try:
            row = json.loads(line)
            row["step"], row["time"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number} is not a row of metrics: correct or delete the line") from None
        rows.append(row)
    return rows


def draw_losses(rows: list[dict[str, Any]], path: Path, unit: str = "token") -> None:
    """The loss curves of `rows`, in nats per `unit`, as a PNG."""
    # Imported here: only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in (("train/loss", {"linewidth": 0.8, "alpha": 0.8}), ("val/loss", {"marker": "o"})):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, markersize=3, **style)
    axes.set(xlabel="step", ylabel=f"nats per {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
