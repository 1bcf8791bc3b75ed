"""Feature maps of linear attention: phi(q) . phi(k) replaces exp(q . k / sqrt(H)).

    y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = phi(q_t) . phi(k_s)

Each map is a function of a single token's features. It is therefore causal, and decoding gives the same
features as the parallel form. All maps compute in the wider of float32 and the dtype of x, and return it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.dtypes import wider


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A feature map without parameters, [..., H] -> [..., H].

    never_negative: all features are >= 0, so the weights can be normalised by their sum.
    """

    phi: Callable[[jax.Array], jax.Array]
    never_negative: bool = True


def elu1(x: jax.Array) -> jax.Array:
    """elu(x) + 1: x + 1 where x > 0, else e^x (Katharopoulos et al. 2020, arXiv 2006.16236, equation 7)."""
    x = wider(x)
    # expm1(x) + 1 would round small features to 0. The inner `where` keeps Inf out of the gradient.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(wider(x))


def squared_relu(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    return relu(x) ** 2


def identity(x: jax.Array) -> jax.Array:
    """x."""
    return wider(x)


def softmax(x: jax.Array) -> jax.Array:
    """softmax over a token's features, efficient attention's queries (Shen et al. 2018, arXiv 1812.01243).

    The paper normalises keys over all positions, which is not causal; here keys are treated like queries.
    """
    return jax.nn.softmax(wider(x), axis=-1)


FEATURE_MAPS = {
    "elu1": FeatureMap(elu1),
    "relu": FeatureMap(relu),
    "squared_relu": FeatureMap(squared_relu),
    "softmax": FeatureMap(softmax),
    "identity": FeatureMap(identity, never_negative=False),
}


def random_directions(key: jax.Array, features: int, width: int, *, orthogonal: bool = True) -> jax.Array:
    """The directions w_i of random features: float32 [features, width], each with marginal N(0, I).

    orthogonal: make the directions orthogonal within blocks of `width` rows: a uniformly random orthogonal
    matrix whose rows are scaled to the norms of independent normal vectors. The estimate stays unbiased and
    has lower variance (Choromanski et al. 2021, arXiv 2009.14794, section 2.4).
    """
    blocks = -(-features // width)
    direction_key, length_key = jax.random.split(key)
    if not orthogonal:
        return jax.random.normal(direction_key, (features, width), jnp.float32)
    q, r = jnp.linalg.qr(jax.random.normal(direction_key, (blocks, width, width), jnp.float32))
    # The Q factor of a QR decomposition is uniformly distributed only if the diagonal of R is positive.
    sign_bj = jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)
    rows = (q * sign_bj[:, None]).reshape(-1, width)[:features]
    lengths = jnp.linalg.norm(jax.random.normal(length_key, (features, width), jnp.float32), axis=1)
    return rows * lengths[:, None]


def log_positive_random(x: jax.Array, w_FH: jax.Array) -> jax.Array:
    """ln of FAVOR+'s positive random features: w_i . x - |x|^2 / 2 (arXiv 2009.14794, lemma 1).

    With w_i ~ N(0, I), the mean over i of exp(log feature of q + log feature of k) is an unbiased estimate of
    exp(q . k). The logarithm is returned because exponentiation needs a stabiliser, which the caller chooses
    so that it cancels.
    """
    x = wider(x)
    projected = jnp.einsum("...h,fh->...f", x, w_FH.astype(x.dtype))
    return projected - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)


def positive_random(x: jax.Array, w_FH: jax.Array) -> jax.Array:
    """FAVOR+'s features exp(w_i . x - |x|^2 / 2) / sqrt(F), without a stabiliser.

    Each feature is at most exp(|w_i|^2 / 2), which overflows float32 for |w_i|^2 >= 177.
    """
    return jnp.exp(log_positive_random(x, w_FH)) / math.sqrt(w_FH.shape[0])


def cos_reweighted(x_BTNH: jax.Array, positions_BT: jax.Array, horizon: int) -> jax.Array:
    """cosFormer's [relu(x) cos(a_t), relu(x) sin(a_t)], a_t = pi t / (2 horizon): [B, T, N, 2 H].

    The product for a query at t and a key at s is relu(q) . relu(k) cos(pi (t - s) / (2 horizon)) (Qin et al.
    2022, arXiv 2202.08791, equation 10). It is nonnegative for positions in [0, horizon) and not meaningful
    beyond.
    """
    x_BTNH = relu(x_BTNH)
    rate = np.asarray(0.5 * math.pi / horizon, x_BTNH.dtype)
    angle_BT11 = positions_BT.astype(x_BTNH.dtype)[..., None, None] * rate
    return jnp.concatenate([x_BTNH * jnp.cos(angle_BT11), x_BTNH * jnp.sin(angle_BT11)], axis=-1)


def taylor2(x: jax.Array) -> jax.Array:
    """phi with phi(q) . phi(k) = 1 + q.k + (q.k)^2 / 2, the second-order Taylor polynomial of exp(q.k).

    F = 1 + H + H (H + 1) / 2 features: 1, x_i, x_i^2 / sqrt(2), and x_i x_j for i < j, which combines
    x_i x_j / sqrt(2) and x_j x_i / sqrt(2) of the full outer product (Based: Arora et al. 2024, arXiv
    2402.18668, section 4.1, which divides the argument by H^(1/4)).
    """
    x = wider(x)
    i, j = np.triu_indices(x.shape[-1])
    weights = np.where(i == j, math.sqrt(0.5), 1.0).astype(x.dtype)
    products = x[..., i] * x[..., j]
    products = products * np.broadcast_to(weights, products.shape)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, products], axis=-1)


def taylor2_features(width: int) -> int:
    """The number of features that `taylor2` returns for inputs of `width` features."""
    return 1 + width + width * (width + 1) // 2


def hedgehog(x_BTNH: jax.Array, w_NHF: jax.Array, b_NF: jax.Array | None = None) -> jax.Array:
    """softmax over [z, -z], z = x W_n + b_n, with a learned W and, optionally, b per head: [B, T, N, 2 F].

    Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv 2402.04347, section 4.2). If W starts as the
    identity, the weights are spiky, like those of softmax, from the first step on.
    """
    x_BTNH = wider(x_BTNH)
    y_BTNF = jnp.einsum("btnh,nhf->btnf", x_BTNH, w_NHF.astype(x_BTNH.dtype))
    y_BTNF = y_BTNF if b_NF is None else y_BTNF + b_NF.astype(y_BTNF.dtype)[None, None]
    return jax.nn.softmax(jnp.concatenate([y_BTNF, -y_BTNF], axis=-1), axis=-1)
