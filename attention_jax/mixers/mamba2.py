"""Mamba-2: Dao & Gu 2024, "Transformers are SSMs", state-space duality (arXiv 2405.21060).

    z, u, B, C, dt = W_in x                               u: N heads of M; B, C: G groups of H
    u, B, C = silu(short convolution over u, B, C)
    dt = softplus(dt + dt_bias),   a = exp(-exp(A_log) dt)             one step and one decay per head
    S_t = a_t S_{t-1} + B_t (dt_t u_t)^T,   o_t = C_t S_t + D u_t
    y = W_out (norm(o * silu(z)))

This is linear attention with queries C, keys B and values dt u. The heads of a group share B and C, like keys in
grouped-query attention. Steps, decays and the product dt u are float32 for any dtype of the model. The mean
square of the norm is taken over the channels of each group.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, RecurrentState
from attention_jax.choices import check_between
from attention_jax.dtypes import wider
from attention_jax.layers import GatedRMSNorm, ShortConvolution
from attention_jax.mixers.base import Context, Mixer, MixerOutput, Parts
from attention_jax.mixers.parts import check_positive, enter, split_heads, zero_invalid
from attention_jax.mixers.recurrent import (
    DecayMixerConfig,
    check_convolution,
    check_steps,
    convolve,
    decayed,
    initial_decays,
)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(DecayMixerConfig):
    """Mamba-2's mixer; `kind: mamba2`. Causal models only."""

    about = About(
        "Mamba-2 (state-space duality)",
        "arXiv 2405.21060",
        "O(T)",
        cache="a matrix H x M per head, the convolution's last inputs",
    )

    kind: Literal["mamba2"] = "mamba2"  #: the mixer
    expand: int = 2  #: ratio of the channels of u and z to d_model
    head_dim: int = 64  #: channels of a head (M), a divisor of expand d_model; heads: N = expand d_model / M
    state_dim: int = 128  #: width of B and C (H), the state size per channel
    groups: int = 1  #: groups (G), a divisor of the heads; the heads of a group share B and C
    convolution: int = 4  #: width of the short convolution in tokens, the current one included
    dt_min: float = 1e-3  #: initial steps are drawn log-uniformly from dt_min ...
    dt_max: float = 0.1  #: ... to dt_max
    dt_limit_low: float = 0.0  #: steps are clipped to at least this
    dt_limit_high: float | None = None  #: and to at most this; null: no limit
    norm_eps: float = 1e-5  #: added to the mean square of the gated norm
    use_bias: bool = False  #: biases in the projections
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    convolution_bias: bool = True  #: a bias in the short convolution
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "expand", "head_dim", "state_dim", "groups", "convolution")
        check_steps(self.dt_min, self.dt_max)
        high = math.inf if self.dt_limit_high is None else self.dt_limit_high
        if not 0 <= self.dt_limit_low < high:
            raise ValueError(f"dt_limit_low {self.dt_limit_low} must be >= 0 and below dt_limit_high {high}")
        for name in ("dt_limit_low", "dt_limit_high"):
            check_between(self, name, 1e-8, 1e4, "a step multiplies the input of a token", zero=True)
        check_convolution(self.convolution)

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        channels = self.expand * d_model
        if channels % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide expand d_model = {channels}")
        if channels // self.head_dim % self.groups:
            raise ValueError(f"groups {self.groups} does not divide the {channels // self.head_dim} heads")

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> RecurrentState:
        """An empty state, whose size does not depend on `capacity`; the options' dtype is that of the cached inputs only."""
        del capacity, causal
        channels = self.expand * d_model
        kept = (self.convolution - 1, channels + 2 * self.groups * self.state_dim, cache.storage_dtype)
        return RecurrentState.empty(
            batch, channels // self.head_dim, self.state_dim, self.head_dim, kept, cache
        )


class Mamba2(Mixer):
    """A short convolution, a state-space recurrence with one decay per head, and a gated norm."""

    config_type = Mamba2Config

    def setup(self, parts: Parts) -> None:
        """Create in_proj, the convolution, the decays, D, the norm and out."""
        config, rngs = self.config, parts.rngs
        self.channels = config.expand * self.d_model
        self.heads = self.channels // config.head_dim
        self.shared = config.groups * config.state_dim  # channels of B, and of C
        convolved = self.channels + 2 * self.shared
        width = self.channels + convolved + self.heads
        self.in_proj = parts.linear(self.d_model, width, use_bias=config.use_bias)
        self.convolution = ShortConvolution(
            convolved, config.convolution, use_bias=config.convolution_bias, dtype=self.dtype, rngs=rngs
        )
        self.A_log, self.dt_bias = initial_decays(rngs, self.heads, self.heads, config.dt_min, config.dt_max)
        self.D = nnx.Param(jnp.ones(self.heads, jnp.float32))
        self.norm = GatedRMSNorm(
            self.channels,
            gated="before",
            groups=config.groups,
            epsilon=config.norm_eps,
            dtype=self.dtype,
            rngs=rngs,
        )
        self.out = parts.out(self.channels, self.d_model, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the RecurrentState with x appended."""
        config, E = self.config, self.channels
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        projected = self.in_proj(x_BTD)
        z_BTE, mixed, dt = jnp.split(projected, [E, projected.shape[-1] - self.heads], axis=-1)
        mixed, inputs = convolve(self.convolution, mixed, state, ctx)
        u, b, c = jnp.split(mixed, [E, E + self.shared], axis=-1)
        u_BTNM = wider(split_heads(u, config.head_dim))
        dt = wider(dt)
        a_N, bias_N, skip_N = (x[...].astype(dt.dtype) for x in (self.A_log, self.dt_bias, self.D))
        dt_BTN = jax.nn.softplus(dt + bias_N[None, None])
        if config.dt_limit_low > 0 or config.dt_limit_high is not None:
            dt_BTN = jnp.clip(dt_BTN, config.dt_limit_low, config.dt_limit_high)
        o_BTNM, state, aux = decayed(
            split_heads(c, config.state_dim), split_heads(b, config.state_dim),
            (u_BTNM * dt_BTN[..., None]).astype(self.dtype), state, ctx, inputs,
            log_decay=-jnp.exp(a_N)[None, None] * dt_BTN,
            impl=config.impl,
        )  # fmt: skip
        o_BTNM = wider(o_BTNM) + skip_N[None, None, :, None] * u_BTNM
        y_BTD = self.out(self.norm(o_BTNM.reshape(z_BTE.shape), z_BTE))
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)
