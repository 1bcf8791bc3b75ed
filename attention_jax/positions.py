"""Position codes that act on queries and keys.

RoPE: Su et al. 2021, "RoFormer" (arXiv 2104.09864). Feature pair j of a head at position p is turned by

    angle = p * theta^(-2j / width),   (a, b) -> (a cos - b sin, a sin + b cos)

Phases are float32 whatever the features' dtype: bfloat16 positions collide past 256.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding over the first `width` features of each head."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    theta: float = 10000.0  #: base of the wavelengths
    width: int | None = None  #: rotated features of each head, even; null: all of them
    layout: Literal["half", "interleaved"] = (
        "half"  #: half: pairs (j, j + width/2), as Llama and GPT-NeoX; interleaved: (2j, 2j + 1), as GPT-J and RoFormer
    )

    def __post_init__(self):
        if self.width is not None and (self.width < 2 or self.width % 2):
            raise ValueError(f"RoPE width must be even and >= 2, got {self.width}")
        if not 0 < self.theta < float("inf"):
            raise ValueError(f"RoPE theta must be > 0 and finite, got {self.theta}")
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"RoPE layout must be 'half' or 'interleaved', got {self.layout!r}")

    def rotated_width(self, head_dim: int) -> int:
        """How many features of a head of `head_dim` are rotated; ValueError where that cannot be."""
        width = head_dim if self.width is None else self.width
        if width % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim {head_dim} is odd; set an even rope.width")
        if width > head_dim:
            raise ValueError(f"RoPE width {width} exceeds head_dim {head_dim}")
        return width

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x [B, T, heads, H] turned to its positions [B or 1, T]; dtype kept."""
        width = self.rotated_width(x_BTNH.shape[-1])
        turned, rest = x_BTNH[..., :width].astype(jnp.float32), x_BTNH[..., width:]
        frequencies = self.theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.layout == "half":
            a, b = jnp.split(turned, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
        turned = turned.astype(x_BTNH.dtype)
        return turned if width == x_BTNH.shape[-1] else jnp.concatenate([turned, rest], axis=-1)
