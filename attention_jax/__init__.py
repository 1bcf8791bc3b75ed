"""attention_jax: attention mechanisms in JAX.

One alphabet, in names, einsums and annotations: B batch, T query length, S key length, N query heads, K kv
heads, G = N/K, H head width, M value width, D model width, F feed-forward width, V vocabulary, C chunk,
L layers. An array's name ends in its axes: `q_BTNH`, `logits_BTV`.
"""

from attention_jax import biases, caches, masks, positions
from attention_jax.biases import ALiBi, Bias
from attention_jax.generate import Sampling
from attention_jax.masks import Causal, Full, Mask, Sinks, SlidingWindow
from attention_jax.mixers import Attention, AttentionConfig, Context, CrossAttentionConfig
from attention_jax.model import LanguageModel, ModelConfig, apply, init_params
from attention_jax.ops.softmax import dot_product_attention, explain
from attention_jax.positions import RoPE

__all__ = [
    "ALiBi",
    "Attention",
    "AttentionConfig",
    "Bias",
    "Causal",
    "Context",
    "CrossAttentionConfig",
    "Full",
    "LanguageModel",
    "Mask",
    "ModelConfig",
    "RoPE",
    "Sampling",
    "Sinks",
    "SlidingWindow",
    "apply",
    "biases",
    "caches",
    "dot_product_attention",
    "explain",
    "init_params",
    "masks",
    "positions",
]
