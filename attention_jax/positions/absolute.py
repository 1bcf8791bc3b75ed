"""What a token's absolute position adds to its features, or makes of its queries' temperature."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.positions.scalings import FORBID, INFINITY, check, plain_frequencies


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Sharper queries far into a text, as Llama 4 tunes those of its layers without RoPE (Meta 2025).

        q * (1 + scale * ln(floor((position + 1) / floor) + 1))

    after the scalable softmax of Nakanishi 2025 (arXiv 2501.19399).
    """

    __pydantic_config__ = FORBID

    floor: int = 8192  #: positions up to which queries stay as they are, and the width of each step after
    scale: float = 0.1  #: how much each unit of the logarithm adds

    def __post_init__(self):
        check("Temperature", "floor", self.floor, self.floor >= 1, ">= 1")
        check("Temperature", "scale", self.scale, 0 <= self.scale < INFINITY, "finite and >= 0")

    def __call__(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """q [B, T, heads, H] times its positions' factors, in float32; dtype kept."""
        # Positions < 0 hold no token and stay; the integer division is exact at every position.
        steps_BT = (jnp.maximum(positions_BT, -1) + 1) // self.floor
        factor_BT = 1 + self.scale * jnp.log(steps_BT.astype(jnp.float32) + 1)
        return (q_BTNH.astype(jnp.float32) * factor_BT[..., None, None]).astype(q_BTNH.dtype)


def sinusoidal(positions_BT: jax.Array, width: int) -> jax.Array:
    """Absolute positions as sines and cosines, float32 [B, T, width]: Vaswani et al. 2017 (arXiv 1706.03762).

        P[p, 2j] = sin(p / 10000^(2j / width)),   P[p, 2j + 1] = cos(p / 10000^(2j / width))

    Any length; positions < 0 hold no token and give finite values. Sums of these with token embeddings take
    the embeddings times sqrt(width), as there (section 3.4). ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width, got {width}")
    frequencies = plain_frequencies(10000.0, width).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BT.shape, width)
