"""Gated, forgetting, differential and latent attention in NumPy float64, one row x [T, D], from the papers.

Each takes the mixer's parameters as nested dicts of arrays and a boolean table keep [T, T].
"""

import numpy as np

from tests.reference import positions
from tests.reference.attention import _project


def _softmax(scores, keep):
    """Rows of probabilities over what is kept; a row that keeps nothing is 0."""
    p = np.zeros_like(scores)
    for t, row in enumerate(keep):
        seen = np.flatnonzero(row)
        if len(seen):
            e = np.exp(scores[t, seen] - scores[t, seen].max())
            p[t, seen] = e / e.sum()
    return p


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _heads(y, count):
    return y.reshape(len(y), count, -1)


def _rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def _rotate(x, rope):
    """x [T, heads, H] rotated to positions 0, 1, 2, ..."""
    options = {"theta": rope.theta, "width": x.shape[-1], "layout": rope.layout}
    return positions.rope(x[None], np.arange(len(x))[None], **options)[0]


def gated(params, x, keep, *, heads, kv_heads, gate, rope=None, qk_norm=None):
    x = np.asarray(x, np.float64)
    q, k, v = (_heads(_project(params, n, x), c) for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    if qk_norm:
        q, k = (_rms(a, params[n]["scale"], 1e-6) for a, n in ((q, "q_norm"), (k, "k_norm")))
    if rope:
        q, k = _rotate(q, rope), _rotate(k, rope)
    out = np.zeros_like(q)
    for n in range(heads):
        g = n * kv_heads // heads
        out[:, n] = _softmax(q[:, n] @ k[:, g].T / np.sqrt(q.shape[-1]), keep) @ v[:, g]
    values = _sigmoid(_project(params, "gate", x))
    out *= _heads(values, heads) if gate == "elementwise" else values[:, :, None]
    return _project(params, "out", out.reshape(len(x), -1))


def forgetting(params, x, keep, *, heads, kv_heads):
    """The decay of key s at query t as the product of the gates after s, written out."""
    x = np.asarray(x, np.float64)
    q, k, v = (_heads(_project(params, n, x), c) for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    f = _sigmoid(_project(params, "gate", x))
    out = np.zeros_like(q)
    for n in range(heads):
        g = n * kv_heads // heads
        scores = q[:, n] @ k[:, g].T / np.sqrt(q.shape[-1])
        for t in range(len(x)):
            for s in range(t + 1):
                scores[t, s] += np.log(f[s + 1 : t + 1, n]).sum()
        out[:, n] = _softmax(scores, keep) @ v[:, g]
    return _project(params, "out", out.reshape(len(x), -1))


def differential(params, x, keep, *, heads, kv_heads, lambda_init, rope=None):
    x = np.asarray(x, np.float64)
    q, k = _heads(_project(params, "q", x), 2 * heads), _heads(_project(params, "k", x), 2 * kv_heads)
    v = _heads(_project(params, "v", x), kv_heads)
    if rope:
        q, k = _rotate(q, rope), _rotate(k, rope)
    a, b, c, d = (np.asarray(params[f"lambda_{n}"], np.float64) for n in ("q1", "k1", "q2", "k2"))
    weight = np.exp(a @ b) - np.exp(c @ d) + lambda_init
    out = np.zeros((len(x), heads, v.shape[-1]))
    for n in range(heads):
        g = n * kv_heads // heads
        first, second = (
            _softmax(q[:, 2 * n + i] @ k[:, 2 * g + i].T / np.sqrt(q.shape[-1]), keep) for i in (0, 1)
        )
        out[:, n] = (first - weight * second) @ v[:, g]
    out = _rms(out, params["head_norm"]["scale"], 1e-5) * (1 - lambda_init)
    return _project(params, "out", out.reshape(len(x), -1))


def latent(params, x, keep, *, heads, head_dim, rotary_dim, rope):
    """Keys and values of every head written out: no absorption."""
    x = np.asarray(x, np.float64)
    source = x
    if "q_down" in params:
        source = _rms(_project(params, "q_down", x), params["q_latent_norm"]["scale"], 1e-6)
    q = _heads(_project(params, "q", source), heads)
    c = _rms(_project(params, "kv_down", x), params["kv_latent_norm"]["scale"], 1e-6)
    k, v = _heads(_project(params, "k_up", c), heads), _heads(_project(params, "v_up", c), heads)
    if rotary_dim:
        q = np.concatenate([q[..., :head_dim], _rotate(q[..., head_dim:], rope)], axis=-1)
        shared = _rotate(_project(params, "k_rotary", x)[:, None], rope)
        k = np.concatenate([k, np.repeat(shared, heads, axis=1)], axis=-1)
    scale = 1 / np.sqrt(head_dim + rotary_dim)
    out = [_softmax(q[:, n] @ k[:, n].T * scale, keep) @ v[:, n] for n in range(heads)]
    return _project(params, "out", np.stack(out, axis=1).reshape(len(x), -1))
