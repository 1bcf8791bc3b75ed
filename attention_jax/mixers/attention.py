"""Softmax attention as a mixer: MHA, GQA and MQA; self and cross; any mask, parallel or cached.

    y = W_o concat_n softmax(q_n k_g(n)^T * scale + bias + mask) v_g(n),   g(n) = n // (num_heads / num_kv_heads)

Vaswani et al. 2017 (arXiv 1706.03762); MQA: Shazeer 2019 (1911.02150); GQA: Ainslie et al. 2023 (2305.13245).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.biases import ALiBi
from attention_jax.caches import KVCache, MemoryCache
from attention_jax.layers import linear, together
from attention_jax.masks import Causal, Full, Mask, parse
from attention_jax.mixers.base import Context
from attention_jax.ops.softmax import dot_product_attention
from attention_jax.positions import RoPE

_FORBID = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Self-attention; `kind: softmax`."""

    __pydantic_config__ = _FORBID

    kind: Literal["softmax"] = "softmax"  #: the mixer
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = (
        None  #: key-value heads (K), a divisor of num_heads; null: num_heads (MHA), 1: MQA
    )
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    mask: Mask | str = (
        Full()
    )  #: which pairs see each other, such as "SlidingWindow(128) | Sinks(4)"; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    bias: Literal["alibi"] | None = None  #: additive score term; alibi: fixed slopes over distance
    qk_norm: Literal["rms", "l2"] | None = (
        None  #: normalise queries and keys: rms (learned scale) or l2; null: neither
    )
    softcap: float | None = None  #: c turns a score x into c tanh(x / c); null: off
    scale: float | None = None  #: multiplies q.k; null: 1 / sqrt(head_dim)
    sinks: bool = False  #: learn a logit per head that joins the softmax denominator only
    use_bias: bool = False  #: biases in the projections
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = (
        None  #: implementation of the attention op by name; null: the best for platform and shape
    )

    def __post_init__(self):
        if isinstance(self.mask, str):
            object.__setattr__(self, "mask", parse(self.mask))
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {self.num_heads}")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads {kv_heads} does not divide num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        del causal  # a causal model intersects the mask with Causal()
        head_dim = _head_dim(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Attention:
        """The mixer; `module` holds dtype and initialisers."""
        self.check(d_model, causal=causal)
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "kind"}
        if causal and not self.mask.causal:
            arguments["mask"] = self.mask & Causal()
        return Attention(d_model, rngs=rngs, **arguments, **module)


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig(AttentionConfig):
    """Attention over an encoder's memory; `kind: cross`."""

    kind: Literal["cross"] = "cross"  #: the mixer

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Attention:
        return super().build(d_model, rngs, causal=False, cross=True, **module)


class Attention(nnx.Module):
    """Multi-head softmax attention over x itself, or over `ctx.memory_BSD` where `cross`."""

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask = Full(),  # noqa: B008 (frozen)
        rope: RoPE | None = None,
        bias: Literal["alibi"] | None = None,
        qk_norm: Literal["rms", "l2"] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        use_bias: bool = False,
        dropout: float = 0.0,
        cross: bool = False,
        impl: str | None = None,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = _head_dim(d_model, num_heads, head_dim)
        self.mask, self.rope, self.cross, self.dropout = mask, rope, cross, dropout
        self.softcap, self.scale, self.impl, self.dtype = softcap, scale, impl, dtype
        self.bias = ALiBi(num_heads) if bias == "alibi" else None
        kv_width = self.num_kv_heads * self.head_dim

        common = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.q = linear(d_model, num_heads * self.head_dim, kernel_init=kernel_init, **common)
        self.k = linear(d_model, kv_width, kernel_init=kernel_init, **common)
        self.v = linear(d_model, kv_width, kernel_init=kernel_init, **common)
        self.out = linear(num_heads * self.head_dim, d_model, kernel_init=out_init or kernel_init, **common)
        self.qk_norm = qk_norm
        if qk_norm == "rms":
            self.q_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs)
            self.k_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), jnp.float32)) if sinks else None

    def __call__(
        self, x_BTD: jax.Array, state: KVCache | MemoryCache | None = None, *, ctx: Context
    ) -> tuple[jax.Array, KVCache | MemoryCache | None]:
        """y [B, T, D] and the state with x appended (unchanged for a memory, None for None)."""
        q_positions = ctx.positions_BT
        if self.cross:
            return self._cross(self._heads(self.q(x_BTD), "q_norm"), state, ctx)
        q, k, v = together([self.q, self.k, self.v], x_BTD)
        q_BTNH, k_BTKH, v_BTKH = self._heads(q, "q_norm"), self._heads(k, "k_norm"), self._heads(v)
        if self.rope is not None:
            positions_BT = jnp.arange(x_BTD.shape[1])[None] if q_positions is None else q_positions
            q_BTNH, k_BTKH = self.rope(q_BTNH, positions_BT), self.rope(k_BTKH, positions_BT)
        if state is None:
            y_BTNH = self._attend(
                q_BTNH, k_BTKH, v_BTKH, ctx, q_positions, q_positions, segment_ids=ctx.segment_ids_BT
            )
            return self._project(y_BTNH, ctx), None
        return self._cached(q_BTNH, k_BTKH, v_BTKH, state, ctx)

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        memory: tuple[jax.Array, jax.Array | None] | None = None,
        dtype=None,
    ) -> KVCache | MemoryCache:
        """An empty cache; for cross-attention the projected memory (memory_BSD, its positions or None)."""
        if not self.cross:
            return KVCache.empty(
                batch, capacity, self.num_kv_heads, self.head_dim, self.head_dim,
                mask=self.mask, dtype=dtype or self.dtype,
            )  # fmt: skip
        if memory is None:
            raise ValueError("cross-attention needs memory=(memory_BSD, memory_positions_BS) in init_state")
        memory_BSD, positions_BS = memory
        k_BSKH, v_BSKH = self._memory(memory_BSD, positions_BS)
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(memory_BSD.shape[1]), memory_BSD.shape[:2])
        return MemoryCache(k_BSKH, v_BSKH, positions_BS)

    def _cached(self, q_BTNH, k_BTKH, v_BTKH, state: KVCache, ctx: Context):
        if ctx.positions_BT is None:
            raise ValueError("a cached call needs ctx.positions_BT: where in the stream its tokens stand")
        if ctx.segment_ids_BT is not None:
            raise ValueError("a cached stream holds one document a row: ctx.segment_ids_BT must be None")
        B, T = q_BTNH.shape[:2]
        if T > state.capacity:
            raise ValueError(f"{T} tokens do not fit a cache of capacity {state.capacity}")
        positions_BT = jnp.broadcast_to(ctx.positions_BT, (B, T))
        grown = state.append(k_BTKH, v_BTKH, positions_BT)
        if T > 1 and state.wraps:
            # Appending may overwrite what the first new tokens still see: read the old ring and the new
            # keys side by side.
            k = jnp.concatenate([state.k_BSKH, k_BTKH.astype(state.k_BSKH.dtype)], axis=1)
            v = jnp.concatenate([state.v_BSKM, v_BTKH.astype(state.v_BSKM.dtype)], axis=1)
            k_positions = jnp.concatenate([state.positions_BS, positions_BT], axis=1)
        else:
            k, v, k_positions = grown.k_BSKH, grown.v_BSKM, grown.positions_BS
        y_BTNH = self._attend(q_BTNH, k, v, ctx, positions_BT, k_positions)
        # A traced position cannot raise; NaN is seen, a silently shortened context is not.
        y_BTNH = jnp.where(state.overflow(positions_BT)[:, :, None, None], jnp.nan, y_BTNH)
        return self._project(y_BTNH, ctx), grown

    def _cross(self, q_BTNH, state: MemoryCache | None, ctx: Context):
        if state is not None:
            k, v, k_positions = state.k_BSKH, state.v_BSKM, state.positions_BS
        elif ctx.memory_BSD is None:
            raise ValueError("cross-attention needs ctx.memory_BSD: an encoder's output to attend to")
        else:
            k_positions = ctx.memory_positions_BS
            k, v = self._memory(ctx.memory_BSD, k_positions)
        if self.rope is not None:
            positions_BT = ctx.positions_BT
            positions_BT = jnp.arange(q_BTNH.shape[1])[None] if positions_BT is None else positions_BT
            q_BTNH = self.rope(q_BTNH, positions_BT)
        return self._project(self._attend(q_BTNH, k, v, ctx, ctx.positions_BT, k_positions), ctx), state

    def _memory(self, memory_BSD, positions_BS):
        k, v = together([self.k, self.v], memory_BSD)
        k_BSKH, v_BSKH = self._heads(k, "k_norm"), self._heads(v)
        if self.rope is not None:
            positions = jnp.arange(memory_BSD.shape[1])[None] if positions_BS is None else positions_BS
            k_BSKH = self.rope(k_BSKH, positions)
        return k_BSKH, v_BSKH

    def _heads(self, y_BTE: jax.Array, norm: str | None = None) -> jax.Array:
        """A projection split into heads, normalised where the config says so."""
        y = y_BTE.reshape(*y_BTE.shape[:2], -1, self.head_dim)
        if norm is None or self.qk_norm is None:
            return y
        if self.qk_norm == "rms":
            return getattr(self, norm)(y)
        y32 = y.astype(jnp.float32)
        return (y32 * jax.lax.rsqrt(jnp.mean(y32 * y32, -1, keepdims=True) + 1e-6)).astype(y.dtype)

    def _attend(self, q, k, v, ctx: Context, q_positions, k_positions, segment_ids=None) -> jax.Array:
        dropout = self.dropout if ctx.dropout_key is not None else 0.0
        return dot_product_attention(
            q, k.astype(q.dtype), v.astype(q.dtype),
            mask=self.mask,
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits_N=None if self.sinks is None else self.sinks[...],
            segment_ids=segment_ids,
            q_positions=q_positions,
            k_positions=k_positions,
            dropout_rate=dropout,
            dropout_key=ctx.dropout_key if dropout else None,
            impl=self.impl,
        )  # fmt: skip

    def _project(self, y_BTNH: jax.Array, ctx: Context) -> jax.Array:
        y_BTD = self.out(y_BTNH.reshape(*y_BTNH.shape[:2], -1))
        return zero_invalid(y_BTD, ctx)


def zero_invalid(y_BTD: jax.Array, ctx: Context) -> jax.Array:
    """y with the rows of invalid tokens selected to 0 (an output bias or their own NaN stays out)."""
    for ids in (ctx.positions_BT, ctx.segment_ids_BT):
        if ids is not None:
            y_BTD = jnp.where((ids >= 0)[..., None], y_BTD, jnp.zeros((), y_BTD.dtype))
    return y_BTD


def _head_dim(d_model: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        if head_dim < 1:
            raise ValueError(f"head_dim must be >= 1, got {head_dim}")
        return head_dim
    if d_model % num_heads:
        raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}; set head_dim")
    return d_model // num_heads
