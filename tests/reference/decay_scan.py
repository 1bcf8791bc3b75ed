"""Linear attention with decay, token by token, and its hand-written backward.

    S = diag(exp(g_t)) S + k_t v_t^T,   y_t = scale * q_t S,   normalised: y_t = scale * (q_t S) / (q_t . z)

One batch row at a time; slots without a token are stepped over. In float64 this is the truth; with `dtype`
float32 it is the naive result in the same precision that errors are compared with.
"""

from __future__ import annotations

import numpy as np


def runs(tokens, segments):
    """For each token (a list of slots) whether its document is another than the one before it."""
    if segments is None:
        return [False] * len(tokens)
    return [i > 0 and segments[t] != segments[tokens[i - 1]] for i, t in enumerate(tokens)]


class Row:
    """q [T, N, H], k [T, N, H], v [T, N, M], g [T, N, H] or None, state [N, H, M (+ 1)]: one batch row."""

    def __init__(self, q, k, v, g, state, tokens, resets, scale=1.0, normalize=False, dtype=np.float64):
        to = lambda x: np.asarray(x).astype(dtype)  # noqa: E731
        self.q, self.k, self.v, self.state = map(to, (q, k, v, state))
        self.a = np.ones_like(self.k) if g is None else np.exp(to(g))
        self.tokens, self.resets, self.scale, self.normalize = tokens, resets, dtype(scale), normalize
        self.M = self.v.shape[-1]
        if normalize:
            self.v = np.concatenate([self.v, np.ones_like(self.v[..., :1])], -1)
        self.y = np.zeros((*self.q.shape[:2], self.M), dtype)
        self.before, self.after = {}, {}
        S = self.state
        for t, reset in zip(tokens, resets, strict=True):
            self.before[t] = np.zeros_like(S) if reset else S
            S = self.a[t][..., None] * self.before[t] + self.k[t][..., None] * self.v[t][..., None, :]
            self.after[t] = S
            out = np.einsum("nh,nhm->nm", self.q[t], S)
            self.y[t] = self.scale * (self._divide(out) if normalize else out)
        self.final = S

    def _divide(self, out):
        den = out[:, -1:]
        return np.where(den == 0, 0, out[:, :-1] / np.where(den == 0, 1, den))

    def backward(self, dy, dfinal):
        """Cotangents of q, k, v, g and the initial state."""
        dy, dS = np.asarray(dy).astype(self.q.dtype), np.asarray(dfinal).astype(self.q.dtype)
        dq, dk, dv, dg = (np.zeros_like(x) for x in (self.q, self.k, self.v, self.k))
        for t, reset in reversed(list(zip(self.tokens, self.resets, strict=True))):
            S, before = self.after[t], self.before[t]
            dout = self.scale * dy[t]
            if self.normalize:
                out = np.einsum("nh,nhm->nm", self.q[t], S)
                num, den = out[:, :-1], out[:, -1:]
                some, safe = den != 0, np.where(den == 0, 1, den)
                dden = -(dout * num).sum(-1, keepdims=True) / safe**2
                dout = np.where(some, np.concatenate([dout / safe, dden], -1), 0)
            dq[t] = np.einsum("nm,nhm->nh", dout, S)
            dS = dS + self.q[t][..., None] * dout[:, None]
            dk[t] = np.einsum("nhm,nm->nh", dS, self.v[t])
            dv[t] = np.einsum("nhm,nh->nm", dS, self.k[t])
            dg[t] = self.a[t] * (dS * before).sum(-1)
            dS = np.zeros_like(dS) if reset else self.a[t][..., None] * dS
        return dq, dk, dv[..., : self.M], dg, dS
