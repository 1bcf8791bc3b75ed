"""Norms of heads and channels: RMS with and without a gate, group norm with one group per head.

    RMSNorm(x) = x / sqrt(mean(x^2) + epsilon) * scale          Zhang & Sennrich 2019 (arXiv 1910.07467)

All statistics are computed in the wider of float32 and the dtype of the features. No norm has a default
epsilon: published checkpoints differ in it, and the configs of the mixers say which one a layer has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from attention_jax.dtypes import wider

ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}

#: The norms of the queries and keys of heads; see `head_norm`.
HeadNorm = Literal["rms", "l2", "layer", "rms_per_head", "rms_all_heads", "layer_per_head"]


def head_norm(
    kind: HeadNorm | None,
    heads: int,
    head_dim: int,
    *,
    epsilon: float,
    offset: float = 0.0,
    dtype: Any,
    rngs: nnx.Rngs,
) -> Any:
    """The norm of features [..., heads, H]; None if `kind` is None.

    rms: RMS norm of each head with one learned scale [H]. l2: without a scale (Llama 4 calls it L2 norm).
    layer: layer norm of each head with a learned scale and bias [H]. rms_per_head: RMS norm of each head with
    a scale per head. rms_all_heads: RMS norm of all heads together (OLMo 2). layer_per_head: layer norm of
    each head with a scale per head and no bias (Cohere). offset: that of rms and layer.
    """
    if kind is None:
        return None
    given = {"epsilon": epsilon, "dtype": dtype, "rngs": rngs}
    if kind == "layer":
        return LayerNorm(head_dim, offset=offset, use_fast_variance=False, **given)
    if kind == "layer_per_head":
        return HeadsLayerNorm(heads, head_dim, **given)
    if kind in ("rms_per_head", "rms_all_heads"):
        return HeadsRMSNorm(heads, head_dim, together=kind == "rms_all_heads", **given)
    return RMSNorm(head_dim, offset=offset, use_scale=kind == "rms", **given)


class HeadsRMSNorm(nnx.Module):
    """RMS norm with a learned scale [heads, H], of each head or of all heads together."""

    def __init__(
        self, heads: int, head_dim: int, *, together: bool, epsilon: float, dtype: Any, rngs: nnx.Rngs
    ):
        del rngs  # the scale is initialised to ones
        self.together, self.epsilon, self.dtype = together, epsilon, dtype
        self.scale = nnx.Param(jnp.ones((heads, head_dim), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """y [..., heads, H], for x [..., heads, H]; computed in float32 or wider."""
        x = wider(x)
        axes = (-2, -1) if self.together else -1
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + self.epsilon)
        return (x * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)).astype(self.dtype)


class HeadsLayerNorm(nnx.Module):
    """Layer norm of each head with a learned scale [heads, H] and no bias."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        del rngs  # the scale is initialised to ones
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((heads, head_dim), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """y [..., heads, H], for x [..., heads, H]; computed in float32 or wider."""
        x = wider(x)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return (x * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Promotion:
    """Flax's promotion of (x, scale, ...), under any `jax_numpy_dtype_promotion`, of scale + offset."""

    offset: float

    def __call__(self, arrays: tuple[Any, ...], **options: Any) -> Any:
        x, scale, *rest = arrays
        if self.offset and scale is not None:
            scale = scale + self.offset
        return promote_dtype((x, scale, *rest), **options)


def _with_offset(offset: float) -> dict[str, Any]:
    """Options of a norm of Flax whose scale is `offset` + its parameter, which starts at 1 - offset."""
    options: dict[str, Any] = {"promote_dtype": _Promotion(offset)}
    return options | {"scale_init": nnx.initializers.constant(1.0 - offset)} if offset else options


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm`, whose statistics are float32, or float64 beside such features.

    Flax leaves the conversion to NumPy's promotion, which is allowed here whatever
    `jax_numpy_dtype_promotion` is elsewhere. offset: added to the learned scale, which starts at 1 - offset;
    checkpoints of Gemma hold such scales, with an offset of 1.
    """

    def __init__(self, width: int, *, offset: float = 0.0, **options: Any):
        super().__init__(width, **_with_offset(offset), **options)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """y [..., width] in the layer's dtype, for x [..., width]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **options)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` under any `jax_numpy_dtype_promotion` and with an offset, as `RMSNorm` is."""

    def __init__(self, width: int, *, offset: float = 0.0, **options: Any):
        super().__init__(width, **_with_offset(offset), **options)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """y [..., width] in the layer's dtype, for x [..., width]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **options)


class GatedRMSNorm(nnx.Module):
    """RMS norm over the last axis, with a gate.

        after:  y = RMSNorm(x) scale * act(g)          before:  y = RMSNorm(x * act(g)) scale

    gated: apply the gate after the norm (GLA, Gated DeltaNet, lightning attention) or before it (Mamba-2).
    The mean square is taken over each of `groups` equal parts of the axis. Computed in float32 or wider.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: Literal["silu", "sigmoid"] = "silu",
        gated: Literal["before", "after"] = "after",
        groups: int = 1,
        epsilon: float,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs  # the scale is initialised to ones
        self.gate, self.gated, self.groups, self.epsilon, self.dtype = gate, gated, groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """y [..., width], for x and gate [..., width]."""
        x, gate = wider(x), ACTIVATIONS[self.gate](wider(gate))
        if self.gated == "before":
            x = x * gate
        parts = rearrange(x, "... (g c) -> ... g c", g=self.groups)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, -1, keepdims=True) + self.epsilon)
        x = parts.reshape(x.shape)
        x = x * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)
        return (x if self.gated == "before" else x * gate).astype(self.dtype)


class HeadGroupNorm(nnx.Module):
    """Group norm with one group per head: (x - mean) / sqrt(var + eps) * scale + bias over its features.

    Up to eps, the output does not change if all features of a head are multiplied by a positive factor.
    """

    def __init__(self, heads: int, width: int, *, epsilon: float, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        del rngs  # the scale is initialised to ones, the bias to zeros
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones((heads, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((heads, width), jnp.float32))

    def __call__(self, x_BTNM: jax.Array) -> jax.Array:
        """y [..., N, M], for x [..., N, M]; computed in float32 or wider."""
        x = wider(x_BTNM)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.broadcast_to(w[...].astype(x.dtype), x.shape) for w in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)


def unit(x: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(|x|^2 + epsilon) over the last axis, computed in float32 or wider."""
    wide = wider(x)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)
