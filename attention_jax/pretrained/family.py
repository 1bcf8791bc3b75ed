"""What is known of a family of published models: how its description is read, and its table of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.files import Tensors
from attention_jax.pretrained.table import Entry


@dataclasses.dataclass(frozen=True)
class Family:
    """Architectures whose checkpoints share a table.

    title: for people. model_types: the values of model_type in config.json. config: reads a description; it
    must read every key that matters. table: all parameters. head: the name of the output projection, which
    files of tied models may hold too. unused: patterns of tensors that are no parameters, such as stored
    masks. older_names: (pattern, replacement) of names that some files have; the first pattern that matches a
    whole name gives the name in the table. view: the tensors that the table means from those of the files,
    where they are packed.
    """

    title: str
    model_types: tuple[str, ...]
    config: Callable[[Description], ModelConfig]
    table: tuple[Entry, ...]
    head: str = "lm_head.weight"
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    older_names: tuple[tuple[str, str], ...] = ()
    view: Callable[[Tensors], Tensors] | None = None


def tiled(blocks: list[BlockConfig]) -> tuple[BlockConfig, ...]:
    """The shortest period that gives these layers when it is tiled."""
    for period in range(1, len(blocks) + 1):
        if all(block == blocks[i % period] for i, block in enumerate(blocks)):
            return tuple(blocks[:period])
    return tuple(blocks)
