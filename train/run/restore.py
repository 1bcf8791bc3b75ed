"""Loading a trained run: its model, its parameters, its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attention_jax import tokenizers
from attention_jax.model import ModelConfig, init_params
from train.config.schema import RunConfig
from train.data import snapshot
from train.data.masking import vocabulary_size
from train.optimizer import make_optimizer
from train.run.checkpoint import CheckpointError, Checkpoints
from train.run.files import exists
from train.run.folder import check_checkpoint, recorded_corpus, saved_config


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run folder holds at one checkpoint."""

    config: RunConfig
    model: ModelConfig
    params: dict[str, Any]
    tokenizer: tokenizers.Tokenizer | None  # None: the run is of a synthetic task
    step: int
    chosen: str = ""  # how `load_run` chose the step, such as "the latest"
    folder: Path = Path()

    @property
    def title(self) -> str:
        """What was loaded, for a line on stderr."""
        return f"{self.folder}: checkpoint of step {self.step}, {self.chosen}"

    @property
    def trained_lengths(self) -> dict[str, int | None]:
        """The most tokens of a prompt and of a source in training."""
        data = self.config.data
        return {"prompt": data.sequence_length, "source": data.source_width}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text beside the tokenizer's `end_of_document`."""
        return getattr(self.tokenizer, "stop_ids", ())

    def requests(self, texts: Sequence[str]) -> Requests:
        """Inputs of `generate` that continue the texts, or for seq2seq generate their targets.

        ValueError for an empty source, and for a run of a task: it has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"the run was trained on data.task {self.config.data.task.kind}, which has no text"
            )
        return make_requests(self.config.objective, self.tokenizer, texts)


class Requests(NamedTuple):
    """Token ids for `generate`, and the text to print in front of each generated one."""

    prompts: list[np.ndarray]
    sources: list[np.ndarray] | None
    echo: list[str]


def load_run(run_dir: str | Path, *, step: int | str = "latest") -> TrainedRun:
    """The run in `run_dir` at checkpoint `step`: a number, "latest" or "best" (lowest val/loss).

    ValueError, in one line: not a run folder, no such checkpoint, a checkpoint that is damaged or cannot be
    read, or one of another configuration or corpus than the run's. No other checkpoint takes its place.
    """
    folder = Path(run_dir)
    _check_folder(folder)
    config = saved_config(folder)
    task = config.data.task
    corpus_sha256 = recorded_corpus(folder)
    tokenizer = None
    if task is None:
        tokenizer, of_data = snapshot.read_tokenizer(folder / "data")
        if of_data != corpus_sha256:
            raise ValueError(
                f"{folder / 'data'} is of another corpus than the run: restore it and run.json from a copy"
            )
    model = with_vocabulary(config.model, vocabulary_size(config.objective, task or tokenizer))
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    number, chosen = _choose(checkpoints, step)

    def check(info: dict[str, Any], path: Path) -> None:
        check_checkpoint(info, path, config, folder, corpus_sha256)

    state, _ = checkpoints.restore(number, abstract_state(config, model), check)
    return TrainedRun(config, model, state["params"], tokenizer, number, chosen, folder)


def _check_folder(folder: Path) -> None:
    """ValueError unless it is a run folder."""
    try:
        if exists(folder / "config.yaml"):
            return
        if not exists(folder):
            raise ValueError(f"{folder} does not exist")
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    raise ValueError(f"{folder} is not a run folder: it has no config.yaml")


def with_vocabulary(model: ModelConfig, size: int) -> ModelConfig:
    """The model with a vocabulary of `size` ids, unless its own is given and large enough."""
    if model.vocab_size is None:
        return dataclasses.replace(model, vocab_size=size)
    if model.vocab_size < size:
        raise ValueError(
            f"model.vocab_size {model.vocab_size} is less than the {size} ids of the data:"
            " raise it, or set it to null"
        )
    return model


def run_model(folder: Path) -> ModelConfig:
    """The model of a run, with its vocabulary, without a checkpoint. ValueError as of `load_run`."""
    _check_folder(folder)
    config = saved_config(folder)
    data = config.data.task or snapshot.read_tokenizer(folder / "data")[0]
    return with_vocabulary(config.model, vocabulary_size(config.objective, data))


def state_of(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Given parameters and their new optimiser state, placed as `fresh_state` places them."""

    def begin(params):
        return {"params": params, "opt_state": make_optimizer(config.optimizer, config.steps).init(params)}

    return jax.jit(begin, out_shardings=_first_device())(params)


def fresh_state(config: RunConfig, model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """New parameters and their optimiser state, the arrays of a checkpoint, on the first device."""
    return jax.jit(functools.partial(_fresh, config, model), out_shardings=_first_device())(key)


def abstract_state(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """Shapes, dtypes and placement of `fresh_state`, to restore into.

    Fresh and restored arrays are placed alike: else a resumed run would compile another program.
    """
    shapes = jax.eval_shape(functools.partial(_fresh, config, model), jax.random.key(0))
    place = _first_device()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def _fresh(config: RunConfig, model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    params = init_params(model, key)
    return {"params": params, "opt_state": make_optimizer(config.optimizer, config.steps).init(params)}


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def encode_prompt(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """Ids of a prompt, after the end-of-document token that starts every document in training."""
    ids = tokenizer.encode(text)
    if tokenizer.end_of_document is None:
        return ids
    return np.concatenate([np.array([tokenizer.end_of_document], np.int32), ids])


def make_requests(objective: str, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Requests:
    """The texts as prompts, or for seq2seq as sources. ValueError for an empty source."""
    if objective != "seq2seq":  # masked_lm: `generate` refuses the model and explains why
        return Requests([encode_prompt(tokenizer, text) for text in texts], None, list(texts))
    if not all(texts):
        raise ValueError("the source is empty: give a text")
    sources = [tokenizer.encode(text) for text in texts]
    return Requests([encode_prompt(tokenizer, "") for _ in texts], sources, [f"{text} -> " for text in texts])


def _choose(checkpoints: Checkpoints, step: int | str) -> tuple[int, str]:
    """The step of a checkpoint, and how it was chosen."""
    steps = checkpoints.steps()
    there = ", ".join(map(str, steps))
    if not steps:
        raise ValueError(f"{checkpoints.folder} has no complete checkpoint: train first")
    if step == "latest":
        return steps[-1], "the latest"
    if step != "best":
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step}; there are {there}")
        return step, "as asked"
    try:
        best = checkpoints.info(steps[-1])["best"]
    except CheckpointError as error:
        raise ValueError(f"the newest checkpoint names the best one, but: {error}") from None
    if best is None:
        return steps[-1], "the latest; no val/loss was saved with it to tell the best"
    if best["step"] not in steps:
        raise ValueError(
            f"the best checkpoint, of step {best['step']}, is not in {checkpoints.folder}: there are {there}"
        )
    return best["step"], f"the best, val/loss {best['val/loss']:.4f}"
