"""Mixtures of experts in NumPy float64, token by token, from the papers named in each function."""

from __future__ import annotations

import numpy as np


def _softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def scores(logits, scoring):
    """Softmax (Shazeer et al. 2017) or sigmoid (DeepSeek-V3) of one token's logits [E]."""
    return _softmax(logits) if scoring == "softmax" else 1 / (1 + np.exp(-logits))


def choose(s, k, correction=0.0, num_groups=1, groups_per_token=1, group_score="max"):
    """The k experts of a token, the best first.

    Groups: the best by their largest score (DeepSeek-V2, section 2.2.2) or by the sum of their two
    largest (DeepSeek-V3); the correction is in the choice alone (DeepSeek-V3, eq. 16).
    """
    biased = s + correction
    groups = np.split(np.arange(len(s)), num_groups)
    best = {"max": 1, "top2": 2}[group_score]
    value = [np.sort(biased[g])[-best:].sum() for g in groups]
    kept = [e for i in np.argsort(value)[::-1][:groups_per_token] for e in groups[i]]
    return sorted(kept, key=lambda e: -biased[e])[:k]


def experts(x_BTD, valid_BT, p, unit, *, k, scoring="softmax", normalize=True, scale=1.0, weigh_input=False,
            capacity=None, **groups):  # fmt: skip
    """(y, scores [B, T, E], load [E], balance, z): one token after another.

    p: dict of float64 arrays under the names of the module's parameters, with None for what it does not have.
    capacity: the most tokens of an expert in a row of the batch (GShard), in the order of the tokens.
    """
    B, T, D = x_BTD.shape
    E = p["up"].shape[0]
    y, all_scores, logits_BTE, counts = (
        np.zeros_like(x_BTD),
        np.zeros((B, T, E)),
        np.zeros((B, T, E)),
        np.zeros(E),
    )

    def linear(name, x, e):
        bias = p.get(f"{name}_bias")
        return x @ p[name][e] + (0 if bias is None else bias[e])

    def expert(x, e):
        gate = linear("gate", x, e) if p.get("gate") is not None else None
        return linear("down", unit(gate, linear("up", x, e)), e)

    for b in range(B):
        used = np.zeros(E, int)
        for t in range(T):
            if not valid_BT[b, t]:
                continue
            x = x_BTD[b, t]
            logits_BTE[b, t] = x @ p["router"] + p.get("router_b", 0)
            s = all_scores[b, t] = scores(logits_BTE[b, t], scoring)
            chosen = choose(s, k, p.get("router_bias", 0.0), **groups)
            total = sum(s[e] for e in chosen) if normalize else 1.0
            for e in chosen:
                counts[e] += 1
                used[e] += 1
                if capacity is not None and used[e] > capacity:
                    continue
                w = scale * s[e] / total
                y[b, t] += expert(w * x, e) if weigh_input else w * expert(x, e)
            if p.get("shared_up") is not None:
                shared = unit(x @ p["shared_gate_proj"], x @ p["shared_up"]) @ p["shared_down"]
                gate = p.get("shared_gate")
                y[b, t] += shared if gate is None else shared / (1 + np.exp(-(x @ gate)[0]))
    valid = valid_BT.astype(bool)
    shares = all_scores[valid] / all_scores[valid].sum(-1, keepdims=True)
    load = counts / counts.sum()
    balance = E * np.sum(load * shares.mean(axis=0))  # Switch Transformer, eq. 4
    z = np.mean(np.log(np.exp(logits_BTE[valid]).sum(-1)) ** 2)  # ST-MoE, eq. 5
    return y, all_scores, load, balance, z
