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


def dilated(window, stride):
    """q - k in {0, s, ..., (w - 1) s}."""
    return lambda q, k: np.isin(q - k, np.arange(window) * stride)


def strided(stride):
    return lambda q, k: np.logical_or(k % stride == 0, k == q)


def chunked(size):
    return lambda q, k: np.floor_divide(q, size) == np.floor_divide(k, size)


def block_local(block, neighbours):
    return lambda q, k: abs(np.floor_divide(q, block) - np.floor_divide(k, block)) <= neighbours


def named(positions):
    """Global: q in P or k in P."""
    return lambda q, k: np.logical_or(np.isin(q, list(positions)), np.isin(k, list(positions)))


def prefix(length):
    return lambda q, k: (k < length) & full(q, k)


def array(kept):
    """kept[q, k], False outside the array."""

    def at(q, k):
        return bool(0 <= q < kept.shape[0] and 0 <= k < kept.shape[1] and kept[q, k])

    return lambda q, k: np.vectorize(at, otypes=[bool])(q, k)


def draws(i, count, seed, skip, first):
    """The blocks that block i of `RandomBlocks` draws, in plain integers: one from each stratum."""
    span, found = i - skip - first, set()
    for stratum in range(count if span > 0 else 0):
        lo, hi = stratum * span // count, (stratum + 1) * span // count
        if hi > lo:
            h = ((i * 0x01000193) ^ (seed * 0x9E3779B9 + stratum * 0x85EBCA6B + 0x27220A95)) % 2**32
            h = ((h ^ (h >> 16)) * 0x7FEB352D) % 2**32
            h = ((h ^ (h >> 15)) * 0x6BA68B) % 2**32
            found.add(first + lo + ((h ^ (h >> 16)) % 2**24) % (hi - lo))
    return found


def random_blocks(block, count, seed, skip, first):
    def at(q, k):
        a, b = int(q) // block, int(k) // block
        return b in draws(a, count, seed, skip, first) or a in draws(b, count, seed, skip, first)

    return lambda q, k: np.vectorize(at, otypes=[bool])(q, k)


def longformer(window, positions):
    return either(sliding_window(window // 2 + 1, window // 2), named(positions))


def bigbird(block, window_blocks, global_blocks, random, seed):
    half = window_blocks // 2
    near = block_local(block, half)
    return either(
        either(near, named(range(global_blocks * block))),
        random_blocks(block, random, seed, half, global_blocks),
    )


def both(a, b):
    return lambda q, k: np.logical_and(a(q, k), b(q, k))


def either(a, b):
    return lambda q, k: np.logical_or(a(q, k), b(q, k))


def negated(a):
    return lambda q, k: np.logical_not(a(q, k))


def table(truth, q_positions, k_positions):
    """The truth table [..., T, S] of positions [..., T] and [..., S]."""
    return truth(np.asarray(q_positions)[..., :, None], np.asarray(k_positions)[..., None, :])
