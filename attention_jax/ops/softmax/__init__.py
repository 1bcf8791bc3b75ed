"""Softmax attention: `dot_product_attention`, its weights and its implementations."""

from attention_jax.ops.softmax.api import attention_weights, dot_product_attention, explain

__all__ = ["attention_weights", "dot_product_attention", "explain"]
