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
from attention_jax.mixers.base import Context, MixerOutput, Parts
from attention_jax.mixers.parts import enter, merge_heads, update_cache, zero_invalid
from attention_jax.mixers.softmax_parts import BiasedAttention, BiasedAttentionConfig


@dataclasses.dataclass(frozen=True)
class GatedAttentionConfig(BiasedAttentionConfig):
    """Self-attention with an output gate; `kind: gated`."""

    about = About("Gated attention", "arXiv 2505.06708", "O(T^2)", cache="by the mask")

    kind: Literal["gated"] = "gated"  #: the mixer
    gate: Literal["elementwise", "headwise"] = "elementwise"  #: a gate per feature or one per head


class GatedAttention(BiasedAttention):
    """Softmax self-attention with an output gate."""

    config_type = GatedAttentionConfig

    def setup_gates(self, parts: Parts) -> None:
        """Create the gate."""
        config, N = self.config, self.config.num_heads
        width = N * self.value_dim if config.gate == "elementwise" else N
        self.gate = parts.linear(self.d_model, width, use_bias=config.use_bias)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache with x appended."""
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q_BTNH, k_BTKH, v_BTKH, (gate,) = self._project(x_BTD, ctx, self.gate)
        view, state = update_cache(state, ctx, k_BTKH, v_BTKH)
        y_BTNH, aux = view.attend(q_BTNH, ctx, **self._options())
        # A gate per head broadcasts over the features of the head.
        gate_BTNG = rearrange(nnx.sigmoid(gate), "b t (n g) -> b t n g", n=self.config.num_heads)
        y_BTD = self.out(merge_heads(y_BTNH * gate_BTNG))
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)
