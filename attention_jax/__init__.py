"""attention_jax: attention mechanisms in JAX.

One alphabet, in names, einsums and annotations: B batch, T query length, S key length, N query heads, K kv
heads, G = N/K, H head width, M value width, D model width, F feed-forward width, V vocabulary, C chunk,
L layers, R latent width, P rotary width, U inputs kept for a convolution. An array's name ends in its axes:
`q_BTNH`, `logits_BTV`.
"""

from attention_jax import biases, caches, masks, positions
from attention_jax.biases import T5, ALiBi, Bias
from attention_jax.catalogue import catalogue
from attention_jax.generate import Sampling
from attention_jax.masks import (
    BigBird,
    BlockLocal,
    Causal,
    Chunked,
    Dense,
    Dilated,
    Full,
    Global,
    Longformer,
    Mask,
    Predicate,
    Prefix,
    Sinks,
    SlidingWindow,
    Strided,
)
from attention_jax.mixers import (
    Attention,
    AttentionConfig,
    Context,
    CrossAttention,
    CrossAttentionConfig,
    DeltaNetConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GatedAttentionConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    KDAConfig,
    LatentAttentionConfig,
    LightningConfig,
    Mamba2Config,
    NSAConfig,
    RetentionConfig,
    make_mixer,
)
from attention_jax.model import EncoderConfig, LanguageModel, ModelConfig, apply, encode, init_params
from attention_jax.ops.selected import selected_attention
from attention_jax.ops.softmax import dot_product_attention, explain
from attention_jax.positions import RoPE

__all__ = [
    "ALiBi",
    "Attention",
    "AttentionConfig",
    "Bias",
    "BigBird",
    "BlockLocal",
    "Causal",
    "Chunked",
    "Context",
    "CrossAttention",
    "CrossAttentionConfig",
    "Dense",
    "DeltaNetConfig",
    "DifferentialAttentionConfig",
    "Dilated",
    "EncoderConfig",
    "ForgettingAttentionConfig",
    "Full",
    "GLAConfig",
    "GatedAttentionConfig",
    "GatedDeltaNetConfig",
    "Global",
    "KDAConfig",
    "LanguageModel",
    "LatentAttentionConfig",
    "LightningConfig",
    "Longformer",
    "Mamba2Config",
    "Mask",
    "ModelConfig",
    "NSAConfig",
    "Predicate",
    "Prefix",
    "RetentionConfig",
    "RoPE",
    "Sampling",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "T5",
    "apply",
    "biases",
    "caches",
    "catalogue",
    "dot_product_attention",
    "encode",
    "explain",
    "init_params",
    "make_mixer",
    "masks",
    "positions",
    "selected_attention",
]
