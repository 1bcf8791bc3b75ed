"""Gated, forgetting, differential and latent attention in NumPy float64, one row x [T, D], from the papers.

Each takes the mixer's parameters as nested dicts of arrays and a boolean table keep [T, T].
"""

import numpy as np

from tests.reference import positions
from tests.reference.attention import _project, head_norm


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


def _projected(params, x, q_heads, kv_heads, v_heads, options):
    """q, k, v [T, heads, width] as they enter the scores. options: the config's fields of these names."""
    counts = {"q": q_heads, "k": kv_heads, "v": v_heads}
    q, k, v = (_heads(_project(params, name, x), count) for name, count in counts.items())
    if (limit := options.get("clip_qkv")) is not None:
        q, k, v = (np.minimum(np.maximum(a, -limit), limit) for a in (q, k, v))
    kind, eps = options.get("qk_norm"), options.get("qk_norm_eps")
    q, k = (head_norm(a, kind, params.get(name), eps) for a, name in ((q, "q_norm"), (k, "k_norm")))
    if options.get("rope"):
        q, k = _rotate(q, options["rope"]), _rotate(k, options["rope"])
    if (tempered := options.get("temperature")) is not None:
        at = [positions.temperature(t, floor=tempered.floor, scale=tempered.scale) for t in range(len(x))]
        q = q * np.array(at)[:, None, None]
    return q, k, v


def _weights(q, k, keep, options, bias=0.0, sink=None):
    """The probabilities [T, T] of one head: q, k [T, H]."""
    scale = options.get("scale")
    scores = q @ k.T * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    if (cap := options.get("softcap")) is not None:
        scores = cap * np.tanh(scores / cap)
    scores = scores + bias
    p = _softmax(scores, keep)
    if sink is None:
        return p
    # The sink joins the denominator: p / (1 + e^(sink - lse)).
    for t, row in enumerate(keep):
        seen = np.flatnonzero(row)
        if len(seen):
            p[t] /= 1 + np.exp(float(sink)) / np.exp(scores[t, seen]).sum()
    return p


def _sinks(params, heads):
    return params.get("sink_logits", [None] * heads)


def gated(params, x, keep, *, heads, kv_heads, gate, alibi=None, **options):
    """alibi: slopes [heads]."""
    x = np.asarray(x, np.float64)
    q, k, v = _projected(params, x, heads, kv_heads, kv_heads, options)
    distance = np.abs(np.arange(len(x))[:, None] - np.arange(len(x)))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for n in range(heads):
        g = n * kv_heads // heads
        bias = 0.0 if alibi is None else -alibi[n] * distance
        out[:, n] = _weights(q[:, n], k[:, g], keep, options, bias, _sinks(params, heads)[n]) @ v[:, g]
    values = _sigmoid(_project(params, "gate", x))
    out *= _heads(values, heads) if gate == "elementwise" else values[:, :, None]
    return _project(params, "out", out.reshape(len(x), -1))


def forgetting(
    params, x, keep, *, heads, kv_heads, output_gate=None, output_norm=None, norm_eps=None, **options
):
    """The decay of key s at query t as the product of the gates after s, written out."""
    x = np.asarray(x, np.float64)
    q, k, v = _projected(params, x, heads, kv_heads, kv_heads, options)
    f = _sigmoid(_project(params, "gate", x))
    out = np.zeros_like(q)
    for n in range(heads):
        g = n * kv_heads // heads
        decay = np.zeros((len(x), len(x)))
        for t in range(len(x)):
            for s in range(t + 1):
                decay[t, s] = np.log(f[s + 1 : t + 1, n]).sum()
        out[:, n] = _weights(q[:, n], k[:, g], keep, options, decay, _sinks(params, heads)[n]) @ v[:, g]
    out = head_norm(out, output_norm, params.get("output_norm"), norm_eps).reshape(len(x), -1)
    if output_gate is not None:
        gate = _project(params, "output_gate", x)
        out = out * _sigmoid(gate) * (gate if output_gate == "silu" else 1)
    return _project(params, "out", out)


def differential(params, x, keep, *, heads, kv_heads, lambda_init, norm_eps, **options):
    x = np.asarray(x, np.float64)
    q, k, v = _projected(params, x, 2 * heads, 2 * kv_heads, kv_heads, options)
    a, b, c, d = (np.asarray(params[f"lambda_{n}"], np.float64) for n in ("q1", "k1", "q2", "k2"))
    weight = np.exp(a @ b) - np.exp(c @ d) + lambda_init
    out = np.zeros((len(x), heads, v.shape[-1]))
    for n in range(heads):
        g = n * kv_heads // heads
        first, second = (
            _weights(
                q[:, 2 * n + i], k[:, 2 * g + i], keep, options, sink=_sinks(params, 2 * heads)[2 * n + i]
            )
            for i in (0, 1)
        )
        out[:, n] = (first - weight * second) @ v[:, g]
    out = _rms(out, params["head_norm"]["scale"], norm_eps) * (1 - lambda_init)
    return _project(params, "out", out.reshape(len(x), -1))


def latent(params, x, keep, *, heads, head_dim, rotary_dim, rope, norm_eps, **options):
    """Keys and values of every head written out: no absorption."""
    x = np.asarray(x, np.float64)
    source = x
    if "q_down" in params:
        source = _rms(_project(params, "q_down", x), params["q_latent_norm"]["scale"], norm_eps)
    q = _heads(_project(params, "q", source), heads)
    c = _rms(_project(params, "kv_down", x), params["kv_latent_norm"]["scale"], norm_eps)
    k, v = _heads(_project(params, "k_up", c), heads), _heads(_project(params, "v_up", c), heads)
    if rotary_dim:
        shared, of_query = _project(params, "k_rotary", x)[:, None], q[..., head_dim:]
        if rope is not None:
            shared, of_query = _rotate(shared, rope), _rotate(of_query, rope)
        q = np.concatenate([q[..., :head_dim], of_query], axis=-1)
        k = np.concatenate([k, np.repeat(shared, heads, axis=1)], axis=-1)
    out = [_weights(q[:, n], k[:, n], keep, options) @ v[:, n] for n in range(heads)]
    return _project(params, "out", np.stack(out, axis=1).reshape(len(x), -1))
