"""Lightning attention: linear attention with a fixed decay per head, as in TransNormerLLM and MiniMax-01.

    q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
    S_t = exp(-s_n) S_{t-1} + k_t v_t^T,   o_t = q_t S_t,   s_n: ALiBi's slopes
    y = W_o (sigmoid(x W_g) * RMSNorm(o))

Qin et al. 2024, "Lightning Attention-2" (arXiv 2401.04658); MiniMax 2025, "MiniMax-01" (arXiv 2501.08313), whose
gate, activations and norm over all heads at once these are. Scores have no scale, since the norm would undo
it. The name means the computation in blocks, which here is the `chunked` form of the recurrence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.about import About
from attention_jax.biases import alibi_slopes
from attention_jax.layers import linear, together
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import check_options, head_width, positions_of, split_heads, zero_invalid
from attention_jax.mixers.recurrent import GatedRMSNorm, RecurrentState, decayed, refuse_bidirectional
from attention_jax.ops.decay_scan.api import implementations
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Lightning attention; `kind: lightning`. Causal models only."""

    about = About(
        "Lightning attention", "arXiv 2401.04658, 2501.08313", "O(T)", cache="a matrix H x H per head"
    )
    implementations = staticmethod(implementations)
    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["lightning"] = "lightning"  #: the mixer
    num_heads: int = 4  #: heads (N), each with its own decay
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    rope: RoPE | None = None  #: rotation of queries and keys; null: none
    #: multiplies the slopes; MiniMax-01 gives layer l of L the factor 1 - l / (L - 1) + 1e-5
    slope_factor: float = 1.0
    use_bias: bool = False  #: biases in the projections
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        check_options(self)
        if not 0 < self.slope_factor < math.inf:
            raise ValueError(f"slope_factor must be > 0 and finite, got {self.slope_factor}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        refuse_bidirectional("lightning", causal, "its state decays from the past to the present")
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> LightningAttention:
        """The mixer; `module` holds dtype and initialisers."""
        self.check(d_model, causal=causal)
        return LightningAttention(d_model, self, rngs=rngs, **module)


class LightningAttention(nnx.Module):
    """Linear attention with a fixed decay per head, an RMS norm over all heads and a sigmoid gate."""

    def __init__(
        self,
        d_model: int,
        config: LightningConfig,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.head_dim = head_width(d_model, config.num_heads, config.head_dim)
        width = config.num_heads * self.head_dim
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        self.q, self.k, self.v, self.gate = (
            linear(d_model, width, kernel_init=kernel_init, **common) for _ in range(4)
        )
        self.norm = GatedRMSNorm(width, gate="sigmoid", dtype=dtype, rngs=rngs)
        self.out = linear(width, d_model, kernel_init=out_init or kernel_init, **common)

    def __call__(
        self, x_BTD: jax.Array, state: RecurrentState | None = None, *, ctx: Context
    ) -> tuple[jax.Array, RecurrentState | None]:
        """y [B, T, D] and the state with x appended (None for None)."""
        config = self.config
        x_BTD = zero_invalid(x_BTD, ctx)
        *qkv, gate = together([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (split_heads(jax.nn.silu(x), self.head_dim) for x in qkv)
        if config.rope is not None:
            at_BT = positions_of(ctx, x_BTD.shape[1])
            q_BTNH, k_BTNH = config.rope.queries(q_BTNH, at_BT), config.rope.keys(k_BTNH, at_BT)
        slopes_N = config.slope_factor * np.array(alibi_slopes(config.num_heads))
        o_BTNH, state = decayed(
            q_BTNH, k_BTNH, v_BTNH, state, ctx,
            log_decay=jnp.asarray(-slopes_N, jnp.float32),
            impl=config.impl,
        )  # fmt: skip
        return zero_invalid(self.out(self.norm(o_BTNH.reshape(gate.shape), gate)), ctx), state

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> RecurrentState:
        """The empty state; it is as large for any capacity, and float32 whatever the dtype."""
        del capacity, memory, dtype
        return RecurrentState.empty(batch, self.config.num_heads, self.head_dim, self.head_dim)
