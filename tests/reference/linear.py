"""Linear attention in NumPy float64, one row x [T, D], token by token, from the papers.

Each function takes the mixer's parameters as nested dicts of arrays. `weight(n, t, s)` is the papers'
similarity of query t and key s of head n, a formula of the pair wherever the paper has one: no feature
vectors, no stabiliser, no state. A token without any
weight gives 0, which the papers leave open. eps: the config's norm_eps and normalizer_eps.
"""

import numpy as np

from tests.reference import positions
from tests.reference.attention import _project


def _heads(params, x, heads, kv_heads):
    """q, k, v [T, heads, width], keys and values repeated for their group of query heads."""
    q, k, v = (
        _project(params, name, x).reshape(len(x), count, -1)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    return q, np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)


def _attend(params, v, weight, *, causal, norm_eps=None, normalizer_eps=0.0, normalize=True, total=None):
    """sum_s weight v_s / sum_s total over what t sees; total is weight but where a paper says otherwise."""
    T, N, M = v.shape
    out = np.zeros((T, N, M))
    for n in range(N):
        for t in range(T):
            denominator = 0.0
            for s in range(t + 1 if causal else T):
                w = weight(n, t, s)
                out[t, n] += w * v[s, n]
                denominator += w if total is None else total(n, t, s)
            if normalize and denominator != 0:
                out[t, n] /= denominator + normalizer_eps
    if "y_norm" in params:
        scale = np.asarray(params["y_norm"]["scale"], np.float64)
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + norm_eps) * scale
    return _project(params, "out", out.reshape(T, -1))


def elu1(x):
    return np.array([1 + z if z > 0 else np.exp(z) for z in np.ravel(x)]).reshape(np.shape(x))


def linear(params, x, *, causal, heads, kv_heads, feature_map="elu1", rope=None, **eps):
    """elu1 normalised (Katharopoulos et al. 2020), or the identity over sqrt(H), not normalised."""
    x = np.asarray(x, np.float64)
    q, k, v = _heads(params, x, heads, kv_heads)
    if feature_map == "elu1":
        q, k = elu1(q), elu1(k)
    rotated_q, rotated_k = q, k
    if rope is not None:  # Su et al. 2021: the denominator's features stay as they are
        options = {"theta": rope.theta, "width": q.shape[-1], "layout": rope.layout}
        at = np.arange(len(x))[None]
        rotated_q, rotated_k = (positions.rope(a[None], at, **options)[0] for a in (q, k))
    if feature_map == "identity":
        weight = lambda n, t, s: rotated_q[t, n] @ rotated_k[s, n] / np.sqrt(q.shape[-1])  # noqa: E731
        return _attend(params, v, weight, causal=causal, normalize=False, **eps)
    return _attend(
        params, v, lambda n, t, s: rotated_q[t, n] @ rotated_k[s, n], causal=causal,
        total=lambda n, t, s: q[t, n] @ k[s, n], **eps,
    )  # fmt: skip


def performer(params, x, *, causal, heads, kv_heads, **eps):
    """The mean over the directions of exp(w.q - |q|^2/2) exp(w.k - |k|^2/2), exponents added up first."""
    x = np.asarray(x, np.float64)
    q, k, v = _heads(params, x, heads, kv_heads)
    q, k = (a / q.shape[-1] ** 0.25 for a in (q, k))
    w = np.asarray(params["random_directions"], np.float64)

    def weight(n, t, s):
        return np.exp(w @ (q[t, n] + k[s, n]) - (q[t, n] @ q[t, n] + k[s, n] @ k[s, n]) / 2).mean()

    return _attend(params, v, weight, causal=causal, **eps)


def cosformer(params, x, *, causal, heads, kv_heads, horizon, **eps):
    x = np.asarray(x, np.float64)
    q, k, v = _heads(params, x, heads, kv_heads)

    def weight(n, t, s):
        near = np.cos(np.pi / 2 * (t - s) / horizon)
        return np.maximum(q[t, n], 0) @ np.maximum(k[s, n], 0) * near

    return _attend(params, v, weight, causal=causal, **eps)


def based(params, x, *, causal, heads, kv_heads, **eps):
    x = np.asarray(x, np.float64)
    q, k, v = _heads(params, x, heads, kv_heads)

    def weight(n, t, s):
        u = q[t, n] @ k[s, n] / np.sqrt(q.shape[-1])
        return 1 + u + u**2 / 2

    return _attend(params, v, weight, causal=causal, **eps)


def hedgehog(params, x, *, causal, heads, kv_heads, **eps):
    x = np.asarray(x, np.float64)
    q, k, v = _heads(params, x, heads, kv_heads)
    map_q, map_k = (np.asarray(params[name], np.float64) for name in ("map_q", "map_k"))
    none = np.zeros((heads, 1))
    b_q, b_k = (np.asarray(params.get(name, none), np.float64) for name in ("bias_q", "bias_k"))

    def features(y):
        e = np.exp(np.concatenate([y, -y]))
        return e / e.sum()

    def weight(n, t, s):
        g = n * kv_heads // heads
        return features(q[t, n] @ map_q[n] + b_q[n]) @ features(k[s, n] @ map_k[g] + b_k[g])

    return _attend(params, v, weight, causal=causal, **eps)
