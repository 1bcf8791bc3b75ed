"""Layers that mixers and the model are built from: projections, norms, short convolutions."""

from attention_jax.layers.convolution import ShortConvolution
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
    "kernel_rows",
    "linear",
    "matmul",
    "prepare_linears",
    "recorded_calls",
    "unit",
]
