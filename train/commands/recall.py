"""Multi-query associative recall: trains mixers on it and prints their accuracies.

    python scripts/recall.py --settings 64x8 128x16 --rates 1e-3 3e-3

A setting TxD has rows of T tokens and D pairs. The paper's settings are 64x4,
128x8, 256x16 and 512x64, with --set data.task.vocab_size=8192. The table holds
the accuracy on the held-out rows at the best learning rate, the mean over
seeds. Every run has a folder below --runs: the result of a finished run is
read, and a run that was interrupted is resumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp

from attention_jax.mixers import MixerConfig
from train import command_line
from train import config as config_lib
from train.commands import trials
from train.commands.types import Configs, Folder, Integers, Overrides, Positional, many
from train.config import shipped


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a config at a setting, a learning rate (None: its own) and a seed."""

    config: Path
    setting: tuple[int, int]
    rate: str | None
    seed: int
    more: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The run folder's name."""
        T, D = self.setting
        rate = "" if self.rate is None else f"-rate{self.rate}"
        return f"{self.config.stem}-{T}x{D}{rate}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What the trial changes in its config."""
        T, D = self.setting
        changes = [f"data.sequence_length={T}", f"data.task.pairs={D}", f"seed={self.seed}"]
        changes.append(f"data.shuffle_seed={self.seed}")
        if self.rate is not None:
            changes.append(f"optimizer.learning_rate={self.rate}")
        return [*changes, *self.more]


def _setting(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"must be tokens a row, x, pairs, such as 64x8, got {text}")
    return int(match[1]), int(match[2])


Settings = Annotated[tuple[tuple[int, int], ...], many("TxD", _setting, "{0[0]}x{0[1]}".format)]
Rates = Annotated[tuple[str, ...], many("RATE", str)]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    configs: Positional[Configs] = ()  #: files or names; none: all of configs/mqar
    settings: Settings = ((64, 8), (128, 16))  #: tokens a row, and key-value pairs
    rates: Rates = ()  #: learning rates to try; none: the configuration's own
    seeds: Integers = (0,)  #: seeds to average over
    runs: Folder = Path("runs/recall")  #: where the run folders are
    set: Overrides = ()  #: overrides for every run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> None:
    configs = [shipped.find(name) for name in options.configs] or trials.all_of("mqar")
    all_trials = [
        Trial(config, setting, rate, seed, options.set)
        for config, setting, rate, seed in itertools.product(
            configs, options.settings, options.rates or [None], options.seeds
        )
    ]
    for trial in all_trials:  # all of them, before the first hour
        config_lib.load(trial.config, trial.overrides)
    results = {trial: _run(trial, options.runs) for trial in all_trials}
    print("\n".join(table(results)))


def table(accuracies: dict[Trial, float]) -> Iterator[str]:
    """Rows of Markdown, a mixer each: its state, then the accuracy at each setting and the rate it is of."""
    settings = list(dict.fromkeys(trial.setting for trial in accuracies))
    heads = [f"T {T}, {D} pairs" for T, D in settings]
    yield f"| mixer | floats of state | {' | '.join(heads)} |"
    yield "|---|---|" + "---|" * len(heads)
    for config in dict.fromkeys(trial.config for trial in accuracies):
        own = {trial: value for trial, value in accuracies.items() if trial.config == config}
        cells = [_cell({t: v for t, v in own.items() if t.setting == setting}) for setting in settings]
        run = config_lib.load(config)
        floats = [state_floats(run.model.named_mixers[-1][1], run.model.d_model, T) for T, _ in settings]
        states = " / ".join(f"{number:,}" for number in dict.fromkeys(floats))
        yield f"| {config.stem} | {states} | {' | '.join(cells)} |"


def state_floats(mixer: MixerConfig, d_model: int, capacity: int) -> int:
    """How many numbers a row's state of this mixer holds after `capacity` tokens, positions not counted."""

    def state():
        return mixer.init_state(d_model, 1, capacity)

    leaves = jax.tree.leaves(jax.eval_shape(state))
    return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


def _cell(accuracies: dict[Trial, float]) -> str:
    """The mean over seeds at the best rate, the range if there are several seeds, and the rate."""
    by_rate: dict[str | None, list[float]] = {}
    for trial, accuracy in accuracies.items():
        by_rate.setdefault(trial.rate, []).append(accuracy)
    rate, values = max(by_rate.items(), key=lambda item: sum(item[1]) / len(item[1]))
    return trials.mean_and_range(values) + (f" ({rate})" if len(by_rate) > 1 else "")


def _run(trial: Trial, runs: Path) -> float:
    """The accuracy on all held-out rows."""
    result = trials.train(trial.config, trial.overrides, runs / trial.folder)
    if "val/full_accuracy" not in result:
        raise ValueError(f"{trial.config}: no accuracy; it needs data.task and evaluation.final_full: true")
    return result["val/full_accuracy"]
