"""selected_attention and choose_blocks against NumPy float64, in every implementation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.ops.selected import GatheredConfig, choose_blocks, explain, selected_attention
from attention_jax.ops.selected.api import implementations
from tests.reference import nsa as truth

B, T, N, K, H, M, BLOCK = 2, 23, 4, 2, 6, 5, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Repeated, absent (-1), future and far out of range indices among the good ones.
RNG = np.random.default_rng(0)
BLOCKS = RNG.integers(-1, 7, (B, T, K, 4)).astype(np.int32)
BLOCKS[0, 3:7] = [[[0, 0, 0, 0], [-1, -1, -1, -1]]]
BLOCKS[1, 5, 0] = [1, 1, 2**30, -(2**31)]

# Five queries at a time: several chunks, the last of them not full.
SMALL = GatheredConfig(chunk_elements=5 * B * K * BLOCKS.shape[-1] * BLOCK * (H + M))
each_implementation = pytest.mark.parametrize(
    "impl", [SMALL if x == "gathered" else x for x in implementations()], ids=implementations()
)


def arrays(T=T):
    q, k, v, do = (RNG.standard_normal((B, T, heads, width)).astype(np.float32)
                   for heads, width in ((N, H), (K, H), (K, M), (N, M)))  # fmt: skip
    return q, k, v, do


def run(impl, q, k, v, do, blocks=BLOCKS, block_size=BLOCK, **options):
    """Output and gradients of q, k, v."""
    return [np.asarray(x) for x in _both(impl, block_size, q, k, v, do, blocks, options)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(impl, block_size, q, k, v, do, blocks, options):
    """One program for all calls of the same shapes."""
    attend = functools.partial(selected_attention, block_size=block_size, impl=impl, **options)
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, blocks), q, k, v)
    return out, *pull(do.astype(out.dtype))


def expected_gradients(q, k, v, do, blocks):
    """Central differences of the float64 reference along one random direction of each array."""
    found = []
    for index in range(3):
        direction, step = RNG.standard_normal((q, k, v)[index].shape), 1e-5
        values = []
        for sign in (1, -1):
            moved = [x.astype(np.float64) for x in (q, k, v)]
            moved[index] = moved[index] + sign * step * direction
            outs = [truth.selected(*(x[b] for x in moved), blocks[b], BLOCK) for b in range(B)]
            values.append((np.stack(outs) * do).sum())
        found.append((direction, (values[0] - values[1]) / (2 * step)))
    return found


@each_implementation
def test_output_and_gradients(impl):
    q, k, v, do = arrays()
    out, *grads = run(impl, q, k, v, do)
    for b in range(B):
        assert_allclose(
            out[b], truth.selected(*(x[b].astype(float) for x in (q, k, v)), BLOCKS[b], BLOCK), **TOLERANCE
        )
    for grad, (direction, slope) in zip(grads, expected_gradients(q, k, v, do, BLOCKS), strict=True):
        assert_allclose((grad * direction).sum(), slope, rtol=1e-4)
    # A query that names no block gives 0 and passes nothing on.
    assert_array_equal(out[0, 3:7, N // K :], 0)
    assert_array_equal(grads[0][0, 3:7, N // K :], 0)


def packed_row():
    """Slots of two documents with padding before, between and after: (parts, segments, positions)."""
    parts = (slice(2, 10), slice(12, 21))
    segments, positions = np.full(T, -1), np.full(T, 3)
    for ids, part in zip((7, 6), parts, strict=True):
        segments[part], positions[part] = ids, np.arange(part.stop - part.start)
    positions[-2:], segments[-2:] = -1, 0
    return parts, segments, positions


@each_implementation
def test_packed_documents_with_padding_around(impl):
    """Each document as it is alone, whatever the empty slots hold."""
    plain = arrays()
    parts, segments, positions = packed_row()
    empty = (segments < 0) | (positions < 0)
    q, k, v = (np.where(empty[:, None, None], np.nan, x) for x in plain[:3])
    options = {"segment_ids": segments, "q_positions": positions, "k_positions": positions}
    packed = run(impl, q, k, v, plain[3], **options)
    for b, part in itertools.product(range(B), parts):
        alone = truth.selected(*(x[b, part].astype(float) for x in plain[:3]), BLOCKS[b, part], BLOCK)
        assert_allclose(packed[0][b, part], alone, **TOLERANCE)
    for x, y in zip(packed, run("reference", *plain, **options), strict=True):
        assert_allclose(x, y, **TOLERANCE)
        assert_array_equal(x[:, empty], 0)


@each_implementation
def test_last_queries_of_a_padded_row(impl):
    """T != S, as with a cache: the keys begin at any slot, and at any position."""
    q, k, v, _ = arrays()
    pad, skip = 6, 3
    positions = np.where(np.arange(T) < pad, -1, np.arange(T) - pad + skip)
    at = positions[-2:]
    attend = functools.partial(
        selected_attention, block_size=BLOCK, q_positions=at, k_positions=positions, impl=impl
    )
    out = jax.jit(lambda *qkv: attend(*qkv, BLOCKS[:, -2:]))(
        q[:, -2:], *(np.where(positions[:, None, None] < 0, np.nan, x) for x in (k, v))
    )
    for b in range(B):
        whole = [np.concatenate([x[b, :skip] * 0, x[b, pad:]]).astype(float) for x in (q, k, v)]
        for i, t in enumerate(at):
            for n, g in itertools.product(range(N), range(K)):
                seen = [skip <= s <= t and s // BLOCK in BLOCKS[b, T - 2 + i, g] for s in range(t + 1)]
                if n // (N // K) == g:
                    expected, _ = truth.attend(
                        whole[0][t, n], whole[1][: t + 1, g], whole[2][: t + 1, g], seen
                    )
                    assert_allclose(out[b, i, n], expected, **TOLERANCE)


@each_implementation
def test_a_hidden_key_changes_no_bit(impl):
    q, k, v, do = arrays()
    before, dq, *_ = run(impl, q, k, v, do)
    t = 10
    k2, v2 = k.copy(), v.copy()
    k2[:, t + 1 :], v2[:, t + 1 :] = np.finfo(np.float32).max, 1e30
    after, dq2, *_ = run(impl, q, k2, v2, np.where(np.arange(T)[:, None, None] <= t, do, 0))
    assert_array_equal(before[:, : t + 1], after[:, : t + 1])
    assert_array_equal(dq[:, : t + 1], dq2[:, : t + 1])


@each_implementation
def test_bfloat16_accumulates_in_float32(impl):
    q, k, v, do = (x.astype(jnp.bfloat16) for x in arrays())
    out, *grads = run(impl, q, k, v, do)
    exact, *exact_grads = run("reference", *(x.astype(np.float32) for x in (q, k, v, do)))
    for x, y in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert x.dtype == jnp.bfloat16
        assert_allclose(x.astype(np.float32), y, rtol=2**-8, atol=2e-4)


def test_gathered_gives_nan_where_a_document_is_not_contiguous():
    q, k, v, do = arrays()
    positions = np.stack([np.arange(T), np.arange(T)[::-1]])
    out, *_ = run(SMALL, q, k, v, do, q_positions=positions, k_positions=positions)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_the_choice_is_by_size_and_explained():
    q, k, v, _ = arrays()
    found = explain(q, k, v, BLOCKS, block_size=BLOCK)
    assert found.chosen == "reference" and "reference comes first" in found.reasons["gathered"]
    shape = jax.ShapeDtypeStruct
    long = [shape((B, 2048, *x.shape[2:]), x.dtype) for x in (q, k, v, BLOCKS)]
    one = [shape((B, 1, *x.shape[2:]), x.dtype) for x in (q, BLOCKS)]
    step = explain(one[0], *long[1:3], one[1], block_size=BLOCK, q_positions=np.full((B, 1), 2047))
    assert step.chosen == "gathered" and "of S = 2048 keys" in step.reasons["reference"]
    assert explain(*long, block_size=BLOCK).chosen == "gathered"
    assert explain(*long, block_size=BLOCK, impl="reference").chosen == "reference"


def test_choose_blocks_is_equations_9_to_11():
    """Also in a row of two documents, where compressed blocks of both stand in one list."""
    C, sizes = 10, {"compress_block": 4, "compress_stride": 2, "select_block": 6, "select_count": 4}
    rng = np.random.default_rng(0)  # its own: the data must hold no near tie
    q, k = (rng.standard_normal((1, n, heads, H)).astype(np.float32) for n, heads in ((40, N), (2 * C, K)))
    segments = (np.repeat([[0, 1]], 20, axis=1), np.repeat([[0, 1]], C, axis=1))
    t_pos, c_end = np.tile(np.arange(20), 2)[None] + 20, np.tile(np.arange(C), 2)[None] * 2 + 3
    s = np.einsum("tkgh,ckh->tkgc", q[0].reshape(40, K, N // K, H).astype(float), k[0]) / np.sqrt(H)
    seen = (segments[0].T == segments[1]) & (c_end <= t_pos.T)
    p = np.where(seen[:, None, None], np.exp(s), 0)
    lse = np.log(p.sum(-1))
    p = (p / p.sum(-1, keepdims=True)).sum(2)
    found = choose_blocks(
        q, k, jnp.asarray(lse.reshape(1, 40, N), jnp.float32), scale=H**-0.5, num_blocks=7, **sizes,
        q_positions=jnp.asarray(t_pos), k_positions=jnp.asarray(c_end),
        segment_ids=tuple(map(jnp.asarray, segments)),
        shift_BT=jnp.asarray(np.where(segments[0] == 0, 0, C)),
    )  # fmt: skip
    for t in range(40):
        for g in range(K):
            own = t_pos[0, t] // 6
            score = truth.importance(p[t, g, C * (t >= 20) :][:C], 7, 4, 2, 6)
            assert sorted(found[0, t, g].tolist()) == truth.chosen(score, own, 4)


def test_near_ties_fall_to_the_first_block():
    """Importances a few units in the last place apart are one importance."""
    q = jnp.ones((1, 1, 1, 2))
    k = jnp.ones((1, 12, 1, 2)) * (1 + 1e-7 * jnp.arange(12))[None, :, None, None]
    found = choose_blocks(
        q, k, jnp.full((1, 1, 1), 3.0), scale=1.0, compress_block=1, compress_stride=1, select_block=1,
        select_count=5, num_blocks=12, q_positions=jnp.array([[11]]), k_positions=jnp.arange(12)[None],
    )  # fmt: skip
    assert sorted(found.ravel().tolist()) == [0, 1, 2, 10, 11]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fast"}, "unknown impl 'fast'"),
        ({"block_size": 0}, "block_size must be an integer >= 1"),
        ({"scale": float("nan")}, "scale must be a finite Python number"),
        ({"blocks": BLOCKS[:, :5]}, r"block_indices must be \[B, T, K, n\]"),
        ({"blocks": BLOCKS.astype(np.float32)}, "block_indices must be integers"),
        ({"q_positions": np.arange(4)}, r"q_positions must be \[2, 23\] or \[23\]"),
        ({"k_positions": np.zeros(T)}, "k_positions must be integers"),
        ({"segment_ids": (np.arange(T), None)}, "segment_ids must be an array"),
        ({"k": np.zeros((B, T, 3, H), np.float32)}, "do not fit"),
        ({"k": np.zeros((B, T, K, H), np.float16)}, "differ in dtype"),
        ({"q": np.zeros((B, T, N, H), np.int32)}, "q must be floating point"),
        ({"q": np.zeros((B, T, 3, H), np.float32)}, "2 kv heads do not divide 3 query heads"),
    ],
)
def test_bad_calls(changes, message):
    q, k, v, _ = arrays()
    given = {"q": q, "k": k, "v": v, "blocks": BLOCKS, "block_size": BLOCK} | changes
    with pytest.raises(ValueError, match=message) as error:
        selected_attention(*[given.pop(name) for name in ("q", "k", "v", "blocks")], **given)
    assert "\n" not in str(error.value)
