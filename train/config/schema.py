"""The configuration of a run: frozen dataclasses, a section each. `train.config` reads them from YAML.

The text after a field's `#:` is its documentation, as `python -m train --help` prints it. A
`__post_init__` raises a ValueError of one line that starts with the key that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import field
from typing import Any, Literal

from attention_jax.choices import check_between, check_choices
from attention_jax.model import ModelConfig
from train.data.tasks import TaskConfig

# Keys of `data` that objective masked_lm alone reads.
MASKING_KEYS = ("mask_fraction", "mask_replaced", "mask_random")
_FORBID = {"extra": "forbid", "strict": True}
_SEED_LIMIT = 2**32
# What null stands for in optimizer and evaluation, wherever it fits.
_WARMUP, _FINAL_RATE, _SAMPLE_TOKENS = 100, 1e-4, 200


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the text, and how it becomes batches."""

    __pydantic_config__ = _FORBID

    #: glob of UTF-8 text files, ** for any depth; null: the source code of the Python standard library.
    #: objective seq2seq: files of lines source<TAB>target; null: about 7,000 first lines of docstrings of
    #: the standard library as targets, the same without spaces and capitals as sources
    files: str | None = None
    #: bytes: 256 ids and an end-of-document token; chars: the characters of the text, sorted
    tokenizer: Literal["bytes", "chars"] = "bytes"
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
        _at_least(self, 1, "sequence_length", "source_length", "batch_size")
        _seed(self, "shuffle_seed")
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
        _check_path("files", self.files)
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

    __pydantic_config__ = _FORBID

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
        _finite(self, "learning_rate", "epsilon", "clip_norm", above=0)
        _finite(self, "final_learning_rate", "weight_decay", least=0)
        _at_least(self, 0, "warmup_steps", "max_consecutive_skips")
        _at_least(self, 1, "decay_steps", "accumulation_steps")
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

    __pydantic_config__ = _FORBID

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
        _at_least(self, 1, "every", "batches")
        _at_least(self, 0, "sample_tokens")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints on disk."""

    __pydantic_config__ = _FORBID

    every: int = 500  #: steps between checkpoints; the last step is always saved
    #: also save when so many minutes have passed since the last checkpoint; null: by steps alone
    minutes: float | None = None
    keep: int = 2  #: how many of the newest checkpoints to keep
    keep_best: bool = True  #: also keep the checkpoint with the lowest val/loss

    def __post_init__(self):
        check_choices(self)
        _at_least(self, 1, "every", "keep")
        _finite(self, "minutes", above=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    __pydantic_config__ = _FORBID

    run_dir: str | None = None  #: the run's folder, ~ for the home folder; null: runs/NAME_OF_THE_CONFIG
    seed: int = 0  #: of the initial parameters and of dropout
    steps: int = 1000  #: training steps
    log_every: int = 10  #: steps between rows of metrics.jsonl
    #: causal_lm: predict the next token. seq2seq: predict a target text from a source text, with
    #: model.encoder and mixers of kind cross; losses are in nats per target token, bits per byte are of the
    #: targets given their sources. masked_lm: predict masked tokens from bidirectional context, with
    #: model.causal: false; losses are in nats per masked token, and there are no bits per byte
    objective: Literal["causal_lm", "seq2seq", "masked_lm"] = "causal_lm"
    model: ModelConfig = field(default_factory=ModelConfig)  #: the language model
    data: DataConfig = field(default_factory=DataConfig)  #: the text
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  #: the optimiser
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  #: evaluation
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  #: checkpoints

    def __post_init__(self):
        check_choices(self)
        _at_least(self, 1, "steps", "log_every")
        _seed(self, "seed")
        _check_path("run_dir", self.run_dir)
        if self.run_dir is not None and not self.run_dir.strip():
            raise ValueError("run_dir is empty; name a folder, or null for runs/NAME_OF_THE_CONFIG")
        self._resolve()
        self._check_rows()
        self._check_causal()
        if self.objective == "seq2seq":
            self._check_seq2seq()
        else:
            self._check_language_model()
        if self.objective == "masked_lm":
            self._check_masked_lm()
        else:
            self._check_no_masks()
        if self.data.task is not None:
            self._check_task(self.data.task.kind)
        self._check_schedule()

    def _resolve(self) -> None:
        """Replace what null stands for: ~ in run_dir, and defaults that follow other keys."""
        if self.run_dir is not None:
            object.__setattr__(self, "run_dir", _expanded("run_dir", self.run_dir))
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.steps))
        if self.evaluation.sample_tokens is None:
            tokens = 0 if self.data.task is not None else _SAMPLE_TOKENS
            if self.model.limit is not None:
                prompt = 1 + len(self.evaluation.sample_prompt.encode(errors="replace"))
                tokens = max(0, min(tokens, self.model.limit[0] - prompt))
            object.__setattr__(self, "evaluation", dataclasses.replace(self.evaluation, sample_tokens=tokens))

    def _check_rows(self) -> None:
        model, data = self.model, self.data
        rows, parts = data.batch_size, self.optimizer.accumulation_steps
        if rows % parts:
            raise ValueError(f"optimizer.accumulation_steps {parts} does not divide data.batch_size {rows}")
        lengths = {"sequence_length": data.sequence_length, "source_length": data.source_length}
        for name, length in lengths.items():
            limit, key = model.limit or (math.inf, "")
            if length is not None and length > limit:
                raise ValueError(
                    f"data.{name} {length} exceeds model.{key} {limit}: lower it, or raise the other"
                )
        if self.objective != "seq2seq" and data.packing == "documents":
            for index, mixer in enumerate(model.mixers):
                if mixer.mixes_whole_row:
                    raise ValueError(
                        f"data.packing is documents: model.mixers.{index} ({mixer.kind}) mixes all tokens of "
                        "a row and cannot keep its documents apart; set it to stream"
                    )
        for index, mixer in enumerate(() if model.encoder is None else model.encoder.mixers):
            if mixer.horizon is not None and mixer.horizon < data.source_width:
                key = f"model.encoder.mixers.{index}.{mixer.horizon_key}"
                raise ValueError(
                    f"{key} {mixer.horizon} is less than the {data.source_width} tokens of a source row: "
                    "raise it, or lower data.source_length"
                )

    def _check_causal(self) -> None:
        masked = self.objective == "masked_lm"
        if self.model.causal and masked:
            raise ValueError(
                "model.causal is true: objective masked_lm predicts masked tokens from bidirectional context; "
                "set model.causal to false, or objective: causal_lm"
            )
        if not self.model.causal and not masked:
            raise ValueError(
                f"model.causal is false: objective {self.objective} predicts the next token, to which such "
                "a model attends; set it to true, or objective: masked_lm"
            )

    def _check_language_model(self) -> None:
        for index, mixer in enumerate(self.model.mixers):
            if mixer.reads_memory:
                raise ValueError(
                    f"model.mixers.{index}.kind is {mixer.kind}: it reads an encoder's output, which a "
                    "language model does not have; set objective: seq2seq and model.encoder"
                )
        if self.model.encoder is not None:
            raise ValueError(
                f"model.encoder is set: it reads a source, which objective {self.objective} does not have; set "
                "objective: seq2seq"
            )
        if self.data.source_length is not None:
            raise ValueError(
                f"data.source_length {self.data.source_length}: objective {self.objective} has no source; "
                "remove the key"
            )
        evaluation, tokenizer = self.evaluation, self.data.tokenizer
        if evaluation.sample_tokens and not evaluation.sample_prompt and tokenizer == "chars":
            raise ValueError(
                "evaluation.sample_prompt is empty: the chars tokenizer has no end-of-document token to start "
                "from; give at least one character"
            )

    def _check_seq2seq(self) -> None:
        if self.model.encoder is None:  # a model with one has a mixer that reads it
            raise ValueError(
                "model.encoder is null: objective seq2seq reads the source with it; set model.encoder and a "
                "mixer of kind cross"
            )
        if self.data.tokenizer == "chars":
            raise ValueError(
                "data.tokenizer is chars: it has no end-of-document token, with which objective seq2seq "
                "starts and ends a target; use bytes"
            )
        if self.data.packing == "stream":
            raise ValueError(
                "data.packing is stream: objective seq2seq has one pair per row and does not pack; remove the key"
            )
        if self.evaluation.sample_prompt != EvaluationConfig.sample_prompt:
            raise ValueError(
                "evaluation.sample_prompt: objective seq2seq samples for held-out sources; remove the key"
            )
        if self.model.prefix:
            raise ValueError(
                f"model.mixers: a prefix of {self.model.prefix} tokens is attended bidirectionally, so the "
                "start of a target would attend to the tokens to predict; use causal masks only"
            )

    def _check_masked_lm(self) -> None:
        if self.evaluation.sample_prompt != EvaluationConfig.sample_prompt:
            raise ValueError(
                "evaluation.sample_prompt: objective masked_lm predicts masked tokens of held-out text; remove the key"
            )

    def _check_no_masks(self) -> None:
        for name in MASKING_KEYS:
            value = getattr(self.data, name)
            if value != getattr(DataConfig, name):
                raise ValueError(
                    f"data.{name} {value}: objective {self.objective} masks no tokens; remove the key, or set "
                    "objective: masked_lm"
                )

    def _check_task(self, kind: str) -> None:
        if self.objective != "causal_lm":
            raise ValueError(
                f"objective {self.objective}: data.task {kind} has its own targets; use causal_lm"
            )
        if self.evaluation.sample_tokens:
            raise ValueError(
                f"evaluation.sample_tokens {self.evaluation.sample_tokens}: data.task {kind} has no text to "
                "sample; set it to 0"
            )
        if self.model.prefix:
            raise ValueError(
                f"model.mixers: a prefix of {self.model.prefix} tokens is not scored, which would skip "
                f"targets of data.task {kind}; use causal masks only"
            )

    def _check_schedule(self) -> None:
        optimizer, steps = self.optimizer, self.steps
        warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
        if warmup > steps:
            raise ValueError(
                f"optimizer.warmup_steps {warmup} exceeds steps {steps}: lower it or raise steps"
            )
        if optimizer.schedule == "cosine" and warmup >= (decay or steps):
            raise ValueError(
                f"optimizer.warmup_steps {warmup} is not before the end of the cosine at step "
                f"{decay or steps}: lower it or raise steps"
            )
        if optimizer.schedule == "wsd":
            length = optimizer.wsd_decay(steps)
            if warmup + length > steps:
                raise ValueError(
                    f"optimizer.warmup_steps {warmup} and the decay of {length} steps (optimizer.decay_steps) "
                    f"exceed steps {steps}: lower one of them or raise steps"
                )


def _check_path(name: str, path: str | None) -> None:
    if path is not None and "\0" in path:
        raise ValueError(f"{name} {path!r}: a path must not hold the character U+0000")


def _expanded(name: str, path: str) -> str:
    """The path with ~ or ~user at its start replaced by the home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.partition("/")[0]
        raise ValueError(f"{name} {path}: {user} is no home folder; write ./{path} for a folder of that name")
    return found


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _finite(config: Any, *names: str, above: float | None = None, least: float | None = None) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value) or (above is not None and value <= above):
            raise ValueError(f"{name} must be finite and > {above if least is None else least}, got {value}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _seed(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) < _SEED_LIMIT:
        raise ValueError(f"{name} must be in [0, {_SEED_LIMIT}), got {getattr(config, name)}")
