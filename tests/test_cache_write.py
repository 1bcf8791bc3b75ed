"""The update of a key-value cache: runs of slots, rings, dropped tokens, in any order."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.caches.write import write_heads


@pytest.mark.parametrize("B, T, S", [(3, 1, 8), (3, 7, 8), (2, 12, 8)])
def test_every_token_goes_to_its_slot(B, T, S):
    """Bit for bit, beside one token after another: full rings that wrap, gaps, and slots in any order."""
    rng, write = np.random.default_rng(0), jax.jit(write_heads)
    for _ in range(40):
        held = rng.normal(size=(B, 2, S, 3)).astype(np.float32)
        new = rng.normal(size=(B, T, 2, 3)).astype(np.float32)
        slots = np.full((B, T), S, np.int32)
        for row in slots:
            kind, first = rng.integers(3), rng.integers(50)
            if kind == 0:  # a ring, of which some tokens are padding
                row[:] = np.where(np.arange(T) >= T - S, (first + np.arange(T)) % S, S)
                row[rng.random(T) < 0.2] = S
            elif kind == 1:  # a run that reaches past the last slot, padded on the right
                row[:] = np.minimum(first % S + np.arange(T), S)
                row[T - rng.integers(T + 1) :] = S
            else:
                some = min(T, S)
                row[rng.choice(T, some, replace=False)] = rng.permutation(S)[:some]
        expected = held.copy()
        for b, t in np.argwhere(slots < S):
            expected[b, :, slots[b, t]] = new[b, t]
        assert_array_equal(write(held, new, slots), expected)
