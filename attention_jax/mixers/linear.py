"""Linear attention with deterministic feature maps: `linear`, `cosformer`, `based`, `hedgehog`.

    y_t = W_o concat_n sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts,   w_ts = phi(q_t) . phi(k_s)

    linear     phi by name: elu(x) + 1 and others      Katharopoulos et al. 2020 (arXiv 2006.16236)
    cosformer  relu, reweighted by a cosine of t - s   Qin et al. 2022 (arXiv 2202.08791)
    based      w = 1 + q.k + (q.k)^2 / 2               Arora et al. 2024 (arXiv 2402.18668)
    hedgehog   a learned map, then softmax             Zhang et al. 2024 (arXiv 2402.04347)

In models that are not causal, the sums are over the whole document.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import feature_maps
from attention_jax.about import About
from attention_jax.choices import check_between
from attention_jax.dtypes import wider
from attention_jax.feature_maps import FEATURE_MAPS
from attention_jax.mixers.base import Context, MixerOutput, Parts
from attention_jax.mixers.linear_parts import Features, LinearBase, LinearBaseConfig
from attention_jax.mixers.parts import head_width, positions_of, valid_tokens
from attention_jax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(LinearBaseConfig):
    """Linear attention with a named feature map; `kind: linear`."""

    about = About("Linear attention", "arXiv 2006.16236", "O(T)", "O(T)", "a matrix H x M per head")

    kind: Literal["linear"] = "linear"  #: the mixer
    #: phi, applied to the queries and keys of a head
    feature_map: Literal["elu1", "relu", "squared_relu", "softmax", "identity"] = "elu1"
    #: divide by the sum of the weights; null: only if phi is nonnegative (all except identity)
    normalize: bool | None = None
    #: rotary position embedding of the features, in the numerator only; null: none
    rope: RoPE | None = None
    normalizer_eps: float = (
        0.0  #: added to the sum of the weights, the denominator; the authors' code has 1e-6
    )

    def __post_init__(self):
        super().__post_init__()
        if self.normalize and not FEATURE_MAPS[self.feature_map].never_negative:
            raise ValueError(
                f"normalize needs nonnegative weights, but feature_map {self.feature_map!r} has negative "
                "features; set normalize: false and output_norm: rms"
            )

    @property
    def normalized(self) -> bool:
        """True if weights are divided by their sum."""
        return FEATURE_MAPS[self.feature_map].never_negative if self.normalize is None else self.normalize

    @property
    def rotates(self) -> bool:
        """True if the numerator has rotated features, unlike the denominator."""
        return self.normalized and self.rope is not None

    def feature_count(self, d_model: int) -> int:
        """H."""
        return self.query_width(d_model)

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        if self.rope is not None:
            self.rope.rotated_width(head_width(d_model, self.num_heads, self.head_dim))


class LinearAttention(LinearBase):
    """Linear attention: phi(q) . phi(k) replaces exp(q . k).

    Without normalisation, weights are divided by sqrt(H). With rope, w_ts = (R_t phi(q_t)) . (R_s phi(k_s)) in
    the numerator only, since rotated features may be negative (Su et al. 2021, arXiv 2104.09864, equation 19).
    """

    config_type = LinearAttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create the parameters that all linear mixers have."""
        super().setup(parts)
        self.map = FEATURE_MAPS[self.config.feature_map]
        self.scale = 1.0 if self.normalize else 1 / math.sqrt(self.head_dim)

    def features(self, q_BTNH, k_BTKH, state, ctx):
        """The named feature map, rotated if the config has rope."""
        del state
        q_BTNF, k_BTKF = self.map.phi(q_BTNH), self.map.phi(k_BTKH)
        rope = self.config.rope
        if rope is None:
            return Features(q_BTNF, k_BTKF)
        at_BT = positions_of(ctx, q_BTNH.shape[1])
        rotated = rope.queries(q_BTNF, at_BT), rope.keys(k_BTKF, at_BT)
        return Features(q_BTNF, k_BTKF, rotated) if self.normalize else Features(*rotated)


@dataclasses.dataclass(frozen=True)
class CosformerConfig(LinearBaseConfig):
    """cosFormer: linear attention whose weights decay with distance as a cosine; `kind: cosformer`."""

    about = About("cosFormer", "arXiv 2202.08791", "O(T)", "O(T)", "a matrix 2H x M per head")

    kind: Literal["cosformer"] = "cosformer"  #: the mixer
    #: maximum length of a document (M); weights decay to 0 at this distance, later positions give NaN
    horizon: int = 2048
    normalizer_eps: float = 0.0  #: added to the sum of the weights, the denominator

    def __post_init__(self):
        super().__post_init__()
        if self.horizon < 1:
            raise ValueError(f"horizon must be >= 1, got {self.horizon}")

    def feature_count(self, d_model: int) -> int:
        """2 H: H features times a cosine and H times a sine."""
        return 2 * self.query_width(d_model)


class Cosformer(LinearBase):
    """Linear attention with w_ts = relu(q_t) . relu(k_s) cos(pi (t - s) / (2 horizon)).

    The horizon is fixed. The authors' code uses the current length, so that earlier outputs change as the
    sequence grows.
    """

    config_type = CosformerConfig

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the LinearState with x appended.

        A token at a position past the horizon gives NaN and does not change the state. In a model that is not
        causal, its whole row is NaN, since every token of the row attends to it. Raises: ValueError for more
        than `horizon` tokens without positions.
        """
        ctx = ctx or Context()
        T, horizon = x_BTD.shape[1], self.config.horizon
        if ctx.positions_BT is None:
            if T > horizon:
                raise ValueError(f"{T} tokens exceed cosformer's horizon {horizon}; increase horizon")
            return super().mix(x_BTD, state, ctx=ctx)
        # A traced position cannot raise an error: NaN makes it visible, unlike a weight of the wrong sign.
        beyond_BT = valid_tokens(ctx) & (ctx.positions_BT >= horizon)
        kept = dataclasses.replace(ctx, positions_BT=jnp.where(beyond_BT, -1, ctx.positions_BT))
        y_BTD, state, aux = self._mix(x_BTD, state, kept, seen_BT=valid_tokens(ctx))
        if not self.causal:
            beyond_BT = valid_tokens(ctx) & beyond_BT.any(axis=1, keepdims=True)
        return MixerOutput(jnp.where(beyond_BT[..., None], jnp.nan, y_BTD), state, aux)

    def features(self, q_BTNH, k_BTKH, state, ctx):
        """relu, multiplied by the cosine and the sine of the angle of the position."""
        del state
        at_BT = positions_of(ctx, q_BTNH.shape[1])
        return Features(
            *(feature_maps.cos_reweighted(x, at_BT, self.config.horizon) for x in (q_BTNH, k_BTKH))
        )


@dataclasses.dataclass(frozen=True)
class BasedConfig(LinearBaseConfig):
    """Based's linear attention, a Taylor polynomial of softmax; `kind: based`."""

    about = About("Based (Taylor features)", "arXiv 2402.18668", "O(T)", "O(T)", "a matrix F x M per head")

    kind: Literal["based"] = "based"  #: the mixer
    #: width of queries and keys (d'); the state has 1 + d' + d' (d' + 1) / 2 rows
    feature_dim: int = 16
    normalizer_eps: float = 0.0  #: added to the sum of the weights, the denominator; fla has 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.feature_dim < 1:
            raise ValueError(f"feature_dim must be >= 1, got {self.feature_dim}")
        check_between(self, "feature_dim", 1, 1024, "the number of features is about half of its square")

    def query_width(self, d_model: int) -> int:
        """d'."""
        return self.feature_dim

    def feature_count(self, d_model: int) -> int:
        """1 + d' + d' (d' + 1) / 2."""
        return feature_maps.taylor2_features(self.feature_dim)


class Based(LinearBase):
    """Linear attention with w_ts = 1 + u + u^2 / 2, u = q_t . k_s / sqrt(d'), for queries and keys of width d'."""

    config_type = BasedConfig

    def features(self, q_BTNH, k_BTKH, state, ctx):
        """1, x and the products of pairs of features of x, for x / d'^(1/4)."""
        del state, ctx
        root = self.query_width**-0.25
        return Features(*(feature_maps.taylor2(root * wider(x)) for x in (q_BTNH, k_BTKH)))


@dataclasses.dataclass(frozen=True)
class HedgehogConfig(LinearBaseConfig):
    """Hedgehog: linear attention with learned feature maps; `kind: hedgehog`."""

    about = About("Hedgehog", "arXiv 2402.04347", "O(T)", "O(T)", "a matrix 2H x M per head")

    kind: Literal["hedgehog"] = "hedgehog"  #: the mixer
    map_bias: bool = False  #: a bias in the feature maps
    normalizer_eps: float = 0.0  #: added to the sum of the weights, the denominator

    def feature_count(self, d_model: int) -> int:
        """2 H: the mapped features and their negatives."""
        return 2 * self.query_width(d_model)


class Hedgehog(LinearBase):
    """phi(x) = softmax([z, -z]), z = x W + b, with a W [H, H] per query head and key head, initially the identity.

    The bias b [H] per head, initially 0, is an option.
    """

    config_type = HedgehogConfig

    def setup(self, parts: Parts) -> None:
        """Create the parameters that all linear mixers have, and the maps of queries and keys."""
        super().setup(parts)
        H = self.head_dim
        # Not named `kernel`, to exclude them from weight decay, which would make all features equal.
        self.map_q, self.map_k = (
            nnx.Param(jnp.tile(jnp.eye(H, dtype=jnp.float32), (heads, 1, 1)))
            for heads in (self.config.num_heads, self.config.kv_heads)
        )
        self.bias_q, self.bias_k = (
            nnx.Param(jnp.zeros((heads, H), jnp.float32)) if self.config.map_bias else None
            for heads in (self.config.num_heads, self.config.kv_heads)
        )

    def features(self, q_BTNH, k_BTKH, state, ctx):
        """softmax over the mapped features and their negatives."""
        del state, ctx
        maps = ((q_BTNH, self.map_q, self.bias_q), (k_BTKH, self.map_k, self.bias_k))
        return Features(
            *(feature_maps.hedgehog(x, w[...], None if b is None else b[...]) for x, w, b in maps)
        )
