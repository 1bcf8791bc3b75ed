"""The language model: its configuration, stacks of layers, and plain functions over dicts of arrays."""

from attention_jax.model.block_config import BlockConfig
from attention_jax.model.cache_bytes import cache_bytes
from attention_jax.model.config import EncoderConfig, ModelConfig
from attention_jax.model.fingerprint import fingerprint
from attention_jax.model.language_model import (
    LanguageModel,
    ModelOutput,
    apply,
    bind,
    count_params,
    encode,
    init_params,
    init_state,
    prepare_for_decoding,
)
from attention_jax.model.prepared import Prepared

__all__ = [
    "BlockConfig",
    "EncoderConfig",
    "LanguageModel",
    "ModelConfig",
    "ModelOutput",
    "Prepared",
    "apply",
    "bind",
    "cache_bytes",
    "count_params",
    "encode",
    "fingerprint",
    "init_params",
    "init_state",
    "prepare_for_decoding",
]
