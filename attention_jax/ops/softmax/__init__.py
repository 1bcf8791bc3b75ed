"""Softmax attention: `dot_product_attention` and its implementations."""

from attention_jax.ops.softmax.api import dot_product_attention, explain

__all__ = ["dot_product_attention", "explain"]
