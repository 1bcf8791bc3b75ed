"""Softmax attention as a mixer: MHA, GQA and MQA; self and cross; any mask, parallel or cached.

    y = W_o concat_n softmax(q_n k_g(n)^T * scale + bias + mask) v_g(n),   g(n) = n // (num_heads / num_kv_heads)

Vaswani et al. 2017 (arXiv 1706.03762); MQA: Shazeer 2019 (1911.02150); GQA: Ainslie et al. 2023 (2305.13245).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.biases import T5, ALiBi
from attention_jax.caches import KVCache, MemoryCache
from attention_jax.layers import linear, together
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import (
    Keys,
    check_options,
    dropout_options,
    head_norm,
    head_width,
    parse_mask,
    positions_of,
    recall,
    split_heads,
    within,
    zero_invalid,
)
from attention_jax.positions import RoPE, Temperature

_FORBID = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Self-attention; `kind: softmax`."""

    about = About(
        "Softmax attention: MHA, GQA, MQA", "arXiv 1706.03762, 2305.13245", "O(T^2)", cache="by the mask"
    )
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
    #: additive score term; alibi: fixed slopes over distance; t5: a learned table of relative positions
    bias: Literal["alibi", "t5"] | T5 | None = None
    temperature: Temperature | None = None  #: sharper queries far into a text; null: off
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
        parse_mask(self)
        if self.bias == "t5":
            object.__setattr__(self, "bias", T5())
        check_options(self)
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be finite and > 0, got {self.softcap}; null switches it off")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        del causal  # a causal model intersects the mask with Causal()
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Attention:
        """The mixer; `module` holds dtype and initialisers."""
        return Attention(d_model, rngs=rngs, **self._arguments(d_model, causal), **module)

    def _arguments(self, d_model: int, causal: bool) -> dict[str, Any]:
        """What the module takes by name, checked."""
        self.check(d_model, causal=causal)
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "kind"}
        return arguments | {"mask": within(self.mask, causal)}


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig(AttentionConfig):
    """Attention over an encoder's memory; `kind: cross`."""

    about = About("Cross-attention", "arXiv 1706.03762", "O(T S)", "O(T + S)", "the memory's keys, once")

    kind: Literal["cross"] = "cross"  #: the mixer

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> CrossAttention:
        """The mixer; a causal model may see the whole memory."""
        del causal
        return CrossAttention(d_model, rngs=rngs, **self._arguments(d_model, causal=False), **module)


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
        bias: Literal["alibi", "t5"] | T5 | None = None,
        temperature: Temperature | None = None,
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
        self.head_dim = head_width(d_model, num_heads, head_dim)
        self.mask, self.rope, self.cross, self.dropout = mask, rope, cross, dropout
        self.softcap, self.scale, self.impl, self.dtype = softcap, scale, impl, dtype
        self.bias = ALiBi(num_heads) if bias == "alibi" else T5() if bias == "t5" else bias
        if isinstance(self.bias, T5):
            self.bias = self.bias.over(mask.causal)
        self.temperature = temperature
        kv_width = self.num_kv_heads * self.head_dim

        common = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.q = linear(d_model, num_heads * self.head_dim, kernel_init=kernel_init, **common)
        self.k = linear(d_model, kv_width, kernel_init=kernel_init, **common)
        self.v = linear(d_model, kv_width, kernel_init=kernel_init, **common)
        self.out = linear(num_heads * self.head_dim, d_model, kernel_init=out_init or kernel_init, **common)
        self.q_norm, self.k_norm = (
            head_norm(qk_norm, self.head_dim, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.sinks = nnx.Param(jnp.zeros((num_heads,), jnp.float32)) if sinks else None
        table = None
        if isinstance(self.bias, T5):
            table = nnx.initializers.normal(0.02)(rngs.params(), (self.bias.buckets, num_heads), jnp.float32)
        self.bias_table = None if table is None else nnx.Param(table)

    def __call__(
        self, x_BTD: jax.Array, state: KVCache | MemoryCache | None = None, *, ctx: Context
    ) -> tuple[jax.Array, KVCache | MemoryCache | None]:
        """y [B, T, D] and the state with x appended (unchanged for a memory, None for None)."""
        # An empty slot's NaN would reach the parameters' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        if self.cross:
            return self._cross(x_BTD, state, ctx)
        q, k, v = together([self.q, self.k, self.v], x_BTD)
        q_BTNH = self._queries(split_heads(q, self.head_dim, self.q_norm), ctx)
        k_BTKH = self._keys(split_heads(k, self.head_dim, self.k_norm), ctx)
        keys, state = recall(state, ctx, k_BTKH, split_heads(v, self.head_dim))
        return self._output(keys, q_BTNH, ctx), state

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

    def _queries(self, q_BTNH: jax.Array, ctx: Context) -> jax.Array:
        positions_BT = positions_of(ctx, q_BTNH.shape[1])
        q_BTNH = q_BTNH if self.rope is None else self.rope.queries(q_BTNH, positions_BT)
        return q_BTNH if self.temperature is None else self.temperature(q_BTNH, positions_BT)

    def _keys(self, k_BSKH: jax.Array, ctx: Context) -> jax.Array:
        return k_BSKH if self.rope is None else self.rope.keys(k_BSKH, positions_of(ctx, k_BSKH.shape[1]))

    def _cross(self, x_BTD, state: MemoryCache | None, ctx: Context):
        if state is not None:
            k, v, k_positions = state.k_BSKH, state.v_BSKM, state.positions_BS
        elif ctx.memory_BSD is None:
            raise ValueError("cross-attention needs ctx.memory_BSD: an encoder's output to attend to")
        else:
            k_positions = ctx.memory_positions_BS
            k, v = self._memory(ctx.memory_BSD, k_positions)
        q_BTNH = self._queries(split_heads(self.q(x_BTD), self.head_dim, self.q_norm), ctx)
        keys = Keys(k, v, None, ctx.positions_BT, k_positions, None, None)
        return self._output(keys, q_BTNH, ctx), state

    def _memory(self, memory_BSD, positions_BS):
        ctx = Context(positions_BT=positions_BS)
        k, v = together([self.k, self.v], zero_invalid(memory_BSD, ctx))
        k_BSKH = self._keys(split_heads(k, self.head_dim, self.k_norm), ctx)
        return k_BSKH, split_heads(v, self.head_dim)

    def _output(self, keys: Keys, q_BTNH: jax.Array, ctx: Context) -> jax.Array:
        y_BTNH = keys.attend(
            q_BTNH,
            mask=self.mask,
            bias=self.bias if self.bias_table is None else self.bias.of(self.bias_table[...]),
            scale=self.scale,
            softcap=self.softcap,
            sink_logits_N=None if self.sinks is None else self.sinks[...],
            impl=self.impl,
            **dropout_options(self.dropout, ctx),
        )
        return zero_invalid(self.out(y_BTNH.reshape(*y_BTNH.shape[:2], -1)), ctx)


class CrossAttention(Attention):
    """`Attention` over `ctx.memory_BSD`, an encoder's output."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, **options):
        super().__init__(d_model, cross=True, rngs=rngs, **options)
