"""The training loop: data -> train_step -> metrics, evaluation, samples, checkpoints.

At step n the order is: train, evaluate, write the row, sample, save. So everything up to step n is on disk
before its checkpoint, and a run that resumes from it first removes later rows.

A signal that ends the run (`train.signals`) is obeyed between two steps, which saves a checkpoint. It is also
obeyed in an evaluation: the checkpoint then has the step's measurements as `due` in its info.json, and
a run that resumes from it evaluates first.

Where the loss or the gradient of a step is not finite, the jitted step has changed nothing. Such a step is
reported and counted as skipped, and more than optimizer.max_consecutive_skips of them in a row end the run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.model import count_params
from train import samples
from train.config.schema import RunConfig
from train.data.masking import vocabulary_size
from train.objective import check_ids
from train.run import initial
from train.run.checkpoint import Checkpoints
from train.run.console import Console, print_result
from train.run.environment import record
from train.run.failure import NonFiniteError
from train.run.files import write_atomically
from train.run.folder import RunFolder, saved_keys
from train.run.metrics import BITS, MetricsWriter, draw_losses
from train.run.restore import abstract_state, with_vocabulary
from train.signals import NOTHING_NEW, Signals, Stopped
from train.step import Batch, make_eval_step, make_fill_in, make_train_step
from train.streams import Lasting


class Scores(NamedTuple):
    """Sums over scored tokens: nll in nats, count, and for masked_lm and tasks the correct predictions."""

    nll: float
    count: int
    correct: int | None = None

    def means(self, prefix: str) -> dict[str, float]:
        """The loss and, where it is known, the accuracy, each name preceded by `prefix`."""
        accuracy = {} if self.correct is None else {f"{prefix}accuracy": self.correct / self.count}
        return {f"{prefix}loss": self.nll / self.count} | accuracy


def train(config: RunConfig, *, start_over: bool = False, accept_environment: bool = False) -> int:
    """Train the run that `config` describes in config.run_dir, or resume it; return the exit status.

    start_over, accept_environment: see `RunFolder`.
    ValueError, in one line: a mistake of the user, or a run that cannot go on (`RunError`). `Stopped`: a
    signal ended it; what was done is saved. Called in the main thread, it handles signals until it returns.
    """
    assert config.run_dir is not None, "train.config.load resolves run_dir"
    config = initial.resolved(config)
    path = Path(config.run_dir)
    options = {"start_over": start_over, "accept_environment": accept_environment}
    output = Lasting(sys.stdout, f"{path}/metrics.jsonl")
    try:
        with Signals() as signals, RunFolder(path, config, **options) as folder:
            result = folder.result()
            if result is None:
                with contextlib.closing(Run(config, folder, output, signals)) as run:
                    run.steps()
                    result = run.finish()
            else:
                print(f"{folder.path} is finished", file=output)
            print_result(folder.path, result, scored_unit(config), output)
    except Stopped as stopped:
        stopped.text = stopped.text or NOTHING_NEW
        raise
    return 0


class Skips(NamedTuple):
    """How many steps were skipped because they were not finite: in all, and in a row up to now."""

    total: int = 0
    consecutive: int = 0


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


class Run:
    """A run in this process: its state on the device, and what it writes to disk."""

    def __init__(self, config: RunConfig, folder: RunFolder, output: Lasting, signals: Signals):
        self.config, self.folder, self.signals = config, folder, signals
        self.data = initial.prepared(config, folder)
        self.masked = config.objective == "masked_lm"
        self.unit = scored_unit(config)
        ids = vocabulary_size(config.objective, config.data.task or self.data.tokenizer)
        self.model = with_vocabulary(config.model, ids)
        self.requests = samples.sample_requests(config, self.model, self.data)
        init_key, self.dropout_key, self.sample_key = jax.random.split(jax.random.key(config.seed), 3)
        self.train_step = make_train_step(self.model, config.optimizer, config.steps)
        if self.masked or config.data.task is not None:
            self.eval_step = make_eval_step(self.model, accuracy=True)
        else:
            self.eval_step = make_eval_step(self.model)
        if self.masked:
            self.fill_in = make_fill_in(self.model)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.checkpoint.keep)
        self.checkpoints.clean()
        damaged = self._start(init_key)
        older = folder.check_start(self.done or None)
        if not folder.begun:
            # What cannot run here, such as a named `impl`, is refused before the folder is set up.
            jax.eval_shape(self.eval_step, self.params, next(self.data.validation_batches(1)))
        facts = {"corpus_sha256": self.data.corpus_sha256, "parameters": count_params(self.params)}
        notes = folder.begin(facts) + self.checkpoints.set_aside(damaged) + older
        self.checkpoints.collect(self.best and self.best["step"])
        # The row of a step whose evaluation is still due is written again.
        self.metrics = MetricsWriter(folder.path, self.done - (self.due is not None))
        self.console = Console(config.steps, self.done, output, unit=self.unit)
        self._introduce(facts["parameters"], notes)

    def _introduce(self, parameters: int, notes: list[str]) -> None:
        self.console.line(self.data.summary)
        start = f"resuming after step {self.done}" if self.done else "starting"
        self.console.line(
            f"{self.folder.path}: {parameters:,} parameters on {jax.default_backend()}, {start}"
        )
        if jax.device_count() > 1:
            notes = [f"training uses one of {jax.device_count()} devices, {jax.devices()[0]}", *notes]
        notes = [
            f"ignoring checkpoints/{n}: it has no manifest.json" for n in self.checkpoints.incomplete()
        ] + notes
        for note in notes:
            self.console.line(f"note: {note}")

    def _start(self, init_key: jax.Array) -> dict[int, str]:
        """Set the parameters: new ones, or the newest sound checkpoint's; the damaged ones after that."""
        self.done, self.tokens, self.best, damaged = 0, 0, None, {}
        self.skips, self.due = Skips(), None
        if self.checkpoints.steps():
            like = abstract_state(self.config, self.model)
            check = functools.partial(self.folder.check_checkpoint, corpus_sha256=self.data.corpus_sha256)
            self.done, state, info, damaged = self.checkpoints.newest(like, check)
            self.tokens, self.best = info["tokens"], info["best"]
            self.skips, self.due = Skips(**info.get("skips", {})), info.get("due")
        else:
            state = initial.first_state(self.config, self.model, init_key)
        self.params, self.opt_state = state["params"], state["opt_state"]
        self.reached, self._saved = self.done, (self.done, time.monotonic())
        return damaged

    def steps(self) -> None:
        """Train up to the last step. `Stopped`: a signal ended it before, and the step reached is saved."""
        with self.console:
            try:
                self._reset_clock()
                if self.due is not None:
                    self._report(self.done, self.due)
                self._train()
                self.signals.defer(False)
                self.signals.check()
            except Stopped as stopped:
                if self.reached != self._saved[0]:
                    self._save(self.reached)
                stopped.text = "no step was done yet; the same command starts again"
                if self.reached:
                    stopped.text = f"step {self.reached} is saved; the same command goes on from there"
                raise
            finally:
                self.signals.defer(False)

    def _train(self) -> None:
        pending = None
        for step in range(self.done + 1, self.config.steps + 1):
            batch = self._checked(self.data.train_batch(step - 1))
            self.params, self.opt_state, metrics = self.train_step(
                self.params, self.opt_state, batch, np.int32(step - 1), self.dropout_key
            )
            self.signals.defer(True)  # from here on there is something to save
            # One step late: the device computes this step while the host reads the last one's metrics.
            if pending is not None:
                self._arrived(*pending)
            pending = (step, metrics)
            stop, save = self.signals.number is not None, self._saves(step) or self._overdue()
            if stop or save or self._evaluates(step):
                self._arrived(*pending)
                pending = None
            if save and self._saved[0] != step:
                self._save(step)
            if stop:
                self.signals.check()
        assert pending is None

    def _arrived(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Handle the metrics of a step; where it evaluates or saves, self.params are still that step's."""
        arrays = jax.device_get(metrics)
        finite = arrays.pop("finite")
        names = ("train/loss", "tokens", "grad_norm", "learning_rate", "router_loss", "router_load")
        values = {name: arrays[name].item() for name in names if name in arrays}
        loss = values["train/loss"]
        self.tokens += values["tokens"]
        values["tokens"] = self.tokens
        self.reached = step
        if finite:
            self.skips = self.skips._replace(consecutive=0)
        else:
            self._skip(step, loss, values["grad_norm"])
            for name in ("train/loss", "grad_norm", "router_loss", "router_load"):
                values.pop(name, None)
        if self.skips.total:
            values["skipped_steps"] = self.skips.total
        self.console.step(step, loss, self._speed())
        if step == self.done + 1:
            self._reset_clock()  # the first step includes compilation
        self._report(step, values)

    def _skip(self, step: int, loss: float, norm: float) -> None:
        """Count and report a step that was not finite; NonFiniteError if it is one too many."""
        self.skips = Skips(self.skips.total + 1, self.skips.consecutive + 1)
        what = f"the loss is {loss} and the gradient's norm {norm}"
        limit, saved = self.config.optimizer.max_consecutive_skips, self._saved[0]
        if self.skips.consecutive > limit:
            again = f"goes on from step {saved}, the newest checkpoint" if saved else "starts again"
            raise NonFiniteError(
                f"step {step}: {what}; such steps in a row: {self.skips.consecutive}, and"
                f" optimizer.max_consecutive_skips is {limit}. The same command {again}"
            )
        self.console.line(
            f"step {step}: skipped, because {what}; parameters and optimizer state are unchanged"
            f" ({self.skips.consecutive} in a row, {self.skips.total} in all)"
        )

    def _report(self, step: int, values: dict[str, float]) -> None:
        """Evaluate, write the row, sample and save, as far as they are due at this step."""
        evaluates = self._evaluates(step)
        self.due = dict(values) if evaluates else None
        speed = self._speed()
        if evaluates:
            values |= self._evaluate(step)
        if evaluates or step % self.config.log_every == 0:
            self.folder.still_there()
            self.metrics.check()
            self.console.row(self.metrics.write(step, {**values, "tokens_per_second": round(speed, 1)}))
            self._reset_clock()
        if evaluates and self.config.evaluation.sample_tokens:
            self.signals.check()
            self._sample(step)
        self.due = None
        if self._saves(step):
            self._save(step, values.get("val/loss"))
        if evaluates or self._saves(step):
            self._reset_clock()

    def _overdue(self) -> bool:
        """Whether the last checkpoint is older than checkpoint.minutes."""
        minutes = self.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved[1] >= 60 * minutes

    def _speed(self) -> float:
        """Tokens a second since the clock was reset."""
        return (self.tokens - self._clock[1]) / (time.perf_counter() - self._clock[0])

    def _evaluates(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.steps

    def _saves(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.config.steps

    def _evaluate(self, step: int) -> dict[str, float]:
        """The means over the periodic evaluation's tokens, by name."""
        scores = self._score(self.data.validation_batches(self.config.evaluation.batches))
        if not math.isfinite(scores.nll):
            raise NonFiniteError(f"step {step}: the held-out loss is {scores.nll}; the step is not saved")
        return scores.means("val/")

    def _score(self, batches: Iterable[Batch]) -> Scores:
        """The sums of `eval_step` over the batches, read one batch late as in training."""
        parts, pending = [], []
        for batch in batches:
            self.signals.check()
            pending.append(self.eval_step(self.params, self._checked(batch)))
            if len(pending) > 1:
                parts.append(jax.device_get(pending.pop(0)))
        parts += jax.device_get(pending)
        scores = Scores(*(sum(x.item() for x in column) for column in zip(*parts, strict=True)))
        assert scores.count > 0, "the data holds tokens to score"
        return scores

    def _sample(self, step: int) -> None:
        evaluation = self.config.evaluation
        if self.masked:
            batch = next(self.data.validation_batches(evaluation.batches))
            predicted = self.fill_in(self.params, self._checked(batch))
            texts = samples.filled_in(self.data, batch, predicted, evaluation.sample_tokens)
        else:
            key = jax.random.fold_in(self.sample_key, step)
            report, tokenizer = self.console.line, self.data.tokenizer
            texts = samples.continued(
                self.config, self.model, self.params, self.requests, tokenizer, key, report
            )
        path = self._sample_path(step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "\n".join(texts))

    def _sample_path(self, step: int) -> Path:
        return self.folder.path / "samples" / f"step_{step:06d}.txt"

    def _save(self, step: int, val_loss: float | None = None) -> None:
        """Save a checkpoint. `val_loss`: of a step that the configuration saves, which may be the best."""
        self.folder.still_there()
        self.metrics.check()
        if not _all_finite(self.params):
            raise NonFiniteError(f"step {step}: the parameters are not finite; the step is not saved")
        if val_loss is not None and self.config.checkpoint.keep_best:
            if self.best is None or val_loss < self.best["val/loss"]:
                self.best = {"step": step, "val/loss": val_loss}
        info = {
            "tokens": self.tokens,
            "best": self.best,
            "config": saved_keys(self.config),
            "corpus_sha256": self.data.corpus_sha256,
            "versions": record(),
        }
        info |= {"skips": self.skips._asdict()} if self.skips.total else {}
        info |= {"due": self.due} if self.due is not None else {}
        state = {"params": self.params, "opt_state": self.opt_state}
        self.metrics.sync()
        self.checkpoints.save(step, state, info, best=self.best and self.best["step"])
        self.folder.reached(step)
        self._saved = (step, time.monotonic())

    def finish(self) -> dict[str, Any]:
        """Score every held-out token, draw the losses, write result.json; its content."""
        steps = self.config.steps
        # An earlier row is of other parameters.
        last = next((row for row in self.metrics.rows if row["step"] == steps and "val/loss" in row), None)
        if last is None:
            raise ValueError(
                f"{self.folder.path}/metrics.jsonl has lost the row of step {steps}, written before the "
                f"checkpoint: restore it from a copy, or move {self.checkpoints.path(steps)} to another place"
                " to train its last steps again"
            )
        names = ("train/loss", "val/loss", "val/accuracy")
        result = {"step": steps} | {name: last[name] for name in names if name in last}
        if self.config.evaluation.final_full:
            self.console.line("scoring every held-out token")
            scores = self._score(self.data.scoring_batches())
            if not math.isfinite(scores.nll):
                raise NonFiniteError(
                    f"step {steps}: the loss of all held-out tokens is {scores.nll}; there is no result"
                )
            values = scores.means("val/full_") | {"val/tokens": scores.count}
            # A loss of some tokens given all others is not a code length of the text, and a task has no text.
            if not (self.masked or self.config.data.task is not None):
                values[BITS] = self._bits_per_byte(scores)
            self.metrics.write(steps, values)
            result |= values
        draw_losses(self.metrics.rows, self.folder.path / "loss.png", self.unit)
        if self._sample_path(steps).exists():
            result["sample"] = self._sample_path(steps).read_text(encoding="utf-8")
        self.folder.finish(result)
        return result

    def _bits_per_byte(self, scores: Scores) -> float:
        scored = self.data.validation_bytes
        if self.model.prefix:  # targets within the prefix are not scored: count the bytes of the others
            every = sum(int((batch["targets"] >= 0).sum()) for batch in self.data.scoring_batches())
            scored = scored * scores.count / every
        return scores.nll / math.log(2) / scored

    def close(self) -> None:
        """Close the files."""
        self.metrics.close()

    def _checked(self, batch: Batch) -> Batch:
        check_ids(batch, self.model.vocab_size)
        return batch

    def _reset_clock(self) -> None:
        self._clock = (time.perf_counter(), self.tokens)


def scored_unit(config: RunConfig) -> str:
    """The unit that losses are averaged over, in the singular."""
    if config.data.task is not None:
        return "queried token"
    return "masked token" if config.objective == "masked_lm" else "token"
