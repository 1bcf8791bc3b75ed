"""impl="decode" of dot_product_attention: float64, the dense form, and the blocks that it visits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.biases import ALiBi
from attention_jax.masks import Causal, SlidingWindow
from attention_jax.ops.softmax import dot_product_attention, explain
from tests import problems
from tests.cases import fast_cases

_NO_DROPOUT = [case for case in fast_cases() if not case.dropout]


@pytest.mark.parametrize(
    "case", [*_NO_DROPOUT[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in _NO_DROPOUT[2:])], ids=str
)
def test_forward_lse_and_gradients(case):
    problems.check(case, "decode")


def _call(rng, B, T, S, N, K, H, newest_B):
    """Queries at the last T positions of each row, and a cache whose later slots are empty and hold NaN."""
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    slots_BS = np.broadcast_to(np.arange(S), (B, S))
    empty_BS = slots_BS > np.asarray(newest_B)[:, None]
    k[empty_BS] = v[empty_BS] = np.nan
    q_positions = np.asarray(newest_B)[:, None] - np.arange(T)[::-1]
    return (q, k, v), {"q_positions": q_positions, "k_positions": np.where(empty_BS, -1, slots_BS)}


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "mask", "options"),
    [
        (1, 6, 6, 64, Causal(), {"sinks": True}),  # 6 heads: 4 side by side, then 2
        (1, 6, 2, 24, SlidingWindow(300), {"softcap": 3.0}),
        (5, 4, 1, 16, Causal(), {"bias": ALiBi(4)}),
    ],
)
def test_blocks_of_a_cache_equal_the_dense_form(T, N, K, H, mask, options):
    """Without derivatives: rows of unequal lengths, an empty row, and a last block that overlaps another."""
    rng = np.random.default_rng(0)
    arrays, ids = _call(rng, 3, T, 701, N, K, H, [699, 290, -1])
    options = dict(options)
    if options.pop("sinks", False):
        options["sink_logits_N"] = rng.standard_normal(N, np.float32)
    call = functools.partial(dot_product_attention, mask=mask, return_lse=True, **ids, **options)
    assert explain(*arrays, mask=mask, **ids, **options).chosen == "decode"
    found = jax.jit(functools.partial(call, impl="decode"))(*arrays)
    wanted = jax.jit(functools.partial(call, impl="reference"))(*arrays)
    for new, old in zip(found, wanted, strict=True):
        assert_allclose(new, old, rtol=2e-5, atol=2e-6)


def test_hidden_keys_change_no_bit():
    """Neither finite ones nor, in slots without a token, NaN and Inf."""
    rng = np.random.default_rng(1)
    (q, k, v), ids = _call(rng, 2, 3, 128, 4, 2, 16, [90, 100])
    run = jax.jit(functools.partial(dot_product_attention, mask=Causal(), impl="decode"))
    found, wanted = [], run(q, k, v, **ids)
    for fill in (7.0, np.nan, np.inf):
        hidden = np.asarray(ids["k_positions"] < 0)[..., None, None]
        found.append(run(q, *(np.where(hidden, np.float32(fill), x) for x in (k, v)), **ids))
    assert jnp.isfinite(wanted).all() and hidden.any()
    for x in found:
        assert_array_equal(x, wanted)
