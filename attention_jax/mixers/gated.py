"""Gated attention: softmax attention whose output passes a sigmoid gate of the token's own features.

    y = W_o (sigmoid(x W_g) * concat_n softmax(q_n k^T * scale + mask) v)

Qiu et al. 2025, "Gated Attention for Large Language Models" (arXiv 2505.06708): the gate stands between the
attention and its output projection, one value per feature (elementwise) or per head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import KVCache
from attention_jax.layers import linear, together
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import (
    build_within,
    check_options,
    dropout_options,
    head_norm,
    head_width,
    parse_mask,
    positions_of,
    recall,
    split_heads,
    zero_invalid,
)
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class GatedAttentionConfig:
    """Self-attention with an output gate; `kind: gated`."""

    about = About("Gated attention", "arXiv 2505.06708", "O(T^2)", cache="by the mask")
    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    kind: Literal["gated"] = "gated"  #: the mixer
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    gate: Literal["elementwise", "headwise"] = "elementwise"  #: a gate per feature or one per head
    mask: Mask | str = Full()  #: which pairs see each other; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    qk_norm: Literal["rms", "l2"] | None = None  #: normalise queries and keys; null: neither
    use_bias: bool = False  #: biases in the projections
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        parse_mask(self)
        check_options(self)

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        del causal  # a causal model intersects the mask with Causal()
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> GatedAttention:
        """The mixer; `module` holds dtype and initialisers."""
        return build_within(self, GatedAttention, d_model, rngs, causal, module)


class GatedAttention(nnx.Module):
    """Softmax self-attention with an output gate."""

    def __init__(
        self,
        d_model: int,
        config: GatedAttentionConfig,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        N = config.num_heads
        self.kv_heads = N if config.num_kv_heads is None else config.num_kv_heads
        self.head_dim = H = head_width(d_model, N, config.head_dim)
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        widths = {"q": N * H, "k": self.kv_heads * H, "v": self.kv_heads * H}
        widths["gate"] = N * H if config.gate == "elementwise" else N
        for name, width in widths.items():
            setattr(self, name, linear(d_model, width, kernel_init=kernel_init, **common))
        self.out = linear(N * H, d_model, kernel_init=out_init or kernel_init, **common)
        self.q_norm, self.k_norm = (head_norm(config.qk_norm, H, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(
        self, x_BTD: jax.Array, state: KVCache | None = None, *, ctx: Context
    ) -> tuple[jax.Array, KVCache | None]:
        """y [B, T, D] and the state with x appended."""
        config = self.config
        # An empty slot's NaN would reach the parameters' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        q, k, v, gate = together([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH = split_heads(q, self.head_dim, self.q_norm)
        k_BTKH = split_heads(k, self.head_dim, self.k_norm)
        if config.rope is not None:
            positions_BT = positions_of(ctx, x_BTD.shape[1])
            q_BTNH, k_BTKH = config.rope.queries(q_BTNH, positions_BT), config.rope.keys(k_BTKH, positions_BT)
        keys, state = recall(state, ctx, k_BTKH, split_heads(v, self.head_dim))
        options = dropout_options(config.dropout, ctx)
        y_BTNH = keys.attend(q_BTNH, mask=config.mask, impl=config.impl, **options)
        # One gate per head broadcasts over its features.
        gate_BTNG = nnx.sigmoid(gate).reshape(*gate.shape[:2], config.num_heads, -1)
        y_BTE = (y_BTNH * gate_BTNG).reshape(*y_BTNH.shape[:2], -1)
        return zero_invalid(self.out(y_BTE), ctx), state

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> KVCache:
        """An empty cache for `capacity` tokens a row."""
        del memory
        H = self.head_dim
        return KVCache.empty(
            batch, capacity, self.kv_heads, H, H, mask=self.config.mask, dtype=dtype or self.dtype
        )
