"""The configuration of a run: its sections, and how keys of several sections fit together.

`train.config` reads it from YAML. The text after a field's `#:` is its documentation, as
`python -m train --help` prints it. A check raises a ValueError of one line that starts with the key that is
wrong.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Literal

from attention_jax.choices import check_choices
from attention_jax.model import ModelConfig
from train.config.sections import (
    FORBID,
    MASKING_KEYS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    at_least,
    check_path,
    check_seed,
    expanded,
)

# What null stands for in evaluation.sample_tokens, wherever it fits.
_SAMPLE_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    __pydantic_config__ = FORBID

    run_dir: str | None = None  #: the run's folder, ~ for the home folder; null: runs/NAME_OF_THE_CONFIG
    seed: int = 0  #: of the initial parameters and of dropout
    steps: int = 1000  #: training steps
    log_every: int = 10  #: steps between rows of metrics.jsonl
    #: causal_lm: predict the next token. seq2seq: predict a target text from a source text, with
    #: model.encoder and mixers of kind cross; losses are in nats per target token, bits per byte are of the
    #: targets given their sources. masked_lm: predict masked tokens from bidirectional context, with
    #: model.causal: false; losses are in nats per masked token, and there are no bits per byte
    objective: Literal["causal_lm", "seq2seq", "masked_lm"] = "causal_lm"
    #: start from the parameters, the model and the tokenizer of hf:NAME, a published model (a folder, a .gguf
    #: file or a name on the hub), or of run:FOLDER, another run; without hf: or run: a path is looked at. Keys
    #: of model are then absent, but dtype, scan_layers and remat; null: new parameters
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)  #: the language model
    data: DataConfig = field(default_factory=DataConfig)  #: the text
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  #: the optimiser
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  #: evaluation
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  #: checkpoints

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "steps", "log_every")
        check_seed(self, "seed")
        check_path("run_dir", self.run_dir)
        if self.run_dir is not None and not self.run_dir.strip():
            raise ValueError("run_dir is empty; name a folder, or null for runs/NAME_OF_THE_CONFIG")
        check_path("init_from", self.init_from)
        self._check_init_from()
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
            object.__setattr__(self, "run_dir", expanded("run_dir", self.run_dir))
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.steps))
        if self.evaluation.sample_tokens is None:
            tokens = 0 if self.data.task is not None else _SAMPLE_TOKENS
            if self.model.limit is not None:
                prompt = 1 + len(self.evaluation.sample_prompt.encode(errors="replace"))
                tokens = max(0, min(tokens, self.model.limit[0] - prompt))
            object.__setattr__(self, "evaluation", dataclasses.replace(self.evaluation, sample_tokens=tokens))

    def _check_init_from(self) -> None:
        tokenizer = self.data.tokenizer
        if self.init_from is None:
            if tokenizer == "init_from":
                raise ValueError("data.tokenizer is init_from, which is null: set init_from, or use bytes")
            return
        if not self.init_from.strip() or self.init_from in ("hf:", "run:"):
            raise ValueError(f"init_from {self.init_from!r}: name a folder, a file or a model of the hub")
        if tokenizer == "chars":
            raise ValueError(
                "data.tokenizer is chars: a model of init_from has its own tokenizer; remove the key"
            )
        if self.data.task is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, tokenizer="init_from"))

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
            for key, mixer in model.named_mixers:
                if mixer.mixes_whole_row:
                    raise ValueError(
                        f"data.packing is documents: model.{key} ({mixer.kind}) mixes all tokens of "
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
        for key, mixer in self.model.named_mixers:
            if mixer.reads_memory:
                raise ValueError(
                    f"model.{key}.kind is {mixer.kind}: it reads an encoder's output, which a "
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
