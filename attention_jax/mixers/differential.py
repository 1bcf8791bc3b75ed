"""Differential attention: the difference of two softmax maps, which cancels common noise.

    y = W_o concat_n (1 - lambda_init) RMSNorm((softmax(q1 k1^T / sqrt(H)) - lambda softmax(q2 k2^T / sqrt(H))) v)
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init

Ye et al. 2024, "Differential Transformer" (arXiv 2410.05258). q1, q2, k1 and k2 have width H, v has width 2 H.
Two calls of the attention op share v. The norm is over the 2 H features of a head, with one learned scale for
all heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, KVCache, empty_kv_cache
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator, wider
from attention_jax.layers import RMSNorm
from attention_jax.mixers.base import Context, MixerOutput, Parts
from attention_jax.mixers.parts import (
    enter,
    head_width,
    merge_heads,
    split_heads,
    update_cache,
    zero_invalid,
)
from attention_jax.mixers.softmax_parts import SelfAttention, SelfAttentionConfig


@dataclasses.dataclass(frozen=True)
class DifferentialAttentionConfig(SelfAttentionConfig):
    """Differential self-attention; `kind: differential`."""

    about = About("Differential attention", "arXiv 2410.05258", "O(2 T^2)", cache="by the mask")

    kind: Literal["differential"] = "differential"  #: the mixer
    num_heads: int = 2  #: differential heads (N) of two query heads each; half those of softmax attention
    head_dim: int | None = None  #: width of q1, q2, k1, k2 (H), values 2 H; null: d_model / num_heads / 2
    lambda_init: float = 0.8  #: in (0, 1); in the paper 0.8 - 0.6 exp(-0.3 layer), with layer from 0
    norm_eps: float = 1e-5  #: added to the mean square of the norm of the head outputs

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.lambda_init < 1:
            raise ValueError(f"lambda_init must be in (0, 1), got {self.lambda_init}")
        check_between(self, "lambda_init", 1e-3, 1 - 1e-3, "the output is multiplied by 1 - lambda_init")

    def head_width(self, d_model: int) -> int:
        """The head width H; ValueError if it is not an integer."""
        return head_width(d_model, 2 * self.num_heads, self.head_dim)

    @property
    def query_heads(self) -> int:
        """2 N: heads 2n and 2n + 1 are q1 and q2 of head n."""
        return 2 * self.num_heads

    @property
    def key_heads(self) -> int:
        """2 K: heads 2n and 2n + 1 are k1 and k2 of head n."""
        return 2 * self.kv_heads

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> KVCache:
        """An empty cache with the slots that the mask needs, 2 K key heads and K value heads."""
        K, H = self.kv_heads, self.head_width(d_model)
        mask = self.restricted(causal).mask
        return empty_kv_cache(batch, capacity, 2 * K, H, 2 * H, value_heads=K, mask=mask, options=cache)


class DifferentialAttention(SelfAttention):
    """The difference of two softmax attentions over shared values."""

    config_type = DifferentialAttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, out, the four vectors of lambda and the norm of the head outputs."""
        super().setup(parts)
        H = self.head_dim
        init = nnx.initializers.normal(0.1)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nnx.Param(init(parts.rngs.params(), (H,), jnp.float32)))
        self.head_norm = RMSNorm(
            2 * H, epsilon=self.config.norm_eps, dtype=accumulator(self.dtype), rngs=parts.rngs
        )

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache with x appended.

        The captured queries and keys are those of both maps, where heads 2n and 2n + 1 belong to head n. The
        captured attention is the difference of the maps, which multiplies the values before the norm.
        """
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q_BTNH, k_BTKH, v_BTKM, _ = self._project(x_BTD, ctx)
        view, state = update_cache(state, ctx, k_BTKH, v_BTKM)
        (first, first_aux), (second, second_aux) = (
            view.attend(q_BTNH[:, :, i::2], ctx.fold_key(i), k=view.k_BSKH[:, :, i::2], **self._options_of(i))
            for i in (0, 1)
        )
        difference = wider(first) - self._lambda() * wider(second)
        y_BTNM = self.head_norm(difference) * (1 - self.config.lambda_init)
        y_BTD = self.out(merge_heads(y_BTNM.astype(self.dtype)))
        aux = ctx.captured(
            queries=lambda: q_BTNH,
            keys=lambda: view.k_BSKH,
            values=lambda: view.v_BSKM,
            attention=lambda: first_aux["attention"] - self._lambda() * second_aux["attention"],
        )
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)

    def _values(self, v_BSE: jax.Array) -> jax.Array:
        """Projected values, [B, S, K, 2 H]."""
        return split_heads(self._clipped(v_BSE), 2 * self.head_dim)

    def _options_of(self, i: int) -> dict[str, Any]:
        """The options of the first or the second map, whose heads are i, 2 + i, 4 + i, ..."""
        options = self._options()
        sinks_N = options["sink_logits_N"]
        return options | {"sink_logits_N": None if sinks_N is None else sinks_N[i::2]}

    def _lambda(self) -> jax.Array:
        q1, k1, q2, k2 = (
            x[...].astype(accumulator(self.dtype))
            for x in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        first, second = jnp.exp((q1 * k1).sum()), jnp.exp((q2 * k2).sum())
        return first - second + self.config.lambda_init


def lambda_of_depth(layer: int) -> float:
    """The paper's lambda_init, 0.8 - 0.6 exp(-0.3 layer), with layers counted from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)
