"""Rotary positions: what turns queries and keys by where they stand.

RoPE: Su et al. 2021, "RoFormer" (arXiv 2104.09864). Feature pair j of a head at position p is turned by

    angle = p * theta^(-2j / width),   (a, b) -> (a cos - b sin, a sin + b cos)

Angles are float32 whatever the features' dtype (bfloat16 positions collide past 256), from frequencies made
in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.positions.scalings import FORBID, INFINITY, Scaling, check, plain_frequencies


@dataclasses.dataclass(frozen=True)
class XPos:
    """Scores that shrink with distance: Sun et al. 2022 (arXiv 2212.10554), an option of RoPE.

    Pair j of a query at position p is multiplied by zeta_j^((p - centre) / scale_base), that of a key by the
    inverse, zeta_j = (2j / width + 0.4) / 1.4 <= 1. The authors' centre is half the current length; here it
    is fixed, since a centre that moved would disagree with cached keys. Scores do not depend on it.
    """

    __pydantic_config__ = FORBID

    scale_base: float = 512.0  #: distance over which pair 0's share of a score shrinks to 0.4 / 1.4
    centre: int = 0  #: the position that is not scaled; the middle of the longest text doubles the reach

    def __post_init__(self):
        check("XPos", "scale_base", self.scale_base, 0 < self.scale_base < INFINITY, "finite and > 0")
        check("XPos", "centre", self.centre, self.centre >= 0, ">= 0")

    def reach(self, dtype: Any) -> int:
        """How far from the centre a token may stand; beyond it the scaled features would not be exact.

        Up to there, factors and their inverses stay 1 / eps inside the range of `dtype`, so that features
        from eps to 1 / eps keep their precision: 29,178 positions in float32 at scale_base 512.
        """
        limits = jnp.finfo(dtype if jnp.dtype(dtype).itemsize <= 4 else jnp.float32)
        room = min(math.log(float(limits.max)), -math.log(float(limits.tiny))) + math.log(float(limits.eps))
        return int(room * self.scale_base / math.log(1.4 / 0.4))

    def gain(self, positions_BT: jax.Array, width: int, dtype: Any) -> jax.Array:
        """The factors of queries, float32 [B, T, width / 2]; NaN out of reach. Keys take the inverse."""
        zeta = (np.arange(0, width, 2) / width + 0.4) / 1.4
        # No token stands at a position < 0: it is left alone, so that no NaN reaches a gradient there.
        offset_BT = jnp.where(positions_BT < 0, 0, positions_BT - self.centre)
        offset_BT = jnp.where(jnp.abs(offset_BT) > self.reach(dtype), jnp.nan, offset_BT.astype(jnp.float32))
        return jnp.exp(offset_BT[..., None] * (np.log(zeta) / self.scale_base).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding over the first `width` features of each head.

    `rope(x, positions)` serves queries and keys alike; with `xpos` they differ: `rope.queries`, `rope.keys`.
    """

    __pydantic_config__ = FORBID

    theta: float = 10000.0  #: base of the wavelengths
    width: int | None = None  #: rotated features of each head, even; null: all of them
    #: half: pairs (j, j + width/2), as Llama and GPT-NeoX; interleaved: (2j, 2j + 1), as GPT-J and RoFormer
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling | None = None  #: how to read texts longer than those trained on; null: as trained
    xpos: XPos | None = None  #: scores that shrink with distance; null: off

    def __post_init__(self):
        if self.width is not None and (self.width < 2 or self.width % 2):
            raise ValueError(f"RoPE width must be even and >= 2, got {self.width}")
        if not 0 < self.theta < INFINITY:
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
        if self.scaling is not None:
            self.scaling.frequencies(self.theta, width)  # raises where the scaling does not fit the width
        return width

    def frequencies(self, head_dim: int) -> np.ndarray:
        """The angle per position of each pair, float64 [rotated width / 2]."""
        width = self.rotated_width(head_dim)
        if self.scaling is None:
            return plain_frequencies(self.theta, width)
        return self.scaling.frequencies(self.theta, width)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by: 1 but for YaRN and LongRoPE."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    @property
    def softmax_factor(self) -> float:
        """What latent attention (MLA) multiplies its softmax scale by: 1 but for YaRN with mscale_all_dim."""
        return 1.0 if self.scaling is None else self.scaling.softmax_factor

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x [B, T, heads, H] turned to its positions [B or 1, T]; dtype kept."""
        if self.xpos is not None:
            raise ValueError("RoPE with xpos differs for queries and keys: call rope.queries or rope.keys")
        return self._turned(x_BTNH, positions_BT, self.attention_factor)

    def queries(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Queries turned to their positions; with `xpos` also scaled."""
        return self._turned(q_BTNH, positions_BT, self._gain(q_BTNH, positions_BT, False))

    def keys(self, k_BSKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Keys turned to their positions; with `xpos` also scaled, inversely to queries."""
        return self._turned(k_BSKH, positions_BS, self._gain(k_BSKH, positions_BS, True))

    def _gain(self, x_BTNH: jax.Array, positions_BT: jax.Array, inverse: bool) -> Any:
        """What multiplies cosines and sines: a number, or float32 [B, T, 1, width / 2]."""
        if self.xpos is None:
            return self.attention_factor
        gain_BTj = self.xpos.gain(positions_BT, self.rotated_width(x_BTNH.shape[-1]), x_BTNH.dtype)
        return self.attention_factor * (1 / gain_BTj if inverse else gain_BTj)[:, :, None]

    def _turned(self, x_BTNH: jax.Array, positions_BT: jax.Array, gain: Any) -> jax.Array:
        frequencies = self.frequencies(x_BTNH.shape[-1])
        width = 2 * frequencies.size
        turned, rest = x_BTNH[..., :width].astype(jnp.float32), x_BTNH[..., width:]
        angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies.astype(np.float32)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if not (isinstance(gain, float) and gain == 1.0):
            cos, sin = gain * cos, gain * sin
        if self.layout == "half":
            a, b = jnp.split(turned, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
        turned = turned.astype(x_BTNH.dtype)
        return turned if width == x_BTNH.shape[-1] else jnp.concatenate([turned, rest], axis=-1)
