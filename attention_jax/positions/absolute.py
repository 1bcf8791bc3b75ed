"""Encodings of absolute positions: sinusoids added to the features, and a temperature of the queries."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.choices import check_choices
from attention_jax.dtypes import accumulator, wider
from attention_jax.positions.scalings import FORBID, check, plain_frequencies


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Scaling of queries by position, as in the layers of Llama 4 without RoPE (Meta 2025).

        q * (1 + scale * ln(floor((position + offset) / floor) + 1))

    It follows the scalable softmax of Nakanishi 2025 (arXiv 2501.19399).
    """

    __pydantic_config__ = FORBID

    #: queries at the first floor - offset positions are unchanged; the scale changes every floor positions
    floor: int = 8192
    scale: float = 0.1  #: factor of the logarithm
    offset: int = 1  #: of positions; 0 in Ministral 3

    def __post_init__(self):
        check_choices(self)
        check("Temperature", "floor", self.floor, self.floor >= 1, ">= 1")
        check("Temperature", "offset", self.offset, 0 <= self.offset <= 1, "0 or 1")
        check("Temperature", "scale", self.scale, 0 <= self.scale <= 100, "from 0 to 100")

    def __call__(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """q [B, T, heads, H] times the factors of its positions, computed in float32 or wider, in the dtype of q."""
        # Invalid slots (position < 0) are unchanged. The integer division is exact at every position.
        steps_BT = (jnp.maximum(positions_BT, -self.offset) + self.offset) // self.floor
        factor_BT = 1 + self.scale * jnp.log(steps_BT.astype(accumulator(q_BTNH)) + 1)
        return (wider(q_BTNH) * factor_BT[..., None, None]).astype(q_BTNH.dtype)


def sinusoidal(positions_BT: jax.Array, width: int, dtype: Any = jnp.float32) -> jax.Array:
    """Absolute positions as sines and cosines [B, T, width]: Vaswani et al. 2017 (arXiv 1706.03762).

        P[p, 2j] = sin(p / 10000^(2j / width)),   P[p, 2j + 1] = cos(p / 10000^(2j / width))

    Positions are unbounded; invalid slots (position < 0) give finite values. As in the paper (section 3.4),
    token embeddings should be multiplied by sqrt(width) before they are added. Raises: ValueError for an odd
    width.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width, got {width}")
    frequencies = plain_frequencies(10000.0, width).astype(dtype)
    angles = jnp.expand_dims(positions_BT.astype(dtype), -1)
    angles = angles * np.expand_dims(frequencies, tuple(range(positions_BT.ndim)))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BT.shape, width)
