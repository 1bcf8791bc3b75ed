"""Trains mechanisms as the same small language model and prints one table.

    python scripts/compare.py mechanisms/gqa mechanisms/gla --seeds 0 1

Without CONFIG: all of configs/mechanisms that train next-token prediction.
Configurations may differ in their mixers, positions and score and logit bounds.
Rows, steps, widths and learning rates must be equal, or there is no table.

bits:   bits per byte of the held-out text after the last step, the mean over
        seeds; over evaluation.batches batches, or over all of the text with
        evaluation.final_full. The tokens of a prefix are not scored.
state:  how many numbers the state of one row holds for so many tokens.
step:   milliseconds of a training step; decode: of a token of a row with that
        state. Both are medians of calls taken in turn.

Every run has a folder below --runs: the result of a finished run is read, and a
run that was interrupted is resumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.benchmarks.timing import interleave
from attention_jax.generation import Sampling, generate
from attention_jax.model import ModelConfig, count_params, init_state
from train import command_line
from train import config as config_lib
from train.commands import trials
from train.commands.types import Configs, Counts, Folder, Integer, Integers, Overrides, Positional
from train.config import shipped
from train.data.prepare import prepare
from train.run.metrics import BITS
from train.run.restore import TrainedRun, fresh_state, load_run
from train.step import make_train_step

# What a table compares may differ in these keys, and in what changes no figure.
_COMPARED = ("model.blocks", "model.mixers", "model.max_positions", "model.sinusoidal", "model.logit_softcap")
_NO_MATTER = ("run_dir", "evaluation.sample_prompt", "evaluation.sample_tokens")
_STEPS, _TOKENS = 4, 64  # of one timed call


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says of one mechanism; times in milliseconds, None where not measured."""

    name: str
    parameters: int
    bits: list[float]  # per seed
    numbers: dict[int, int | None]  # of state, by capacity; None: longer than the model's limit
    step: float | None = None
    decode: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    configs: Positional[Configs] = ()  #: files or names; none: those of configs/mechanisms
    seeds: Integers = (0,)  #: seeds to average over
    capacities: Counts = (256, 4096)  #: tokens that a state has room for
    rounds: Integer = 5  #: rounds of timing; 0 times nothing
    runs: Folder = Path("runs/compare")  #: where the run folders are
    set: Overrides = ()  #: overrides for every run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> None:
    configs = [shipped.find(name) for name in options.configs] or _next_token(options.set)
    check_equal_terms(configs, options.set)
    rows = [_trained(path, options) for path in configs]
    if options.rounds:
        rows = _timed(rows, configs, options)
    print("\n".join(table(rows, options.capacities)))


def check_equal_terms(configs: Sequence[Path], overrides: Sequence[str]) -> None:
    """ValueError where configs differ in more than the mechanism, or cannot be scored in bits per byte."""
    first, terms = None, {}
    for path in configs:
        run = config_lib.load(path, overrides)
        if run.objective != "causal_lm" or run.data.task is not None:
            what = run.objective if run.data.task is None else f"data.task {run.data.task.kind}"
            raise ValueError(f"{path} trains {what}, which is not scored in bits per byte of text: remove it")
        if run.data.tokenizer != "bytes" and not run.evaluation.final_full:
            raise ValueError(f"{path}: evaluation.final_full must be true for tokens that are not bytes")
        own = dict(_flat(config_lib.to_dict(run)))
        first, terms = (path, own) if first is None else (first, terms)
        for key in own | terms:
            if own.get(key) != terms.get(key):
                differs = f"{key} is {own.get(key)}, not {terms.get(key)}"
                raise ValueError(f"{path} is not on equal terms with {first}: {differs}")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys and values that must be the same."""
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif name not in _COMPARED + _NO_MATTER:
            yield name, value


def _next_token(overrides: Sequence[str]) -> list[Path]:
    """The mechanisms' configs of the objective causal_lm."""
    return [
        path
        for path in trials.all_of("mechanisms")
        if config_lib.load(path, overrides).objective == "causal_lm"
    ]


def state_numbers(model: ModelConfig, capacity: int) -> int | None:
    """How many numbers a row's state holds with room for `capacity` tokens, positions not counted.

    None: more tokens than the model takes.
    """
    if model.limit is not None and capacity > model.limit[0]:
        return None
    state = jax.eval_shape(lambda: init_state(model, 1, capacity))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _folder(path: Path, seed: int, options: Options) -> Path:
    return options.runs / f"{path.stem}-seed{seed}"


def _trained(path: Path, options: Options) -> Row:
    bits = []
    for seed in options.seeds:
        overrides = [*options.set, f"seed={seed}", f"data.shuffle_seed={seed}"]
        result = trials.train(path, overrides, _folder(path, seed, options))
        bits.append(result.get(BITS, result["val/loss"] / math.log(2)))
    run = load_run(_folder(path, options.seeds[0], options))
    numbers = {capacity: state_numbers(run.model, capacity) for capacity in options.capacities}
    return Row(path.stem, count_params(run.params), bits, numbers)


def _timed(rows: list[Row], configs: Sequence[Path], options: Options) -> list[Row]:
    """The rows with times: every round calls each model's step and decoding once."""
    calls: dict[tuple[str, int | None], Callable[[], Any]] = {}
    for row, path in zip(rows, configs, strict=True):
        folder = _folder(path, options.seeds[0], options)
        run = load_run(folder)
        calls[row.name, None] = _step(run, folder)
        for capacity, numbers in row.numbers.items():
            if numbers is not None and capacity > _TOKENS:
                calls[row.name, capacity] = _decoding(run, capacity)
    times = {name: float(np.median(ms)) for name, ms in interleave(calls, options.rounds).items()}
    return [
        dataclasses.replace(
            row,
            step=times[row.name, None] / _STEPS,
            decode={c: times[row.name, c] / _TOKENS for c in row.numbers if (row.name, c) in times},
        )
        for row in rows
    ]


def _step(run: TrainedRun, folder: Path) -> Callable[[], Any]:
    """A few training steps on the run's first batch."""
    state = fresh_state(run.config, run.model, jax.random.key(0))
    train_step = make_train_step(run.model, run.config.optimizer, run.config.steps)
    batch = prepare(run.config.data, folder, run.config.objective).train_batch(0)
    held = [state["params"], state["opt_state"]]  # given away by every step

    def steps():
        for _ in range(_STEPS):
            held[0], held[1], metrics = train_step(*held, batch, np.int32(0), jax.random.key(0))
        return jax.block_until_ready(metrics)

    return steps


def _decoding(run: TrainedRun, capacity: int) -> Callable[[], Any]:
    """Some greedy tokens with a state for `capacity` tokens."""

    def tokens():
        return generate(
            run.model, run.params, [[1]], max_new_tokens=_TOKENS, sampling=Sampling(0), capacity=capacity
        )

    return tokens


def table(rows: Sequence[Row], capacities: Sequence[int]) -> Iterator[str]:
    """Rows of Markdown, the fewest bits first."""
    heads = ["mechanism", "parameters", "bits", *(f"state {c}" for c in capacities)]
    timed = any(row.step is not None for row in rows)
    if timed:
        heads += ["step, ms", *(f"decode {c}, ms" for c in capacities)]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in sorted(rows, key=lambda row: sum(row.bits) / len(row.bits)):
        cells = [row.name, f"{row.parameters:,}", trials.mean_and_range(row.bits)]
        cells += ["-" if row.numbers[c] is None else f"{row.numbers[c]:,}" for c in capacities]
        if timed:
            decode = [f"{row.decode[c]:.2f}" if c in row.decode else "-" for c in capacities]
            cells += [f"{row.step:.0f}", *decode]
        yield f"| {' | '.join(cells)} |"
