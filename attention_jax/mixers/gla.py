"""Gated linear attention (GLA): Yang et al. 2023 (arXiv 2312.06635).

    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1 / tau)                       a decay per key channel, of rank r
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = q_t S_t / sqrt(H)
    y = W_o (swish(x W_g) * norm(o))

tau = 16 initialises the decays near 1. The norm is a per-head RMS norm with one learned scale for all heads, as
in the authors' code (the paper has a layer norm). The decays are float32 for any dtype of the model. There is
no position encoding: the decays depend on the distance.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, RecurrentState
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator, wider
from attention_jax.layers import GatedRMSNorm, fused_linear
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import check_positive, enter, head_width, split_heads, zero_invalid
from attention_jax.mixers.recurrent import DecayMixerConfig, decayed


@dataclasses.dataclass(frozen=True)
class GLAConfig(DecayMixerConfig):
    """Gated linear attention; `kind: gla`. Causal models only."""

    about = About("Gated linear attention", "arXiv 2312.06635", "O(T)", cache="a matrix H x M per head")

    kind: Literal["gla"] = "gla"  #: the mixer
    num_heads: int = 4  #: heads (N)
    head_dim: int | None = None  #: width of a head's queries and keys (H); null: d_model / (2 num_heads)
    value_dim: int | None = None  #: width of a head's values (M); null: d_model / num_heads
    decay_rank: int = 16  #: rank of the projection to the decays (r)
    decay_temperature: float = 16.0  #: tau; larger values start with a longer memory
    norm_eps: float = 1e-5  #: added to the mean square of the norm of the head outputs
    use_bias: bool = False  #: biases in the projections (the projection to the decays always has one)
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "value_dim", "decay_rank")
        check_between(self, "decay_temperature", 0.01, 1e4, "every decay is close to 0 or to 1 otherwise")

    def widths(self, d_model: int) -> tuple[int, int]:
        """(H, M); ValueError if they are not integers."""
        if self.head_dim is None and d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model {d_model} is not divisible by 2 num_heads = {2 * self.num_heads}; set head_dim"
            )
        head_dim = head_width(d_model, 2 * self.num_heads, self.head_dim)
        if self.value_dim is None and d_model % self.num_heads:
            raise ValueError(
                f"d_model {d_model} is not divisible by num_heads {self.num_heads}; set value_dim"
            )
        return head_dim, self.value_dim or d_model // self.num_heads

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        self.widths(d_model)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> RecurrentState:
        """An empty state, whose size does not depend on `capacity`."""
        del capacity, causal
        return RecurrentState.empty(batch, self.num_heads, *self.widths(d_model), options=cache)


class GatedLinearAttention(Mixer):
    """Linear attention with a data-dependent decay per key channel, an RMS norm and a swish gate."""

    config_type = GLAConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, gate, the two factors of the projection to the decays, the norm and out."""
        config, N = self.config, self.config.num_heads
        self.head_dim, self.value_dim = config.widths(self.d_model)
        keys, values = N * self.head_dim, N * self.value_dim
        widths = {"q": keys, "k": keys, "v": values, "gate": values, "decay_down": config.decay_rank}
        for name, width in widths.items():
            setattr(self, name, parts.linear(self.d_model, width, use_bias=config.use_bias))
        self.decay_up = parts.linear(config.decay_rank, keys, use_bias=True, dtype=accumulator(self.dtype))
        self.norm = GatedRMSNorm(self.value_dim, epsilon=config.norm_eps, dtype=self.dtype, rngs=parts.rngs)
        self.out = parts.out(values, self.d_model, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the RecurrentState with x appended."""
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q, k, v, gate, low_rank = fused_linear([self.q, self.k, self.v, self.gate, self.decay_down], x_BTD)
        q_BTNH, k_BTNH = split_heads(q, self.head_dim), split_heads(k, self.head_dim)
        logits_BTE = self.decay_up(wider(low_rank))
        log_decay_BTE = jax.nn.log_sigmoid(logits_BTE) / self.config.decay_temperature
        o_BTNM, state, aux = decayed(
            q_BTNH, k_BTNH, split_heads(v, self.value_dim), state, ctx,
            log_decay=split_heads(log_decay_BTE, self.head_dim),
            scale=self.head_dim**-0.5,
            impl=self.config.impl,
        )  # fmt: skip
        y_BTNM = self.norm(o_BTNM, split_heads(gate, self.value_dim))
        return MixerOutput(zero_invalid(self.out(y_BTNM.reshape(gate.shape)), ctx), state, aux)
