"""Linformer: softmax attention over keys and values that are projected along the sequence, n to R.

    y = W_o concat_i softmax(q_i (E_i k_i)^T / sqrt(H)) (F_i v_i),   E_i, F_i of [R, n]

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity" (arXiv 2006.04768). Column p of E and F
belongs to position p; a row of fewer than n tokens uses the columns of its positions. A projected key is a
sum over the whole row: it cannot be causal, kept in a cache, or parted by document.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.layers import linear, together
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import (
    check_options,
    check_whole_row,
    dropout_options,
    head_width,
    refuse_causal,
    refuse_state,
    split_heads,
    zero_invalid,
)
from attention_jax.ops.softmax import dot_product_attention


@dataclasses.dataclass(frozen=True)
class LinformerConfig:
    """Attention over a projected sequence; `kind: linformer`. Models that are not causal only."""

    about = About(
        "Linformer", "arXiv 2006.04768", "O(T R)", "O(T + R), and E, F of [R, n]", cache="-", causal=False
    )
    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["linformer"] = "linformer"  #: the mixer
    num_heads: int = 4  #: heads (N)
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    length: int = 256  #: tokens of the longest row (n)
    projected_length: int = 64  #: keys and values that a row is projected to (R)
    #: who shares the projections of a layer; none: two for each head; head: two for all heads; kv: one for
    #: keys and values of all heads
    sharing: Literal["none", "head", "kv"] = "head"
    use_bias: bool = False  #: biases in q, k, v and the output
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        check_options(self)
        for name in ("length", "projected_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.projected_length > self.length:
            raise ValueError(
                f"projected_length {self.projected_length} exceeds length {self.length}: lower it, or use "
                "kind softmax"
            )

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        refuse_causal("linformer", "a projected key is a sum over the whole row, the future included", causal)
        head_width(d_model, self.num_heads, self.head_dim)

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **module) -> Linformer:
        """The mixer; `module` holds dtype and initialisers."""
        self.check(d_model, causal=causal)
        return Linformer(d_model, self, rngs=rngs, **module)


class SequenceProjection(nnx.Module):
    """x [B, S, N, H] to [B, R, N, H] by a matrix [n, R] for all heads, or [N, n, R]."""

    def __init__(self, length: int, rows: int, *, heads: int | None, rngs: nnx.Rngs):
        shape = (length, rows) if heads is None else (heads, length, rows)
        # A sum of n independent keys keeps the size of one, whatever std the model's matrices have.
        std = 1 / math.sqrt(length)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))

    def __call__(self, x_BSNH: jax.Array) -> jax.Array:
        kernel = self.kernel[..., : x_BSNH.shape[1], :].astype(x_BSNH.dtype)
        equation = "bsnh,sr->brnh" if kernel.ndim == 2 else "bsnh,nsr->brnh"
        return jnp.einsum(equation, x_BSNH, kernel)


class Linformer(nnx.Module):
    """Softmax attention over a projected sequence; two-sided, without a state."""

    def __init__(
        self,
        d_model: int,
        config: LinformerConfig,
        *,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        N = config.num_heads
        self.head_dim = H = head_width(d_model, N, config.head_dim)
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        for name in ("q", "k", "v"):
            setattr(self, name, linear(d_model, N * H, kernel_init=kernel_init, **common))
        self.out = linear(N * H, d_model, kernel_init=out_init or kernel_init, **common)
        heads = N if config.sharing == "none" else None
        sizes = (config.length, config.projected_length)
        self.k_rows = SequenceProjection(*sizes, heads=heads, rngs=rngs)
        self.v_rows = None if config.sharing == "kv" else SequenceProjection(*sizes, heads=heads, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, state: None = None, *, ctx: Context) -> tuple[jax.Array, None]:
        """y [B, T, D] and None; NaN in a row that holds a position >= length.

        Raises: ValueError for a state, segment ids or more than `length` slots.
        """
        config = self.config
        refuse_state("linformer", state)
        check_whole_row("linformer", ctx)
        T = x_BTD.shape[1]
        if T > config.length:
            raise ValueError(f"linformer: {T} tokens exceed its length {config.length}; raise length")
        # An empty slot's NaN would reach the projections' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        q_BTNH, k_BTNH, v_BTNH = (
            split_heads(y, self.head_dim) for y in together([self.q, self.k, self.v], x_BTD)
        )
        if ctx.positions_BT is not None:
            k_BTNH, v_BTNH = (_placed(y, ctx.positions_BT, config.length) for y in (k_BTNH, v_BTNH))
        y_BTNH = dot_product_attention(
            q_BTNH,
            self.k_rows(k_BTNH),
            (self.v_rows or self.k_rows)(v_BTNH),
            q_positions=ctx.positions_BT,
            impl=config.impl,
            **dropout_options(config.dropout, ctx),
        )
        y_BTD = self.out(y_BTNH.reshape(*y_BTNH.shape[:2], -1))
        if ctx.positions_BT is not None:
            # A traced position cannot raise; NaN is seen, a key that is left out is not.
            lost_B = (ctx.positions_BT >= config.length).any(axis=1)
            y_BTD = jnp.where(lost_B[:, None, None], jnp.nan, y_BTD)
        return zero_invalid(y_BTD, ctx), None

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> None:
        """There is none: ValueError."""
        refuse_state("linformer", (batch, capacity, memory, dtype))


def _placed(x_BTNH: jax.Array, positions_BT: jax.Array, length: int) -> jax.Array:
    """[B, length, N, H]: each token at its position, 0 where there is none."""
    B, T = x_BTNH.shape[:2]
    positions_BT = jnp.broadcast_to(positions_BT, (B, T))
    places_BT = jnp.where(positions_BT >= 0, positions_BT, length)  # past the end: dropped
    empty = jnp.zeros((B, length, *x_BTNH.shape[2:]), x_BTNH.dtype)
    return empty.at[jnp.arange(B)[:, None], places_BT].set(x_BTNH, mode="drop")
