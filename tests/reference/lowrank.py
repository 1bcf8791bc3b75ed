"""Linformer and Nystromformer in NumPy float64, one row x [T, D] of valid tokens, from the papers' formulas.

Each takes the mixer's parameters as nested dicts of arrays.
"""

from fractions import Fraction

import numpy as np

from tests.reference.attention import _project


def _softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _heads(params, x, heads):
    x = np.asarray(x, np.float64)
    return (_project(params, name, x).reshape(len(x), heads, -1) for name in ("q", "k", "v"))


def linformer(params, x, *, heads, sharing):
    """arXiv 2006.04768, equation 7: head_i = softmax(Q (E_i K)^T / sqrt(d)) F_i V, row by row of E and F."""
    q, k, v = _heads(params, x, heads)
    matrices = [np.asarray(params["k_rows"]["kernel"], np.float64)]
    matrices.append(matrices[0] if sharing == "kv" else np.asarray(params["v_rows"]["kernel"], np.float64))
    out = np.zeros_like(q)
    for i in range(heads):
        e, f = (m[i] if sharing == "none" else m for m in matrices)
        keys = np.zeros((e.shape[1], q.shape[-1]))
        values = np.zeros_like(keys)
        for t in range(len(q)):
            for r in range(len(keys)):
                keys[r] += e[t, r] * k[t, i]
                values[r] += f[t, r] * v[t, i]
        for t in range(len(q)):
            out[t, i] = _softmax(keys @ q[t, i] / np.sqrt(q.shape[-1])) @ values
    return _project(params, "out", out.reshape(len(q), -1))


def means(x, segments):
    """Means of x [T, H] over `segments` equal stretches of the line [0, T), token t lying on [t, t + 1)."""
    width = Fraction(len(x), segments)
    out = np.zeros((segments, x.shape[1]))
    for r in range(segments):
        for t in range(len(x)):
            inside = min((r + 1) * width, t + 1) - max(r * width, t)
            if inside > 0:
                out[r] += float(inside / width) * x[t]
    return out


def inverse(a, iterations):
    """arXiv 2102.03902, equations 11 and 12."""
    column, row = (max(np.abs(line).sum() for line in m) for m in (a.T, a))
    z, eye = a.T / (column * row), np.eye(len(a))
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def nystromformer(params, x, *, heads, landmarks, iterations, conv_width):
    """arXiv 2102.03902, algorithm 1, with the skip connection of section 3.3."""
    q, k, v = _heads(params, x, heads)
    T, out = len(q), np.zeros_like(q)
    scale = 1 / np.sqrt(q.shape[-1])
    for i in range(heads):
        q_means, k_means = means(q[:, i], landmarks), means(k[:, i], landmarks)
        f = _softmax(q[:, i] @ k_means.T * scale)
        a = _softmax(q_means @ k_means.T * scale)
        b = _softmax(q_means @ k[:, i].T * scale)
        out[:, i] = f @ inverse(a, iterations) @ (b @ v[:, i])
        for t in range(T if conv_width else 0):
            for w in range(conv_width):
                s = t + w - conv_width // 2
                if 0 <= s < T:
                    out[t, i] += float(params["conv"]["kernel"][w, i]) * v[s, i]
    return _project(params, "out", out.reshape(T, -1))


def softmax_attention(params, x, *, heads):
    """Full bidirectional attention with the same parameters."""
    q, k, v = _heads(params, x, heads)
    out = [_softmax(q[:, i] @ k[:, i].T / np.sqrt(q.shape[-1])) @ v[:, i] for i in range(heads)]
    return _project(params, "out", np.stack(out, axis=1).reshape(len(q), -1))
