"""Linformer: softmax attention over keys and values that are projected along the sequence, from n to R.

    y = W_o concat_i softmax(q_i (E_i k_i)^T / sqrt(H)) (F_i v_i),   E_i, F_i of [R, n]

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity" (arXiv 2006.04768). Column p of E and F
applies to position p; a row of fewer than n tokens uses the columns of its positions. A projected key is a
sum over the whole row, so that causal models, caches and packed documents are not supported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE
from attention_jax.layers import fused_linear
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    check_positive,
    dropout_options,
    enter,
    head_width,
    merge_heads,
    split_heads,
    zero_invalid,
)
from attention_jax.ops.softmax import dot_product_attention


@dataclasses.dataclass(frozen=True)
class LinformerConfig(MixerConfig):
    """Attention over a projected sequence; `kind: linformer`. Models that are not causal only."""

    about = About("Linformer", "arXiv 2006.04768", "O(T R)", "O(T + R), and E, F of [R, n]", cache="-")
    direction = "bidirectional"
    reason = "a projected key is a sum over the whole row, the future included"
    mixes_whole_row = True
    horizon_key = "length"

    kind: Literal["linformer"] = "linformer"  #: the mixer
    num_heads: int = 4  #: heads (N)
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    length: int = 256  #: maximum tokens per row (n)
    projected_length: int = 64  #: projected keys and values per row (R)
    #: sharing of the projections in a layer; none: two per head; head: two for all heads; kv: one for keys and
    #: values of all heads
    sharing: Literal["none", "head", "kv"] = "head"
    use_bias: bool = False  #: biases in q, k, v and the output
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "length", "projected_length")
        if self.projected_length > self.length:
            raise ValueError(
                f"projected_length {self.projected_length} exceeds length {self.length}: lower it, or use "
                "kind softmax"
            )

    @property
    def horizon(self) -> int:
        """The maximum number of tokens per row."""
        return self.length

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        head_width(d_model, self.num_heads, self.head_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> None:
        """Raise ValueError, since there is no state."""
        raise ValueError(
            "linformer has no state, since every output depends on the whole row: pass state=None"
        )


class SequenceProjection(nnx.Module):
    """Projects x [B, S, N, H] to [B, R, N, H] with a matrix [n, R] for all heads, or [N, n, R]."""

    def __init__(self, length: int, rows: int, *, heads: int | None, rngs: nnx.Rngs):
        shape = (length, rows) if heads is None else (heads, length, rows)
        # A sum of n independent keys then has the variance of one key, independent of the model's init_std.
        std = 1 / math.sqrt(length)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))

    def __call__(self, x_BSNH: jax.Array) -> jax.Array:
        kernel = self.kernel[..., : x_BSNH.shape[1], :].astype(x_BSNH.dtype)
        equation = "bsnh,sr->brnh" if kernel.ndim == 2 else "bsnh,nsr->brnh"
        return jnp.einsum(equation, x_BSNH, kernel)


class Linformer(Mixer):
    """Softmax attention over a projected sequence; bidirectional, without a state."""

    config_type = LinformerConfig

    def setup(self, parts: Parts) -> None:
        """q, k, v, out and the projections along the sequence."""
        config, N = self.config, self.config.num_heads
        self.head_dim = H = head_width(self.d_model, N, config.head_dim)
        for name in ("q", "k", "v"):
            setattr(self, name, parts.linear(self.d_model, N * H, use_bias=config.use_bias))
        self.out = parts.out(N * H, self.d_model, use_bias=config.biased_output)
        heads = N if config.sharing == "none" else None
        sizes = (config.length, config.projected_length)
        self.k_rows = SequenceProjection(*sizes, heads=heads, rngs=parts.rngs)
        self.v_rows = (
            None if config.sharing == "kv" else SequenceProjection(*sizes, heads=heads, rngs=parts.rngs)
        )

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and no state; NaN in a row that holds a position >= length.

        Queries, keys and values are captured before the projection along the sequence. Raises: ValueError for
        a state, segment ids or more than `length` slots.
        """
        config = self.config
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        T = x_BTD.shape[1]
        if T > config.length:
            raise ValueError(f"linformer: {T} tokens exceed its length {config.length}; increase length")
        q_BTNH, k_BTNH, v_BTNH = (
            split_heads(y, self.head_dim) for y in fused_linear([self.q, self.k, self.v], x_BTD)
        )
        aux = ctx.captured(queries=lambda: q_BTNH, keys=lambda: k_BTNH, values=lambda: v_BTNH)
        if ctx.positions_BT is not None:
            k_BTNH, v_BTNH = (
                _scatter_by_position(y, ctx.positions_BT, config.length) for y in (k_BTNH, v_BTNH)
            )
        y_BTNH = dot_product_attention(
            q_BTNH,
            self.k_rows(k_BTNH),
            (self.v_rows or self.k_rows)(v_BTNH),
            q_positions=ctx.positions_BT,
            impl=config.impl,
            **dropout_options(config.dropout, ctx),
        )
        y_BTD = self.out(merge_heads(y_BTNH))
        if ctx.positions_BT is not None:
            # A traced position cannot raise an error: NaN makes it visible, unlike an omitted key.
            beyond_B = (ctx.positions_BT >= config.length).any(axis=1)
            y_BTD = jnp.where(beyond_B[:, None, None], jnp.nan, y_BTD)
        return MixerOutput(zero_invalid(y_BTD, ctx), None, aux)


def _scatter_by_position(x_BTNH: jax.Array, positions_BT: jax.Array, length: int) -> jax.Array:
    """The tokens scattered to their positions, [B, length, N, H]; 0 at positions without a token."""
    B, T = x_BTNH.shape[:2]
    positions_BT = jnp.broadcast_to(positions_BT, (B, T))
    indices_BT = jnp.where(positions_BT >= 0, positions_BT, length)  # out of range: the scatter drops them
    empty = jnp.zeros((B, length, *x_BTNH.shape[2:]), x_BTNH.dtype)
    return empty.at[jnp.arange(B)[:, None], indices_BT].set(x_BTNH, mode="drop")
