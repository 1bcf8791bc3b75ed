"""The distribution that a token is sampled from, in float64, written from the papers.

Temperature; top-k; nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1): the smallest set
of the most probable tokens whose total probability is at least p; min-p (arXiv 2407.01082): tokens of at
least min_p times the largest probability. Each filter renormalises what the one before it left.
"""

from __future__ import annotations

import math

import numpy as np


def distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """Probabilities [V] of one row of logits; ties go to the smallest ids."""
    z = np.asarray(logits, np.float64)
    p = _normalised(np.exp((z - z.max()) / temperature))
    order = np.argsort(-z, kind="stable")
    if top_k is not None:
        p[order[top_k:]] = 0
        p = _normalised(p)
    if top_p is not None and top_p < 1:  # with 1 a sum of rounded terms would drop the smallest
        kept = 0
        while kept < len(p) and math.fsum(p[order[:kept]]) < top_p:
            kept += 1
        p[order[kept:]] = 0
        p = _normalised(p)
    if min_p is not None:
        p[p < min_p * p.max()] = 0
        p = _normalised(p)
    return p


def nucleus(logits, top_p) -> int:
    """How many tokens a nucleus keeps, for large vocabularies: by the probability from each token on."""
    z = -np.sort(-np.asarray(logits, np.float64))
    p = _normalised(np.exp(z - z[0]))
    from_here = np.cumsum(p[::-1])[::-1]
    return (
        int((from_here > 1 - np.float64(top_p)).sum())
        if top_p > 0.5
        else int((np.cumsum(p) - p < top_p).sum())
    )


def _normalised(p: np.ndarray) -> np.ndarray:
    return p / math.fsum(p)


def adjusted(
    logits, prompt=(), output=(), repetition=1.0, presence=0.0, frequency=0.0, bias=(), banned=()
) -> np.ndarray:
    """Logits [V] after penalties (arXiv 1909.05858, section 4.1, in vLLM's form), biases and bans."""
    z = np.array(logits, np.float64)
    for token in set(prompt) | set(output):
        z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
    for token in set(output):
        z[token] -= frequency * list(output).count(token) + presence
    for token, value in bias:
        z[token] += value
    z[list(banned)] = -np.inf
    return z
