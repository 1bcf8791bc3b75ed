"""Feed-forward networks applied to each token."""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import nnx

from attention_jax.layers.linear import fused_linear, gelu, gelu_tanh, linear

FeedForwardKind = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"]

# The activation of each kind, and whether it multiplies a second projection.
_KINDS = {
    "swiglu": (nnx.silu, True),
    "geglu": (gelu, True),
    "geglu_tanh": (gelu_tanh, True),
    "gelu": (gelu, False),
    "gelu_tanh": (gelu_tanh, False),
}


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate: Shazeer 2020 (arXiv 2002.05202).

    kind: swiglu (act = silu), geglu (gelu) and geglu_tanh (its tanh approximation) have a gate; gelu and
    gelu_tanh have none. width: the hidden width F.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        *,
        kind: FeedForwardKind,
        use_bias: bool = False,
        dtype: Any,
        kernel_init: Any,
        out_init: Any,
        rngs: nnx.Rngs,
    ):
        common = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.kind = kind
        if is_gated(kind):
            self.gate = linear(d_model, width, kernel_init=kernel_init, **common)
        self.up = linear(d_model, width, kernel_init=kernel_init, **common)
        self.down = linear(width, d_model, kernel_init=out_init, **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """y [B, T, D]."""
        activation, gated = _KINDS[self.kind]
        if not gated:
            return self.down(activation(self.up(x_BTD)))
        gate_BTF, up_BTF = fused_linear([self.gate, self.up], x_BTD, only_prepared=True)
        return self.down(activation(gate_BTF) * up_BTF)


def is_gated(kind: FeedForwardKind) -> bool:
    """Whether a feed-forward of this kind has a third projection, the gate."""
    return _KINDS[kind][1]
