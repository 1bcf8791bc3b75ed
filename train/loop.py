"""The training loop: data -> train_step -> metrics, evaluation, samples, checkpoints.

At step n the order is: train, evaluate, write the row, sample, save. So everything up to step n is on disk
before its checkpoint, and a run that resumes from it first removes later rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attention_jax.generation import Sampling, generate
from attention_jax.model import ModelConfig, count_params
from train.config.schema import RunConfig
from train.data import batches as data_lib
from train.data.masking import vocabulary_size
from train.objective import check_ids
from train.run.checkpoint import Checkpoints
from train.run.console import Console, printable
from train.run.environment import record
from train.run.files import write_atomically
from train.run.folder import RunFolder, saved_keys
from train.run.metrics import BITS, FINAL, MetricsWriter, draw_losses
from train.run.restore import Requests, abstract_state, fresh_state, make_requests, with_vocabulary
from train.step import Batch, make_eval_step, make_fill_in, make_train_step

_SAMPLING = Sampling(temperature=0.8)
_SAMPLED_SOURCES = 4
_MASK = "█"  # stands for a masked token in a sample


class Scores(NamedTuple):
    """Sums over scored tokens: nll in nats, count, and for masked_lm and tasks the correct predictions."""

    nll: float
    count: int
    correct: int | None = None

    def means(self, prefix: str) -> dict[str, float]:
        """The loss and, where it is known, the accuracy, each name preceded by `prefix`."""
        accuracy = {} if self.correct is None else {f"{prefix}accuracy": self.correct / self.count}
        return {f"{prefix}loss": self.nll / self.count} | accuracy


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite; the parameters are unchanged."""


def train(config: RunConfig, *, start_over: bool = False, accept_environment: bool = False) -> int:
    """Train the run that `config` describes in config.run_dir, or resume it; return the exit status.

    start_over, accept_environment: see `RunFolder`.
    ValueError, in one line: a mistake of the user, or a loss that is not finite.
    """
    assert config.run_dir is not None, "train.config.load resolves run_dir"
    options = {"start_over": start_over, "accept_environment": accept_environment}
    with RunFolder(Path(config.run_dir), config, **options) as folder:
        result = folder.result()
        if result is None:
            with contextlib.closing(Run(config, folder)) as run:
                run.steps()
                result = run.finish()
        else:
            print(f"{folder.path} is finished")
        _print_result(folder.path, result, scored_unit(config))
    return 0


class Run:
    """A run in this process: its state on the device, and what it writes to disk."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        self.config, self.folder = config, folder
        self.data = data_lib.prepare(config.data, folder.path, config.objective)
        self.masked = config.objective == "masked_lm"
        self.unit = scored_unit(config)
        ids = vocabulary_size(config.objective, config.data.task or self.data.tokenizer)
        self.model = with_vocabulary(config.model, ids)
        self.requests = _requests(config, self.model, self.data)
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
        self.metrics = MetricsWriter(folder.path, self.done)
        self.console = Console(config.steps, self.done, unit=self.unit)
        self.console.line(self.data.summary)
        start = f"resuming after step {self.done}" if self.done else "starting"
        self.console.line(
            f"{folder.path}: {facts['parameters']:,} parameters on {jax.default_backend()}, {start}"
        )
        for name in self.checkpoints.incomplete():
            self.console.line(f"note: ignoring checkpoints/{name}: it has no manifest.json")
        for note in notes:
            self.console.line(f"note: {note}")

    def _start(self, init_key: jax.Array) -> dict[int, str]:
        """Set the parameters: new ones, or the newest sound checkpoint's; the damaged ones after that."""
        self.done, self.tokens, self.best, damaged = 0, 0, None, {}
        if self.checkpoints.steps():
            like = abstract_state(self.config, self.model)
            check = functools.partial(self.folder.check_checkpoint, corpus_sha256=self.data.corpus_sha256)
            self.done, state, info, damaged = self.checkpoints.newest(like, check)
            self.tokens, self.best = info["tokens"], info["best"]
        else:
            state = fresh_state(self.config, self.model, init_key)
        self.params, self.opt_state = state["params"], state["opt_state"]
        return damaged

    def steps(self) -> None:
        """Train up to the last step."""
        pending = None
        with self.console:
            self._reset_clock()
            for step in range(self.done + 1, self.config.steps + 1):
                batch = self._checked(self.data.train_batch(step - 1))
                self.params, self.opt_state, metrics = self.train_step(
                    self.params, self.opt_state, batch, np.int32(step - 1), self.dropout_key
                )
                # One step late: the device computes this step while the host reads the last one's metrics.
                if pending is not None:
                    self._arrived(*pending)
                pending = (step, metrics)
                if self._evaluates(step) or self._saves(step):
                    self._arrived(*pending)
                    pending = None
        assert pending is None

    def _arrived(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Handle the metrics of a step; where it evaluates or saves, self.params are still that step's."""
        arrays = jax.device_get(metrics)
        finite = arrays.pop("finite")
        names = ("train/loss", "tokens", "grad_norm", "learning_rate")
        values = {name: arrays[name].item() for name in names}
        if not finite:
            raise NonFiniteError(
                f"step {step}: the loss is {values['train/loss']} and the gradient's norm"
                f" {values['grad_norm']}; the parameters are unchanged. Lower optimizer.learning_rate,"
                " lengthen optimizer.warmup_steps or set optimizer.clip_norm, in another run_dir"
            )
        self.tokens += values["tokens"]
        values["tokens"] = self.tokens
        speed = (self.tokens - self._clock[1]) / (time.perf_counter() - self._clock[0])
        self.console.step(step, values["train/loss"], speed)
        if step == self.done + 1:
            self._reset_clock()  # the first step includes compilation
        if self._evaluates(step):
            values |= self._evaluate(step)
        if self._evaluates(step) or step % self.config.log_every == 0:
            self.console.row(self.metrics.write(step, {**values, "tokens_per_second": round(speed, 1)}))
            self._reset_clock()
        if self._evaluates(step) and self.config.evaluation.sample_tokens:
            self._sample(step)
        if self._saves(step):
            self._save(step, values.get("val/loss"))
        if self._evaluates(step) or self._saves(step):
            self._reset_clock()

    def _evaluates(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.steps

    def _saves(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.config.steps

    def _evaluate(self, step: int) -> dict[str, float]:
        """The means over the periodic evaluation's tokens, by name."""
        scores = self._score(self.data.validation_batches(self.config.evaluation.batches))
        if not math.isfinite(scores.nll):
            raise NonFiniteError(
                f"step {step}: the held-out loss is {scores.nll}; no later checkpoint was written"
            )
        return scores.means("val/")

    def _score(self, batches: Iterable[Batch]) -> Scores:
        """The sums of `eval_step` over the batches, read one batch late as in training."""
        parts, pending = [], []
        for batch in batches:
            pending.append(self.eval_step(self.params, self._checked(batch)))
            if len(pending) > 1:
                parts.append(jax.device_get(pending.pop(0)))
        parts += jax.device_get(pending)
        scores = Scores(*(sum(x.item() for x in column) for column in zip(*parts, strict=True)))
        assert scores.count > 0, "the data holds tokens to score"
        return scores

    def _sample(self, step: int) -> None:
        texts = self._filled_in() if self.masked else self._written(step)
        path = self._sample_path(step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "\n".join(texts))

    def _filled_in(self) -> list[str]:
        """Held-out text with masked tokens, and with the model's predictions in their places."""
        batch = next(self.data.validation_batches(self.config.evaluation.batches))
        batches = (batch["tokens"], self.fill_in(self.params, self._checked(batch)))
        length = self.config.evaluation.sample_tokens
        masked, filled = (self._readable(np.asarray(tokens)[0, :length]) for tokens in batches)
        return [f"--- masked\n{masked}", f"--- filled in\n{filled}"]

    def _written(self, step: int) -> list[str]:
        """The prompts, each with its generated text."""
        evaluation, tokenizer = self.config.evaluation, self.data.tokenizer
        rows = generate(
            self.model,
            self.params,
            self.requests.prompts,
            sources=self.requests.sources,
            max_new_tokens=evaluation.sample_tokens,
            sampling=_SAMPLING,
            key=jax.random.fold_in(self.sample_key, step),
            eos_id=tokenizer.end_of_document,
        )
        return [echo + tokenizer.decode(ids) for echo, ids in zip(self.requests.echo, rows, strict=True)]

    def _sample_path(self, step: int) -> Path:
        return self.folder.path / "samples" / f"step_{step:06d}.txt"

    def _save(self, step: int, val_loss: float | None) -> None:
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
        state = {"params": self.params, "opt_state": self.opt_state}
        self.metrics.sync()
        self.folder.check_still_there()
        self.checkpoints.save(step, state, info, best=self.best and self.best["step"])
        self.folder.reached(step)

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

    def _readable(self, ids: np.ndarray) -> str:
        """The text of some ids, with a block for each masked token."""
        masks = np.flatnonzero(ids == self.data.mask_id)
        parts = np.split(ids, masks)
        texts = [self.data.tokenizer.decode(part[part != self.data.mask_id]) for part in parts]
        return _MASK.join(texts)

    def _checked(self, batch: Batch) -> Batch:
        check_ids(batch, self.model.vocab_size)
        return batch

    def _reset_clock(self) -> None:
        self._clock = (time.perf_counter(), self.tokens)


def _requests(config: RunConfig, model: ModelConfig, data: Any) -> Requests | None:
    """The inputs of samples, the prompt or a few held-out sources; None where nothing is sampled."""
    evaluation = config.evaluation
    if evaluation.sample_tokens == 0 or config.objective == "masked_lm":
        return None
    texts = [evaluation.sample_prompt]
    if config.objective == "seq2seq":
        texts = data.held_out_sources(_SAMPLED_SOURCES)
    try:
        requests = make_requests(config.objective, data.tokenizer, texts)
    except ValueError as error:
        raise ValueError(f"evaluation.sample_prompt: {error}") from None
    prompt = len(requests.prompts[0])
    if prompt < model.prefix:
        raise ValueError(
            f"evaluation.sample_prompt has {prompt} tokens, fewer than the mask's prefix of {model.prefix}: "
            "give a longer one, or set evaluation.sample_tokens to 0"
        )
    limit, key = model.limit or (math.inf, "")
    if prompt + evaluation.sample_tokens > limit:
        raise ValueError(
            f"evaluation.sample_tokens {evaluation.sample_tokens}: with the prompt's {prompt} tokens it"
            f" exceeds model.{key} {limit}: lower it to {max(0, limit - prompt)}"
        )
    return requests


def scored_unit(config: RunConfig) -> str:
    """The unit that losses are averaged over, in the singular."""
    if config.data.task is not None:
        return "queried token"
    return "masked token" if config.objective == "masked_lm" else "token"


def _print_result(path: Path, result: dict[str, Any], unit: str) -> None:
    if "sample" in result:
        print(f"--- sample\n{printable(result['sample'])}\n---")
    names = ("val/loss", "val/accuracy", FINAL, "val/full_accuracy", BITS)
    figures = "  ".join(f"{name} {result[name]:.4f}" for name in names if name in result)
    if "val/accuracy" in result:
        figures += f"  (nats per {unit}; share of {unit}s predicted correctly)"
    print(f"{path}: step {result['step']}  {figures}", flush=True)
