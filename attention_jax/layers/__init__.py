"""Layers that every module uses."""

from attention_jax.layers.linear import gelu, linear, matmul, together

__all__ = ["gelu", "linear", "matmul", "together"]
