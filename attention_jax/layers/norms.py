"""Norms of heads and channels: RMS with and without a gate, group norm with one group per head.

    RMSNorm(x) = x / sqrt(mean(x^2) + epsilon) * scale          Zhang & Sennrich 2019 (arXiv 1910.07467)

All statistics are computed in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def head_norm(kind: Literal["rms", "l2"] | None, head_dim: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
    """The norm of a head's features [..., H]; None if `kind` is None.

    rms: RMS norm with a learned scale. l2: unscaled RMS norm (Llama 4 calls it L2 norm).
    """
    if kind is None:
        return None
    return RMSNorm(head_dim, use_scale=kind == "rms", dtype=dtype, rngs=rngs)


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm`, whose statistics are float32 beside features of any dtype.

    Flax leaves the conversion to NumPy's promotion, which is allowed here whatever
    `jax_numpy_dtype_promotion` is elsewhere.
    """

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """y [..., width] in the layer's dtype, for x [..., width]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **options)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` under any `jax_numpy_dtype_promotion`, as `RMSNorm` is."""

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """y [..., width] in the layer's dtype, for x [..., width]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **options)


class GatedRMSNorm(nnx.Module):
    """RMS norm over the last axis, with a gate.

        after:  y = RMSNorm(x) scale * act(g)          before:  y = RMSNorm(x * act(g)) scale

    gated: apply the gate after the norm (GLA, Gated DeltaNet, lightning attention) or before it (Mamba-2).
    The mean square is taken over each of `groups` equal parts of the axis. Computed in float32.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: Literal["silu", "sigmoid"] = "silu",
        gated: Literal["before", "after"] = "after",
        groups: int = 1,
        epsilon: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs  # the scale is initialised to ones
        self.gate, self.gated, self.groups, self.epsilon, self.dtype = gate, gated, groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """y [..., width], for x and gate [..., width]."""
        x, gate = x.astype(jnp.float32), ACTIVATIONS[self.gate](gate.astype(jnp.float32))
        if self.gated == "before":
            x = x * gate
        parts = rearrange(x, "... (g c) -> ... g c", g=self.groups)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, -1, keepdims=True) + self.epsilon)
        x = parts.reshape(x.shape)
        x = x * jnp.broadcast_to(self.scale[...], x.shape)
        return (x if self.gated == "before" else x * gate).astype(self.dtype)


class HeadGroupNorm(nnx.Module):
    """Group norm with one group per head: (x - mean) / sqrt(var + eps) * scale + bias over its features.

    Up to eps, the output does not change if all features of a head are multiplied by a positive factor.
    """

    def __init__(
        self, heads: int, width: int, *, epsilon: float = 1e-5, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        del rngs  # the scale is initialised to ones, the bias to zeros
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((heads, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((heads, width), jnp.float32))

    def __call__(self, x_BTNM: jax.Array) -> jax.Array:
        """y [..., N, M], for x [..., N, M]; computed in float32."""
        x = x_BTNM.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.broadcast_to(w[...], x.shape) for w in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)
