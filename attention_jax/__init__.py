"""attention_jax: attention mechanisms in JAX.

Axis letters, in names, einsums and annotations: B batch, T query length, S key length, N query heads, K kv
heads, G = N/K, H head width, M value width, D model width, F feed-forward or feature-map width, V vocabulary,
C chunk, L layers, R latent width, P rotary width, U cached inputs of a convolution. Any other letter is
defined where it is used. An array's name ends in its axes: `q_BTNH`, `logits_BTV`.
"""

from attention_jax import biases, caches, drop_in, feature_maps, masks, positions
from attention_jax.biases import T5, ALiBi, ALiBiConfig, Bias
from attention_jax.catalogue import catalogue
from attention_jax.feed_forwards import DenseConfig
from attention_jax.generation import Completion, Sampling, generate, score, stream
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
    RandomBlocks,
    Sinks,
    SlidingWindow,
    Strided,
)
from attention_jax.mixers import *  # noqa: F403 (its __all__)
from attention_jax.mixers import __all__ as _mixers
from attention_jax.model import (
    BlockConfig,
    EncoderConfig,
    LanguageModel,
    ModelConfig,
    apply,
    encode,
    init_params,
)
from attention_jax.ops.selected import selected_attention
from attention_jax.ops.softmax import dot_product_attention, explain
from attention_jax.positions import RoPE

__version__ = "0.1.0"  # read by setup.cfg, too

__all__ = [
    *_mixers,
    "ALiBi",
    "ALiBiConfig",
    "Bias",
    "BigBird",
    "BlockConfig",
    "BlockLocal",
    "Causal",
    "Chunked",
    "Completion",
    "Dense",
    "DenseConfig",
    "Dilated",
    "EncoderConfig",
    "Full",
    "Global",
    "LanguageModel",
    "Longformer",
    "Mask",
    "ModelConfig",
    "Predicate",
    "Prefix",
    "RandomBlocks",
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
    "drop_in",
    "encode",
    "explain",
    "feature_maps",
    "generate",
    "init_params",
    "masks",
    "positions",
    "score",
    "selected_attention",
    "stream",
]
