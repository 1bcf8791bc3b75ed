"""The delta rule in NumPy float64: one head of one row, token after token, and its gradients by hand.

S <- diag(a_t) S;  S <- S + beta_t k_t (v_t - S^T k_t)^T;  y_t = scale S^T q_t
(arXiv 2406.06484; the decay of 2412.06464 is the same for all channels, that of 2510.26692 is not).
"""

import numpy as np


def forward(q, k, v, beta, decay, state, starts, scale=1.0):
    """(y [T, M], last state, steps) of q, k, decay [T, H], v [T, M], beta [T]; starts[t]: a new document."""
    y, steps = np.zeros(v.shape), []
    S = np.array(state, np.float64)
    for t in range(len(q)):
        before = np.zeros_like(S) if starts[t] else S
        decayed = decay[t][:, None] * before
        error = v[t] - decayed.T @ k[t]
        S = decayed + beta[t] * np.outer(k[t], error)
        y[t] = scale * S.T @ q[t]
        steps.append((before, decayed, error, S))
    return y, S, steps


def backward(q, k, v, beta, decay, state, starts, dy, dstate, scale=1.0):
    """Gradients of sum(dy * y) + sum(dstate * last state): (q, k, v, beta, log decay [T, H], state)."""
    _, _, steps = forward(q, k, v, beta, decay, state, starts, scale)
    dq, dk, dv, dbeta, dlog = (np.zeros(x.shape) for x in (q, k, v, beta, decay))
    dS = np.array(dstate, np.float64)
    for t in reversed(range(len(q))):
        before, decayed, error, S = steps[t]
        dq[t] = scale * S @ dy[t]
        dS = dS + scale * np.outer(q[t], dy[t])
        dbeta[t] = k[t] @ dS @ error
        dv[t] = beta[t] * dS.T @ k[t]
        dk[t] = beta[t] * dS @ error - decayed @ dv[t]
        dS = dS - np.outer(k[t], dv[t])
        dlog[t] = (dS * decayed).sum(1)
        dS = np.zeros_like(dS) if starts[t] else decay[t][:, None] * dS
    return dq, dk, dv, dbeta, dlog, dS
