"""Pairwise covering arrays: few cases in which every pair of values of any two factors meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0, tries: int = 30) -> list[dict[str, Any]]:
    """Cases that cover all pairs of values, greedily (AETG), the same on every run and every Python.

    Each case starts from the uncovered pair that is first in order; of `tries` random completions the one
    that covers most goes in.
    """
    names = list(factors)
    rng = random.Random(seed)
    sizes = [len(factors[name]) for name in names]
    # Values are compared by index: they need be neither hashable nor distinct from one another.
    open_pairs = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    cases = []
    while open_pairs:
        best, best_gain = None, -1
        for _ in range(tries):
            row = _complete(next(iter(open_pairs)), sizes, open_pairs, rng)
            gain = sum(pair in open_pairs for pair in _pairs(row))
            if gain > best_gain:
                best, best_gain = row, gain
        for pair in _pairs(best):
            open_pairs.pop(pair, None)
        cases.append({name: factors[name][i] for name, i in zip(names, best, strict=True)})
    return cases


def _pairs(row):
    return itertools.combinations(enumerate(row), 2)


def _complete(start, sizes, open_pairs, rng):
    """A row that holds the pair `start`; each further factor, in random order, takes the best value."""
    row = dict(start)
    rest = [a for a in range(len(sizes)) if a not in row]
    rng.shuffle(rest)
    for a in rest:
        values = list(range(sizes[a]))
        rng.shuffle(values)
        row[a] = max(values, key=lambda i: sum(tuple(sorted([(a, i), x])) in open_pairs for x in row.items()))
    return [row[a] for a in range(len(sizes))]
