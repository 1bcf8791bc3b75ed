"""Dense feed-forwards, and the activation of one hidden unit that experts share with them.

    y = W_down a(x W_up)                                  without a gate
    y = W_down (a(x W_gate) * (x W_up + up_offset))       with one: Shazeer 2020 (arXiv 2002.05202)

With a `limit` L the activation's input is at most L and that of the product within [-L, L], as in gpt-oss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.choices import check_between
from attention_jax.feed_forwards.base import FeedForward, FeedForwardConfig, FeedForwardOutput
from attention_jax.layers import fused_linear, gelu, gelu_tanh
from attention_jax.mixers import Context, Parts

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
FeedForwardWord = Literal[
    "swiglu", "geglu", "geglu_tanh", "reglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"
]

# relu2: squared ReLU (So et al. 2021, arXiv 2109.08668).
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

#: The activation of each short word, and whether it multiplies a second projection.
WORDS: dict[str, tuple[ActivationName, bool]] = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "reglu": ("relu", True),
    **{name: (name, False) for name in _ACTIVATIONS},
}


@dataclasses.dataclass(frozen=True)
class UnitConfig(FeedForwardConfig):
    """The hidden units of a feed-forward, for `DenseConfig` and for experts."""

    #: a; relu2 is the squared ReLU, gelu_tanh the tanh approximation of GELU (GPT-2, Gemma, Phi)
    activation: ActivationName = "silu"
    gated: bool = True  #: whether a(gate) multiplies a second projection
    limit: float | None = None  #: L, which bounds the inputs of the activation and of the product; null: none
    sharpness: float = 1.0  #: s of the activation silu: x sigmoid(s x); 1.702 in gpt-oss
    up_offset: float = 0.0  #: added to the second projection of a gated unit; 1 in gpt-oss

    def __post_init__(self):
        super().__post_init__()
        check_between(self, "limit", 1e-3, 1e6, "less leaves no signal, and null turns it off")
        check_between(self, "sharpness", 1e-3, 1e3, "1 is the plain silu")
        if self.sharpness != 1 and self.activation != "silu":
            raise ValueError(f"sharpness {self.sharpness} is for activation silu, got {self.activation}")
        if self.up_offset and not self.gated:
            raise ValueError(f"up_offset {self.up_offset} is for a gated unit: set gated to true")

    def width_of(self, d_model: int, width: int | None) -> int:
        """The hidden width F: `width`, or 4 d_model without a gate and 8/3 d_model rounded to 8 with one."""
        if width is not None:
            return width
        return 8 * round(d_model / 3) if self.gated else 4 * d_model

    def unit(self, gate: jax.Array | None, up: jax.Array) -> jax.Array:
        """The hidden features from the projections; gate is None without a gate."""
        if self.limit is not None:
            up = jnp.clip(up, -self.limit, self.limit)
            gate = None if gate is None else jnp.minimum(gate, self.limit)
        if gate is None:
            return self._activate(up)
        return self._activate(gate) * (up + self.up_offset if self.up_offset else up)

    def _activate(self, x: jax.Array) -> jax.Array:
        if self.sharpness != 1:
            return x * jax.nn.sigmoid(self.sharpness * x)
        return _ACTIVATIONS[self.activation](x)


@dataclasses.dataclass(frozen=True)
class DenseConfig(UnitConfig):
    """A feed-forward with the same weights for every token."""

    kind: Literal["dense"] = "dense"  #: the feed-forward
    width: int | None = None  #: F; null: 4 d_model (without a gate) or 8/3 d_model rounded to a multiple of 8
    use_bias: bool | None = None  #: biases of the projections; null: model.use_bias

    def __post_init__(self):
        super().__post_init__()
        if self.width is not None and self.width < 1:
            raise ValueError(f"width must be >= 1, got {self.width}")

    def hidden_width(self, d_model: int) -> int:
        """F."""
        return self.width_of(d_model, self.width)

    @classmethod
    def of_word(cls, word: FeedForwardWord, width: int | None = None) -> DenseConfig:
        """The config of a short word, such as swiglu."""
        activation, gated = WORDS[word]
        return cls(activation=activation, gated=gated, width=width)


class Dense(FeedForward):
    """down(unit(gate(x), up(x))): see `DenseConfig`."""

    config_type = DenseConfig

    def setup(self, parts: Parts) -> None:
        """Create gate (of a gated unit), up and down."""
        config = self.config
        width = config.width_of(self.d_model, config.width)
        use_bias = self.use_bias if config.use_bias is None else config.use_bias
        if config.gated:
            self.gate = parts.linear(self.d_model, width, use_bias=use_bias)
        self.up = parts.linear(self.d_model, width, use_bias=use_bias)
        self.down = parts.out(width, self.d_model, use_bias=use_bias)

    def run(self, x_BTD: jax.Array, *, ctx: Context, cached: bool = False) -> FeedForwardOutput:
        """y [B, T, D] of each token by itself."""
        del ctx, cached
        if self.config.gated:
            gate_BTF, up_BTF = fused_linear([self.gate, self.up], x_BTD, only_prepared=True)
        else:
            gate_BTF, up_BTF = None, self.up(x_BTD)
        return FeedForwardOutput(self.down(self.config.unit(gate_BTF, up_BTF)))
