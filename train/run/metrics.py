"""Metrics of a run: metrics.jsonl is authoritative; TensorBoard events and loss.png are made from it.

A row has `step` (steps done), then what was measured: losses in nats per scored token, `tokens` scored in
training so far, `tokens_per_second` of them, `time` (Unix seconds). After the first step that was skipped,
because its loss or gradient was not finite, rows have `skipped_steps`, how many there were; the row of such
a step itself has no train/loss and no grad_norm. Objective masked_lm scores the masked
tokens, a task the queried ones; both add val/accuracy, the share of them that have the largest logit. All
but `tokens_per_second` and `time` are bit-identical in every run of a configuration on a machine, whether or
not it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from train.run.failure import RunError
from train.run.files import same_file, write_atomically, writing

TIMING = ("tokens_per_second", "time")
BITS = "val/bits_per_byte"
FINAL = "val/full_loss"  # a row with this key was written after the last checkpoint


class MetricsWriter:
    """Appends rows to metrics.jsonl in `folder` and, as scalars, to TensorBoard events in tensorboard/."""

    def __init__(self, folder: Path, last_step: int):
        """Removes rows after `last_step`, the step of the checkpoint from which the run resumes."""
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= last_step and FINAL not in row]
        write_atomically(self._path, "".join(map(_line, self.rows)))
        self._file = _Appended(self._path)
        self._events = _Events(folder / "tensorboard")
        self._events.write(self.rows)

    def write(self, step: int, values: dict[str, float | int]) -> dict[str, Any]:
        """Append a row, which is with the operating system when this returns.

        ValueError if a value is not finite. OSError names the file, in which no part of the row is left.
        """
        row = {"step": step, **values, "time": round(time.time(), 3)}
        self._file.append(_line(row).encode())
        self.rows.append(row)
        self._events.write([row])
        return row

    def sync(self) -> None:
        """Wait until the rows are on disk, so that a power failure loses none from before a checkpoint."""
        self._file.sync()

    def check(self) -> None:
        """RunError if metrics.jsonl is no longer the file that rows are written to."""
        if not self._file.in_place():
            raise RunError(
                f"{self._path} was removed or replaced during training: the run stops, because its rows are"
                " lost; the same command goes on from the newest checkpoint that is left"
            )

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()


class _Events:
    """TensorBoard events of rows, written by this thread: `SummaryWriter` writes in one of its own, whose
    failure would be lost.

    Each event is a TFRecord: its length, its bytes, and the CRC-32C of either.
    """

    def __init__(self, folder: Path):
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # The events repeat the rows, so they are written anew instead of being cut.
            for stale in folder.glob("events.out.tfevents.*"):
                stale.unlink()
        now = time.time()
        self._file = _Appended(folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}")
        self._file.append(_record(Event(wall_time=now, file_version="brain.Event:2")))

    def write(self, rows: list[dict[str, Any]]) -> None:
        events = [
            Event(wall_time=row["time"], step=row["step"], summary=scalar(name, value))
            for row in rows
            for name, value in row.items()
            if name not in ("step", "time")
        ]
        self._file.append(b"".join(map(_record, events)))

    def close(self) -> None:
        self._file.close()


def _record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)


class _Appended:
    """A file to which whole pieces are appended, unbuffered; OSError names it."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0)

    def append(self, piece: bytes) -> None:
        """Append the piece; where that fails nothing of it stays."""
        with writing(self.path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                while piece:
                    piece = piece[self._file.write(piece) :]
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    self._file.truncate(before)
                raise

    def sync(self) -> None:
        """Wait until the pieces are on the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def in_place(self) -> bool:
        """Whether the file still has its name."""
        return same_file(self.path, self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
