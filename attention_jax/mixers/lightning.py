"""Lightning attention: linear attention with a fixed decay per head, as in TransNormerLLM and MiniMax-01.

    q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
    S_t = exp(-s_n) S_{t-1} + k_t v_t^T,   o_t = q_t S_t,   s_n: ALiBi's slopes
    y = W_o (sigmoid(x W_g) * RMSNorm(o))

Qin et al. 2024, "Lightning Attention-2" (arXiv 2401.04658). The gate, the activations and the norm over all
heads follow MiniMax 2025, "MiniMax-01" (arXiv 2501.08313). Scores have no scale, since the norm cancels it. The
name refers to the blockwise computation, which is the `chunked` form of the recurrence here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.about import About
from attention_jax.biases import alibi_slopes
from attention_jax.caches import DEFAULT_CACHE, RecurrentState
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator
from attention_jax.layers import GatedRMSNorm, fused_linear
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import enter, head_width, rotate, split_heads, zero_invalid
from attention_jax.mixers.recurrent import DecayMixerConfig, decayed
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class LightningConfig(DecayMixerConfig):
    """Lightning attention; `kind: lightning`. Causal models only."""

    about = About(
        "Lightning attention", "arXiv 2401.04658, 2501.08313", "O(T)", cache="a matrix H x H per head"
    )

    kind: Literal["lightning"] = "lightning"  #: the mixer
    num_heads: int = 4  #: heads (N), each with its own decay
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    rope: RoPE | None = None  #: rotation of queries and keys; null: none
    #: multiplies the slopes; MiniMax-01 gives layer l of L the factor 1 - l / (L - 1) + 1e-5
    slope_factor: float = 1.0
    norm_eps: float = 1e-5  #: added to the mean square of the norm over all heads
    use_bias: bool = False  #: biases in the projections
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        super().__post_init__()
        check_between(self, "slope_factor", 1e-6, 1e3, "every decay is close to 1 or to 0 otherwise")

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> RecurrentState:
        """An empty state, whose size does not depend on `capacity`."""
        del capacity, causal
        H = head_width(d_model, self.num_heads, self.head_dim)
        return RecurrentState.empty(batch, self.num_heads, H, H, options=cache)


class LightningAttention(Mixer):
    """Linear attention with a fixed decay per head, an RMS norm over all heads and a sigmoid gate."""

    config_type = LightningConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, gate, the norm and out."""
        config = self.config
        self.head_dim = head_width(self.d_model, config.num_heads, config.head_dim)
        width = config.num_heads * self.head_dim
        self.q, self.k, self.v, self.gate = (
            parts.linear(self.d_model, width, use_bias=config.use_bias) for _ in range(4)
        )
        self.norm = GatedRMSNorm(
            width, gate="sigmoid", epsilon=config.norm_eps, dtype=self.dtype, rngs=parts.rngs
        )
        self.out = parts.out(width, self.d_model, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the RecurrentState with x appended."""
        config = self.config
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        *qkv, gate = fused_linear([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (split_heads(jax.nn.silu(x), self.head_dim) for x in qkv)
        q_BTNH, k_BTNH = rotate(config.rope, q_BTNH, k_BTNH, ctx)
        slopes_N = config.slope_factor * np.array(alibi_slopes(config.num_heads))
        o_BTNH, state, aux = decayed(
            q_BTNH, k_BTNH, v_BTNH, state, ctx,
            log_decay=jnp.asarray(-slopes_N, accumulator(self.dtype)),
            impl=config.impl,
        )  # fmt: skip
        y_BTD = self.out(self.norm(o_BTNH.reshape(gate.shape), gate))
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)
