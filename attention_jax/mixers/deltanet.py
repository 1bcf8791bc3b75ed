"""DeltaNet, Gated DeltaNet and Kimi Delta Attention: linear attention with the delta rule.

    q, k, v = silu(short convolution of x W_q, x W_k, x W_v),   q, k <- q / |q|, k / |k|   per head
    beta_t = sigmoid(x_t W_b), one per head; twice that with negative eigenvalues
    S_t = A_t S_{t-1} + beta_t k_t (v_t - (A_t S_{t-1})^T k_t)^T,   o_t = S_t^T q_t / sqrt(H)

    deltanet        A_t = I                                              y = W_o RMSNorm(o)
    gated_deltanet  A_t = exp(-exp(A_log) softplus(x W_a + dt_bias))     y = W_o (RMSNorm(o) * silu(x W_g))
    kda             A_t = diag(exp(-exp(A_log) softplus(x W_1 W_2 + dt_bias)))
                                                    y = W_o (RMSNorm(o) * sigmoid(x W_3 W_4 + b))

Yang et al. 2024 (arXiv 2406.06484), Yang et al. 2024 (arXiv 2412.06464), Kimi Team 2025 (arXiv 2510.26692).
A_log has one entry per head, dt_bias one per decay. The transition A_t (I - beta_t k_t k_t^T) has eigenvalues
in [0, 1], or in [-1, 1] if beta reaches 2; negative eigenvalues allow state tracking such as parity (Grazzi et
al. 2024, arXiv 2411.12537). The norm is per head with one learned scale for all heads. beta and the decays are
float32 for any dtype of the model. There is no position encoding: the convolution, the delta rule and the decays
depend on the order of the tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, RecurrentState
from attention_jax.dtypes import accumulator, wider
from attention_jax.layers import GatedRMSNorm, RMSNorm, ShortConvolution, fused_linear, unit
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import check_positive, enter, head_width, split_heads, zero_invalid
from attention_jax.mixers.recurrent import (
    appended,
    check_convolution,
    check_steps,
    convolve,
    initial_decays,
    past_states,
    scan_options,
)
from attention_jax.ops.delta_rule import delta_rule, delta_weights
from attention_jax.ops.delta_rule.api import implementations

_CACHE = "O(1): a matrix H x M per head, the convolution's last inputs"


@dataclasses.dataclass(frozen=True)
class DeltaBaseConfig(MixerConfig):
    """Options shared by the three mixers."""

    implementations = staticmethod(implementations)
    direction = "causal"
    reason = "its state accumulates past tokens only"

    num_heads: int = 4  #: heads of values and states (N)
    head_dim: int | None = None  #: width of a head's queries and keys (H); null: d_model / num_heads
    value_dim: int | None = None  #: width of a head's values (M); null: head_dim
    convolution: int = 4  #: width of the short convolutions in tokens, the current one included
    negative_eigenvalues: bool = False  #: beta up to 2 instead of 1
    qk_norm_eps: float = 1e-6  #: added to the squared lengths |q|^2 and |k|^2
    norm_eps: float = 1e-5  #: added to the mean square of the norm of the head outputs
    chunk_size: int | None = None  #: tokens per chunk of the chunked recurrence; null: chosen by the op
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "value_dim", "convolution", "chunk_size")
        check_convolution(self.convolution)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(H, M); ValueError if H is not an integer."""
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        return head_dim, self.value_dim or head_dim

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        self.widths(d_model)

    @property
    def qk_heads(self) -> int:
        """The number of query and key heads."""
        return getattr(self, "num_qk_heads", None) or self.num_heads

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> RecurrentState:
        """An empty state, whose size does not depend on `capacity`; the options' dtype is that of the cached inputs only."""
        del capacity, causal
        H, M = self.widths(d_model)
        kept = (self.convolution - 1, 2 * self.qk_heads * H + self.num_heads * M, cache.storage_dtype)
        return RecurrentState.empty(batch, self.num_heads, H, M, kept, cache)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(DeltaBaseConfig):
    """DeltaNet; `kind: deltanet`. Causal models only."""

    about = About("DeltaNet", "arXiv 2406.06484", "O(T)", cache=_CACHE)

    kind: Literal["deltanet"] = "deltanet"  #: the mixer


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaBaseConfig):
    """Gated DeltaNet; `kind: gated_deltanet`. Causal models only."""

    about = About("Gated DeltaNet", "arXiv 2412.06464", "O(T)", cache=_CACHE)

    kind: Literal["gated_deltanet"] = "gated_deltanet"  #: the mixer
    num_qk_heads: int | None = None  #: heads of queries and keys, a divisor of num_heads; null: num_heads
    value_dim: int | None = None  #: width of a head's values (M); null: 2 head_dim
    dt_min: float = 1e-3  #: initial steps softplus(dt_bias) are drawn log-uniformly from dt_min ...
    dt_max: float = 0.1  #: ... to dt_max; smaller ones start with a longer memory

    def __post_init__(self):
        super().__post_init__()
        check_steps(self.dt_min, self.dt_max)
        heads = self.num_qk_heads
        if heads is not None and (heads < 1 or self.num_heads % heads):
            raise ValueError(f"num_qk_heads {heads} does not divide num_heads {self.num_heads}")

    def widths(self, d_model: int) -> tuple[int, int]:
        """(H, M); ValueError if H is not an integer."""
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        return head_dim, self.value_dim or 2 * head_dim


@dataclasses.dataclass(frozen=True)
class KDAConfig(DeltaBaseConfig):
    """Kimi Delta Attention; `kind: kda`. Causal models only."""

    about = About("Kimi Delta Attention", "arXiv 2510.26692", "O(T)", cache=_CACHE)

    kind: Literal["kda"] = "kda"  #: the mixer
    rank: int | None = None  #: rank of the projections to decays and gates; null: head_dim
    gate_bias: bool = True  #: a bias b in the output gate; false: none, as in Kimi Linear
    dt_min: float = 1e-3  #: initial steps softplus(dt_bias) are drawn log-uniformly from dt_min ...
    dt_max: float = 0.1  #: ... to dt_max; smaller ones start with a longer memory

    def __post_init__(self):
        super().__post_init__()
        check_steps(self.dt_min, self.dt_max)
        check_positive(self, "rank")


class _DeltaMixer(Mixer):
    """Base class of the three mixers. A subclass defines further projections of x, the decays and the norm."""

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, beta, the convolution, out, and the projections and parameters of the subclass."""
        config, N = self.config, self.config.num_heads
        self.head_dim, self.value_dim = config.widths(self.d_model)
        self.keys, self.values = config.qk_heads * self.head_dim, N * self.value_dim
        widths = {"q": self.keys, "k": self.keys, "v": self.values, "beta": N} | self._extra_projections()
        for name, width in widths.items():
            setattr(self, name, parts.linear(self.d_model, width))
        self.projected = tuple(widths)
        self.convolution = ShortConvolution(
            2 * self.keys + self.values, config.convolution, dtype=self.dtype, rngs=parts.rngs
        )
        self.out = parts.out(self.values, self.d_model)
        self._create_parameters(parts)

    def _extra_projections(self) -> dict[str, int]:
        """The names and widths of further projections of x."""
        raise NotImplementedError

    def _create_parameters(self, parts: Parts) -> None:
        """Create the parameters that only this subclass has."""
        raise NotImplementedError

    def _log_decay(self, projections: dict[str, jax.Array]) -> jax.Array | None:
        """log A_t, float32 [B, T, N] or [B, T, N, H]; None for A_t = I."""
        raise NotImplementedError

    def _normalize(self, o_BTNM: jax.Array, projections: dict[str, jax.Array]) -> jax.Array:
        """The normalised and gated output o [B, T, N, M], the input of the output projection."""
        raise NotImplementedError

    def _norm_options(self, parts: Parts) -> dict[str, Any]:
        return {"epsilon": self.config.norm_eps, "dtype": self.dtype, "rngs": parts.rngs}

    def _unit(self, x: jax.Array) -> jax.Array:
        return unit(x, self.config.qk_norm_eps)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the RecurrentState with x appended.

        The captured weights are those among the new tokens only, without the contribution of the state.
        """
        config, (B, T, _) = self.config, x_BTD.shape
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        outputs = fused_linear([getattr(self, name) for name in self.projected], x_BTD)
        projections = dict(zip(self.projected, outputs, strict=True))
        mixed = jnp.concatenate([projections[name] for name in "qkv"], axis=-1)
        mixed, inputs = convolve(self.convolution, mixed, state, ctx)
        q, k, v = jnp.split(mixed, [self.keys, 2 * self.keys], axis=-1)
        largest = 2.0 if config.negative_eigenvalues else 1.0
        arrays = (
            split_heads(q, self.head_dim, self._unit), split_heads(k, self.head_dim, self._unit),
            split_heads(v, self.value_dim), largest * nnx.sigmoid(wider(projections["beta"])),
        )  # fmt: skip
        call = {"log_decay": self._log_decay(projections), "scale": self.head_dim**-0.5}
        call |= scan_options(state, ctx, B, T)
        y_BTNM, *matrices = delta_rule(
            *arrays,
            initial_state_BNHM=None if state is None else state.matrix_BNHM,
            chunk_size=config.chunk_size,
            return_state=True,
            past_states=past_states(state, ctx, T),
            impl=config.impl,
            **call,
        )
        aux = ctx.captured(
            queries=lambda: arrays[0],
            keys=lambda: arrays[1],
            values=lambda: arrays[2],
            attention=lambda: delta_weights(arrays[0], arrays[1], arrays[3], **call),
        )
        y_BTD = self.out(self._normalize(y_BTNM, projections).reshape(B, T, self.values))
        state = None if state is None else appended(state, matrices, inputs, ctx)
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)


class DeltaNet(_DeltaMixer):
    """The delta rule without decay, and RMS norm without a gate."""

    config_type = DeltaNetConfig

    def _extra_projections(self):
        return {}

    def _create_parameters(self, parts):
        self.norm = RMSNorm(self.value_dim, **self._norm_options(parts))

    def _log_decay(self, projections):
        return None

    def _normalize(self, o_BTNM, projections):
        return self.norm(o_BTNM)


class GatedDeltaNet(_DeltaMixer):
    """The delta rule with a decay per head, and RMS norm with a silu gate."""

    config_type = GatedDeltaNetConfig

    def _extra_projections(self):
        return {"decay": self.config.num_heads, "gate": self.values}

    def _create_parameters(self, parts):
        self.A_log, self.dt_bias = initial_decays(
            parts.rngs, self.config.num_heads, self.config.num_heads, self.config.dt_min, self.config.dt_max
        )
        self.norm = GatedRMSNorm(self.value_dim, gate="silu", **self._norm_options(parts))

    def _log_decay(self, projections):
        logits_BTN = wider(projections["decay"])
        a_N, bias_N = (x[...].astype(logits_BTN.dtype) for x in (self.A_log, self.dt_bias))
        logits_BTN = logits_BTN + bias_N[None, None]
        return -jnp.exp(a_N)[None, None] * jax.nn.softplus(logits_BTN)

    def _normalize(self, o_BTNM, projections):
        return self.norm(o_BTNM, split_heads(projections["gate"], self.value_dim))


class KimiDeltaAttention(_DeltaMixer):
    """The delta rule with a decay per key channel, and RMS norm with a sigmoid gate, both of low rank."""

    config_type = KDAConfig

    def _extra_projections(self):
        rank = self.config.rank or self.head_dim
        return {"decay_down": rank, "gate_down": rank}

    def _create_parameters(self, parts):
        rank = self.config.rank or self.head_dim
        self.A_log, self.dt_bias = initial_decays(
            parts.rngs, self.config.num_heads, self.keys, self.config.dt_min, self.config.dt_max
        )
        self.decay_up = parts.linear(rank, self.keys, dtype=accumulator(self.dtype))
        self.gate_up = parts.linear(rank, self.values, use_bias=self.config.gate_bias)
        self.norm = GatedRMSNorm(self.value_dim, gate="sigmoid", **self._norm_options(parts))

    def _log_decay(self, projections):
        logits_BTE = self.decay_up(wider(projections["decay_down"]))
        a_N, bias_E = (x[...].astype(logits_BTE.dtype) for x in (self.A_log, self.dt_bias))
        steps_BTE = jax.nn.softplus(logits_BTE + bias_E[None, None])
        return -jnp.exp(a_N)[None, None, :, None] * split_heads(steps_BTE, self.head_dim)

    def _normalize(self, o_BTNM, projections):
        gate_BTE = self.gate_up(projections["gate_down"])
        return self.norm(o_BTNM, split_heads(gate_BTE, self.value_dim))
