"""A synthetic task as the trainer's data, which has no text, tokenizer or bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grain

from train.data.packing import Batch
from train.data.tasks import TaskConfig

if TYPE_CHECKING:
    from train.config.sections import DataConfig


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Batches of a task: int32 tokens and targets [batch_size, T].

    Row b of step n is training row n * batch_size + b. The held-out rows are a stream of their own.
    """

    config: DataConfig

    @property
    def task(self) -> TaskConfig:
        """The task's configuration, which makes the rows."""
        assert self.config.task is not None
        return self.config.task

    @functools.cached_property
    def corpus_sha256(self) -> str:
        """Of the first training rows and all held-out ones: a run resumes with the same rows only."""
        digest = hashlib.sha256()
        for batch in [self.train_batch(0), *self.validation_batches()]:
            for name in ("tokens", "targets"):
                digest.update(batch[name].astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def summary(self) -> str:
        """One line for the log."""
        options = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.task).items())
        return f"synthetic rows of {self.config.sequence_length} tokens: {options}"

    def train_batch(self, step: int) -> Batch:
        """The batch of step 0, 1, 2, ...: always the same for the same configuration."""
        return self._batches[step]

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` batches of held-out rows, the first ones; None: all.

        The last batch is filled up with rows that are not scored.
        """
        B, rows = self.config.batch_size, self.task.validation_rows
        rows = rows if limit is None else min(limit * B, rows)
        for first in range(0, rows, B):
            batch = self._rows(first, held_out=True)
            batch["targets"][rows - first :] = -1
            yield batch

    def scoring_batches(self) -> Iterator[Batch]:
        """Every held-out row once."""
        return self.validation_batches()

    @functools.cached_property
    def _batches(self) -> grain.MapDataset:
        steps = grain.MapDataset.range(1).repeat()
        return steps.map_with_index(lambda step, _: self._rows(step * self.config.batch_size))

    def _rows(self, first: int, held_out: bool = False) -> Batch:
        """A batch from row `first` on; the held-out rows do not depend on the seed."""
        config = self.config
        seed = 0 if held_out else config.shuffle_seed
        return self.task.rows(first, config.batch_size, config.sequence_length, seed=seed, held_out=held_out)
