"""Differential attention: the difference of two softmax maps, which cancels what both attend to alike.

    y = W_o concat_n (1 - lambda_init) RMSNorm((softmax(q1 k1^T / sqrt(H)) - lambda softmax(q2 k2^T / sqrt(H))) v)
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init

Ye et al. 2024, "Differential Transformer" (arXiv 2410.05258). q1, q2, k1, k2 have width H, v has 2 H. Two calls
of the attention op share v; the norm is over each head's 2 H features, with one learned scale for all heads.
"""

from __future__ import annotations

import dataclasses
import math
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
    head_width,
    parse_mask,
    positions_of,
    recall,
    split_heads,
    zero_invalid,
)
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class DifferentialAttentionConfig:
    """Differential self-attention; `kind: differential`."""

    about = About("Differential attention", "arXiv 2410.05258", "O(2 T^2)", cache="by the mask")
    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    kind: Literal["differential"] = "differential"  #: the mixer
    num_heads: int = 2  #: differential heads (N), each of two query heads; half of a plain model's
    num_kv_heads: int | None = None  #: differential key-value heads (K), a divisor; null: num_heads
    head_dim: int | None = None  #: width of q1, q2, k1, k2 (H), values 2 H; null: d_model / num_heads / 2
    lambda_init: float = 0.8  #: in (0, 1); the paper's by depth: 0.8 - 0.6 exp(-0.3 layer), layer from 0
    mask: Mask | str = Full()  #: which pairs see each other; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    use_bias: bool = False  #: biases in the projections
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        parse_mask(self)
        check_options(self)
        if not 0 < self.lambda_init < 1:
            raise ValueError(f"lambda_init must be in (0, 1), got {self.lambda_init}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        del causal  # a causal model intersects the mask with Causal()
        head_dim = head_width(d_model, 2 * self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> DifferentialAttention:
        """The mixer; `module` holds dtype and initialisers."""
        return build_within(self, DifferentialAttention, d_model, rngs, causal, module)


class DifferentialAttention(nnx.Module):
    """The difference of two softmax attentions over shared values."""

    def __init__(
        self,
        d_model: int,
        config: DifferentialAttentionConfig,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        N = config.num_heads
        self.kv_heads = K = N if config.num_kv_heads is None else config.num_kv_heads
        self.head_dim = H = head_width(d_model, 2 * N, config.head_dim)
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        for name, width in {"q": 2 * N * H, "k": 2 * K * H, "v": 2 * K * H}.items():
            setattr(self, name, linear(d_model, width, kernel_init=kernel_init, **common))
        self.out = linear(2 * N * H, d_model, kernel_init=out_init or kernel_init, **common)
        init = nnx.initializers.normal(0.1)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nnx.Param(init(rngs.params(), (H,), jnp.float32)))
        self.head_norm = nnx.RMSNorm(2 * H, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, state: KVCache | None = None, *, ctx: Context
    ) -> tuple[jax.Array, KVCache | None]:
        """y [B, T, D] and the state with x appended."""
        config, H = self.config, self.head_dim
        # An empty slot's NaN would reach the parameters' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        q, k, v = together([self.q, self.k, self.v], x_BTD)
        # Heads 2n and 2n + 1 are the pair of differential head n.
        q_BTNH, k_BTKH = split_heads(q, H), split_heads(k, H)
        if config.rope is not None:
            positions_BT = positions_of(ctx, x_BTD.shape[1])
            q_BTNH, k_BTKH = config.rope.queries(q_BTNH, positions_BT), config.rope.keys(k_BTKH, positions_BT)
        keys, state = recall(state, ctx, k_BTKH, split_heads(v, 2 * H))
        first, second = (
            keys.attend(
                q_BTNH[:, :, i::2], k=keys.k_BSKH[:, :, i::2], mask=config.mask, impl=config.impl
            ).astype(jnp.float32)
            for i in (0, 1)
        )
        y_BTNM = self.head_norm(first - self._lambda() * second) * (1 - config.lambda_init)
        y_BTE = y_BTNM.astype(self.dtype).reshape(*x_BTD.shape[:2], -1)
        return zero_invalid(self.out(y_BTE), ctx), state

    def _lambda(self) -> jax.Array:
        first = jnp.exp((self.lambda_q1[...] * self.lambda_k1[...]).sum())
        second = jnp.exp((self.lambda_q2[...] * self.lambda_k2[...]).sum())
        return first - second + self.config.lambda_init

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> KVCache:
        """An empty cache for `capacity` tokens a row."""
        del memory
        K, H = self.kv_heads, self.head_dim
        return KVCache.empty(
            batch, capacity, 2 * K, H, 2 * H, value_heads=K, mask=self.config.mask, dtype=dtype or self.dtype
        )


def lambda_of_depth(layer: int) -> float:
    """The paper's lambda_init of a layer counted from 0: 0.8 - 0.6 exp(-0.3 layer)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)
