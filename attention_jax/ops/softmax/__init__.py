"""Softmax attention: `dot_product_attention`, its weights and its implementations."""

from attention_jax.ops.softmax.api import attention_weights, dot_product_attention, explain
from attention_jax.ops.softmax.chunked_plan import ChunkedConfig
from attention_jax.ops.softmax.mosaic_gpu.config import HopperTileSizes, MosaicGPUConfig
from attention_jax.ops.softmax.mosaic_tpu.config import MosaicTPUConfig

__all__ = [
    "ChunkedConfig",
    "HopperTileSizes",
    "MosaicGPUConfig",
    "MosaicTPUConfig",
    "attention_weights",
    "dot_product_attention",
    "explain",
]
