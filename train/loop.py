"""The host's side of training: data -> train_step -> rows, evaluation, samples, checkpoints.

At step n the order is: train, evaluate, write the row, sample, save. So what a checkpoint of step n claims
to have happened is on the disk before it, and a run that goes on from it first cuts what came after.
"""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attention_jax.generate import Sampling, generate
from attention_jax.model import ModelConfig, count_params
from train import data as data_lib
from train.checkpoint import Checkpoints
from train.console import Console, printable
from train.files import write_atomically
from train.metrics import MetricsWriter, draw_losses
from train.objective import check_ids
from train.restore import Requests, abstract_state, fresh_state, make_requests, with_vocabulary
from train.run_folder import RunFolder, config_hash, package_versions
from train.schema import RunConfig
from train.step import Batch, make_eval_step, make_train_step
from train.tasks.scoring import make_task_eval_step

_SAMPLING = Sampling(temperature=0.8)
_SAMPLED_SOURCES = 4
_SCORES = ("val/loss", "val/accuracy", "val/full_loss", "val/full_accuracy", "val/bits_per_byte")


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite; nothing was changed by it."""


def train(config: RunConfig) -> int:
    """Train, or go on training, what `config` describes in the folder config.run_dir; the exit status.

    ValueError, in one line: a mistake of the user, or a loss that is not finite.
    """
    assert config.run_dir is not None, "train.config.load resolves run_dir"
    with RunFolder(Path(config.run_dir), config) as folder:
        result = folder.result()
        if result is None:
            with contextlib.closing(Run(config, folder)) as run:
                run.steps()
                result = run.finish()
        else:
            print(f"{folder.path} is finished")
        _print_result(folder.path, result)
    return 0


class Run:
    """One process's part of a run: its state on the device, and what goes to the disk."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        self.config, self.folder = config, folder
        self.data = data_lib.prepare(config.data, folder.path, config.objective)
        self.model = with_vocabulary(config.model, self.data.vocab_size)
        self.requests = _requests(config, self.model, self.data)
        init_key, self.dropout_key, self.sample_key = jax.random.split(jax.random.key(config.seed), 3)
        self.train_step = make_train_step(self.model, config.optimizer, config.steps)
        make_eval = make_eval_step if config.data.task is None else make_task_eval_step
        self.eval_step = make_eval(self.model)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.checkpoint.keep)
        self._start(init_key)
        facts = {"corpus_sha256": self.data.corpus_sha256, "parameters": count_params(self.params)}
        notes = folder.begin(facts)
        self.checkpoints.collect(self.best and self.best["step"])
        self.metrics = MetricsWriter(folder.path, self.done)
        self.console = Console(config.steps, self.done)
        self.console.line(self.data.summary)
        start = f"resuming after step {self.done}" if self.done else "starting"
        self.console.line(
            f"{folder.path}: {facts['parameters']:,} parameters on {jax.default_backend()}, {start}"
        )
        for name in self.checkpoints.incomplete():
            self.console.line(f"note: ignoring checkpoints/{name}: it has no manifest.json")
        for note in notes:
            self.console.line(f"note: {note}")

    def _start(self, init_key: jax.Array) -> None:
        """Fresh parameters, or those of the newest checkpoint."""

        saved = self.checkpoints.steps()
        self.done, self.tokens, self.best = saved[-1] if saved else 0, 0, None
        if saved:
            like = abstract_state(self.config, self.model)
            state, info = self.checkpoints.restore(self.done, like)
            self.tokens, self.best = info["tokens"], info["best"]
            if info["config_sha256"] != config_hash(self.config):
                raise ValueError(f"checkpoint {self.checkpoints.path(self.done)} was made by another config")
        else:
            state = fresh_state(self.config, self.model, init_key)
        self.params, self.opt_state = state["params"], state["opt_state"]

    def steps(self) -> None:
        """Train from where the run stands to its last step."""
        pending = None
        with self.console:
            self._reset_clock()
            for step in range(self.done + 1, self.config.steps + 1):
                batch = self._checked(self.data.train_batch(step - 1))
                self.params, self.opt_state, metrics = self.train_step(
                    self.params, self.opt_state, batch, np.int32(step - 1), self.dropout_key
                )
                # One step late: while the device works on this step, the host reads the one before.
                if pending is not None:
                    self._arrived(*pending)
                pending = (step, metrics)
                if self._evaluates(step) or self._saves(step):
                    self._arrived(*pending)
                    pending = None
        assert pending is None

    def _arrived(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """All that follows step `step`. Where it evaluates or saves, self.params are still that step's."""
        arrays = jax.device_get(metrics)
        finite = arrays.pop("finite")
        names = ("train/loss", "tokens", "grad_norm", "learning_rate")
        values = {name: arrays[name].item() for name in names}
        if not finite:
            raise NonFiniteError(
                f"step {step}: the loss is {values['train/loss']} and the gradient's norm"
                f" {values['grad_norm']}; nothing was changed by it. Lower optimizer.learning_rate, lengthen"
                " optimizer.warmup_steps or set optimizer.clip_norm, in another run_dir"
            )
        self.tokens += values["tokens"]
        values["tokens"] = self.tokens
        speed = (self.tokens - self._clock[1]) / (time.perf_counter() - self._clock[0])
        self.console.step(step, values["train/loss"], speed)
        if step == self.done + 1:
            self._reset_clock()  # the compilation is no step
        if self._evaluates(step):
            values |= self._evaluate(step)
        if self._evaluates(step) or step % self.config.log_every == 0:
            self.console.row(self.metrics.write(step, {**values, "tokens_per_second": round(speed, 1)}))
            self._reset_clock()
        if self._evaluates(step) and self.requests is not None:
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
        """The means over the periodic evaluation's tokens."""
        nll, count, *right = self._score(self.data.validation_batches(self.config.evaluation.batches))
        if not math.isfinite(nll):
            raise NonFiniteError(f"step {step}: the held-out loss is {nll}; no later checkpoint was written")
        return {"val/loss": nll / count} | ({"val/accuracy": right[0] / count} if right else {})

    def _score(self, batches: Iterable[Batch]) -> tuple[float, ...]:
        """The sums over the batches of what eval_step returns, read one late as in training.

        They are the nll in nats, the number of tokens and, of a task, the number of right ones.
        """
        totals, pending = None, []
        for batch in batches:
            pending.append(self.eval_step(self.params, self._checked(batch)))
            if len(pending) > 1:
                totals = _plus(totals, pending.pop(0))
        totals = _plus(totals, *pending)
        assert totals[1] > 0, "the data holds tokens to score"
        return totals

    def _sample(self, step: int) -> None:
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
        path = self._sample_path(step)
        path.parent.mkdir(exist_ok=True)
        texts = [head + tokenizer.decode(ids) for head, ids in zip(self.requests.heads, rows, strict=True)]
        write_atomically(path, "\n".join(texts))

    def _sample_path(self, step: int) -> Path:
        return self.folder.path / "samples" / f"step_{step:06d}.txt"

    def _save(self, step: int, val_loss: float | None) -> None:
        if val_loss is not None and self.config.checkpoint.keep_best:
            if self.best is None or val_loss < self.best["val/loss"]:
                self.best = {"step": step, "val/loss": val_loss}
        info = {
            "tokens": self.tokens,
            "best": self.best,
            "config_sha256": config_hash(self.config),
            "corpus_sha256": self.data.corpus_sha256,
            "versions": package_versions(),
        }
        state = {"params": self.params, "opt_state": self.opt_state}
        self.checkpoints.save(step, state, info, best=self.best and self.best["step"])

    def finish(self) -> dict[str, Any]:
        """Score every held-out token, draw the losses, write result.json; its content."""
        steps = self.config.steps
        last = next((row for row in reversed(self.metrics.rows) if "val/loss" in row), {})
        result = {"step": steps} | {name: last[name] for name in ("train/loss", *_SCORES) if name in last}
        if self.config.evaluation.final_full:
            self.console.line("scoring every held-out token")
            scores = self._score_all()
            self.metrics.write(steps, scores)
            result |= scores
        draw_losses(self.metrics.rows, self.folder.path / "loss.png")
        if self._sample_path(steps).exists():
            result["sample"] = self._sample_path(steps).read_text(encoding="utf-8")
        self.folder.finish(result)
        return result

    def _score_all(self) -> dict[str, float]:
        """Every held-out token's scores; a task has no bytes, but right answers."""
        nll, count, *right = self._score(self.data.scoring_batches())
        scores = {"val/full_loss": nll / count, "val/tokens": count}
        if self.config.data.task is not None:
            return scores | {"val/full_accuracy": right[0] / count}
        scored = self.data.validation_bytes
        if self.model.prefix:  # what a prefix shows is not scored: count the bytes of the rest alone
            every = sum(int((batch["targets"] >= 0).sum()) for batch in self.data.scoring_batches())
            scored = scored * count / every
        return scores | {"val/bits_per_byte": nll / math.log(2) / scored}

    def close(self) -> None:
        """Close the files."""
        self.metrics.close()

    def _checked(self, batch: Batch) -> Batch:
        check_ids(batch, self.model.vocab_size)
        return batch

    def _reset_clock(self) -> None:
        self._clock = (time.perf_counter(), self.tokens)


def _plus(totals: tuple[float, ...] | None, *parts: tuple[jax.Array, ...]) -> tuple[float, ...]:
    """The sums with the parts added, as numbers of Python: float64, and integers of any size."""
    for part in jax.device_get(parts):
        numbers = [number.item() for number in part]
        totals = tuple(numbers if totals is None else map(operator.add, totals, numbers))
    assert totals is not None, "there is at least one batch"
    return totals


def _requests(config: RunConfig, model: ModelConfig, data: Any) -> Requests | None:
    """What samples start from, None if none is asked for: the prompt, or a few held-out sources."""
    evaluation = config.evaluation
    if evaluation.sample_tokens == 0:
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
            f"evaluation.sample_prompt has {prompt} tokens, fewer than the prefix of {model.prefix} that the "
            "mask shows: give a longer one, or set evaluation.sample_tokens to 0"
        )
    limit, length = model.max_positions, prompt + evaluation.sample_tokens
    if limit is not None and length > limit:
        raise ValueError(
            f"evaluation.sample_tokens {evaluation.sample_tokens}: with the prompt's {prompt} tokens it"
            f" exceeds model.max_positions {limit}: lower it to {max(0, limit - prompt)}"
        )
    return requests


def _print_result(path: Path, result: dict[str, Any]) -> None:
    if "sample" in result:
        print(f"--- sample\n{printable(result['sample'])}\n---")
    figures = "  ".join(f"{name} {result[name]:.4f}" for name in _SCORES if name in result)
    print(f"{path}: step {result['step']}  {figures}", flush=True)
