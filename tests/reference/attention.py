"""The attention mixer in NumPy float64, token by token, from the papers' formulas.

It takes the mixer's parameters as a dict of arrays and a boolean table of what may be seen.
"""

import dataclasses

import numpy as np

from tests.reference import positions


def _project(params, name, x):
    y = x @ np.asarray(params[name]["kernel"], np.float64)
    return y + np.asarray(params[name]["bias"], np.float64) if "bias" in params[name] else y


def _rotate(x, position, rope, is_key):
    """One head vector rotated by the angles of its position, pair by pair, and scaled where rope says so."""
    x = x.copy()
    width = rope.width or len(x)
    scaling = dataclasses.asdict(rope.scaling) if rope.scaling else {}
    frequencies, factor = positions.scaled(rope.theta, width, **scaling)
    gains = factor * np.ones(width // 2)
    if rope.xpos:
        decay = positions.xpos(position, width, **dataclasses.asdict(rope.xpos))
        gains = gains / decay if is_key else gains * decay
    for j in range(width // 2):
        angle, gain = position * frequencies[j], gains[j]
        a, b = (j, j + width // 2) if rope.layout == "half" else (2 * j, 2 * j + 1)
        xa, xb = x[a], x[b]
        x[a] = gain * (xa * np.cos(angle) - xb * np.sin(angle))
        x[b] = gain * (xa * np.sin(angle) + xb * np.cos(angle))
    return x


def attention_mixer(
    params, x, memory=None, *, heads, kv_heads, keep, rope=None, alibi=None, qk_norm=None, softcap=None,
    scale=None, temperature=None, t5=None,
):  # fmt: skip
    """y [T, D] for one row x [T, D]; keys from `memory` [S, D] or x. keep [T, S]; alibi: slopes [heads].

    rope, temperature, t5: the options' settings, read for their numbers alone.
    """
    x = np.asarray(x, np.float64)
    source = x if memory is None else np.asarray(memory, np.float64)
    T, S = len(x), len(source)
    q = _project(params, "q", x).reshape(T, heads, -1)
    k = _project(params, "k", source).reshape(S, kv_heads, -1)
    v = _project(params, "v", source).reshape(S, kv_heads, -1)
    H = q.shape[-1]
    if qk_norm:
        for array, name, eps in ((q, "q_norm", 1e-6), (k, "k_norm", 1e-6)):
            array /= np.sqrt((array**2).mean(-1, keepdims=True) + eps)
            if qk_norm == "rms":
                array *= np.asarray(params[name]["scale"], np.float64)
    if rope is not None:
        for array in (q, k):
            for t in range(len(array)):
                for h in range(array.shape[1]):
                    array[t, h] = _rotate(array[t, h], t, rope, is_key=array is k)
    if temperature is not None:
        for t in range(T):
            q[t] *= positions.temperature(t, floor=temperature.floor, scale=temperature.scale)
    out = np.zeros((T, heads, H))
    for n in range(heads):
        g = n // (heads // kv_heads)
        for t in range(T):
            seen = np.flatnonzero(keep[t])
            if not len(seen):
                continue
            s = k[seen, g] @ q[t, n] * (1 / np.sqrt(H) if scale is None else scale)
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if alibi is not None:
                s = s - alibi[n] * np.abs(t - seen)
            if t5 is not None:
                table = np.asarray(params["bias_table"], np.float64)
                s = s + [table[positions.t5_bucket(j - t, **t5), n] for j in seen]
            denominator = np.append(s, np.asarray(params["sink_logits"])[n]) if "sink_logits" in params else s
            top = denominator.max()
            out[t, n] = np.exp(s - top) @ v[seen, g] / np.exp(denominator - top).sum()
    return _project(params, "out", out.reshape(T, -1))
