"""Nystromformer: softmax attention approximated with R landmarks.

    y = W_o concat_i (F A^+ B v_i + conv(v_i))
    F = softmax(q k'^T s) [T, R],  A = softmax(q' k'^T s) [R, R],  B = softmax(q' k^T s) [R, T],  s = 1 / sqrt(H)

Xiong et al. 2021, "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention" (arXiv
2102.03902). The landmarks q', k' are means over R equal segments of the row. A^+ is the pseudo-inverse, computed
by the paper's iteration. conv is a depthwise convolution along the row with one kernel per head. B v and
F (A^+ B v) are calls of the attention op, from landmarks to tokens and from tokens to landmarks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator, wider
from attention_jax.layers import fused_linear
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    check_positive,
    enter,
    head_width,
    merge_heads,
    split_heads,
    valid_tokens,
    zero_invalid,
)
from attention_jax.ops.softmax import dot_product_attention


@dataclasses.dataclass(frozen=True)
class NystromformerConfig(MixerConfig):
    """Attention with landmarks; `kind: nystromformer`. Models that are not causal only."""

    about = About("Nystromformer", "arXiv 2102.03902", "O(T R + R^3)", "O(T + R^2)", cache="-")
    direction = "bidirectional"
    reason = "a landmark is a mean of tokens, the future included"
    mixes_whole_row = True

    kind: Literal["nystromformer"] = "nystromformer"  #: the mixer
    num_heads: int = 4  #: heads (N)
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    landmarks: int = 64  #: landmarks, the means of equal segments of the row (R)
    iterations: int = 6  #: iterations of the pseudo-inverse
    #: width of the convolution of the values in tokens, odd; null: no convolution
    conv_width: int | None = 33
    use_bias: bool = False  #: biases in q, k, v and the output
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "landmarks", "iterations")
        width = self.conv_width
        if width is not None and (width < 1 or width % 2 == 0):
            raise ValueError(f"conv_width must be odd and >= 1, got {width}; use null to disable it")
        check_between(
            self, "iterations", 1, 1000, "each is compiled, and the pseudo-inverse converges in a few"
        )

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        head_width(d_model, self.num_heads, self.head_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> None:
        """Raise ValueError, since there is no state."""
        raise ValueError(
            "nystromformer has no state, since every output depends on the whole row: pass state=None"
        )


class DepthwiseConv(nnx.Module):
    """y_t = sum_w kernel_w v_{t + w - W // 2} along the row, with a kernel [W] per head and zero padding."""

    def __init__(self, width: int, heads: int, *, kernel_init, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, heads), jnp.float32))

    def __call__(self, v_BTNH: jax.Array) -> jax.Array:
        """y [B, T, N, H], computed as products of banded matrices [C, 2C] with pairs of blocks of C = W - 1 values.

        On a CPU this is five times as fast as a sum of W shifted arrays and twenty times as fast as XLA's
        grouped convolution.
        """
        kernel_WN = self.kernel[...].astype(v_BTNH.dtype)
        (B, T, N, H), W = v_BTNH.shape, kernel_WN.shape[0]
        C = max(W - 1, 1)
        blocks = -(-T // C)
        padding = (W // 2, (blocks + 1) * C - T - W // 2)
        v_BgCNH = jnp.pad(v_BTNH, ((0, 0), padding, (0, 0), (0, 0))).reshape(B, blocks + 1, C, N, H)
        pairs_BgSNH = jnp.concatenate([v_BgCNH[:, :-1], v_BgCNH[:, 1:]], axis=2)
        tap_CS = np.arange(2 * C)[None] - np.arange(C)[:, None]
        band_CSN = jnp.where(
            ((tap_CS >= 0) & (tap_CS < W))[..., None], kernel_WN[np.clip(tap_CS, 0, W - 1)], 0
        )
        y_BgCNH = jnp.einsum("csn,bgsnh->bgcnh", band_CSN, pairs_BgSNH)
        return y_BgCNH.reshape(B, blocks * C, N, H)[:, :T]


class Nystromformer(Mixer):
    """Softmax attention with landmarks; bidirectional, without a state."""

    config_type = NystromformerConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, out and the convolution of the values."""
        config, N = self.config, self.config.num_heads
        self.head_dim = H = head_width(self.d_model, N, config.head_dim)
        for name in ("q", "k", "v"):
            setattr(self, name, parts.linear(self.d_model, N * H, use_bias=config.use_bias))
        self.out = parts.out(N * H, self.d_model, use_bias=config.biased_output)
        width = config.conv_width
        self.conv = (
            None if width is None else DepthwiseConv(width, N, kernel_init=parts.kernel_init, rngs=parts.rngs)
        )

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and no state. Raises: ValueError for a state or segment ids."""
        config = self.config
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        qkv = (split_heads(y, self.head_dim) for y in fused_linear([self.q, self.k, self.v], x_BTD))
        valid_BT = valid_tokens(ctx)
        if valid_BT is not None:  # invalid tokens must not contribute to landmarks or to the convolution
            qkv = (jnp.where(valid_BT[..., None, None], y, jnp.zeros((), y.dtype)) for y in qkv)
        q_BTNH, k_BTNH, v_BTNH = qkv
        aux = ctx.captured(queries=lambda: q_BTNH, keys=lambda: k_BTNH, values=lambda: v_BTNH)
        q_BRNH, k_BRNH = (segment_means(y, valid_BT, config.landmarks) for y in (q_BTNH, k_BTNH))
        at = ctx.positions_BT
        landmark_BRNH = dot_product_attention(q_BRNH, k_BTNH, v_BTNH, k_positions=at, impl=config.impl)
        inverse_BNRR = pseudo_inverse(_landmark_kernel(q_BRNH, k_BRNH), config.iterations)
        values_BRNH = jnp.einsum(
            "bnrs,bsnh->brnh",
            inverse_BNRR,
            wider(landmark_BRNH),
            precision=jax.lax.Precision.HIGHEST,
        ).astype(v_BTNH.dtype)
        y_BTNH = dot_product_attention(q_BTNH, k_BRNH, values_BRNH, q_positions=at, impl=config.impl)
        if self.conv is not None:
            y_BTNH = y_BTNH + self.conv(v_BTNH)
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNH)), ctx), None, aux)


def segment_means(x_BTNH: jax.Array, valid_BT: jax.Array | None, segments: int) -> jax.Array:
    """Means over R equal segments of the valid tokens of each row, in slot order, [B, R, N, H].

    For n tokens, each segment spans n / R. A token at a boundary contributes to both segments in proportion to
    its overlap, and for n < R a token spans several segments. A row without tokens gives 0. x must be 0 for
    invalid tokens.
    """
    B, T, N, H = x_BTNH.shape
    if valid_BT is None and T % segments == 0:
        x = x_BTNH.reshape(B, segments, T // segments, N, H)
        return jnp.mean(x, axis=2, dtype=accumulator(x)).astype(x_BTNH.dtype)
    valid_BT = jnp.ones((1, T), bool) if valid_BT is None else valid_BT
    count_B11 = valid_BT.sum(axis=1, dtype=jnp.int32)[:, None, None]
    rank_B1T = (jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1)[:, None]
    # Exact in integers: token i spans [i R, (i + 1) R) and segment r spans [r n, (r + 1) n).
    r_1R1 = jnp.arange(segments, dtype=jnp.int32)[None, :, None]
    first = jnp.maximum(rank_B1T * segments, r_1R1 * count_B11)
    last = jnp.minimum((rank_B1T + 1) * segments, (r_1R1 + 1) * count_B11)
    overlaps_BRT = jnp.where(valid_BT[:, None], jnp.maximum(last - first, 0), 0).astype(accumulator(x_BTNH))
    shares_BRT = overlaps_BRT / jnp.maximum(count_B11, 1).astype(overlaps_BRT.dtype)
    shares_BRT = jnp.broadcast_to(shares_BRT, (B, segments, T))
    means = jnp.einsum("brt,btnh->brnh", shares_BRT, wider(x_BTNH))
    return means.astype(x_BTNH.dtype)


def _landmark_kernel(q_BRNH: jax.Array, k_BRNH: jax.Array) -> jax.Array:
    """A = softmax(q' k'^T / sqrt(H)), float32 [B, N, R, R]."""
    q, k = wider(q_BRNH), wider(k_BRNH)
    scores = jnp.einsum("brnh,bsnh->bnrs", q, k, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)


def pseudo_inverse(a: jax.Array, iterations: int) -> jax.Array:
    """The Moore-Penrose inverse of matrices [..., R, R], by the paper's third-order iteration.

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,   Z_0 = A^T / (max column sum of |A| max row sum of |A|)

    The norms are computed for each matrix. Some published code takes one maximum over batch and heads, so that
    the result of a row depends on the other rows of the batch.
    """
    size = jnp.abs(a)
    norms = size.sum(-2).max(-1) * size.sum(-1).max(-1)
    z = jnp.swapaxes(a, -1, -2) / norms[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def product(x, y):
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    for _ in range(iterations):
        az = product(a, z)
        z = product(z, 13 * eye - product(az, 15 * eye - product(az, 7 * eye - az))) / 4
    return z
