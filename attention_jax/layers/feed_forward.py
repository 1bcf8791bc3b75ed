"""Feed-forward networks applied to each token."""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import nnx

from attention_jax.layers.linear import gelu, linear


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(gelu(up(x))): Shazeer 2020 (arXiv 2002.05202).

    kind: swiglu (act = silu), geglu (act = gelu) or gelu (no gate). width: the hidden width F.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        *,
        kind: Literal["swiglu", "geglu", "gelu"],
        use_bias: bool = False,
        dtype: Any,
        kernel_init: Any,
        out_init: Any,
        rngs: nnx.Rngs,
    ):
        common = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.kind = kind
        if kind != "gelu":
            self.gate = linear(d_model, width, kernel_init=kernel_init, **common)
        self.up = linear(d_model, width, kernel_init=kernel_init, **common)
        self.down = linear(width, d_model, kernel_init=out_init, **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """y [B, T, D]."""
        up_BTF = self.up(x_BTD)
        if self.kind == "gelu":
            return self.down(gelu(up_BTF))
        act = nnx.silu if self.kind == "swiglu" else gelu
        return self.down(act(self.gate(x_BTD)) * up_BTF)
