"""Layers that mixers and the model are built from: projections, norms, short convolutions, feed-forwards."""

from attention_jax.layers.convolution import ShortConvolution
from attention_jax.layers.feed_forward import FeedForward, FeedForwardKind, is_gated
from attention_jax.layers.linear import (
    PreparedLinear,
    fused_linear,
    gelu,
    gelu_tanh,
    kernel_rows,
    linear,
    matmul,
    prepare_linears,
    recorded_calls,
)
from attention_jax.layers.norms import (
    GatedRMSNorm,
    HeadGroupNorm,
    HeadNorm,
    LayerNorm,
    RMSNorm,
    head_norm,
    unit,
)

__all__ = [
    "FeedForward",
    "FeedForwardKind",
    "GatedRMSNorm",
    "HeadGroupNorm",
    "HeadNorm",
    "LayerNorm",
    "PreparedLinear",
    "RMSNorm",
    "ShortConvolution",
    "fused_linear",
    "gelu",
    "gelu_tanh",
    "head_norm",
    "is_gated",
    "kernel_rows",
    "linear",
    "matmul",
    "prepare_linears",
    "recorded_calls",
    "unit",
]
