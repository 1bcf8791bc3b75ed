"""The sections of a run's configuration: data, optimiser, evaluation, checkpoints. Each checks its own keys.

The text after a field's `#:` is its documentation, as `python -m train --help` prints it. A
`__post_init__` raises a ValueError of one line that starts with the key that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

from attention_jax.choices import check_between, check_choices
from train.data.tasks import TaskConfig

# Keys of `data` that objective masked_lm alone reads.
MASKING_KEYS = ("mask_fraction", "mask_replaced", "mask_random")
FORBID = {"extra": "forbid", "strict": True}
_SEED_LIMIT = 2**32
# What null stands for in optimizer, wherever it fits.
_WARMUP, _FINAL_RATE = 100, 1e-4


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the text, and how it becomes batches."""

    __pydantic_config__ = FORBID

    #: glob of UTF-8 text files, ** for any depth; null: the source code of the Python standard library.
    #: objective seq2seq: files of lines source<TAB>target; null: about 7,000 first lines of docstrings of
    #: the standard library as targets, the same without spaces and capitals as sources
    files: str | None = None
    #: bytes: 256 ids and an end-of-document token; chars: the characters of the text, sorted; init_from: that
    #: of the model that init_from names, which is the default with it
    tokenizer: Literal["bytes", "chars", "init_from"] = "bytes"
    #: tokens per row (T); objective seq2seq: of a target with its end-of-document token, longer pairs are
    #: skipped and counted
    sequence_length: int = 256
    #: objective seq2seq: tokens per source row (S), longer pairs are skipped; null: sequence_length
    source_length: int | None = None
    batch_size: int = 16  #: rows per step (B), all accumulation steps together
    #: documents: packed end to end into rows, with segment ids and positions that restart; stream: random
    #: windows of the concatenated text. Objective seq2seq does not pack: do not set it
    packing: Literal["documents", "stream"] = "documents"
    #: objective masked_lm: fraction of a row's tokens that the model predicts from bidirectional context
    mask_fraction: float = 0.15
    mask_replaced: float = 0.8  #: fraction of these that are replaced by the [MASK] id
    mask_random: float = 0.1  #: fraction of these that are replaced by a random token; the rest are unchanged
    validation_fraction: float = 0.1  #: fraction of the text that is held out, between 0 and 1
    #: files: hold out whole files, chosen by a hash of their name, or the end of an only file; tail: the last
    #: characters or pairs
    validation_split: Literal["files", "tail"] = "files"
    #: decides the order of the training rows and which of their tokens are masked, or a task's rows
    shuffle_seed: int = 0
    #: a synthetic task whose rows replace the text, with evaluation.sample_tokens: 0; null: text
    task: TaskConfig | None = None

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "sequence_length", "source_length", "batch_size")
        check_seed(self, "shuffle_seed")
        if self.task is not None:
            self._check_task(self.task)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, exclusive, got {self.validation_fraction}"
            )
        why = "neither part may be empty"
        check_between(self, "validation_fraction", 1e-6, 1 - 1e-6, why)
        if not 0 < self.mask_fraction <= 1:
            raise ValueError(f"mask_fraction must be in (0, 1], got {self.mask_fraction}")
        check_between(self, "mask_fraction", 1e-4, 1, "only masked tokens are learned")
        for name in ("mask_replaced", "mask_random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.mask_replaced + self.mask_random > 1 + 1e-9:
            raise ValueError(
                f"mask_replaced {self.mask_replaced} and mask_random {self.mask_random} exceed 1 "
                "together: lower one of them"
            )
        check_path("files", self.files)
        if self.files is not None and not self.files.strip():
            raise ValueError(
                "files is an empty glob: give a pattern, or null for the source code of the standard library"
            )

    def _check_task(self, task: TaskConfig) -> None:
        for name in (
            "files",
            "tokenizer",
            "source_length",
            "packing",
            "validation_fraction",
            "validation_split",
        ):
            value = getattr(self, name)
            if value != getattr(DataConfig, name):
                raise ValueError(
                    f"{name} {value}: task {task.kind} generates rows and reads no text; remove the key"
                )
        try:
            task.check(self.sequence_length)
        except ValueError as error:
            raise ValueError(f"task.{error}") from None

    @property
    def source_width(self) -> int:
        """Tokens a source row (S)."""
        return self.sequence_length if self.source_length is None else self.source_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Weight decay applies by parameter path."""

    __pydantic_config__ = FORBID

    learning_rate: float = 1e-3  #: the peak of the schedule
    #: at the last step; null: 1e-4, or a tenth of a smaller learning_rate; unused by `schedule: constant`
    final_learning_rate: float | None = None
    #: steps of linear warm-up from 0; null: 100, or a tenth of the steps where 100 do not fit before the decay
    warmup_steps: int | None = None
    #: after the warm-up. cosine: a cosine; wsd: constant, then linear decay; constant: no decay
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    #: cosine: the step at which it ends; null: the last one. wsd: steps of the linear decay at the end;
    #: null: a fifth of all steps
    decay_steps: int | None = None
    beta1: float = 0.9  #: decay of the first moment
    beta2: float = 0.99  #: decay of the second moment
    epsilon: float = 1e-8  #: added to the square root of the second moment
    #: decoupled; of matrices and embeddings, not of norms, biases and sink logits
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  #: maximum of the gradient's global norm; null: no clipping
    accumulation_steps: int = 1  #: micro-batches per step, a divisor of data.batch_size
    #: steps in a row that may be skipped because their loss or gradient is not finite; one more ends the run.
    #: A skipped step leaves parameters and optimizer state as they are; the schedule and the data go on
    max_consecutive_skips: int = 10

    def __post_init__(self):
        check_choices(self)
        check_finite(self, "learning_rate", "epsilon", "clip_norm", above=0)
        check_finite(self, "final_learning_rate", "weight_decay", least=0)
        at_least(self, 0, "warmup_steps", "max_consecutive_skips")
        at_least(self, 1, "decay_steps", "accumulation_steps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
            check_between(self, name, 0, 1 - 1e-5, "1 minus its powers must keep its digits in float32")
        self._check_sizes()
        if self.schedule == "constant":
            if self.decay_steps is not None:
                raise ValueError(
                    f"decay_steps {self.decay_steps}: schedule constant does not decay; set it to null"
                )
        elif self.final_learning_rate is not None and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate} exceeds learning_rate {self.learning_rate}"
            )

    def _check_sizes(self) -> None:
        lost = "an update vanishes beside float32 parameters, or replaces them"
        check_between(self, "learning_rate", 1e-9, 10, lost)
        check_between(
            self, "epsilon", 1e-20, 1, "updates vanish beside a larger one, and a smaller one is lost"
        )
        check_between(self, "clip_norm", 1e-6, 3e38, "smaller gradients vanish; null turns clipping off")
        if self.learning_rate * self.weight_decay > 1:
            raise ValueError(
                f"weight_decay {self.weight_decay} times learning_rate {self.learning_rate} exceeds 1: a step "
                "would replace the parameters; lower one of them"
            )

    def resolved(self, steps: int) -> OptimizerConfig:
        """A copy without null for warmup_steps and final_learning_rate: what they stand for in a run of `steps`."""
        warmup, final = self.warmup_steps, self.final_learning_rate
        if warmup is None:
            most = self._most_warmup(steps)
            warmup = _WARMUP if most >= _WARMUP else max(0, min(steps // 10, most))
        if final is None:
            lower = self.schedule != "constant" and self.learning_rate < _FINAL_RATE
            final = self.learning_rate / 10 if lower else _FINAL_RATE
        return dataclasses.replace(self, warmup_steps=warmup, final_learning_rate=final)

    def _most_warmup(self, steps: int) -> int:
        """The longest warm-up that leaves the schedule its decay."""
        if self.schedule == "cosine":
            return min(steps, (self.decay_steps or steps) - 1)
        return steps - self.wsd_decay(steps) if self.schedule == "wsd" else steps

    def wsd_decay(self, steps: int) -> int:
        """The steps of the linear decay at the end of schedule wsd."""
        return self.decay_steps or max(1, math.ceil(steps / 5))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the held-out text during training."""

    __pydantic_config__ = FORBID

    every: int = 250  #: steps between evaluations; the last step is always evaluated
    #: batches of data.batch_size held-out rows per evaluation, always the same ones; null: all of them
    batches: int | None = 20
    final_full: bool = True  #: evaluate on all held-out tokens after the last step
    #: prompt of the text that is sampled and saved with each evaluation. Not set for objective seq2seq, which
    #: saves the outputs for a few held-out sources, nor for masked_lm, which saves held-out text with its
    #: masks and the model's predictions
    sample_prompt: str = "def "
    #: the most tokens of a sample; 0: no samples; null: 200, or as many as the model takes, and 0 with data.task
    sample_tokens: int | None = None

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "every", "batches")
        at_least(self, 0, "sample_tokens")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints on disk."""

    __pydantic_config__ = FORBID

    every: int = 500  #: steps between checkpoints; the last step is always saved
    #: also save when so many minutes have passed since the last checkpoint; null: by steps alone
    minutes: float | None = None
    keep: int = 2  #: how many of the newest checkpoints to keep
    keep_best: bool = True  #: also keep the checkpoint with the lowest val/loss

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "every", "keep")
        check_finite(self, "minutes", above=0)


def check_path(name: str, path: str | None) -> None:
    if path is not None and "\0" in path:
        raise ValueError(f"{name} {path!r}: a path must not hold the character U+0000")


def expanded(name: str, path: str) -> str:
    """The path with ~ or ~user at its start replaced by the home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.partition("/")[0]
        raise ValueError(f"{name} {path}: {user} is no home folder; write ./{path} for a folder of that name")
    return found


def at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_finite(config: Any, *names: str, above: float | None = None, least: float | None = None) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value) or (above is not None and value <= above):
            raise ValueError(f"{name} must be finite and > {above if least is None else least}, got {value}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_seed(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) < _SEED_LIMIT:
        raise ValueError(f"{name} must be in [0, {_SEED_LIMIT}), got {getattr(config, name)}")
