"""Native sparse attention in NumPy float64, one query at a time, from the equations of arXiv 2502.11089.

Blocks are counted from zero here; the paper's equation 9 counts them from one.
"""

import math

import numpy as np


def attend(q, k, v, seen):
    """(out [M], probabilities [S]) of one query q [H] over keys k [S, H]; 0 where nothing is seen."""
    p = np.zeros(len(k))
    seen = np.flatnonzero(seen)
    if len(seen):
        s = k[seen] @ q / np.sqrt(len(q))
        p[seen] = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return p @ v, p


def selected(q, k, v, blocks, block_size):
    """selected_attention [T, N, M] of one row: q [T, N, H], k [T, K, H], v [T, K, M], blocks [T, K, n]."""
    T, N, _ = q.shape
    K = k.shape[1]
    out = np.zeros((T, N, v.shape[2]))
    for t in range(T):
        for n in range(N):
            g = n // (N // K)
            seen = [s <= t and s // block_size in blocks[t, g] for s in range(T)]
            out[t, n] = attend(q[t, n], k[:, g], v[:, g], seen)[0]
    return out


def importance(p, blocks, compress_block, stride, select_block):
    """Equation 9 by its meaning: p[i] counts once for each stretch of d tokens that blocks i and j share."""
    i, j = np.arange(len(p))[:, None], np.arange(blocks)
    begin = np.maximum(i * stride, j * select_block)
    end = np.minimum(i * stride + compress_block, (j + 1) * select_block)
    return p @ (np.maximum(0, end - begin) / stride)


def chosen(score, own, count, margin=1e-3):
    """Equation 11 with the forced blocks; AssertionError where the last place is all but tied."""
    forced = {0, own, max(own - 1, 0)}
    free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-score[j], j))
    places = count - len(forced)
    if places < len(free) and score[free[places - 1]] > 0 and places:
        assert score[free[places]] < (1 - margin) * score[free[places - 1]], "choose other data: a near tie"
    return sorted(forced | set(free[:places]))


def nsa_mixer(
    params, x, *, heads, kv_heads, compress_block, compress_stride, select_block, select_count, window,
    rope=None, choices=None,
):  # fmt: skip
    """y [T, D] for one row x [T, D]. choices: a list that receives (t, kv head, blocks) of every query."""
    x = np.asarray(x, np.float64)
    T = len(x)

    def project(name, count):
        return _linear(params[name], x).reshape(T, count, -1)

    q = project("q", heads)
    k, v = ({c: project(f"{c}_{kv}", kv_heads) for c in ("compressed", "selected", "window")} for kv in "kv")
    H = q.shape[-1]
    gates = 1 / (1 + np.exp(-_linear(params["gates"], x).reshape(T, 3, heads)))

    starts = range(0, T - compress_block + 1, compress_stride)
    ends = np.array([start + compress_block - 1 for start in starts], int)
    k_cmp, v_cmp = (
        np.array(
            [[_phi(params[name], x[i : i + compress_block, g]) for g in range(kv_heads)] for i in starts]
        )
        for name, x in (("phi_k", k["compressed"]), ("phi_v", v["compressed"]))
    )
    k_cmp, v_cmp = (x.reshape(len(ends), kv_heads, H) for x in (k_cmp, v_cmp))
    if rope is not None:
        everywhere = np.arange(T)
        for array, positions in (
            (q, everywhere), (k["selected"], everywhere), (k["window"], everywhere), (k_cmp, ends)
        ):  # fmt: skip
            for t, position in enumerate(positions):
                array[t] = [_rotate(head, position, rope.theta) for head in array[t]]

    y, at = np.zeros((T, heads, H)), np.arange(T)
    for t in range(T):
        for g in range(kv_heads):
            group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            total = np.zeros(t // select_block + 1)
            for n in group:
                out, p = attend(q[t, n], k_cmp[:, g], v_cmp[:, g], ends <= t)
                y[t, n] += gates[t, 0, n] * out
                total += importance(p, len(total), compress_block, compress_stride, select_block)
            blocks = chosen(total, t // select_block, select_count)
            if choices is not None:
                choices.append((t, g, blocks))
            for n in group:
                for c, (name, seen) in enumerate(
                    (("selected", np.isin(at // select_block, blocks)), ("window", at > t - window)), 1
                ):
                    y[t, n] += (
                        gates[t, c, n] * attend(q[t, n], k[name][:, g], v[name][:, g], seen & (at <= t))[0]
                    )
    return _linear(params["out"], y.reshape(T, -1))


def _linear(params, x):
    y = x @ np.asarray(params["kernel"], np.float64)
    return y + np.asarray(params["bias"], np.float64) if "bias" in params else y


def _phi(params, block):
    """One vector for a block [l, H]: an MLP with one hidden layer of gelu over features and places."""
    flat = (block + np.asarray(params["places"], np.float64)).reshape(-1)
    hidden = _linear(params["up"], flat)
    hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
    return _linear(params["down"], hidden)


def _rotate(x, position, theta):
    """One head vector rotated by the angles of its position; features j and j + H/2 are a pair."""
    half = len(x) // 2
    angles = position * theta ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])
