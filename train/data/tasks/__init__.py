"""Synthetic tasks: rows that are generated on demand, in place of a corpus.

A task's config (`data.task` in YAML, chosen by its `kind`) has `vocab_size`, `validation_rows`,
`check(sequence_length)` and `rows(first, count, sequence_length, seed=, held_out=)`; `source.TaskData`
turns it into what the trainer reads. Row n is a function of (seed, held out or not, n), whatever the batch
size.
"""

from typing import Annotated

from attention_jax.choices import ByKind
from train.data.tasks.mqar import MQARConfig

# Another task joins as a union: MQARConfig | OtherConfig.
TaskConfig = Annotated[MQARConfig, ByKind()]

__all__ = ["MQARConfig", "TaskConfig"]
