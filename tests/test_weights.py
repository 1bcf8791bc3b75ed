"""The dense map of each op: W v is the op's output, by definitions in float64 that share no code with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.delta_rule import delta_rule, delta_weights
from attention_jax.ops.selected import selected_attention, selected_weights
from attention_jax.ops.softmax import attention_weights, dot_product_attention
from tests import problems
from tests.cases import OpCase
from tests.reference import decay_scan as decay_truth
from tests.reference import delta_rule as delta_truth
from tests.reference import nsa as selected_truth

STATIC = {"mask", "scale", "softcap", "impl", "normalize", "block_size"}


def compiled(function, *arrays, **options):
    """function(*arrays, **options) as one program."""
    static = {name: x for name, x in options.items() if name in STATIC and not hasattr(x, "shape")}
    traced = {name: x for name, x in options.items() if name not in static}
    return jax.jit(lambda arrays, traced: function(*arrays, **static, **traced))(arrays, traced)


SOFTMAX = [
    OpCase((9, 9), (8, 5), (4, 2)),
    OpCase((9, 13), (8, 5), (4, 1), "sink window", "gate", softcap=2.0, sinks=True, positions="cache"),
    OpCase((12, 12), (8, 8), (2, 2), "causal", "forget", segments="packed", sinks=True, batch=1),
    OpCase((12, 12), (8, 8), (4, 2), "far past", "array B11S", segments="ragged", positions="left padded"),
    OpCase((7, 10), (8, 8), (8, 1), "array BNTS", "alibi", scale=-0.3, dtype="bfloat16"),
    OpCase((5, 6), (8, 8), (2, 2), None, None, dropout=0.3),
]
# What is asked for once for all keys; the rest of a problem's arguments is dropout's.
NO_DROPOUT = {"dropout_rate", "dropout_key"}


def applied(W_BNTS, v_BSKM) -> np.ndarray:
    """W v in float64, [B, T, N, M]; consecutive heads of the larger share one of the smaller."""
    W, v = np.asarray(W_BNTS, np.float64), np.asarray(v_BSKM).astype(np.float64)
    N = max(W.shape[1], v.shape[2])
    W, v = np.repeat(W, N // W.shape[1], axis=1), np.repeat(v, N // v.shape[2], axis=2)
    return np.einsum("bnts,bsnm->btnm", W, v)


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_softmax(case):
    problem = problems.make(case)
    exact = problem.truth()
    arguments = {name: x for name, x in problem.fixed.items() if name not in NO_DROPOUT}
    arguments["bias"] = problem.learned.get("bias", problem.fixed.get("bias"))
    # What empty slots hold is never read.
    q = np.where(problem.q_valid[..., None, None], problem.learned["q"], np.nan).astype(problem.dtype)
    k = np.where(problem.k_valid[..., None, None], problem.learned["k"], np.nan).astype(problem.dtype)
    W = compiled(attention_weights, q, k, sink_logits_N=problem.learned.get("sinks"), **arguments)
    assert W.shape == exact.p.shape and W.dtype == jnp.float32
    assert_allclose(W, exact.p, atol=2e-6)
    assert_array_equal(np.asarray(W)[~problem.keep], 0)
    shares = np.where(problem.keep.any(-1), 1 - np.broadcast_to(exact.p_sink, (*W.shape[:3], 1))[..., 0], 0)
    assert_allclose(W.sum(-1), shares, atol=1e-5)
    v = np.where(problem.k_valid[..., None, None], problem.learned["v"], 0)
    if not case.dropout:
        out = compiled(
            dot_product_attention,
            q,
            k,
            v.astype(problem.dtype),
            sink_logits_N=problem.learned.get("sinks"),
            impl="chunked",
            **arguments,
        )
        assert_allclose(applied(W, v), out, atol=4e-6 if case.dtype == "float32" else 0.02)


def test_softmax_weights_are_differentiable():
    problem = problems.make(SOFTMAX[0])
    q, k, v = (problem.learned[name] for name in "qkv")

    def through_weights(q, k):
        W = compiled(attention_weights, q, k, **problem.fixed)
        return jnp.einsum("bnts,bsnm->btnm", W, jnp.repeat(v, 2, axis=2))

    def direct(q, k):
        return compiled(dot_product_attention, q, k, v, **problem.fixed)

    for a, b in zip(*(jax.vjp(f, q, k)[1](problem.do) for f in (through_weights, direct)), strict=True):
        assert_allclose(a, b, atol=1e-5)


def test_selected():
    B, T, N, K, H, M, block = 2, 14, 4, 2, 6, 5, 4
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, n, w)).astype(np.float32) for n, w in ((N, H), (K, H), (K, M)))
    blocks = rng.integers(-1, 5, (B, T, K, 3)).astype(np.int32)
    blocks[1, 4:6, 0] = -1
    W = np.asarray(compiled(selected_weights, q, k, blocks, block_size=block))
    assert W.shape == (B, N, T, T) and W.dtype == np.float32
    for b in range(B):
        row = (x[b].astype(np.float64) for x in (q, k, v))
        assert_allclose(
            applied(W[b : b + 1], v[b : b + 1])[0], selected_truth.selected(*row, blocks[b], block), atol=1e-6
        )
    named = (np.arange(T) // block == blocks[..., None]).any(3) & (
        np.arange(T) <= np.arange(T)[:, None, None]
    )
    named = np.repeat(named.swapaxes(1, 2), N // K, axis=1)
    assert_array_equal(W > 0, named)
    assert_allclose(W.sum(-1), named.any(-1), atol=1e-6)
    # Two documents and an empty slot: the same numbers as each document alone.
    segments = np.repeat([0, 1], [6, 8])[None] + np.zeros((B, 1), int)
    positions = np.concatenate([np.arange(6), np.arange(8)])[None] + np.zeros((B, 1), int)
    segments[:, 3] = -1
    ids = {"segment_ids": segments, "q_positions": positions, "k_positions": positions, "block_size": block}
    q[:, 3] = k[:, 3] = np.nan
    W = np.asarray(compiled(selected_weights, q, k, blocks, **ids))
    v[:, 3] = 0
    assert_allclose(
        applied(W, v), compiled(selected_attention, q, k, v, blocks, impl="gathered", **ids), atol=1e-6
    )
    assert (
        not W[:, :, :6, 6:].any()
        and not W[:, :, 6:, :6].any()
        and not W[:, :, 3].any()
        and not W[..., 3].any()
    )


LAYOUTS = pytest.mark.parametrize("layout", ["plain", "packed with empty slots"])


def ids_of(layout: str, B: int, T: int):
    """(segment_ids, positions, which slots hold a token): two documents in each row."""
    if layout == "plain":
        return None, None, np.ones((B, T), bool)
    segments = np.where(np.arange(T) < np.array([[5], [8]]), 7, 3)
    positions = np.where(np.isin(np.arange(T), (2, 9)), -1, 0) + np.zeros((B, 1), int)
    return segments, positions, positions >= 0


def check_hidden_pairs(W: np.ndarray, segments, valid) -> None:
    """W is 0 for later tokens, other documents and empty slots."""
    T = W.shape[-1]
    seen = (np.arange(T) <= np.arange(T)[:, None]) & valid[:, :, None] & valid[:, None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    assert_array_equal(W[np.broadcast_to(~seen[:, None], W.shape)], 0)


@LAYOUTS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "token", "channel"])
@pytest.mark.parametrize("heads", [(2, 1, 4), (1, 4, 1)])
def test_decay_scan(layout, normalize, decay, heads):
    B, T, N, H, M, scale = 2, 13, 4, 6, 5, -0.7
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(B, T, n, w)).astype(np.float32) for n, w in zip(heads, (H, H, M), strict=True)
    )
    state = rng.normal(size=(B, N, H, M + normalize)).astype(np.float32)
    if normalize:
        q, k, state = np.abs(q), np.abs(k), np.abs(state)
    shape = {None: None, "head": (N,), "token": (B, T, N), "channel": (B, T, N, H)}[decay]
    log_decay = None if shape is None else -rng.exponential(0.3, size=shape).astype(np.float32)
    segments, positions, valid = ids_of(layout, B, T)
    g = np.zeros((B, T, N, H)) if log_decay is None else log_decay
    g = np.broadcast_to(g[..., None] if g.ndim < 4 else g, (B, T, N, H))
    wide = [np.repeat(x, N // x.shape[2], axis=2) for x in (q, k, v)]
    given = {
        "log_decay": log_decay, "segment_ids": segments, "positions": positions, "normalize": normalize,
        "scale": scale,
    }  # fmt: skip
    empty = ~valid[..., None, None]
    q, k = (np.where(empty, np.nan, x).astype(np.float32) for x in (q, k))
    for initial in (None, state):
        W = np.asarray(compiled(decay_weights, q, k, initial_state_BNHM=initial, **given))
        # As many heads as q, k, the decays and the state have.
        assert W.dtype == np.float32
        assert W.shape[1] == (N if decay or initial is not None else max(heads[:2])) and W.shape[2:] == (T, T)
        check_hidden_pairs(W, segments, valid)
        expected, without = np.zeros((B, T, N, M)), np.zeros((B, T, N, M))
        for b in range(B):
            tokens = [int(t) for t in np.flatnonzero(valid[b])]
            resets = decay_truth.runs(tokens, None if segments is None else segments[b])
            zero = np.zeros((N, H, M + normalize))
            start = zero if initial is None else initial[b].astype(np.float64)
            rest = (g[b], start, tokens, resets, scale, normalize)
            expected[b] = decay_truth.Row(*(x[b] for x in wide), *rest).y
            # The same denominators and no values: what the initial state gives.
            without[b] = decay_truth.Row(wide[0][b], wide[1][b], 0 * wide[2][b], *rest).y
        values = np.where(empty, 0, v)
        assert_allclose(applied(W, values), expected - without, atol=3e-6)
        y = compiled(decay_scan, q, k, values.astype(np.float32), initial_state_BNHM=initial, **given)
        assert_allclose(applied(W, values) + without, y, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_delta_rule(layout, decay):
    B, T, (Q, K, N), H, M, scale = 2, 13, (2, 1, 4), 6, 5, 0.7
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, n, w)).astype(np.float32) for n, w in ((Q, H), (K, H), (N, M)))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 2 * rng.random((B, T, N)).astype(np.float32)
    shape = {None: None, "head": (B, T, N), "channel": (B, T, N, H)}[decay]
    log_decay = None if shape is None else -rng.exponential(0.3, size=shape).astype(np.float32)
    segments, positions, valid = ids_of(layout, B, T)
    g = np.zeros((B, T, N, H)) if log_decay is None else log_decay
    g = np.broadcast_to(g[..., None] if g.ndim < 4 else g, (B, T, N, H))
    given = {"log_decay": log_decay, "segment_ids": segments, "positions": positions, "scale": scale}
    empty = ~valid[..., None, None]
    dirty = [np.where(empty, np.nan, x).astype(np.float32) for x in (q, k)]
    W = np.asarray(compiled(delta_weights, *dirty, beta, **given))
    assert W.shape == (B, N, T, T) and W.dtype == np.float32
    check_hidden_pairs(W, segments, valid)
    expected = np.zeros((B, T, N, M))
    for b in range(B):
        at = np.flatnonzero(valid[b])
        ids = np.zeros(T) if segments is None else segments[b]
        starts = np.diff(ids[at], prepend=ids[at][:1]) != 0
        for n in range(N):
            row = (x[b, at, n * x.shape[2] // N].astype(np.float64) for x in (q, k, v))
            out = delta_truth.forward(
                *row, beta[b, at, n], np.exp(g[b, at, n]), np.zeros((H, M)), starts, scale
            )
            expected[b, at, n] = out[0]
    values = np.where(empty, 0, v).astype(np.float32)
    assert_allclose(applied(W, values), expected, atol=3e-6)
    state = rng.normal(size=(B, N, H, M)).astype(np.float32)
    with_state = compiled(delta_rule, *dirty, values, beta, initial_state_BNHM=state, **given)
    from_state = compiled(delta_rule, *dirty, 0 * values, beta, initial_state_BNHM=state, **given)
    assert_allclose(applied(W, values) + from_state, with_state, atol=1e-5)


def test_mistakes_are_named_as_the_ops_name_them():
    x = jnp.ones((1, 4, 2, 3))
    with pytest.raises(ValueError, match="q must be an array"):
        attention_weights([1.0], x)
    with pytest.raises(ValueError, match="mask must be a Mask or a boolean array"):
        attention_weights(x, x, mask=jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
        selected_weights(x, x, jnp.zeros((1, 4, 2, 1), jnp.int32), block_size=0)
    with pytest.raises(ValueError, match="k must be an array"):
        decay_weights(x, 3.0)
    with pytest.raises(ValueError, match=r"log_decay must be \[N\]"):
        decay_weights(x, x, log_decay=jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="initial_state_BNHM must be"):
        decay_weights(x, x, initial_state_BNHM=jnp.zeros((1, 2, 5, 3)))
    with pytest.raises(ValueError, match=r"beta must be \[B, T, N\]"):
        delta_weights(x, x, jnp.ones((1, 4)))
    long = jax.ShapeDtypeStruct((1, 1 << 15, 1, 3), jnp.float32)
    with pytest.raises(NotImplementedError, match="decay_weights cannot make this array: the weights"):
        jax.eval_shape(decay_weights, long, long)
