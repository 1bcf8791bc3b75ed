"""What a run measures: metrics.jsonl is the truth; TensorBoard events and the picture are made from it.

A row has `step` (updates done), then what was measured: losses in nats per scored token, `tokens` scored in
training so far, `tokens_per_second` of them, `time` (Unix seconds). Objective masked_lm scores the masked
tokens, a task the queried ones; both add val/accuracy, the share of them that are the likeliest of all. All
but `tokens_per_second` and `time` are the same bits in every run of a config on a machine, interrupted or
not.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from train.run.files import write_atomically

TIMING = ("tokens_per_second", "time")
BITS = "val/bits_per_byte"
FINAL = "val/full_loss"  # a row that has it was written after the last checkpoint


class MetricsWriter:
    """Appends rows to metrics.jsonl in `folder` and, as scalars, to TensorBoard events in tensorboard/."""

    def __init__(self, folder: Path, last_step: int):
        """Cuts what was written after `last_step`, the step of the checkpoint the run goes on from."""
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= last_step and FINAL not in row]
        write_atomically(self._path, "".join(map(_line, self.rows)))
        self._file = open(self._path, "a", encoding="utf-8")
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # The events hold nothing the rows do not, so they are written anew instead of being cut.
        for stale in events.glob("events.out.tfevents.*"):
            stale.unlink()
        self._events = EventsWriter(str(events / "events"))
        for row in self.rows:
            self._add_events(row)
        self._events.flush()

    def write(self, step: int, values: dict[str, float | int]) -> dict[str, Any]:
        """Append a row; it has left the process when this returns. ValueError if a value is not finite."""
        row = {"step": step, **values, "time": round(time.time(), 3)}
        self._file.write(_line(row))
        self._file.flush()
        self.rows.append(row)
        self._add_events(row)
        self._events.flush()
        return row

    def sync(self) -> None:
        """Wait until the rows are on the disk: a power failure then takes none from before a checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()

    def _add_events(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                event = Event(step=row["step"], wall_time=row["time"])
                event.summary.CopyFrom(summary.scalar(name, value))
                self._events.write_event(event)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none if there is no file; a last line that was cut short is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            row = json.loads(line)
            row["step"], row["time"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number} is no row of metrics: mend or delete the line") from None
        rows.append(row)
    return rows


def draw_losses(rows: list[dict[str, Any]], path: Path, unit: str = "token") -> None:
    """The loss curves of `rows`, in nats per `unit`, as a PNG."""
    # Only here: a run that is not drawn need not import it.
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
