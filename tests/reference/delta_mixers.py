"""DeltaNet, Gated DeltaNet and Kimi Delta Attention in NumPy float64, one row x [T, D], from the papers."""

import numpy as np

from tests.reference.attention import _project
from tests.reference.delta_rule import forward


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _unit(x, eps):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + eps)


def _convolved(kernel, x):
    """silu of the causal convolution of x [T, C] with kernel [W, C], whose last row meets its own token."""
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for lag in range(min(len(kernel), t + 1)):
            y[t] += kernel[-1 - lag] * x[t - lag]
    return y * _sigmoid(y)


def _decays(params, logits):
    """exp(-exp(A_log) softplus(logits + dt_bias)) [T, N, width]."""
    rates, bias = (np.asarray(params[name], np.float64) for name in ("A_log", "dt_bias"))
    steps = np.log1p(np.exp(logits + bias)).reshape(len(logits), len(rates), -1)
    return np.exp(-np.exp(rates)[:, None] * steps)


def delta_mixer(params, x, *, kind, heads, qk_heads, largest_beta, qk_norm_eps, norm_eps):
    """y [T, D] of the mixer of a kind."""
    x = np.asarray(x, np.float64)
    T = len(x)
    kernel = np.asarray(params["convolution"]["kernel"], np.float64)
    parts = [_project(params, name, x) for name in "qkv"]
    ends = np.cumsum([part.shape[1] for part in parts])[:2]
    q, k, v = (
        _convolved(taps, part).reshape(T, count, -1)
        for taps, part, count in zip(
            np.split(kernel, ends, axis=1), parts, (qk_heads, qk_heads, heads), strict=True
        )
    )
    q, k = _unit(q, qk_norm_eps), _unit(k, qk_norm_eps)
    H, M = q.shape[-1], v.shape[-1]
    beta = largest_beta * _sigmoid(_project(params, "beta", x))
    decay = np.ones((T, heads, H))
    if kind == "gated_deltanet":
        decay = decay * _decays(params, _project(params, "decay", x))
    elif kind == "kda":
        decay = decay * _decays(params, _project(params, "decay_up", _project(params, "decay_down", x)))
    o = np.zeros((T, heads, M))
    for n in range(heads):
        g = n * qk_heads // heads
        arrays = (q[:, g], k[:, g], v[:, n], beta[:, n], decay[:, n])
        o[:, n], _, _ = forward(*arrays, np.zeros((H, M)), np.zeros(T, bool), H**-0.5)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + norm_eps)
    o = o * np.asarray(params["norm"]["scale"], np.float64)
    o = o.reshape(T, -1)
    if kind == "gated_deltanet":
        gate = _project(params, "gate", x)
        o = o * gate * _sigmoid(gate)
    elif kind == "kda":
        o = o * _sigmoid(_project(params, "gate_up", _project(params, "gate_down", x)))
    return _project(params, "out", o)
