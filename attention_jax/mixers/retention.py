"""Retention (RetNet): Sun et al. 2023, "Retentive Network" (arXiv 2307.08621).

    S_t = gamma_n S_{t-1} + k_t v_t^T,   o_t = q_t S_t / sqrt(H),   q, k rotated by RoPE
    y = W_o (swish(x W_g) * norm(o)),   gamma_n = 1 - 2^(-5 - n)

Each head has a fixed decay. The norm is per head: the paper's group norm, or an RMS norm. The paper's parallel form is divided by positive factors
for precision (the root of the summed decays and the absolute sum of a row). They are common to all features of a
head, so that the norm cancels them, and they are not computed here. The sums of o are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, RecurrentState
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator
from attention_jax.layers import HeadGroupNorm, RMSNorm, fused_linear
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import check_positive, enter, head_width, rotate, split_heads, zero_invalid
from attention_jax.mixers.recurrent import DecayMixerConfig, decayed
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class RetentionConfig(DecayMixerConfig):
    """Multi-scale retention; `kind: retention`. Causal models only."""

    about = About("Retention (RetNet)", "arXiv 2307.08621", "O(T)", cache="a matrix H x M per head")

    kind: Literal["retention"] = "retention"  #: the mixer
    num_heads: int = 4  #: heads (N), each with its own decay
    head_dim: int | None = None  #: width of a head's queries and keys (H); null: d_model / num_heads
    value_dim: int | None = None  #: width of a head's values (M); null: 2 head_dim, as in the paper
    rope: RoPE | None = RoPE()  #: rotary position embedding of queries and keys; null: none
    first_exponent: float = 5.0  #: head 0 decays by 1 - 2^-first_exponent at every token
    #: exponent of the last head, with even spacing in between; null: first_exponent + num_heads - 1
    last_exponent: float | None = None
    #: norm of each head's output; group: mean and variance, a scale and a bias per head (the paper); rms: mean square,
    #: one scale for all heads (fla; torchscale has none)
    norm: Literal["group", "rms"] = "group"
    norm_eps: float = 1e-5  #: added to the variance (group) or the mean square (rms)
    use_bias: bool = False  #: biases in the projections
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "value_dim")
        for name in ("first_exponent", "last_exponent"):
            value = getattr(self, name)
            # 1 - 2^-24 is the largest float32 below 1.
            if value is not None and not 0 < value <= 24:
                raise ValueError(f"{name} must be > 0 and <= 24, got {value}: a decay is 1 - 2^-{name}")
            check_between(self, name, 0.01, 24, "a decay of almost 0 forgets every token at once")
        if self.last_exponent is None and self.first_exponent + self.num_heads - 1 > 24:
            raise ValueError(
                f"first_exponent {self.first_exponent} and num_heads {self.num_heads} give the last head a decay "
                "that float32 rounds to 1; set last_exponent to at most 24"
            )

    def log_decay(self, dtype: Any = np.float32) -> np.ndarray:
        """ln gamma of every head [N]."""
        last = self.last_exponent
        last = self.first_exponent + self.num_heads - 1 if last is None else last
        return np.log1p(-(2.0 ** -np.linspace(self.first_exponent, last, self.num_heads))).astype(dtype)

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        head_dim, _ = self.widths(d_model)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(H, M); ValueError if H is not an integer."""
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        return head_dim, self.value_dim or 2 * head_dim

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> RecurrentState:
        """An empty state, whose size does not depend on `capacity`."""
        del capacity, causal
        return RecurrentState.empty(batch, self.num_heads, *self.widths(d_model), options=cache)


class Retention(Mixer):
    """Linear attention with a fixed decay per head, a norm per head and a swish gate."""

    config_type = RetentionConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, gate, the norm and out."""
        config, N = self.config, self.config.num_heads
        self.head_dim, self.value_dim = config.widths(self.d_model)
        widths = {"q": self.head_dim, "k": self.head_dim, "v": self.value_dim, "gate": self.value_dim}
        for name, width in widths.items():
            setattr(self, name, parts.linear(self.d_model, N * width, use_bias=config.use_bias))
        norm = {"epsilon": config.norm_eps, "dtype": self.dtype, "rngs": parts.rngs}
        self.norm = (
            HeadGroupNorm(N, self.value_dim, **norm)
            if config.norm == "group"
            else RMSNorm(self.value_dim, **norm)
        )
        self.out = parts.out(N * self.value_dim, self.d_model, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the RecurrentState with x appended."""
        config = self.config
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q, k, v, gate = fused_linear([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH, k_BTNH = rotate(
            config.rope, split_heads(q, self.head_dim), split_heads(k, self.head_dim), ctx
        )
        o_BTNM, state, aux = decayed(
            q_BTNH, k_BTNH, split_heads(v, self.value_dim), state, ctx,
            log_decay=jnp.asarray(config.log_decay(accumulator(self.dtype))),
            scale=self.head_dim**-0.5,
            impl=config.impl,
        )  # fmt: skip
        y_BTE = self.norm(o_BTNM).reshape(gate.shape) * jax.nn.silu(gate)
        return MixerOutput(zero_invalid(self.out(y_BTE), ctx), state, aux)
