"""One layer of the language model.

h' = h + mixer(norm(h)),   h'' = h' + mlp(norm(h'))

The norms may also follow the mixer and the mlp, or stand on both sides: `ModelConfig.norm_order`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.layers import FeedForward, LayerNorm, RMSNorm
from attention_jax.mixers import Context, MixerConfig, MixerOutput
from attention_jax.model.config import ModelConfig


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), with the norms where `config.norm_order` puts them."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, *, causal: bool, rngs: nnx.Rngs):
        common = {
            "dtype": jnp.dtype(config.dtype),
            "kernel_init": weight_init(config),
            "out_init": residual_init(config),
        }
        before, after = config.norm_order != "post", config.norm_order != "pre"
        self.norm1 = make_norm(config, rngs) if before else None
        self.mixer = mixer.build(config.d_model, rngs, causal=causal, **common)
        self.norm2 = make_norm(config, rngs) if before else None
        self.mlp = FeedForward(
            config.d_model,
            config.hidden_width,
            kind=config.mlp,
            use_bias=config.use_bias,
            rngs=rngs,
            **common,
        )
        self.post_norm1, self.post_norm2 = (make_norm(config, rngs) if after else None for _ in range(2))
        self.dropout = config.dropout

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context) -> MixerOutput:
        """The output x of the layer, the state of the mixer, and the arrays named in `ctx.capture`."""
        y_BTD, state, aux = self.mixer.mix(_normalized(self.norm1, x_BTD), state, ctx=ctx.fold_key(0))
        y_BTD = _normalized(self.post_norm1, y_BTD)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(1).dropout_key)
        y_BTD = _normalized(self.post_norm2, self.mlp(_normalized(self.norm2, x_BTD)))
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(2).dropout_key)
        return MixerOutput(x_BTD, state, aux | ctx.captured(hidden=lambda: x_BTD))

    def __call__(self, x_BTD: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """The output x [B, T, D] of the layer for whole rows."""
        return self.mix(x_BTD, None, ctx=ctx or Context()).y


def _normalized(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    """norm(x); x if there is no norm."""
    return x if norm is None else norm(x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with entries dropped at `rate` and the rest scaled by 1 / (1 - rate); unchanged if `key` is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of a layer's mixer or feed-forward, and that before the output projection."""
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
    return LayerNorm(
        config.d_model, epsilon=config.norm_eps, use_bias=config.use_bias, dtype=dtype, rngs=rngs
    )


def weight_init(config: ModelConfig):
    """The initialiser of embeddings and projections."""
    return nnx.initializers.normal(config.init_std)


def residual_init(config: ModelConfig):
    """The initialiser of the projections back to the residual stream."""
    return nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
