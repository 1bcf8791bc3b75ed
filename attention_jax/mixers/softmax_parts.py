"""Code shared by the mixers whose softmax attention has projections q, k and v: options, projections, scores.

    q, k, v = x W_q, x W_k, x W_v;   norm of q and k;   rotation;   temperature of q;   softcap(q.k * scale) + bias

A mixer of this family derives its config from `SelfAttentionConfig` and its module from `SelfAttention`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.biases import T5, ALiBiConfig
from attention_jax.caches import DEFAULT_CACHE, empty_kv_cache
from attention_jax.choices import ByKind, check_between
from attention_jax.dtypes import accumulator
from attention_jax.layers import HeadNorm, fused_linear, head_norm
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context, Mixer, Parts
from attention_jax.mixers.parts import (
    SoftmaxMixerConfig,
    check_positive,
    check_scores,
    positions_of,
    split_heads,
)
from attention_jax.positions import RoPE, Temperature


@dataclasses.dataclass(frozen=True)
class SelfAttentionConfig(SoftmaxMixerConfig):
    """Options of all mixers of this family."""

    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = (
        None  #: key-value heads (K), a divisor of num_heads; null: num_heads (MHA), 1: MQA
    )
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    mask: Mask | str = (
        Full()
    )  #: attention mask, such as "SlidingWindow(128) | Sinks(4)"; a causal model adds Causal()
    rope: RoPE | None = None  #: rotary position embedding; null: none
    temperature: Temperature | None = None  #: scale queries by position, as Llama 4 does; null: off
    #: normalise queries and keys: rms, layer (learned scale per feature), l2 (no scale), rms_per_head (a scale per
    #: head), rms_all_heads (over all heads together, as OLMo 2), layer_per_head (a scale per head, as Cohere); null:
    #: neither
    qk_norm: HeadNorm | None = None
    #: added to the mean square of queries and keys (to the variance for layer norms)
    qk_norm_eps: float = 1e-6
    qk_norm_offset: float = (
        0.0  #: added to the learned scale of an rms or layer norm; 1 in Gemma 3, Qwen3-Next
    )
    clip_qkv: float | None = None  #: limit c: clips queries, keys and values to [-c, c]; null: off
    softcap: float | None = None  #: cap c: replaces a score x by c tanh(x / c); null: off
    scale: float | None = None  #: multiplies q.k; null: 1 / sqrt(head_dim)
    sink_logits: bool = False  #: learn a logit per head that joins the softmax denominator only
    use_bias: bool = False  #: biases in the projections
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
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
        for name, cls in (("rope", RoPE), ("temperature", Temperature)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, cls):
                raise ValueError(f"{name} must be a {cls.__name__} or null, got {value!r}")
        check_scores(self)
        check_between(self, "qk_norm_offset", 1e-3, 10, "1 is usual, and 0 turns it off", zero=True)
        if self.qk_norm_offset and self.qk_norm not in ("rms", "layer"):
            raise ValueError(
                f"qk_norm_offset {self.qk_norm_offset} is for qk_norm rms or layer, got {self.qk_norm}"
            )
        check_between(self, "clip_qkv", 1e-3, 1e6, "less clips almost everything, and null turns it off")

    def value_width(self, d_model: int) -> int:
        """The width of a head's values (M), that of its keys unless a mechanism has an option for it."""
        return self.head_width(d_model)

    @property
    def query_heads(self) -> int:
        """The heads of q."""
        return self.num_heads

    @property
    def key_heads(self) -> int:
        """The heads of k."""
        return self.kv_heads


@dataclasses.dataclass(frozen=True)
class BiasedAttentionConfig(SelfAttentionConfig):
    """The options of mixers that also take a bias of the scores."""

    value_dim: int | None = None  #: width of a head's values (M); null: head_dim
    #: additive score term; alibi: fixed slopes over distance; t5: a learned table of relative positions
    bias: Literal["alibi", "t5"] | Annotated[ALiBiConfig | T5, ByKind()] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.bias == "t5":
            object.__setattr__(self, "bias", T5())
        check_positive(self, "value_dim")

    def value_width(self, d_model: int) -> int:
        """`value_dim`, or the width of a head's keys."""
        return self.value_dim or self.head_width(d_model)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> Any:
        """An empty KVCache with the slots that the mask needs."""
        widths = self.head_width(d_model), self.value_width(d_model)
        mask = self.restricted(causal).mask
        return empty_kv_cache(batch, capacity, self.kv_heads, *widths, mask=mask, options=cache)


class SelfAttention(Mixer):
    """Base class with projections, their norms and the options of a score; a subclass implements `mix`.

    The names of what subclasses share begin with an underscore: `nnx.tabulate` runs every other method by itself.
    """

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, the gates, out, the norms of q and k, and sink logits."""
        config = self.config
        N, K = config.query_heads, config.key_heads
        self.head_dim = H = config.head_width(self.d_model)
        self.value_dim = M = config.value_width(self.d_model)
        for name, width in (("q", N * H), ("k", K * H), ("v", K * M)):
            setattr(self, name, parts.linear(self.d_model, width, use_bias=config.use_bias))
        self.setup_gates(parts)
        self.out = parts.out(N * M, self.d_model, use_bias=config.biased_output)
        norm = {
            "epsilon": config.qk_norm_eps,
            "offset": config.qk_norm_offset,
            "dtype": self.dtype,
            "rngs": parts.rngs,
        }
        self.q_norm, self.k_norm = (head_norm(config.qk_norm, heads, H, **norm) for heads in (N, K))
        self.sink_logits = nnx.Param(jnp.zeros((N,), jnp.float32)) if config.sink_logits else None

    def setup_gates(self, parts: Parts) -> None:
        """Create the gates of a subclass, of the same inputs as q, k and v."""

    def _project(
        self, x_BTD: jax.Array, ctx: Context, *more: nnx.Linear
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
        """q [B, T, N, H] and k [B, T, K, H] as they enter the scores, v, and the outputs of `more` linear layers."""
        q, k, v, *rest = fused_linear([self.q, self.k, self.v, *more], x_BTD)
        return self._queries(q, ctx), self._keys(k, ctx), self._values(v), rest

    def _queries(self, q_BTE: jax.Array, ctx: Context) -> jax.Array:
        """Projected queries as they enter the scores, [B, T, N, H]."""
        rope, temperature = self.config.rope, self.config.temperature
        q_BTNH = split_heads(self._clipped(q_BTE), self.head_dim, self.q_norm)
        positions_BT = positions_of(ctx, q_BTNH.shape[1])
        q_BTNH = q_BTNH if rope is None else rope.queries(q_BTNH, positions_BT)
        return q_BTNH if temperature is None else temperature(q_BTNH, positions_BT)

    def _keys(self, k_BSE: jax.Array, ctx: Context) -> jax.Array:
        """Projected keys as they enter the scores, [B, S, K, H]."""
        rope = self.config.rope
        k_BSKH = split_heads(self._clipped(k_BSE), self.head_dim, self.k_norm)
        return k_BSKH if rope is None else rope.keys(k_BSKH, positions_of(ctx, k_BSKH.shape[1]))

    def _values(self, v_BSE: jax.Array) -> jax.Array:
        """Projected values, [B, S, K, M]."""
        return split_heads(self._clipped(v_BSE), self.value_dim)

    def _options(self) -> dict[str, Any]:
        """The arguments of `KVView.attend` that the config determines."""
        config = self.config
        return {
            "mask": config.mask,
            "scale": config.scale,
            "softcap": config.softcap,
            "sink_logits_N": None if self.sink_logits is None else self.sink_logits[...],
            "dropout": config.dropout,
            "impl": config.impl,
        }

    def _clipped(self, x: jax.Array) -> jax.Array:
        limit = self.config.clip_qkv
        return x if limit is None else jnp.clip(x, -limit, limit)


class BiasedAttention(SelfAttention):
    """`SelfAttention` with a bias of the scores."""

    def setup(self, parts: Parts) -> None:
        """Create what `SelfAttention` has, and the table of a learned bias."""
        super().setup(parts)
        config, N = self.config, self.config.num_heads
        self.bias, table = config.bias, None
        if self.bias == "alibi" or isinstance(self.bias, ALiBiConfig):
            self.bias = (ALiBiConfig() if self.bias == "alibi" else self.bias).of(N, accumulator(self.dtype))
        elif isinstance(self.bias, T5):
            self.bias = self.bias.over(config.mask.causal)
            init = nnx.initializers.normal(0.02)
            table = init(parts.rngs.params(), (self.bias.buckets, N), jnp.float32)
        self.bias_table = None if table is None else nnx.Param(table)

    def _options(self) -> dict[str, Any]:
        """The arguments of `KVView.attend` that the config determines, the bias included."""
        bias = self.bias if self.bias_table is None else self.bias.of(self.bias_table[...])
        return super()._options() | {"bias": bias}
