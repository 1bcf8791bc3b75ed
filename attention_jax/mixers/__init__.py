"""Sequence mixers: a frozen config and a module each. `MixerConfig` is the union YAML chooses from."""

import dataclasses
import difflib
import typing

import jax.numpy as jnp
from flax import nnx

from attention_jax.mixers.attention import (
    Attention,
    AttentionConfig,
    CrossAttention,
    CrossAttentionConfig,
)
from attention_jax.mixers.base import Context, Mixer
from attention_jax.mixers.deltanet import (
    DeltaNet,
    DeltaNetConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    KDAConfig,
    KimiDeltaAttention,
)
from attention_jax.mixers.differential import DifferentialAttention, DifferentialAttentionConfig
from attention_jax.mixers.forgetting import ForgettingAttention, ForgettingAttentionConfig
from attention_jax.mixers.gated import GatedAttention, GatedAttentionConfig
from attention_jax.mixers.gla import GatedLinearAttention, GLAConfig
from attention_jax.mixers.lightning import LightningAttention, LightningConfig
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
from attention_jax.mixers.linformer import Linformer, LinformerConfig
from attention_jax.mixers.mamba2 import Mamba2, Mamba2Config
from attention_jax.mixers.mla import LatentAttention, LatentAttentionConfig
from attention_jax.mixers.nsa import NSA, NSAConfig
from attention_jax.mixers.nystromformer import Nystromformer, NystromformerConfig
from attention_jax.mixers.performer import Performer, PerformerConfig
from attention_jax.mixers.retention import Retention, RetentionConfig

MixerConfig = (
    AttentionConfig
    | CrossAttentionConfig
    | GatedAttentionConfig
    | ForgettingAttentionConfig
    | DifferentialAttentionConfig
    | LatentAttentionConfig
    | NSAConfig
    | RetentionConfig
    | GLAConfig
    | LightningConfig
    | Mamba2Config
    | DeltaNetConfig
    | GatedDeltaNetConfig
    | KDAConfig
    | LinearAttentionConfig
    | PerformerConfig
    | CosformerConfig
    | BasedConfig
    | HedgehogConfig
    | LinformerConfig
    | NystromformerConfig
)


def mixer_kinds() -> dict[str, type]:
    """The config class of every mixer `kind`."""
    return {cls.kind: cls for cls in typing.get_args(MixerConfig)}


def make_mixer(
    kind: str, d_model: int, *, rngs: nnx.Rngs, causal: bool = False, dtype=jnp.float32, **options
) -> Mixer:
    """The mixer of a `kind`: `mixer(x_BTD, state, ctx=Context()) -> (y_BTD, state)`.

    options: the fields of the kind's config, such as num_heads. causal: intersects its mask with Causal().
    Raises: ValueError naming an unknown kind or option, or what does not fit together.
    """
    kinds = mixer_kinds()
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, 1, 0)[0]
        raise ValueError(f"no mixer {kind!r}; did you mean {near!r}? There are {', '.join(kinds)}")
    known = [f.name for f in dataclasses.fields(kinds[kind]) if f.name != "kind"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(f"mixer {kind!r} has no option {name!r}; did you mean {near!r}?")
    if d_model < 1:
        raise ValueError(f"d_model must be >= 1, got {d_model}")
    return kinds[kind](**options).build(d_model, rngs, causal=causal, dtype=dtype)


__all__ = [
    "Attention",
    "AttentionConfig",
    "Based",
    "BasedConfig",
    "Context",
    "Cosformer",
    "CosformerConfig",
    "CrossAttention",
    "CrossAttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "DifferentialAttention",
    "DifferentialAttentionConfig",
    "ForgettingAttention",
    "ForgettingAttentionConfig",
    "GatedAttention",
    "GatedAttentionConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedLinearAttention",
    "GLAConfig",
    "KDAConfig",
    "KimiDeltaAttention",
    "LatentAttention",
    "LatentAttentionConfig",
    "LightningAttention",
    "LightningConfig",
    "Mamba2",
    "Mamba2Config",
    "Hedgehog",
    "HedgehogConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "Linformer",
    "LinformerConfig",
    "Mixer",
    "MixerConfig",
    "NSA",
    "NSAConfig",
    "Retention",
    "RetentionConfig",
    "Performer",
    "PerformerConfig",
    "Nystromformer",
    "NystromformerConfig",
    "make_mixer",
    "mixer_kinds",
]
