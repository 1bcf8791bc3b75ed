"""What tests of whole runs share: reading what a run saved, interrupting one, a step without a model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from train.data.batches import Data
from train.run.checkpoint import Checkpoints
from train.run.folder import RunFolder
from train.run.metrics import TIMING, read_rows


def saved(config):
    """Bytes of all arrays of the newest checkpoint, by path."""
    store = Checkpoints(RunFolder(Path(config.run_dir), config).path / "checkpoints", keep=2)
    step = store.steps()[-1]
    leaves = json.loads((store.path(step) / "info.json").read_text())["leaves"]
    with warnings.catch_warnings(action="ignore"):
        tree = ocp.load(store.path(step) / "state")
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    assert len(arrays) == len(leaves)
    return step, arrays


def rows(config):
    """The rows of metrics.jsonl without what depends on the clock."""
    found = read_rows(Path(config.run_dir) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in found]


def interrupt(monkeypatch, at):
    """Ctrl-C when the batch of step index `at` is asked for."""
    train_batch = Data.train_batch

    def asked(self, step):
        if step == at:
            raise KeyboardInterrupt
        return train_batch(self, step)

    monkeypatch.setattr(Data, "train_batch", asked)


def measured(loss):
    """What a train step reports."""
    metrics = {"train/loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 16}
    metrics["finite"] = np.isfinite(loss)
    return {name: np.asarray(value) for name, value in metrics.items()}


def untrained(model, optimizer, steps):
    """A train step that needs no compilation and changes nothing."""
    return lambda params, opt_state, batch, step, key: (params, opt_state, measured(1.0))
