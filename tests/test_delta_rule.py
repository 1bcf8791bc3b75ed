"""delta_rule against NumPy float64 stepping through time: outputs, state and gradients of every form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.ops.delta_rule import ChunkedDeltaConfig, delta_rule
from attention_jax.ops.delta_rule.api import explain, implementations
from tests.covering import pairwise
from tests.reference import delta_rule as truth

B, SCALE, TOLERANCE = 2, 0.7, 1e-5
NAMES = ("q", "k", "v", "beta", "log_decay", "state")

each_implementation = pytest.mark.parametrize("impl", implementations())


def arrays(T, *, heads=(2, 1, 2), widths=(6, 5), decay="head", smallest=1e-4, beta=2.0, seed=0):
    """(q, k, v, beta, log_decay, state): normalised keys, decays from 1 - 1e-6 to `smallest` side by side."""
    rng = np.random.default_rng(seed)
    (Q, K, N), (H, M) = heads, widths
    q, k, v = (rng.normal(size=(B, T, h, w)) for h, w in ((Q, H), (K, H), (N, M)))
    log_decay = None
    if decay is not None:
        shape = (B, T, N) if decay == "head" else (B, T, N, H)
        log_decay = np.where(rng.random(shape) < 0.7, np.log1p(-1e-6), np.log(smallest) * rng.random(shape))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    found = q, k, v, beta * rng.random((B, T, N)), log_decay, rng.normal(size=(B, N, H, M))
    return [x if x is None else x.astype(np.float32) for x in found]


def layout(T, kind, seed=0):
    """(segment ids, positions) [B, T] or None: documents of any length, empty slots among them."""
    if kind == "plain":
        return None, None
    rng = np.random.default_rng(seed)
    positions = np.where(rng.random((B, T)) < 0.2, -1, 7)
    if kind == "padded":
        return None, positions
    return np.cumsum(rng.random((B, T)) < 3 / T, axis=1) - (rng.random((B, T)) < 0.1) * 99, positions


def expected(given, cotangents, segments, positions, scale=SCALE):
    """y, last state and the gradients of all six arrays, in float64, head by head over the valid tokens."""
    q, k, v, beta, log_decay, state = (x if x is None else x.astype(np.float64) for x in given)
    (_, T, N, _), H = v.shape, k.shape[-1]
    y, last, grads = (
        np.zeros(v.shape),
        np.zeros(state.shape),
        [None if x is None else np.zeros(x.shape) for x in given],
    )
    for b in range(B):
        ids = np.zeros(T) if segments is None else segments[b]
        at = np.flatnonzero((ids >= 0) & (True if positions is None else positions[b] >= 0))
        starts = np.diff(ids[at], prepend=ids[at][:1]) != 0
        for n in range(N):
            iq, ik = n * q.shape[2] // N, n * k.shape[2] // N
            log = np.zeros((T, H)) if log_decay is None else log_decay[b, :, n].reshape(T, -1) + np.zeros(H)
            row = (
                q[b, at, iq],
                k[b, at, ik],
                v[b, at, n],
                beta[b, at, n],
                np.exp(log[at]),
                state[b, n],
                starts,
            )
            y[b, at, n], last[b, n], _ = truth.forward(*row, scale)
            dq, dk, dv, dbeta, dlog, dstate = truth.backward(
                *row, cotangents[0][b, at, n], cotangents[1][b, n], scale
            )
            grads[0][b, at, iq] += dq
            grads[1][b, at, ik] += dk
            grads[2][b, at, n], grads[3][b, at, n], grads[5][b, n] = dv, dbeta, dstate
            if log_decay is not None:
                grads[4][b, at, n] = dlog if log_decay.ndim == 4 else dlog.sum(-1)
    return y, last, *grads


def cotangents_of(given, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=x.shape).astype(np.float32) for x in (given[2], given[5])]


@functools.lru_cache
def compiled(impl, chunk_size=None):
    """y, last state and gradients of all arrays, in one compiled function."""

    @jax.jit
    def run(given, cotangents, segments, positions):
        def call(q, k, v, beta, log_decay, state):
            return delta_rule(
                q, k, v, beta, log_decay=log_decay, initial_state_BNHM=state, segment_ids=segments,
                positions=positions, scale=SCALE, chunk_size=chunk_size, return_state=True, impl=impl,
            )  # fmt: skip

        out, pull = jax.vjp(call, *given)
        return *out, *pull(tuple(cotangents))

    return run


def compare(impl, chunk_size, given, kind, seed=0, tolerance=TOLERANCE):
    segments, positions = layout(given[2].shape[1], kind, seed)
    cotangents = cotangents_of(given)
    found = compiled(impl, chunk_size)(given, cotangents, segments, positions)
    correct = expected(given, cotangents, segments, positions)
    for name, x, y in zip(("y", "last", *NAMES), found, correct, strict=True):
        if y is not None:
            limit = tolerance * max(np.abs(y).max(), 1e-30)
            assert_allclose(x, y, rtol=0, atol=limit, err_msg=f"{name} {impl} {chunk_size} {kind}")


FACTORS = {
    "T": (1, 5, 50),
    "chunk_size": (None, 1, 12),
    "decay": (None, "head", "channel"),
    "kind": ("plain", "padded", "packed"),
    "heads": ((2, 1, 2), (1, 2, 4)),
}
SLOW_FACTORS = {
    "T": (2, 15, 17, 33, 64, 65, 70, 127, 130),
    "chunk_size": (3, 4, 16, 24, 50, 64, 500),
    "decay": (None, "head", "channel"),
    "kind": ("plain", "padded", "packed"),
    "heads": ((1, 1, 1), (2, 1, 2), (1, 2, 4)),
    "widths": ((1, 1), (6, 5), (4, 9), (16, 8)),
}


def _check_case(impl, T, chunk_size, decay, kind, heads, widths=(6, 5)):
    for seed, (smallest, beta) in enumerate([(1e-4, 2.0), (1 - 1e-6, 1.0)]):
        given = arrays(T, heads=heads, widths=widths, decay=decay, smallest=smallest, beta=beta, seed=seed)
        # One channel: all keys are equal or opposite, and a triangle over a long chunk is ill-conditioned.
        tolerance = TOLERANCE if widths[0] > 1 else 5 * TOLERANCE
        compare(impl, chunk_size, given, kind, seed, tolerance)


def _id(case):
    return "-".join(str(x) for x in case.values()).replace(" ", "")


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=_id)
def test_chunked_equals_float64(case):
    _check_case("chunked", **case)


@pytest.mark.parametrize(
    ("decay", "kind"),
    [
        (None, "packed"),
        ("head", "plain"),
        ("head", "packed"),
        pytest.param("channel", "plain", marks=pytest.mark.slow),
        ("channel", "packed"),
    ],
)
@pytest.mark.parametrize("impl", ["recurrent", "quadratic"])
def test_the_readable_forms_equal_float64(impl, decay, kind):
    _check_case(impl, 33, None, decay, kind, (2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise(SLOW_FACTORS), ids=_id)
def test_chunked_equals_float64_exhaustively(case):
    _check_case("chunked", **case)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1023, 1024, 1025])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_long_rows_equal_float64(T, decay):
    for impl in ("chunked", "recurrent"):
        compare(impl, None, arrays(T, decay=decay), "packed")


@pytest.mark.parametrize("decay", [pytest.param("head", marks=pytest.mark.slow), "channel"])
def test_groups_of_chunks_and_single_ones_agree(decay):
    """How many chunks are prepared at once changes nothing."""
    given = arrays(70, decay=decay)
    compare(ChunkedDeltaConfig(chunk_size=16, heads_at_once=12), None, given, "packed")


def test_the_reference_gradient_is_the_slope_of_its_forward():
    given = arrays(9, decay="channel")
    segments, positions = layout(9, "packed")
    cotangents = cotangents_of(given)
    _, _, *grads = expected(given, cotangents, segments, positions)
    rng = np.random.default_rng(5)
    for i, grad in enumerate(grads):
        direction, step, values = rng.normal(size=grad.shape), 1e-6, []
        for sign in (1, -1):
            moved = [x.astype(np.float64) for x in given]
            moved[i] = moved[i] + sign * step * direction
            y, last, *_ = expected(moved, cotangents, segments, positions)
            values.append((y * cotangents[0]).sum() + (last * cotangents[1]).sum())
        assert_allclose((grad * direction).sum(), (values[0] - values[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_gradients_in_float64(impl):
    with jax.enable_x64(True):
        given = [np.asarray(x, np.float64) for x in arrays(6, decay="channel", smallest=0.2)]

        @jax.jit
        def call(q, k, v, beta, log_decay, state):
            return delta_rule(
                q, k, v, beta, log_decay=log_decay, initial_state_BNHM=state, impl=impl, return_state=True
            )

        y, state = call(*given)
        assert y.dtype == state.dtype == jnp.float64
        check_grads(call, given, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


@each_implementation
def test_empty_slots_hold_nothing(impl):
    """NaN in them changes no bit of anything, and they take and pass on exactly 0."""
    given = arrays(33)
    segments, positions = layout(33, "packed")
    empty = (segments < 0) | (positions < 0)
    assert empty.any()
    dirty = [np.where(empty.reshape(B, 33, *[1] * (x.ndim - 2)), np.nan, x) for x in given[:5]] + [given[5]]
    run, cotangents = compiled(impl), cotangents_of(given)
    clean = run(given, cotangents, segments, positions)
    for name, x, y in zip(
        ("y", "last", *NAMES), run(dirty, cotangents, segments, positions), clean, strict=True
    ):
        assert_array_equal(x, y, err_msg=name)
        if name not in ("last", "state"):
            assert_array_equal(np.asarray(x)[empty], 0, err_msg=name)
    nowhere = run(dirty, cotangents, np.full_like(segments, -1), positions)
    assert_array_equal(nowhere[1], given[5])
    assert_array_equal(nowhere[0], 0)


@each_implementation
def test_the_future_changes_no_bit_of_the_past(impl):
    given, t = arrays(33), 10
    changed = [x.copy() for x in given]
    rng = np.random.default_rng(3)
    for x in changed[:4]:
        x[:, t + 1 :] += rng.random(x[:, t + 1 :].shape)
    changed[4][:, t + 1 :] -= 1.0
    cotangents = cotangents_of(given)
    cotangents[0][:, t + 1 :], cotangents[1][:] = 0, 0
    before, after = (compiled(impl)(x, cotangents, None, None) for x in (given, changed))
    assert_array_equal(before[0][:, : t + 1], after[0][:, : t + 1])
    for x, y in zip(before[2:7], after[2:7], strict=True):
        assert_array_equal(x[:, : t + 1], y[:, : t + 1])
        assert_array_equal(x[:, t + 1 :], 0)


@each_implementation
def test_pieces_with_the_state_carried_equal_the_whole(impl):
    """An op's document goes on through its initial state; the next piece's ids may be its own."""
    given = arrays(34, decay="channel")
    segments, _ = layout(34, "packed", seed=4)
    segments = np.abs(segments)
    step = jax.jit(
        lambda q, k, v, beta, log_decay, state, segments: delta_rule(
            q, k, v, beta, log_decay=log_decay, initial_state_BNHM=state, segment_ids=segments, impl=impl,
            return_state=True,
        )
    )  # fmt: skip
    y, last = step(*given, segments)
    state, out = given[5], []
    # Within documents, and in the middle: both pieces are one program.
    assert (segments[:, 16] == segments[:, 17]).all()
    for part in (slice(0, 17), slice(17, 34)):
        piece, state = step(*(x[:, part] for x in given[:5]), state, segments[:, part])
        out.append(piece)
    for x, whole in ((np.concatenate(out, axis=1), y), (state, last)):
        assert_allclose(x, whole, rtol=TOLERANCE, atol=TOLERANCE)


@each_implementation
def test_bfloat16_is_computed_in_float32(impl):
    given = [jnp.asarray(x, jnp.bfloat16 if i < 5 else jnp.float32) for i, x in enumerate(arrays(33))]
    exact = [x.astype(jnp.float32) for x in given]
    y, state, *grads = compiled(impl)(given, [jnp.ones_like(given[2]), jnp.ones_like(given[5])], None, None)
    true_y, true_state, *true_grads = compiled(impl)(
        exact, [jnp.ones_like(exact[2]), jnp.ones_like(exact[5])], None, None
    )
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_allclose(state, true_state, rtol=0, atol=TOLERANCE * np.abs(true_state).max())
    for x, true in ((y, true_y), *zip(grads, true_grads, strict=True)):
        assert_allclose(x.astype(jnp.float32), true, rtol=0, atol=2**-8 * np.abs(true).max())


def test_equal_keys_and_beta_2_stay_finite_and_exact():
    """Each step turns over one direction: a power series of the triangular system would lose all digits."""
    given = arrays(130, decay=None, heads=(2, 2, 2))
    given[1][:] = given[1][:, :1]
    given[3][:] = 2.0
    compare("chunked", 16, given, "plain")
    compare("chunked", 64, given, "plain", tolerance=1e-4)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_a_decay_of_zero_forgets_all(impl):
    given = arrays(33, decay="head")
    given[4][:, 20] = -np.inf
    y, state, *grads = compiled(impl)(given, cotangents_of(given), None, None)
    fresh = [x[:, 20:] for x in given[:5]] + [np.zeros_like(given[5])]
    alone, last, *_ = compiled(impl)(fresh, cotangents_of(fresh), None, None)
    assert_allclose(y[:, 20:], alone, rtol=1e-5, atol=1e-6)
    assert_allclose(state, last, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in grads)


def test_vmap_and_scan():
    given = arrays(20, decay="channel")
    many = [jnp.stack([x, 0.5 * x]) for x in given]

    def call(q, k, v, beta, log_decay, state):
        return delta_rule(
            q, k, v, beta, log_decay=log_decay, initial_state_BNHM=state, chunk_size=8, impl="chunked"
        )

    grad = jax.grad(lambda given: call(*given).sum())
    mapped = jax.jit(jax.vmap(grad))(many)
    _, scanned = jax.jit(lambda many: jax.lax.scan(lambda c, x: (c, grad(x)), 0, many))(many)
    for x, y in zip(mapped, scanned, strict=True):
        assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)


def test_explain_tells_what_runs():
    one, many = (arrays(T)[:4] for T in (1, 7))
    assert explain(*one).chosen == "recurrent"
    found = explain(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in many), return_state=True)
    assert found.chosen == "chunked" and "T = 7 > 1" in found.reasons["recurrent"]


def test_numpy_float64_is_float32_to_jax():
    """A state that a call returned fits the next call with the same arrays."""
    given = [x if x is None else x.astype(np.float64) for x in arrays(7)[:5]]
    y, state = delta_rule(*given[:4], log_decay=given[4], return_state=True)
    assert y.dtype == state.dtype == jnp.float32
    again = delta_rule(*given[:4], log_decay=given[4], initial_state_BNHM=state)
    narrow = [x.astype(np.float32) for x in given]
    assert_array_equal(again, delta_rule(*narrow[:4], log_decay=narrow[4], initial_state_BNHM=state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": [[[0.5, 0.5]]]}, r"beta must be an array \[B, T, N\], got list"),
        ({"log_decay": -0.5}, "log_decay must be an array or None, got float"),
        ({"impl": "fast"}, "unknown impl 'fast'; there are recurrent, chunked, quadratic"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
        ({"chunk_size": 8, "impl": ChunkedDeltaConfig()}, "both set the chunk: give one of them"),
        ({"scale": float("inf")}, "scale must be a finite Python number"),
        ({"q": np.zeros((B, 7, 3, 6), np.float32)}, "3 heads of q do not divide 2 heads of v"),
        ({"k": np.zeros((B, 7, 1, 5), np.float32)}, "do not fit"),
        ({"v": np.zeros((B, 7, 2, 5), np.float16)}, "differ in dtype"),
        ({"v": np.zeros((B, 7, 2), np.float32)}, r"v must be \[B, T, N, M\]"),
        ({"beta": np.zeros((B, 7, 1), np.float32)}, r"beta must be \[B, T, N\] = \(2, 7, 2\)"),
        ({"log_decay": np.zeros((B, 7, 2, 1), np.float32)}, "log_decay must be"),
        ({"log_decay": np.zeros((B, 7, 2), int)}, "log_decay must be floating point"),
        (
            {"initial_state_BNHM": np.zeros((B, 2, 5, 6), np.float32)},
            r"initial_state_BNHM must be \[B, N, H, M\]",
        ),
        ({"initial_state_BNHM": np.zeros((B, 2, 6, 5), np.float16)}, "initial_state_BNHM must be float32"),
        ({"log_decay": np.full((B, 7, 2), 0.5, np.float32)}, "log_decay must be <= 0 .*, got 0.5"),
        ({"log_decay": np.full((B, 7, 2), np.nan, np.float32)}, "log_decay must be <= 0 .*, got nan"),
        ({"segment_ids": np.zeros(6, int)}, r"segment_ids must be \[2, 7\] or \[7\]"),
        ({"positions": np.zeros(7)}, "positions must be integers"),
    ],
)
def test_bad_calls(changes, message):
    given = dict(zip(("q", "k", "v", "beta"), arrays(7), strict=False)) | changes
    with pytest.raises(ValueError, match=message) as error:
        delta_rule(*[given.pop(name) for name in ("q", "k", "v", "beta")], **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("T", "n", "decay", "kind"), [(20, 7, "channel", "packed"), (5, 5, None, "padded")])
def test_past_states_equal_float64_and_so_do_their_gradients(T, n, decay, kind):
    """The states before the last n slots are those after the slots in front of each."""
    given = arrays(T, decay=decay)
    segments, positions = layout(T, kind)
    (dy, dstate), rng = cotangents_of(given), np.random.default_rng(2)
    weights = rng.normal(size=(B, n, *dstate.shape[1:])).astype(np.float32)
    slots, ring = np.stack([rng.permutation(n) for _ in range(B)]), np.zeros_like(weights)

    @jax.jit
    def run(given):
        def call(q, k, v, beta, log_decay, state):
            y, last, full = delta_rule(
                q, k, v, beta, log_decay=log_decay, initial_state_BNHM=state, segment_ids=segments,
                positions=positions, scale=SCALE, return_state=True, past_states=(ring, slots),
            )  # fmt: skip
            return y, last, jnp.take_along_axis(full, slots[..., None, None, None], axis=1)

        out, pull = jax.vjp(call, *given)
        return out, pull((dy, dstate, weights))

    (y, last, past), found = run(given)
    right_y, right_last, *gradients = expected(given, (dy, dstate), segments, positions)
    pasts = []
    for j in range(n):
        t = T - n + j
        # Nothing of the slots from t on, but a cotangent of the state in front of them.
        before = np.where(np.arange(T) < t, 0 if positions is None else positions, -1) * np.ones((B, 1), int)
        _, S, *more = expected(given, (0 * dy, weights[:, j]), segments, before)
        pasts.append(S)
        gradients = [a if a is None else a + b for a, b in zip(gradients, more, strict=True)]
    names = ("y", "last", "past", *NAMES)
    for name, x, right in zip(
        names, (y, last, past, *found), (right_y, right_last, np.stack(pasts, 1), *gradients), strict=True
    ):
        if right is not None:
            assert_allclose(x, right, rtol=0, atol=TOLERANCE * np.abs(right).max(), err_msg=name)
