"""Mamba-2: Dao & Gu 2024, "Transformers are SSMs", state-space duality (arXiv 2405.21060).

    z, u, B, C, dt = W_in x                               u: N heads of M; B, C: G groups of H
    u, B, C = silu(short convolution over u, B, C)
    dt = softplus(dt + dt_bias),   a = exp(-exp(A_log) dt)             one step and one decay per head
    S_t = a_t S_{t-1} + B_t (dt_t u_t)^T,   o_t = C_t S_t + D u_t
    y = W_out (norm(o * silu(z)))

A linear attention whose queries are C, keys B and values dt u; heads share B and C by groups, as query heads
share keys in grouped attention. Steps, decays and the values' product with their step are float32 whatever
the model computes in. The norm's mean is over each group's channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.layers import linear
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import check_options, split_heads, zero_invalid
from attention_jax.mixers.recurrent import (
    GatedRMSNorm,
    RecurrentState,
    ShortConvolution,
    check_steps,
    decayed,
    initial_decays,
    refuse_bidirectional,
)
from attention_jax.ops.decay_scan.api import implementations


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2's mixer; `kind: mamba2`. Causal models only."""

    about = About(
        "Mamba-2 (state-space duality)",
        "arXiv 2405.21060",
        "O(T)",
        cache="a matrix H x M per head, the convolution's last inputs",
    )
    implementations = staticmethod(implementations)
    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["mamba2"] = "mamba2"  #: the mixer
    expand: int = 2  #: channels of u and z over d_model
    head_dim: int = 64  #: channels of a head (M), a divisor of expand d_model; heads: N = expand d_model / M
    state_dim: int = 128  #: width of B and C (H), the state's size per channel
    groups: int = 1  #: pairs of B and C (G), a divisor of the heads; heads of a group share one
    convolution: int = 4  #: tokens that the short convolution sees, the present one included
    dt_min: float = 1e-3  #: initial steps are drawn log-uniformly from dt_min ...
    dt_max: float = 0.1  #: ... to dt_max
    dt_limit_low: float = 0.0  #: steps are clipped to at least this
    dt_limit_high: float | None = None  #: and to at most this; null: no limit
    use_bias: bool = False  #: biases in the projections (the convolution always has one)
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        check_options(self)
        for name in ("expand", "head_dim", "state_dim", "groups", "convolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_steps(self.dt_min, self.dt_max)
        high = math.inf if self.dt_limit_high is None else self.dt_limit_high
        if not 0 <= self.dt_limit_low < high:
            raise ValueError(f"dt_limit_low {self.dt_limit_low} must be >= 0 and below dt_limit_high {high}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        refuse_bidirectional("mamba2", causal, "its state runs from the past to the present")
        channels = self.expand * d_model
        if channels % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide expand d_model = {channels}")
        if channels // self.head_dim % self.groups:
            raise ValueError(f"groups {self.groups} does not divide the {channels // self.head_dim} heads")

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Mamba2:
        """The mixer; `module` holds dtype and initialisers."""
        self.check(d_model, causal=causal)
        return Mamba2(d_model, self, rngs=rngs, **module)


class Mamba2(nnx.Module):
    """A short convolution, a state space with one decay per head, a gated norm."""

    def __init__(
        self,
        d_model: int,
        config: Mamba2Config,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self.channels = config.expand * d_model
        self.heads = self.channels // config.head_dim
        self.shared = config.groups * config.state_dim  # channels of B, and of C
        convolved = self.channels + 2 * self.shared
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        self.in_proj = linear(
            d_model, self.channels + convolved + self.heads, kernel_init=kernel_init, **common
        )
        self.convolution = ShortConvolution(
            convolved, config.convolution, use_bias=True, dtype=dtype, rngs=rngs
        )
        self.A_log, self.dt_bias = initial_decays(rngs, self.heads, self.heads, config.dt_min, config.dt_max)
        self.D = nnx.Param(jnp.ones(self.heads, jnp.float32))
        self.norm = GatedRMSNorm(self.channels, gated="before", groups=config.groups, dtype=dtype, rngs=rngs)
        self.out = linear(self.channels, d_model, kernel_init=out_init or kernel_init, **common)

    def __call__(
        self, x_BTD: jax.Array, state: RecurrentState | None = None, *, ctx: Context
    ) -> tuple[jax.Array, RecurrentState | None]:
        """y [B, T, D] and the state with x appended (None for None)."""
        config, E = self.config, self.channels
        projected = self.in_proj(zero_invalid(x_BTD, ctx))
        z_BTE, mixed, dt = jnp.split(projected, [E, projected.shape[-1] - self.heads], axis=-1)
        mixed, inputs = self.convolution(mixed, None if state is None else state.inputs_BUC, ctx=ctx)
        u, b, c = jnp.split(mixed, [E, E + self.shared], axis=-1)
        u_BTNM = split_heads(u, config.head_dim).astype(jnp.float32)
        dt_BTN = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        if config.dt_limit_low > 0 or config.dt_limit_high is not None:
            dt_BTN = jnp.clip(dt_BTN, config.dt_limit_low, config.dt_limit_high)
        o_BTNM, state = decayed(
            split_heads(c, config.state_dim), split_heads(b, config.state_dim),
            (u_BTNM * dt_BTN[..., None]).astype(self.dtype), state, ctx, inputs,
            log_decay=-jnp.exp(self.A_log[...]) * dt_BTN,
            impl=config.impl,
        )  # fmt: skip
        o_BTNM = o_BTNM + self.D[...][:, None] * u_BTNM
        return zero_invalid(self.out(self.norm(o_BTNM.reshape(z_BTE.shape), z_BTE)), ctx), state

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> RecurrentState:
        """The empty state, as large for any capacity; `dtype` is that of the convolution's inputs alone."""
        del capacity, memory
        config = self.config
        inputs_BUC = self.convolution.init_state(batch, dtype)
        return RecurrentState.empty(batch, self.heads, config.state_dim, config.head_dim, inputs_BUC)
