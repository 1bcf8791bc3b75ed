"""Multi-query associative recall: trains every mixer of configs/mqar and prints a table of accuracies.

python scripts/recall.py [CONFIG ...] [--settings 64x8 128x16] [--rates 1e-3 3e-3] [--seeds 0 1] [--set K=V]

A setting TxD has rows of T tokens and D pairs; the paper's are 64x4, 128x8, 256x16 and 512x64, with --set
data.task.vocab_size=8192. A cell holds the accuracy on the held-out rows at the best learning rate, the mean
over seeds. Every run has a folder below --runs: a finished one is read, one that was cut short goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_jax.mixers import MixerConfig
from scripts import trials
from train import config as config_lib


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status: 0, or 2 for a user's mistake told in one line on stderr."""
    args = _parser().parse_args(argv)
    configs = args.configs or sorted((trials.ROOT / "configs" / "mqar").glob("*.yaml"))
    all_trials = [
        Trial(Path(config), setting, rate, seed, tuple(args.set))
        for config, setting, rate, seed in itertools.product(
            configs, args.settings, args.rates or [None], args.seeds
        )
    ]
    try:
        for trial in all_trials:  # all of them, before the first hour
            config_lib.load(trial.config, trial.overrides)
        results = {trial: _run(trial, args.runs) for trial in all_trials}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(results)))
    return 0


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
        floats = [state_floats(run.model.mixers[-1], run.model.d_model, T) for T, _ in settings]
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


def _setting(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting such as 64x8: tokens a row, x, pairs")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="default: all of configs/mqar")
    parser.add_argument("--settings", nargs="+", type=_setting, default=[(64, 8), (128, 16)], metavar="TxD")
    parser.add_argument("--rates", nargs="+", help="learning rates to try; default: the config's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"), help="where run folders go")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
