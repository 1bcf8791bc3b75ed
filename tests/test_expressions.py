"""Random mask expressions through attention itself: blocked, and decoded with the cache they allow."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.testing import assert_allclose

from attention_jax.caches import KVCache
from attention_jax.masks import Causal
from attention_jax.mixers import Context
from attention_jax.mixers.parts import update_cache
from attention_jax.ops.softmax import ChunkedConfig, dot_product_attention
from tests.reference import masks as truth
from tests.strategies import expressions

T, N, H = 26, 2, 4
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
_RNG = np.random.default_rng(0)
Q, K, V = (_RNG.normal(size=(1, T, N, H)).astype(np.float32) for _ in range(3))
# The fixture may be shared by examples: each undoes its own patch.
quietly = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense(table: np.ndarray) -> np.ndarray:
    """Softmax attention over what the table keeps; a row that keeps nothing is 0."""
    out = np.zeros((T, N, H))
    for n in range(N):
        scores = Q[0, :, n].astype(np.float64) @ K[0, :, n].T / np.sqrt(H)
        for t in range(T):
            seen = np.flatnonzero(table[t])
            if seen.size:
                p = np.exp(scores[t, seen] - scores[t, seen].max())
                out[t, n] = p @ V[0, seen, n] / p.sum()
    return out


@given(expressions)
@quietly
def test_the_blocked_form(row):
    small = ChunkedConfig(query_tile=8, key_tile=16, key_unit=8)
    out = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, mask=row.mask, impl=small))(Q, K, V)
    assert_allclose(out[0], dense(truth.table(row.truth, np.arange(T), np.arange(T))), **TOLERANCE)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((8, 1, 8, 1, 8), id="in pieces"),
        pytest.param((1,) * T, id="token by token", marks=pytest.mark.slow),
    ],
)
@given(expressions)
@quietly
def test_decoding_with_the_cache_the_mask_allows(pieces, row):
    mask = row.mask & Causal()
    wanted = dense(truth.table(truth.both(row.truth, truth.causal), np.arange(T), np.arange(T)))
    state = KVCache.empty(1, T, N, H, H, mask=mask)

    @jax.jit
    def step(state, positions_BT, q, k, v):
        ctx = Context(positions_BT=positions_BT)
        view, state = update_cache(state, ctx, k, v)
        return view.attend(q, ctx, mask=mask, impl="reference")[0], state

    start = 0
    for size in pieces:
        at = slice(start, start + size)
        out, state = step(state, np.arange(T)[None, at], Q[:, at], K[:, at], V[:, at])
        assert_allclose(out[0], wanted[at], **TOLERANCE)
        start += size
