"""Gated attention: softmax attention whose output is multiplied by a sigmoid gate of the token's features.

    y = W_o (sigmoid(x W_g) * concat_n softmax(q_n k^T * scale + mask) v)

Qiu et al. 2025, "Gated Attention for Large Language Models" (arXiv 2505.06708). The gate is applied between the
attention and its output projection and has one value per feature (elementwise) or per head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from einops import rearrange
from flax import nnx

from attention_jax.about import About
from attention_jax.layers import fused_linear, head_norm
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import (
    SoftmaxMixerConfig,
    enter,
    merge_heads,
    rotate,
    split_heads,
    update_cache,
    zero_invalid,
)
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class GatedAttentionConfig(SoftmaxMixerConfig):
    """Self-attention with an output gate; `kind: gated`."""

    about = About("Gated attention", "arXiv 2505.06708", "O(T^2)", cache="by the mask")

    kind: Literal["gated"] = "gated"  #: the mixer
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    gate: Literal["elementwise", "headwise"] = "elementwise"  #: a gate per feature or one per head
    mask: Mask | str = Full()  #: attention mask; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    qk_norm: Literal["rms", "l2"] | None = None  #: normalise queries and keys; null: neither
    use_bias: bool = False  #: biases in the projections
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best


class GatedAttention(Mixer):
    """Softmax self-attention with an output gate."""

    config_type = GatedAttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, gate, out and the norms of q and k."""
        config = self.config
        N, K = config.num_heads, config.kv_heads
        self.head_dim = H = config.head_width(self.d_model)
        widths = {"q": N * H, "k": K * H, "v": K * H}
        widths["gate"] = N * H if config.gate == "elementwise" else N
        for name, width in widths.items():
            setattr(self, name, parts.linear(self.d_model, width, use_bias=config.use_bias))
        self.out = parts.out(N * H, self.d_model, use_bias=config.use_bias)
        norms = (head_norm(config.qk_norm, H, dtype=self.dtype, rngs=parts.rngs) for _ in range(2))
        self.q_norm, self.k_norm = norms

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache with x appended."""
        config = self.config
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q, k, v, gate = fused_linear([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH = split_heads(q, self.head_dim, self.q_norm)
        k_BTKH = split_heads(k, self.head_dim, self.k_norm)
        q_BTNH, k_BTKH = rotate(config.rope, q_BTNH, k_BTKH, ctx)
        view, state = update_cache(state, ctx, k_BTKH, split_heads(v, self.head_dim))
        y_BTNH, aux = view.attend(q_BTNH, ctx, mask=config.mask, impl=config.impl, dropout=config.dropout)
        # A gate per head broadcasts over the features of the head.
        gate_BTNG = rearrange(nnx.sigmoid(gate), "b t (n g) -> b t n g", n=config.num_heads)
        y_BTD = self.out(merge_heads(y_BTNH * gate_BTNG))
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)
