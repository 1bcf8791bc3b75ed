"""Softmax attention as a mixer: MHA, GQA and MQA, self- and cross-attention, with any mask.

    y = W_o concat_n softmax(q_n k_g(n)^T * scale + bias + mask) v_g(n),   g(n) = n // (num_heads / num_kv_heads)

Vaswani et al. 2017 (arXiv 1706.03762); MQA: Shazeer 2019 (1911.02150); GQA: Ainslie et al. 2023 (2305.13245).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.biases import T5, ALiBi
from attention_jax.caches import MemoryCache
from attention_jax.choices import ByKind, check_between
from attention_jax.layers import fused_linear, head_norm
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import (
    KVView,
    SoftmaxMixerConfig,
    enter,
    merge_heads,
    positions_of,
    split_heads,
    update_cache,
    zero_invalid,
)
from attention_jax.positions import RoPE, Temperature


@dataclasses.dataclass(frozen=True)
class AttentionConfig(SoftmaxMixerConfig):
    """Self-attention; `kind: softmax`."""

    about = About(
        "Softmax attention: MHA, GQA, MQA",
        "arXiv 1706.03762, 1911.02150, 2305.13245",
        "O(T^2)",
        cache="by the mask",
    )

    kind: Literal["softmax"] = "softmax"  #: the mixer
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = (
        None  #: key-value heads (K), a divisor of num_heads; null: num_heads (MHA), 1: MQA
    )
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    mask: Mask | str = (
        Full()
    )  #: attention mask, such as "SlidingWindow(128) | Sinks(4)"; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    #: additive score term; alibi: fixed slopes over distance; t5: a learned table of relative positions
    bias: Literal["alibi", "t5"] | Annotated[T5, ByKind()] | None = None
    temperature: Temperature | None = None  #: scale queries by position, as Llama 4 does; null: off
    #: normalise queries and keys: rms (learned scale) or l2 (no scale); null: neither
    qk_norm: Literal["rms", "l2"] | None = None
    softcap: float | None = None  #: cap c: replaces a score x by c tanh(x / c); null: off
    scale: float | None = None  #: multiplies q.k; null: 1 / sqrt(head_dim)
    sink_logits: bool = False  #: learn a logit per head that joins the softmax denominator only
    use_bias: bool = False  #: biases in the projections
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = (
        None  #: implementation of the attention op by name; null: the best for platform and shape
    )

    def __post_init__(self):
        if not isinstance(self.sink_logits, bool):
            raise ValueError(
                f"sink_logits must be true or false, got {self.sink_logits!r}; for n sink tokens use the mask "
                "Sinks(n)"
            )
        super().__post_init__()
        if self.bias == "t5":
            object.__setattr__(self, "bias", T5())
        for name, cls in (("rope", RoPE), ("temperature", Temperature)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, cls):
                raise ValueError(f"{name} must be a {cls.__name__} or null, got {value!r}")
        check_between(self, "softcap", 0.1, 1e6, "less caps every score at almost 0, and null turns it off")
        check_between(self, "scale", 1e-6, 1e6, "scores vanish or overflow otherwise", zero=True, signed=True)


class Attention(Mixer):
    """Multi-head softmax self-attention."""

    config_type = AttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, out and the parameters of the options."""
        config, rngs = self.config, parts.rngs
        N, K = config.num_heads, config.kv_heads
        self.head_dim = H = config.head_width(self.d_model)
        self.bias = ALiBi(N) if config.bias == "alibi" else config.bias
        if isinstance(self.bias, T5):
            self.bias = self.bias.over(config.mask.causal)
        for name, heads in (("q", N), ("k", K), ("v", K)):
            setattr(self, name, parts.linear(self.d_model, heads * H, use_bias=config.use_bias))
        self.out = parts.out(N * H, self.d_model, use_bias=config.use_bias)
        norms = (head_norm(config.qk_norm, H, dtype=self.dtype, rngs=rngs) for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.sink_logits = nnx.Param(jnp.zeros((N,), jnp.float32)) if config.sink_logits else None
        table = None
        if isinstance(self.bias, T5):
            table = nnx.initializers.normal(0.02)(rngs.params(), (self.bias.buckets, N), jnp.float32)
        self.bias_table = None if table is None else nnx.Param(table)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache with x appended."""
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q, k, v = fused_linear([self.q, self.k, self.v], x_BTD)
        q_BTNH = self._queries(split_heads(q, self.head_dim, self.q_norm), ctx)
        k_BTKH = self._keys(split_heads(k, self.head_dim, self.k_norm), ctx)
        view, state = update_cache(state, ctx, k_BTKH, split_heads(v, self.head_dim))
        y_BTNH, aux = view.attend(q_BTNH, ctx, **self._options())
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNH)), ctx), state, aux)

    def _queries(self, q_BTNH: jax.Array, ctx: Context) -> jax.Array:
        rope, temperature = self.config.rope, self.config.temperature
        positions_BT = positions_of(ctx, q_BTNH.shape[1])
        q_BTNH = q_BTNH if rope is None else rope.queries(q_BTNH, positions_BT)
        return q_BTNH if temperature is None else temperature(q_BTNH, positions_BT)

    def _keys(self, k_BSKH: jax.Array, ctx: Context) -> jax.Array:
        rope = self.config.rope
        return k_BSKH if rope is None else rope.keys(k_BSKH, positions_of(ctx, k_BSKH.shape[1]))

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {
            "mask": config.mask,
            "bias": self.bias if self.bias_table is None else self.bias.of(self.bias_table[...]),
            "scale": config.scale,
            "softcap": config.softcap,
            "sink_logits_N": None if self.sink_logits is None else self.sink_logits[...],
            "dropout": config.dropout,
            "impl": config.impl,
        }


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig(AttentionConfig):
    """Attention over an encoder's memory; `kind: cross`."""

    about = About("Cross-attention", "arXiv 1706.03762", "O(T S)", "O(T + S)", "the memory's keys, once")
    reads_memory = True
    takes_mask = False  # the mask of a call is about the tokens of the row, not about those of the memory

    kind: Literal["cross"] = "cross"  #: the mixer

    def restricted(self, causal: bool) -> CrossAttentionConfig:
        """The config itself: a causal model attends to the whole memory."""
        del causal
        return self

    def init_state(self, d_model, batch, capacity, *, causal=True, dtype=jnp.float32) -> MemoryCache:
        """An empty MemoryCache, which the first call fills from `ctx.memory_BSD`."""
        del capacity, causal
        H = self.head_width(d_model)
        return MemoryCache.empty(batch, self.kv_heads, H, dtype=dtype)


class CrossAttention(Attention):
    """Multi-head softmax attention over `ctx.memory_BSD`, an encoder's output."""

    config_type = CrossAttentionConfig

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the MemoryCache, filled from the context if it was empty.

        Raises: ValueError if neither the state nor the context has a memory, or both have one.
        """
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        if state is not None and state.positions_BS.shape[1]:
            if ctx.memory_BSD is not None:
                raise ValueError(
                    "the state of cross-attention holds the memory of the first call: ctx.memory_BSD must be None"
                )
            memory = state
        elif ctx.memory_BSD is None:
            raise ValueError("cross-attention needs ctx.memory_BSD, the output of an encoder")
        else:
            memory = self._memory(ctx.memory_BSD, ctx.memory_positions_BS, state)
        state = None if state is None else memory
        q_BTNH = self._queries(split_heads(self.q(x_BTD), self.head_dim, self.q_norm), ctx)
        k, v, k_positions_BS, _ = memory.view()
        view = KVView(k, v, None, ctx.positions_BT, k_positions_BS, None, None)
        y_BTNH, aux = view.attend(q_BTNH, ctx, **self._options())
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNH)), ctx), state, aux)

    def _memory(self, memory_BSD, positions_BS, state: MemoryCache | None) -> MemoryCache:
        """The projected memory; with a state, in the dtype of the state and with explicit positions."""
        ctx = Context(positions_BT=positions_BS)
        k, v = fused_linear([self.k, self.v], zero_invalid(memory_BSD, ctx))
        k_BSKH = self._keys(split_heads(k, self.head_dim, self.k_norm), ctx)
        v_BSKH = split_heads(v, self.head_dim)
        if state is None:
            return MemoryCache(k_BSKH, v_BSKH, positions_BS)
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(memory_BSD.shape[1]), memory_BSD.shape[:2])
        return state.append(k_BSKH, v_BSKH, jnp.broadcast_to(positions_BS, memory_BSD.shape[:2]))
