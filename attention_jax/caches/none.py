"""The state of a layer without a mixer, which remembers nothing."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax

from attention_jax.caches.base import State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoState(State):
    """A state without arrays: every operation returns it unchanged."""

    def append(self, *new: Any) -> Self:
        """The state itself."""
        return self

    def view(self) -> None:
        """None: there is nothing to read."""

    def fork(self, rows: Any) -> Self:
        """The state itself, for any number of rows."""
        return self

    def rewind(self, n_B: Any) -> Self:
        """The state itself."""
        return self
