"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+).

    y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = 1/F sum_i exp(w_i . q - |q|^2 / 2) exp(w_i . k - |k|^2 / 2)

with q and k divided by H^(1/4), so that w_ts is an unbiased estimate of exp(q_t . k_s / sqrt(H)).
Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv 2009.14794).

The exponentials need a stabiliser. A common factor of the features of a query cancels, so that each query
subtracts its own largest exponent. A factor of the key features must be common to all keys of a sum. The usual
choice, the largest exponent over all keys, is not causal and is unknown while decoding. Here it is the running
maximum m_t of the exponents: the sums over past tokens are divided by e^{m_t}, as in an online softmax, and an
increase of m is a decay:

    S_t = e^{m_{t-1} - m_t} S_{t-1} + e^{-m_t} phi(k_t) v_t^T

Nothing overflows, and the largest feature of the largest key is 1 for any norms of the keys. A weight underflows
in float32 only if it is e^87 times smaller than the product of the largest query feature and that key feature.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.choices import check_between
from attention_jax.dtypes import wider
from attention_jax.feature_maps import log_positive_random, random_directions
from attention_jax.mixers.base import Context, Parts
from attention_jax.mixers.linear_parts import Features, LinearBase, LinearBaseConfig
from attention_jax.mixers.parts import document_starts, valid_tokens


@dataclasses.dataclass(frozen=True)
class PerformerConfig(LinearBaseConfig):
    """Performer: softmax attention with random features; `kind: performer`."""

    about = About("Performer (FAVOR+)", "arXiv 2009.14794", "O(T)", "O(T)", "a matrix F x M per head")

    kind: Literal["performer"] = "performer"  #: the mixer
    num_features: int = (
        256  #: random features per head (F); the error of the estimate decreases as 1 / sqrt(F)
    )
    orthogonal: bool = True  #: make the random directions orthogonal, in blocks of head_dim

    def __post_init__(self):
        super().__post_init__()
        if self.num_features < 1:
            raise ValueError(f"num_features must be >= 1, got {self.num_features}")
        check_between(self, "num_features", 1, 2**20, "each token has as many features per head")

    @property
    def rescales(self) -> bool:
        """True: the sums are divided by the exponential of the running maximum of the key exponents."""
        return True

    def feature_count(self, d_model: int) -> int:
        """F."""
        return self.num_features


class RandomDirections(nnx.Variable):
    """Random directions, which are not trained: their gradient is 0."""


class Performer(LinearBase):
    """Self-attention with positive random features; all heads of a layer share the random directions.

    The directions are a leaf `random_directions` [F, H] of the parameters. They are saved with them, are not
    trained (their gradient is 0 and weight decay excludes them), and can be replaced with `redraw`.
    """

    config_type = PerformerConfig

    def setup(self, parts: Parts) -> None:
        """Create the parameters that all linear mixers have, and the random directions."""
        super().setup(parts)
        F, orthogonal = self.config.num_features, self.config.orthogonal
        self.random_directions = RandomDirections(
            random_directions(parts.rngs.params(), F, self.head_dim, orthogonal=orthogonal)
        )

    def features(self, q_BTNH, k_BTKH, state, ctx):
        """The positive random features, with stabilisers that cancel in the quotient."""
        w_FH = jax.lax.stop_gradient(self.random_directions[...])
        root = self.head_dim**-0.25
        q_BTNF, k_BTKF = (log_positive_random(root * wider(x), w_FH) for x in (q_BTNH, k_BTKH))
        q_BTNF = jnp.exp(q_BTNF - jax.lax.stop_gradient(q_BTNF.max(-1, keepdims=True)))
        largest_BTK = jax.lax.stop_gradient(k_BTKF.max(-1))
        if not self.causal:
            shift_BTK = _replace_invalid(_document_max(largest_BTK, ctx), largest_BTK, ctx)
            return Features(q_BTNF, jnp.exp(k_BTKF - shift_BTK[..., None]))
        held_BK = None if state is None else state.log_scale_BK
        running_BTK, before_BTK = _running_max(largest_BTK, held_BK, ctx)
        # At the first token of a document the sums are empty and need no decay.
        log_decay_BTK = jnp.where(jnp.isneginf(before_BTK), 0.0, before_BTK - running_BTK)
        shift_BTK = _replace_invalid(running_BTK, largest_BTK, ctx)
        k_BTKF = jnp.exp(k_BTKF - shift_BTK[..., None])
        scales = {"log_scale_BK": running_BTK[:, -1], "past_log_scale_BTK": before_BTK}
        return Features(q_BTNF, k_BTKF, log_decay_BTK=log_decay_BTK, **scales)


def redraw(params: dict, key: jax.Array, *, orthogonal: bool = True) -> dict:
    """The parameters of a model with new random directions in every Performer layer.

    The paper redraws the directions periodically during training, so that the model does not overfit one draw.
    Call it between training steps. Each stacked layer gets its own draw. Raises: ValueError if the parameters
    have no Performer layer.
    """
    count = 0

    def redraw_leaf(path, leaf):
        nonlocal count
        if path[-1] != jax.tree_util.DictKey("random_directions"):
            return leaf
        count += 1
        layers = leaf.reshape(-1, *leaf.shape[-2:])
        keys = jax.random.split(jax.random.fold_in(key, count), len(layers))
        draws = [random_directions(k, *layers.shape[1:], orthogonal=orthogonal) for k in keys]
        return jnp.stack(draws).reshape(leaf.shape)

    params = jax.tree_util.tree_map_with_path(redraw_leaf, params)
    if not count:
        raise ValueError("no random_directions among the parameters: the model has no performer mixer")
    return params


def _running_max(x_BTK: jax.Array, held_BK: jax.Array | None, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """The running maximum over the valid tokens of each document, including and excluding the current slot.

    Both are [B, T, K] and -inf if there is no such token.
    """
    B, T, K = x_BTK.shape
    valid_BT = valid_tokens(ctx)
    if valid_BT is not None:
        x_BTK = jnp.where(valid_BT[..., None], x_BTK, -jnp.inf)
    if held_BK is None:
        held_BK = jnp.full((B, K), -jnp.inf)
    if ctx.segment_ids_BT is None:
        running_BTK = jnp.maximum(jax.lax.cummax(x_BTK, axis=1), held_BK[:, None])
        return running_BTK, jnp.concatenate([held_BK[:, None], running_BTK[:, :-1]], axis=1)
    starts_BT = document_starts(ctx)

    def merge(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    starts_BTK = jnp.broadcast_to(starts_BT[..., None], x_BTK.shape)
    _, running_BTK = jax.lax.associative_scan(merge, (starts_BTK, x_BTK), axis=1)
    before_BTK = jnp.concatenate([held_BK[:, None], running_BTK[:, :-1]], axis=1)
    return running_BTK, jnp.where(starts_BTK, -jnp.inf, before_BTK)


def _document_max(x_BTK: jax.Array, ctx: Context) -> jax.Array:
    """The maximum over all valid tokens of the document of each token."""
    ids = {name: getattr(ctx, name) for name in ("positions_BT", "segment_ids_BT")}
    flipped = Context(**{name: None if x is None else jnp.flip(x, axis=1) for name, x in ids.items()})
    past_BTK, _ = _running_max(x_BTK, None, ctx)
    future_BTK, _ = _running_max(jnp.flip(x_BTK, axis=1), None, flipped)
    return jnp.maximum(past_BTK, jnp.flip(future_BTK, axis=1))


def _replace_invalid(x_BTK: jax.Array, own_BTK: jax.Array, ctx: Context) -> jax.Array:
    """x with invalid slots replaced by `own_BTK`, so that their exponentials, which are unused, do not overflow."""
    valid_BT = valid_tokens(ctx)
    return x_BTK if valid_BT is None else jnp.where(valid_BT[..., None], x_BTK, own_BTK)
