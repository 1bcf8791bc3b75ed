"""Granite: Llama with multipliers of the embedding, the branches, the scores and the logits."""

from __future__ import annotations

from attention_jax.feed_forwards import FeedForwardConfig
from attention_jax.masks import Causal
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import TABLE, attention, gated, head_dim, model
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope


def granite(d: Description, feed_forward: FeedForwardConfig) -> ModelConfig:
    """Granite with this feed-forward in every layer."""
    mixer = attention(
        d,
        Causal(),
        rope=read_rope(d, head_dim(d)),
        scale=float(d.number("attention_multiplier", 1.0)),
        use_bias=d.flag("attention_bias", False),
    )
    branch = float(d.number("residual_multiplier", 1.0))
    divisor = d.number("logits_scaling", 1.0)
    if divisor == 0:
        raise ValueError(f"{d.where}: logits_scaling divides the logits, got 0")
    block = BlockConfig(mixer, feed_forward, mixer_scale=branch, feed_forward_scale=branch)
    return model(
        d,
        [block] * d.layers(),
        embedding_scale=float(d.number("embedding_multiplier", 1.0)),
        logit_scale=1 / divisor,
    )


FAMILIES = (Family("Granite 3", ("granite",), lambda d: granite(d, gated(d)), TABLE),)
