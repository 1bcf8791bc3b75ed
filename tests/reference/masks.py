"""Truth formulas of the masks: (q position, k position) -> kept, on integers and integer arrays."""

from __future__ import annotations

import numpy as np


def full(q, k):
    return np.ones(np.broadcast(q, k).shape, bool)


def causal(q, k):
    return k <= q


def sliding_window(window, right=0):
    return lambda q, k: (-right <= q - k) & (q - k < window)


def sinks(count):
    return lambda q, k: (k < count) & full(q, k)


def both(a, b):
    return lambda q, k: np.logical_and(a(q, k), b(q, k))


def either(a, b):
    return lambda q, k: np.logical_or(a(q, k), b(q, k))


def negated(a):
    return lambda q, k: np.logical_not(a(q, k))


def table(truth, q_positions, k_positions):
    """The truth table [..., T, S] of positions [..., T] and [..., S]."""
    return truth(np.asarray(q_positions)[..., :, None], np.asarray(k_positions)[..., None, :])
