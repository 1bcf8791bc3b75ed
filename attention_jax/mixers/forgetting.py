"""Forgetting attention: softmax attention whose scores decay by data-dependent forget gates.

    f_t = sigmoid(w_f x_t + b_f) per head,   c_t = sum_{l <= t} log f_l
    y = W_o concat_n softmax(q_n k^T * scale + (c_t - c_s) + mask) v

Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate" (arXiv 2503.02130). The decay
is a `Bias` with one leaf per query and one per key, so that every implementation evaluates it block by
block; in the cache each key keeps its own c_s. The paper uses no position code, and neither does this. c is a
float32 sum over the whole row: where it reaches 4096, c_t - c_s is known to 2^-11.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.biases import Axes, Bias
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
    recall,
    split_heads,
    valid_tokens,
    zero_invalid,
)


@dataclasses.dataclass(frozen=True)
class ForgettingAttentionConfig:
    """Self-attention with forget gates; `kind: forgetting`. Causal models only."""

    about = About(
        "Forgetting attention", "arXiv 2503.02130", "O(T^2)", cache="by the mask, and a sum per key and head"
    )
    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    kind: Literal["forgetting"] = "forgetting"  #: the mixer
    num_heads: int = 4  #: query heads (N), each with its own forget gate
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    mask: Mask | str = Full()  #: which pairs see each other, beside Causal()
    qk_norm: Literal["rms", "l2"] | None = None  #: normalise queries and keys; null: neither
    use_bias: bool = False  #: biases in the projections (the gate always has one)
    gate_bias: float = 0.0  #: initial bias of the gates; larger: remembers longer at first
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        parse_mask(self)
        check_options(self)
        if not math.isfinite(self.gate_bias):
            raise ValueError(f"gate_bias must be finite, got {self.gate_bias}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        if not causal:
            raise ValueError(
                "forgetting attention is causal: a key is forgotten by the tokens after it; causal is false"
            )
        if self.mask.prefix:
            raise ValueError(
                f"forgetting attention cannot show a prefix to the tokens before it: mask {self.mask}"
            )
        head_width(d_model, self.num_heads, self.head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> ForgettingAttention:
        """The mixer; `module` holds dtype and initialisers."""
        return build_within(self, ForgettingAttention, d_model, rngs, causal, module)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgetBias(Bias):
    """c_t - c_s, the log of what remains of key s at query t: leaves [B, T, N] and [B, S, N]."""

    queries_BTN: Any
    keys_BSN: Any

    def axes(self):
        return Axes(batch=0, query=1), Axes(batch=0, key=1)

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        # Clipped indices are never out of range; the default would fill with NaN.
        q_BTN, k_BSN = (jnp.take(x, heads_N, axis=2, mode="clip") for x in (self.queries_BTN, self.keys_BSN))
        return q_BTN.transpose(0, 2, 1)[..., None] - k_BSN.transpose(0, 2, 1)[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgettingState:
    """The cache, each key with its c_s [B, S, N], and c of the newest token, [B, N] float32."""

    cache: KVCache
    total_BN: jax.Array


class ForgettingAttention(nnx.Module):
    """Softmax self-attention with a forget gate per head."""

    def __init__(
        self,
        d_model: int,
        config: ForgettingAttentionConfig,
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
        for name, width in {"q": N * H, "k": self.kv_heads * H, "v": self.kv_heads * H}.items():
            setattr(self, name, linear(d_model, width, kernel_init=kernel_init, **common))
        # Sums over the whole context need float32, whatever the layers compute in.
        self.gate = linear(
            d_model, N, use_bias=True, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs,
            bias_init=nnx.initializers.constant(config.gate_bias),
        )  # fmt: skip
        self.out = linear(N * H, d_model, kernel_init=out_init or kernel_init, **common)
        self.q_norm, self.k_norm = (head_norm(config.qk_norm, H, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(
        self, x_BTD: jax.Array, state: ForgettingState | None = None, *, ctx: Context
    ) -> tuple[jax.Array, ForgettingState | None]:
        """y [B, T, D] and the state with x appended."""
        config = self.config
        # An empty slot's NaN would reach the parameters' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        q, k, v = together([self.q, self.k, self.v], x_BTD)
        q_BTNH = split_heads(q, self.head_dim, self.q_norm)
        k_BTKH = split_heads(k, self.head_dim, self.k_norm)
        log_f_BTN = jax.nn.log_sigmoid(self.gate(x_BTD))
        valid_BT = valid_tokens(ctx)
        if valid_BT is not None:
            log_f_BTN = jnp.where(valid_BT[..., None], log_f_BTN, 0.0)
        # Packed documents share one running sum: within a document only differences count.
        c_BTN = jnp.cumsum(log_f_BTN, axis=1)
        if state is not None:
            c_BTN = c_BTN + state.total_BN[:, None]
        cache = None if state is None else state.cache
        keys, cache = recall(cache, ctx, k_BTKH, split_heads(v, self.head_dim), extra=c_BTN)
        y_BTNH = keys.attend(
            q_BTNH,
            mask=config.mask,
            bias=ForgetBias(c_BTN, keys.extra),
            impl=config.impl,
            **dropout_options(config.dropout, ctx),
        )
        y_BTD = zero_invalid(self.out(y_BTNH.reshape(*y_BTNH.shape[:2], -1)), ctx)
        return y_BTD, None if cache is None else ForgettingState(cache, c_BTN[:, -1])

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> ForgettingState:
        """An empty state for `capacity` tokens a row."""
        del memory
        N, H = self.config.num_heads, self.head_dim
        cache = KVCache.empty(
            batch, capacity, self.kv_heads, H, H, mask=self.config.mask, dtype=dtype or self.dtype,
            extra=jax.ShapeDtypeStruct((N,), jnp.float32),
        )  # fmt: skip
        return ForgettingState(cache, jnp.zeros((batch, N), jnp.float32))
