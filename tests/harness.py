"""A mixer with random parameters behind two jitted functions, for the tests that run a whole mixer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.mixers import Context
from tests.mixers import D_MODEL


@dataclasses.dataclass
class Harness:
    """A built mixer with random parameters (norm scales and biases too) behind two jitted functions.

    batch, capacity: of the states that `state` makes and `cached` starts from.
    """

    config: object
    causal: bool = True
    impl: str | None = None
    batch: int = 2
    capacity: int = 24
    dtype: Any = jnp.float32

    def __post_init__(self):
        config = dataclasses.replace(self.config, impl=self.impl)
        module = nnx.eval_shape(
            lambda: config.build(D_MODEL, nnx.Rngs(0), causal=self.causal, dtype=self.dtype)
        )
        self.graphdef, abstract = nnx.split(module)
        rng = np.random.default_rng(7)
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _random(rng, jax.tree_util.keystr(path), leaf.shape), abstract
        )
        self.call = jax.jit(self.run)

    def run(self, params, x, state, ctx):
        return tuple(nnx.merge(self.graphdef, params).mix(x, state, ctx=ctx)[:2])

    def parallel(self, x, ctx=None):
        return self.call(self.params, x, None, ctx or Context())[0]

    def state(self):
        return nnx.merge(self.graphdef, self.params).init_state(self.batch, self.capacity)

    def cached(self, x, cuts, state=None, positions=None):
        """The outputs of x fed in the pieces that `cuts` ends, and the last state."""
        state = self.state() if state is None else state
        if positions is None:
            positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        out, start = [], 0
        for cut in cuts:
            ctx = Context(positions_BT=positions[:, start:cut])
            y, state = self.call(self.params, x[:, start:cut], state, ctx)
            out.append(y)
            start = cut
        return np.concatenate(out, axis=1), state


def _random(rng, path: str, shape) -> np.ndarray:
    """Kernels that keep the scale of what they meet; norm scales about 1; small everything else."""
    x = rng.normal(size=shape).astype(np.float32)
    if "kernel" in path:
        return x / np.float32(np.sqrt(shape[0]))
    return 0.2 * x + ("scale" in path)
