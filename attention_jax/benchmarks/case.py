"""What is computed: a mask, sizes, and how each system is given them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from attention_jax.benchmarks.calls import qkv
from attention_jax.benchmarks.timing import flops

_DENSE_LIMIT = 2**26  # scores of all heads; more is the dense forms' memory, not their speed


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows, N heads over K kv heads, all of width H, over T tokens under a mask."""

    B: int
    T: int
    N: int
    K: int
    H: int
    mask: Any
    dtype: str

    @functools.cached_property
    def inputs(self) -> list[Any]:
        return qkv(self.T, self.N, self.H, self.B, self.dtype, self.K)

    @functools.cached_property
    def density(self) -> float:
        """The share of pairs that the mask keeps."""
        return float(self.mask.density(self.T))

    @functools.cached_property
    def live_blocks(self) -> float:
        """The share of 128 x 128 blocks with a kept pair."""
        from attention_jax.ops.softmax.blocks import static_map

        return float(static_map(self.mask, self.T, self.T, 128, 128).any_kept.mean())

    def teraflops(self, ms: float, what: str) -> float:
        return flops(self.B, self.N, self.T, self.H, self.density)[what] / ms / 1e9

    @property
    def causal(self) -> bool:
        from attention_jax import Causal

        return self.mask == Causal()

    @property
    def full(self) -> bool:
        from attention_jax import Full

        return self.mask == Full()

    @property
    def window(self) -> int | None:
        """How many keys a query sees, its own the last, where that is all the mask says."""
        from attention_jax import SlidingWindow

        plain = isinstance(self.mask, SlidingWindow) and self.mask.right == 0
        return self.mask.window if plain else None

    def dense(self) -> np.ndarray:
        positions = np.arange(self.T)
        return np.broadcast_to(self.mask.keep(positions[:, None], positions[None]), (self.T, self.T))

    @property
    def dense_too_large(self) -> str | None:
        scores = self.B * self.N * self.T**2
        return f"{scores:,} scores > {_DENSE_LIMIT:,}" if scores > _DENSE_LIMIT else None
