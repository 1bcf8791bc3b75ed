"""Retention (RetNet): Sun et al. 2023, "Retentive Network" (arXiv 2307.08621).

    S_t = gamma_n S_{t-1} + k_t v_t^T,   o_t = q_t S_t / sqrt(H),   q, k turned by RoPE
    y = W_o (swish(x W_g) * GroupNorm(o)),   gamma_n = 1 - 2^(-5 - n)

Each head forgets at a fixed rate of its own. The group norm is per head. What the paper's parallel form
divides by for precision (the root of a row's summed decays, the row's absolute sum) is one positive factor for
all of a head's features: the group norm takes it out again, so that none of it is computed here. The sums
behind o are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.about import About
from attention_jax.layers import linear, together
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import check_options, head_width, positions_of, split_heads, zero_invalid
from attention_jax.mixers.recurrent import HeadGroupNorm, RecurrentState, decayed, refuse_bidirectional
from attention_jax.ops.decay_scan.api import implementations
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class RetentionConfig:
    """Multi-scale retention; `kind: retention`. Causal models only."""

    about = About("Retention (RetNet)", "arXiv 2307.08621", "O(T)", cache="a matrix H x M per head")
    implementations = staticmethod(implementations)
    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["retention"] = "retention"  #: the mixer
    num_heads: int = 4  #: heads (N), each with its own decay
    head_dim: int | None = None  #: width of a head's queries and keys (H); null: d_model / num_heads
    value_dim: int | None = None  #: width of a head's values (M); null: 2 head_dim, as in the paper
    rope: RoPE | None = RoPE()  #: rotation of queries and keys; null: none
    first_exponent: float = 5.0  #: head 0 decays by 1 - 2^-first_exponent at every token
    #: the same of the last head, those between evenly spaced; null: first_exponent + num_heads - 1
    last_exponent: float | None = None
    use_bias: bool = False  #: biases in the projections
    impl: str | None = None  #: implementation of the recurrence by name; null: the best for the shape

    def __post_init__(self):
        check_options(self)
        if self.value_dim is not None and self.value_dim < 1:
            raise ValueError(f"value_dim must be >= 1, got {self.value_dim}")
        for name in ("first_exponent", "last_exponent"):
            value = getattr(self, name)
            # 1 - 2^-24 is the largest float32 below 1.
            if value is not None and not 0 < value <= 24:
                raise ValueError(f"{name} must be > 0 and <= 24, got {value}: a decay is 1 - 2^-{name}")
        if self.last_exponent is None and self.first_exponent + self.num_heads - 1 > 24:
            raise ValueError(
                f"first_exponent {self.first_exponent} and num_heads {self.num_heads} decay the last head by "
                "less than float32 tells from 1; set last_exponent to at most 24"
            )

    def log_decay(self) -> np.ndarray:
        """ln gamma of every head, float32 [N]."""
        last = self.last_exponent
        last = self.first_exponent + self.num_heads - 1 if last is None else last
        return np.log1p(-(2.0 ** -np.linspace(self.first_exponent, last, self.num_heads))).astype(np.float32)

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        refuse_bidirectional("retention", causal, "its state decays from the past to the present")
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Retention:
        """The mixer; `module` holds dtype and initialisers."""
        self.check(d_model, causal=causal)
        return Retention(d_model, self, rngs=rngs, **module)


class Retention(nnx.Module):
    """Linear attention with a fixed decay per head, a group norm and a swish gate."""

    def __init__(
        self,
        d_model: int,
        config: RetentionConfig,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        N = config.num_heads
        self.head_dim = head_width(d_model, N, config.head_dim)
        self.value_dim = config.value_dim or 2 * self.head_dim
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        widths = {"q": self.head_dim, "k": self.head_dim, "v": self.value_dim, "gate": self.value_dim}
        for name, width in widths.items():
            setattr(self, name, linear(d_model, N * width, kernel_init=kernel_init, **common))
        self.norm = HeadGroupNorm(N, self.value_dim, dtype=dtype, rngs=rngs)
        self.out = linear(N * self.value_dim, d_model, kernel_init=out_init or kernel_init, **common)

    def __call__(
        self, x_BTD: jax.Array, state: RecurrentState | None = None, *, ctx: Context
    ) -> tuple[jax.Array, RecurrentState | None]:
        """y [B, T, D] and the state with x appended (None for None)."""
        config = self.config
        x_BTD = zero_invalid(x_BTD, ctx)
        q, k, v, gate = together([self.q, self.k, self.v, self.gate], x_BTD)
        q_BTNH, k_BTNH = split_heads(q, self.head_dim), split_heads(k, self.head_dim)
        if config.rope is not None:
            at_BT = positions_of(ctx, x_BTD.shape[1])
            q_BTNH, k_BTNH = config.rope.queries(q_BTNH, at_BT), config.rope.keys(k_BTNH, at_BT)
        o_BTNM, state = decayed(
            q_BTNH, k_BTNH, split_heads(v, self.value_dim), state, ctx,
            log_decay=jnp.asarray(config.log_decay()),
            scale=self.head_dim**-0.5,
            impl=config.impl,
        )  # fmt: skip
        y_BTE = self.norm(o_BTNM).reshape(gate.shape) * jax.nn.silu(gate)
        return zero_invalid(self.out(y_BTE), ctx), state

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> RecurrentState:
        """The empty state; it is as large for any capacity, and float32 whatever the dtype."""
        del capacity, memory, dtype
        return RecurrentState.empty(batch, self.config.num_heads, self.head_dim, self.value_dim)
