"""Rotary position embedding: rotates queries and keys by angles proportional to their positions.

RoPE: Su et al. 2021, "RoFormer" (arXiv 2104.09864). Feature pair j of a head at position p is rotated by

    angle = p * theta^(-2j / width),   (a, b) -> (a cos - b sin, a sin + b cos)

Frequencies are computed in float64 and angles in the wider of float32 and the dtype of the features: bfloat16
cannot represent all positions past 256.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.choices import check_choices
from attention_jax.dtypes import accumulator, wider
from attention_jax.positions.scalings import FORBID, Scaling, check, plain_frequencies


@dataclasses.dataclass(frozen=True)
class XPos:
    """Scores that decay with distance, an option of RoPE: Sun et al. 2022 (arXiv 2212.10554).

    Pair j of a query at position p is multiplied by zeta_j^((p - centre) / scale_base) and that of a key by
    the inverse, with zeta_j = (2j / width + 0.4) / 1.4 <= 1. Scores do not depend on the centre. The authors
    use half the current length; here it is fixed, since cached keys were scaled with an earlier centre.
    """

    __pydantic_config__ = FORBID

    scale_base: float = (
        512.0  #: distance over which the contribution of pair 0 to a score decays to 0.4 / 1.4
    )
    centre: int = 0  #: the position with scale 1; half the maximum length doubles the usable range

    def __post_init__(self):
        check_choices(self)
        check("XPos", "scale_base", self.scale_base, 0.1 <= self.scale_base <= 1e9, "from 0.1 to 1e9")
        check("XPos", "centre", self.centre, self.centre >= 0, ">= 0")

    def reach(self, dtype: Any) -> int:
        """The largest distance from the centre at which scaled features keep full precision in `dtype`.

        Up to this distance the factors and their inverses stay a factor of 1 / eps inside the range of
        `dtype`, so that features from eps to 1 / eps neither overflow nor become subnormal. For float32 and
        scale_base 512 it is 29,178 positions.
        """
        limits = jnp.finfo(dtype if jnp.dtype(dtype).itemsize <= 4 else jnp.float32)
        log_range = min(math.log(float(limits.max)), -math.log(float(limits.tiny))) + math.log(
            float(limits.eps)
        )
        return int(log_range * self.scale_base / math.log(1.4 / 0.4))

    def gain(self, positions_BT: jax.Array, width: int, dtype: Any) -> jax.Array:
        """The factors of queries, float32 or wider [B, T, width / 2]; NaN beyond `reach`. Keys use the inverse."""
        wide = accumulator(dtype)
        zeta = (np.arange(0, width, 2) / width + 0.4) / 1.4
        # Invalid slots (position < 0) get finite factors, so that no NaN reaches a gradient there.
        offset_BT = jnp.where(positions_BT < 0, 0, positions_BT - self.centre)
        offset_BT = jnp.where(jnp.abs(offset_BT) > self.reach(dtype), jnp.nan, offset_BT.astype(wide))
        # A query's exponent and a key's cancel. The error of a float32 exponent grows with the offset, so that
        # most of it is a product with few bits, which float32 holds, and the rest is small.
        rates = np.log(zeta) / self.scale_base
        bits = max(1, 24 - self.reach(dtype).bit_length())
        unit = 2.0 ** (np.ceil(np.log2(np.abs(rates).max())) - bits)
        high = np.round(rates / unit) * unit
        high, low = (offset_BT[..., None] * x.astype(wide)[None, None] for x in (high, rates - high))
        return jnp.exp(high) * jnp.exp(low)


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding over the first `width` features of each head.

    `rope(x, positions)` rotates queries or keys. With `xpos` the two differ: use `rope.queries` and `rope.keys`.
    """

    __pydantic_config__ = FORBID

    theta: float = 10000.0  #: base of the wavelengths
    width: int | None = None  #: rotated features of each head, even; null: all of them
    #: half: pairs (j, j + width/2), as Llama and GPT-NeoX; interleaved: (2j, 2j + 1), as GPT-J and RoFormer
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling | None = None  #: context extension beyond the trained length; null: none
    xpos: XPos | None = None  #: scores that decay with distance; null: off

    def __post_init__(self):
        check_choices(self)
        if self.width is not None and (self.width < 2 or self.width % 2):
            raise ValueError(f"RoPE width must be even and >= 2, got {self.width}")
        if not 1 <= self.theta <= 1e15:
            raise ValueError(
                f"RoPE theta must be from 1 to 1e15, got {self.theta}: it is the base of the wavelengths"
            )

    def rotated_width(self, head_dim: int) -> int:
        """The number of rotated features of a head of `head_dim`; ValueError if it does not fit the head."""
        width = head_dim if self.width is None else self.width
        if width % 2:
            raise ValueError(
                f"RoPE rotates feature pairs, but head_dim {head_dim} is odd: set an even rope.width"
            )
        if width > head_dim:
            raise ValueError(f"RoPE width {width} exceeds head_dim {head_dim}: lower rope.width")
        if self.scaling is not None:
            self.scaling.frequencies(self.theta, width)  # raises if the scaling does not fit the width
        return width

    def frequencies(self, head_dim: int) -> np.ndarray:
        """The angle per position of each pair, float64 [rotated width / 2]."""
        width = self.rotated_width(head_dim)
        if self.scaling is None:
            return plain_frequencies(self.theta, width)
        return self.scaling.frequencies(self.theta, width)

    @property
    def attention_factor(self) -> float:
        """The factor of cosines and sines: 1 except for YaRN and LongRoPE."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    @property
    def softmax_factor(self) -> float:
        """The factor of the softmax scale in latent attention (MLA): 1 except for YaRN with mscale_all_dim."""
        return 1.0 if self.scaling is None else self.scaling.softmax_factor

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x [B, T, heads, H] rotated to its positions [B or 1, T], in the dtype of x."""
        if self.xpos is not None:
            raise ValueError(
                "RoPE with xpos treats queries and keys differently: call rope.queries or rope.keys"
            )
        return self._rotate(x_BTNH, positions_BT, self.attention_factor)

    def queries(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Queries rotated to their positions and, with `xpos`, scaled."""
        return self._rotate(q_BTNH, positions_BT, self._gain(q_BTNH, positions_BT, False))

    def keys(self, k_BSKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Keys rotated to their positions and, with `xpos`, scaled inversely to queries."""
        return self._rotate(k_BSKH, positions_BS, self._gain(k_BSKH, positions_BS, True))

    def _gain(self, x_BTNH: jax.Array, positions_BT: jax.Array, inverse: bool) -> Any:
        """The factor of cosines and sines: a number, or float32 or wider [B, T, 1, width / 2]."""
        if self.xpos is None:
            return self.attention_factor
        gain_BTj = self.xpos.gain(positions_BT, self.rotated_width(x_BTNH.shape[-1]), x_BTNH.dtype)
        return self.attention_factor * (1 / gain_BTj if inverse else gain_BTj)[:, :, None]

    def _rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array, gain: Any) -> jax.Array:
        frequencies = self.frequencies(x_BTNH.shape[-1])
        width = 2 * frequencies.size
        rotated, rest = wider(x_BTNH[..., :width]), x_BTNH[..., width:]
        frequencies = frequencies.astype(rotated.dtype)[None, None, None]
        angles = positions_BT.astype(rotated.dtype)[..., None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if not (isinstance(gain, float) and gain == 1.0):
            cos, sin = gain * cos, gain * sin
        if self.layout == "half":
            a, b = jnp.split(rotated, 2, axis=-1)
            rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        else:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(rotated.shape)
        rotated = rotated.astype(x_BTNH.dtype)
        return rotated if width == x_BTNH.shape[-1] else jnp.concatenate([rotated, rest], axis=-1)
