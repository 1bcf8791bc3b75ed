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


def head_norm(x, kind, params, eps):
    """x [T, heads, H] normalised as `qk_norm` says; params: scale and bias, if the kind has them."""
    if kind is None:
        return x
    if kind in ("layer", "layer_per_head"):
        x = x - x.mean(-1, keepdims=True)
    axes = (-2, -1) if kind == "rms_all_heads" else -1
    x = x / np.sqrt((x**2).mean(axes, keepdims=True) + eps)
    if kind == "l2":
        return x
    scale, bias = (np.asarray(params.get(name, 0.0), np.float64) for name in ("scale", "bias"))
    of_heads = kind in ("rms_per_head", "rms_all_heads", "layer_per_head")
    assert scale.shape == (x.shape[-2:] if of_heads else x.shape[-1:])
    return x * scale + bias


def attention_mixer(
    params, x, memory=None, *, heads, kv_heads, keep, rope=None, alibi=None, qk_norm=None, qk_norm_eps=1e-6,
    clip_qkv=None, softcap=None, scale=None, temperature=None, t5=None, rows=(),
):  # fmt: skip
    """y [T, D] for one row x [T, D]; keys from `memory` [S, D] or x. keep [T, S]; alibi: slopes [heads].

    rope, temperature, t5: the options' settings, read for their numbers alone. rows: positions whose queries
    have projections of their own, and keys and values of their own to attend to.
    """
    if rows:
        given = dict(locals())
        params, x, memory, _ = (given.pop(name) for name in ("params", "x", "memory", "rows"))
        own = params | {name: params[f"{name}_global"] for name in "qkv"}
        first, second = (attention_mixer(p, x, memory, **given) for p in (params, own))
        return np.array([second[t] if t in rows else first[t] for t in range(len(x))])
    x = np.asarray(x, np.float64)
    source = x if memory is None else np.asarray(memory, np.float64)
    T, S = len(x), len(source)
    q = _project(params, "q", x).reshape(T, heads, -1)
    k = _project(params, "k", source).reshape(S, kv_heads, -1)
    v = _project(params, "v", source).reshape(S, kv_heads, -1)
    H = q.shape[-1]
    if clip_qkv is not None:
        q, k, v = (np.minimum(np.maximum(array, -clip_qkv), clip_qkv) for array in (q, k, v))
    q = head_norm(q, qk_norm, params.get("q_norm"), qk_norm_eps)
    k = head_norm(k, qk_norm, params.get("k_norm"), qk_norm_eps)
    if rope is not None:
        for array in (q, k):
            for t in range(len(array)):
                for h in range(array.shape[1]):
                    array[t, h] = _rotate(array[t, h], t, rope, is_key=array is k)
    if temperature is not None:
        for t in range(T):
            q[t] *= positions.temperature(t, floor=temperature.floor, scale=temperature.scale)
    out = np.zeros((T, heads, v.shape[-1]))
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
