"""Layers that mixers and the model are built from: projections, norms, short convolutions, feed-forwards."""

from attention_jax.layers.convolution import ShortConvolution
from attention_jax.layers.feed_forward import FeedForward
from attention_jax.layers.linear import fused_linear, gelu, linear, matmul
from attention_jax.layers.norms import GatedRMSNorm, HeadGroupNorm, LayerNorm, RMSNorm, head_norm

__all__ = [
    "FeedForward",
    "GatedRMSNorm",
    "HeadGroupNorm",
    "LayerNorm",
    "RMSNorm",
    "ShortConvolution",
    "fused_linear",
    "gelu",
    "head_norm",
    "linear",
    "matmul",
]
