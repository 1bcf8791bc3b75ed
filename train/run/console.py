"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.run.metrics import BITS, FINAL
from train.streams import Lasting, printable


class Console:
    """`with Console(steps, done, file) as console:` shows steps done + 1 ... steps; `unit` is scored."""

    def __init__(self, steps: int, done: int, file: Lasting | TextIO, unit: str = "token"):
        self._file = file
        self._steps = steps
        self._unit = unit
        self._bar: Progress | None = None
        if self._file.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} " + f"{unit}s/s"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._file, highlight=False, markup=False),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Console:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Report a completed step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=tokens_per_second)

    def row(self, row: dict[str, Any]) -> None:
        """Print a row of metrics.jsonl; on a terminal only with a held-out loss, the bar shows the rest."""
        if self._bar is None or "val/loss" in row:
            names = [name for name in ("train/loss", "val/loss", "val/accuracy") if name in row]
            losses = "  ".join(f"{name} {row[name]:.4f}" for name in names) or "skipped"
            speed = row["tokens_per_second"]
            self.line(f"step {row['step']}/{self._steps}  {losses}  {speed:,.0f} {self._unit}s/s")

    def line(self, text: str) -> None:
        """Print a line; control characters, which a model may generate, are escaped."""
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)


def print_result(path: Path, result: dict[str, Any], unit: str, file: Lasting | TextIO) -> None:
    """Print the last sample and the figures of a finished run's result.json."""
    if "sample" in result:
        print(f"--- sample\n{printable(result['sample'])}\n---", file=file)
    names = ("val/loss", "val/accuracy", FINAL, "val/full_accuracy", BITS)
    figures = "  ".join(f"{name} {result[name]:.4f}" for name in names if name in result)
    if "val/accuracy" in result:
        figures += f"  (nats per {unit}; share of {unit}s predicted correctly)"
    print(f"{path}: step {result['step']}  {figures}", file=file, flush=True)
