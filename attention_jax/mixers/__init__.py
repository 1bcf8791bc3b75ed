"""Sequence mixers: a frozen config and a module each. Only this file lists them all.

Importing the module of a mechanism registers its `kind`. Other code uses the traits of its config.
"""

# ruff: noqa: F401, I001 (`__all__` is built from the classes; the import order is the order of the kinds)

from attention_jax.mixers.attention import (
    Attention,
    AttentionConfig,
    CrossAttention,
    CrossAttentionConfig,
)
from attention_jax.mixers.base import (
    CAPTURES,
    Context,
    Mixer,
    MixerConfig,
    MixerOutput,
    Parts,
    make_config,
    make_mixer,
    mixer_kinds,
)
from attention_jax.mixers.gated import GatedAttention, GatedAttentionConfig
from attention_jax.mixers.forgetting import ForgettingAttention, ForgettingAttentionConfig
from attention_jax.mixers.differential import DifferentialAttention, DifferentialAttentionConfig
from attention_jax.mixers.mla import LatentAttention, LatentAttentionConfig
from attention_jax.mixers.nsa import NSA, NSAConfig
from attention_jax.mixers.retention import Retention, RetentionConfig
from attention_jax.mixers.gla import GatedLinearAttention, GLAConfig
from attention_jax.mixers.lightning import LightningAttention, LightningConfig
from attention_jax.mixers.mamba2 import Mamba2, Mamba2Config
from attention_jax.mixers.deltanet import (
    DeltaNet,
    DeltaNetConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    KDAConfig,
    KimiDeltaAttention,
)
from attention_jax.mixers.linear import (
    Based,
    BasedConfig,
    Cosformer,
    CosformerConfig,
    Hedgehog,
    HedgehogConfig,
    LinearAttention,
    LinearAttentionConfig,
)
from attention_jax.mixers.performer import Performer, PerformerConfig
from attention_jax.mixers.linformer import Linformer, LinformerConfig
from attention_jax.mixers.nystromformer import Nystromformer, NystromformerConfig

__all__ = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, (Mixer, MixerConfig))
) + ["CAPTURES", "Context", "MixerOutput", "Parts", "make_config", "make_mixer", "mixer_kinds"]
