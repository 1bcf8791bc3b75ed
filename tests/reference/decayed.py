"""Retention, GLA, lightning attention and Mamba-2 in NumPy float64, one row x [T, D], token by token.

Each takes the mixer's parameters as nested dicts of arrays.
"""

import numpy as np

from tests.reference import positions
from tests.reference.attention import _project


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def _array(x):
    return np.asarray(x, np.float64)


def _rotated(x, rope):
    """x [T, heads, H] rotated to positions 0, 1, 2, ..."""
    if rope is None:
        return x
    options = {"theta": rope.theta, "width": x.shape[-1], "layout": rope.layout}
    return positions.rope(x[None], np.arange(len(x))[None], **options)[0]


def _split(params, name, x, heads):
    return _project(params, name, x).reshape(len(x), heads, -1)


def recurrence(q, k, v, decay):
    """o [T, N, M] of S <- diag(decay_t) S + k_t v_t^T, o_t = q_t S; q, k, decay [T, N, H], v [T, N, M]."""
    T, N, H = q.shape
    o = np.zeros((T, N, v.shape[-1]))
    for n in range(N):
        S = np.zeros((H, v.shape[-1]))
        for t in range(T):
            S = decay[t, n][:, None] * S + np.outer(k[t, n], v[t, n])
            o[t, n] = q[t, n] @ S
    return o


def retention(params, x, *, heads, norm_eps, norm="group", rope=None, first_exponent=5.0, last_exponent=None):
    x = _array(x)
    q, k, v = (_split(params, name, x, heads) for name in "qkv")
    H = q.shape[-1]
    last = first_exponent + heads - 1 if last_exponent is None else last_exponent
    gamma = np.array(
        [1 - 2 ** -(first_exponent + (last - first_exponent) * n / (heads - 1)) for n in range(heads)]
    )
    decay = np.broadcast_to(gamma[:, None], q.shape)
    o = recurrence(_rotated(q, rope), _rotated(k, rope) / np.sqrt(H), v, decay)
    if norm == "group":
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + norm_eps)
        o = o * _array(params["norm"]["scale"]) + _array(params["norm"]["bias"])
    else:
        o = _rms(o, norm_eps) * _array(params["norm"]["scale"])
    return _project(params, "out", _silu(_project(params, "gate", x)) * o.reshape(len(x), -1))


def gla(params, x, *, heads, tau, norm_eps):
    x = _array(x)
    q, k, v, gate = (_split(params, name, x, heads) for name in ("q", "k", "v", "gate"))
    alpha = _sigmoid(_project(params, "decay_up", _project(params, "decay_down", x))) ** (1 / tau)
    o = recurrence(q / np.sqrt(q.shape[-1]), k, v, alpha.reshape(q.shape))
    o = _rms(o, norm_eps) * _array(params["norm"]["scale"])
    return _project(params, "out", (_silu(gate) * o).reshape(len(x), -1))


def lightning(params, x, *, slopes, norm_eps, rope=None):
    x = _array(x)
    q, k, v = (_silu(_split(params, name, x, len(slopes))) for name in "qkv")
    decay = np.broadcast_to(np.exp(-np.array(slopes))[:, None], q.shape)
    o = recurrence(_rotated(q, rope), _rotated(k, rope), v, decay).reshape(len(x), -1)
    o = _rms(o, norm_eps) * _array(params["norm"]["scale"])
    return _project(params, "out", _sigmoid(_project(params, "gate", x)) * o)


def convolution(params, x):
    """y_t = silu(b + sum_j w_j x_{t - W + 1 + j}), zeros before the first token."""
    kernel, y = _array(params["kernel"]), np.zeros_like(x)
    for t in range(len(x)):
        y[t] = _array(params.get("bias", 0.0))
        for j, weights in enumerate(kernel):
            if (source := t - len(kernel) + 1 + j) >= 0:
                y[t] += weights * x[source]
    return _silu(y)


def mamba2(params, x, *, heads, groups, norm_eps, limits=(0.0, np.inf)):
    x = _array(x)
    T, E = len(x), len(_array(params["norm"]["scale"]))
    projected = _project(params, "in_proj", x)
    shared = (projected.shape[1] - 2 * E - heads) // 2
    z, dt = projected[:, :E], projected[:, -heads:]
    mixed = convolution(params["convolution"], projected[:, E:-heads])
    u = mixed[:, :E].reshape(T, heads, -1)
    b, c = (part.reshape(T, groups, -1) for part in (mixed[:, E : E + shared], mixed[:, E + shared :]))
    b, c = (np.repeat(part, heads // groups, axis=1) for part in (b, c))
    dt = np.clip(np.log1p(np.exp(dt + _array(params["dt_bias"]))), *limits)
    a = np.exp(-np.exp(_array(params["A_log"])) * dt)
    o = recurrence(c, dt[..., None] * b, u, np.broadcast_to(a[..., None], b.shape))
    o = o + _array(params["D"])[:, None] * u
    o = (o.reshape(T, E) * _silu(z)).reshape(T, groups, -1)
    o = _rms(o, norm_eps).reshape(T, E)
    return _project(params, "out", o * _array(params["norm"]["scale"]))
