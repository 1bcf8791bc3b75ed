"""Sequence mixers: a frozen config and a module each. `MixerConfig` is the union YAML chooses from."""

from attention_jax.mixers.attention import Attention, AttentionConfig, CrossAttentionConfig
from attention_jax.mixers.base import Context, Mixer

MixerConfig = AttentionConfig | CrossAttentionConfig

__all__ = ["Attention", "AttentionConfig", "Context", "CrossAttentionConfig", "Mixer", "MixerConfig"]
