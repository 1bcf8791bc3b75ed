"""Parameters for tests without compiling an initialiser: NumPy draws in the shapes of `init_params`."""

from __future__ import annotations

import functools

import jax
import numpy as np

from attention_jax.model import ModelConfig, init_params


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Norm scales about 1, kernels and embeddings of std config.init_std, small everything else."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf) -> np.ndarray:
        name = path[-1].key
        x = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * x if name == "scale" else x * np.float32(config.init_std)

    return jax.tree_util.tree_map_with_path(draw, shapes)
