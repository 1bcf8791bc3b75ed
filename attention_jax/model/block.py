"""One layer of the language model: its mixer, its feed-forward, and how both join the residual stream.

    h' = h + mixer(norm(h)),   h'' = h' + mlp(norm(h'))

`BlockConfig` has the other forms.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.layers import LayerNorm, RMSNorm
from attention_jax.mixers import Context, MixerOutput
from attention_jax.model.block_config import BlockConfig
from attention_jax.model.config import ModelConfig


class Block(nnx.Module):
    """The layer that `block`, an entry of `ModelConfig.period`, describes."""

    def __init__(self, config: ModelConfig, block: BlockConfig, *, causal: bool, rngs: nnx.Rngs):
        common = {
            "dtype": jnp.dtype(config.dtype),
            "kernel_init": weight_init(config),
            "out_init": residual_init(config),
        }
        self.config, self.dropout = block, config.dropout
        before, after = block.norm_order != "post", block.norm_order in ("post", "sandwich")
        mixer, feed_forward = block.mixer, block.feed_forward

        def norm(needed: bool) -> nnx.Module | None:
            return make_norm(config, rngs) if needed else None

        self.norm1 = norm(mixer is not None and before)
        self.mixer = mixer and mixer.build(config.d_model, rngs, causal=causal, **common)
        self.norm2 = norm(feed_forward is not None and before and not block.shared_norm)
        self.mlp = feed_forward and feed_forward.build(
            config.d_model, rngs, use_bias=config.use_bias, **common
        )
        self.post_norm1 = norm(mixer is not None and after)
        self.post_norm2 = norm(feed_forward is not None and after)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context) -> MixerOutput:
        """The output x of the layer, the state of the mixer, and the arrays named in `ctx.capture`."""
        config, aux = self.config, {}
        if config.parallel:
            x_BTD, state, aux = self._parallel(x_BTD, state, ctx)
        else:
            if self.mixer is not None:
                n_BTD = _normalized(self.norm1, x_BTD)
                y_BTD, state, aux = self.mixer.mix(n_BTD, state, ctx=ctx.fold_key(0))
                y_BTD = _scaled(_normalized(self.post_norm1, y_BTD), config.mixer_scale)
                x_BTD = _scaled(self._residual(x_BTD, n_BTD), config.mixer_residual_scale)
                x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(1).dropout_key)
            if self.mlp is not None:
                n_BTD = _normalized(self.norm2, x_BTD)
                y_BTD, more = self.mlp.run(n_BTD, ctx=ctx, cached=state is not None)
                y_BTD = _scaled(_normalized(self.post_norm2, y_BTD), config.feed_forward_scale)
                x_BTD = _scaled(self._residual(x_BTD, n_BTD), config.feed_forward_residual_scale)
                x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(2).dropout_key)
                aux = aux | more
        return MixerOutput(x_BTD, state, aux | ctx.captured(hidden=lambda: x_BTD))

    def _parallel(self, x_BTD: jax.Array, state: Any, ctx: Context) -> MixerOutput:
        """r x + b_1 mixer(norm1(x)) + b_2 mlp(norm2(x))."""
        config = self.config
        n_BTD = _normalized(self.norm1, x_BTD)
        y_BTD, state, aux = self.mixer.mix(n_BTD, state, ctx=ctx.fold_key(0))
        m_BTD = n_BTD if self.norm2 is None else self.norm2(x_BTD)
        z_BTD, more = self.mlp.run(m_BTD, ctx=ctx, cached=state is not None)
        x_BTD = _scaled(x_BTD, config.mixer_residual_scale)
        for i, (branch_BTD, scale) in enumerate(
            ((y_BTD, config.mixer_scale), (z_BTD, config.feed_forward_scale)), start=1
        ):
            x_BTD = x_BTD + dropout(_scaled(branch_BTD, scale), self.dropout, ctx.fold_key(i).dropout_key)
        return MixerOutput(x_BTD, state, aux | more)

    def _residual(self, x_BTD: jax.Array, n_BTD: jax.Array) -> jax.Array:
        """What a branch is added to: the layer's input, or its norm."""
        return n_BTD if self.config.norm_order == "residual" else x_BTD

    def __call__(self, x_BTD: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """The output x [B, T, D] of the layer for whole rows."""
        return self.mix(x_BTD, None, ctx=ctx or Context()).y


def _normalized(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
    """norm(x); x if there is no norm."""
    return x if norm is None else norm(x)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """scale x; x itself for a scale of 1."""
    return x if scale == 1 else x * scale


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with entries dropped at `rate` and the rest scaled by 1 / (1 - rate); unchanged if `key` is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of a layer's mixer or feed-forward, and that before the output projection."""
    given = {
        "epsilon": config.norm_eps, "offset": config.norm_offset, "dtype": jnp.dtype(config.dtype), "rngs": rngs
    }  # fmt: skip
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, **given)
    use_bias = config.use_bias if config.norm_bias is None else config.norm_bias
    return LayerNorm(config.d_model, use_bias=use_bias, **given)


def weight_init(config: ModelConfig):
    """The initialiser of embeddings and projections."""
    return nnx.initializers.normal(config.init_std)


def residual_init(config: ModelConfig):
    """The initialiser of the projections back to the residual stream."""
    return nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
