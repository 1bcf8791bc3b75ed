"""decay_scan against NumPy float64 stepping through time, in every implementation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.ops.decay_scan import ChunkedScanConfig, decay_scan, explain, quadratic
from attention_jax.ops.decay_scan.api import implementations
from tests import cases
from tests.covering import pairwise
from tests.reference import decay_scan as truth

FORWARD = ("y", "state")
GRADIENTS = ("q", "k", "v", "log_decay", "initial_state")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, in words."""

    T: int = 33
    chunk: int = 16
    decay: str = "token"  # None, "head", "token", "channel"
    strength: str = "mixed"  # "weak": 1 - 1e-6 a step, "strong": 1e-4, "mixed": from one to the other, "-inf"
    widths: tuple[int, int] = (8, 5)  # H, M
    heads: tuple[int, int, int] = (2, 2, 2)  # of q, k, v
    segments: str | None = None  # "packed"; "ragged": slots without a token before, between and after
    state: bool = True
    normalize: bool = False
    dtype: str = "float32"
    scale: float = 1.0
    batch: int = 2

    def __str__(self):
        own = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)
               if getattr(self, f.name) != f.default]  # fmt: skip
        return ",".join(own).replace(" ", "") or "default"


FACTORS_FAST = {
    "T": [1, 16, 50],
    "decay": ["channel", "token", "head", None],
    "chunk": [16, 12],
    "strength": ["mixed", "strong", "-inf"],
    "segments": [None, "packed", "ragged"],
    "heads": [(2, 2, 2), (4, 2, 2), (1, 1, 4)],
    "widths": [(8, 5), (1, 8), (24, 1)],
    "state": [True, False],
    "normalize": [False, True],
    "dtype": ["float32", "bfloat16"],
    "scale": [1.0, -0.3],
}
FACTORS_SLOW = {
    "T": [1, 2, 7, 15, 16, 17, 33, 63, 64, 65, 97, 128, 130, 1023, 1024, 1025],
    "decay": ["channel", "token", "head", None],
    "chunk": [1, 16, 48, 64],
    "strength": ["mixed", "strong", "weak", "-inf"],
    "segments": [None, "packed", "ragged"],
    "heads": [(2, 2, 2), (4, 2, 2), (1, 1, 4), (2, 1, 2), (6, 2, 3), (3, 1, 3)],
    "widths": [(8, 5), (1, 64), (24, 24), (64, 1), (64, 64)],
    "state": [True, False],
    "normalize": [False, True],
    "dtype": ["float32", "bfloat16", "float16"],
    "scale": [1.0, -0.3],
    "batch": [1, 2],
}


@dataclasses.dataclass
class Problem:
    """Arrays of a case: `learned` has gradients; the rest is NumPy."""

    learned: dict[str, np.ndarray]
    fixed: dict[str, Any]
    valid: np.ndarray  # [B, T]
    dy: np.ndarray
    dstate: np.ndarray


def log_decays(case, rng, shape):
    """Log decays of the case's strength, of any shape."""
    low, high = np.log(1e-4), np.log1p(-1e-6)
    size = {
        "weak": np.full(shape, high),
        "strong": np.full(shape, low),
        # Log-uniform, so that steps of every size stand side by side.
        "mixed": -np.exp(rng.uniform(np.log(-high), np.log(-low), shape)),
        "-inf": np.where(rng.random(shape) < 0.2, -np.inf, -rng.random(shape)),
    }[case.strength]
    return size.astype(np.float32)


def documents(case, rng):
    """segment_ids and positions, [B, T] or None."""
    shape = (case.batch, case.T)
    if case.segments is None:
        return None, None
    segments = np.sort(rng.integers(0, 1 + case.T // 6, shape))
    # Ids need not grow: every other document has a smaller one.
    segments = np.where(segments % 2, segments, 1000 - segments)
    positions = np.arange(case.T) * np.ones(shape, int)
    if case.segments == "ragged":
        positions = np.where(rng.random(shape) < 0.3, -1, positions)
        segments = np.where(np.arange(case.T) < case.T // 8, -1, segments)
        positions[-1, case.T - case.T // 5 :] = -1
    return segments, positions


def make(case: Case, seed: int = 0) -> Problem:
    rng = np.random.default_rng([seed, case.T])
    B, T, N, (H, M), dtype = case.batch, case.T, max(case.heads), case.widths, jnp.dtype(case.dtype)
    shapes = [(B, T, n, w) for n, w in zip(case.heads, (H, H, M), strict=True)]
    q, k, v = (rng.standard_normal(shape) / max(1, shape[-1]) ** 0.25 for shape in shapes)
    state = rng.standard_normal((B, N, H, M + case.normalize))
    if case.normalize:
        q, k, state[..., -1] = np.abs(q), np.abs(k), np.abs(state[..., -1])
    learned = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
    if case.decay is not None:
        shape = {"head": (N,), "token": (B, T, N), "channel": (B, T, N, H)}[case.decay]
        learned["log_decay"] = log_decays(case, rng, shape)
    if case.state:
        learned["initial_state"] = state.astype(np.float32)
    segments, positions = documents(case, rng)
    valid = np.ones((B, T), bool) if segments is None else (segments >= 0) & (positions >= 0)
    fixed = {"segment_ids": segments, "positions": positions, "normalize": case.normalize,
             "scale": case.scale, "chunk_size": case.chunk, "return_state": True}  # fmt: skip
    dy = rng.standard_normal((B, T, N, M)).astype(dtype)
    return Problem(learned, fixed, valid, dy, rng.standard_normal(state.shape).astype(np.float32))


def scan(learned, fixed, impl):
    return decay_scan(
        learned["q"], learned["k"], learned["v"], log_decay=learned.get("log_decay"),
        initial_state_BNHM=learned.get("initial_state"), impl=impl, **fixed,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scanned(learned, ids, options, impl):
    return scan(learned, ids | dict(options), impl)


def scanned(learned, fixed, impl):
    """`scan` as one program, the same for all ids."""
    ids = {name: fixed[name] for name in ("segment_ids", "positions")}
    return _scanned(learned, ids, tuple((n, x) for n, x in fixed.items() if n not in ids), impl)


def compiled(problem: Problem, impl: str | None):
    """A program of (learned, dy, dstate) that returns results and gradients by name."""

    @jax.jit
    def run(learned, dy, dstate):
        out, pull = jax.vjp(lambda x: scan(x, problem.fixed, impl), learned)
        return dict(zip(FORWARD, out, strict=True)) | {f"d{n}": x for n, x in pull((dy, dstate))[0].items()}

    return lambda *args: {name: np.asarray(x) for name, x in run(*args).items()}


def expected(problem: Problem, dtype=np.float64, absolute: bool = False) -> dict[str, np.ndarray]:
    """What `compiled` must return; absolute: how large what it sums is."""
    size = np.abs if absolute else lambda x: x
    x, rows = {n: x if n == "log_decay" else size(x) for n, x in problem.learned.items()}, []
    B, T = problem.valid.shape
    N = max(x[name].shape[2] for name in "qkv")
    H, M = x["k"].shape[3], x["v"].shape[3] + problem.fixed["normalize"]
    full = {name: np.repeat(x[name], N // x[name].shape[2], axis=2) for name in "qkv"}
    g = x.get("log_decay")
    if g is not None:
        g = np.broadcast_to(g[..., None] if g.ndim < 4 else g, (B, T, N, H))
    state = x.get("initial_state", np.zeros((B, N, H, M)))
    for b in range(B):
        tokens = [int(t) for t in np.flatnonzero(problem.valid[b])]
        segments = problem.fixed["segment_ids"]
        row = truth.Row(
            *(full[name][b] for name in "qkv"), None if g is None else g[b], state[b], tokens,
            truth.runs(tokens, None if segments is None else segments[b]),
            size(problem.fixed["scale"]), problem.fixed["normalize"], dtype,
        )  # fmt: skip
        cotangents = row.backward(size(problem.dy[b]), size(problem.dstate[b]), 1 if absolute else -1)
        rows.append((row.y, row.final, *cotangents))
    found = dict(
        zip((*FORWARD, *(f"d{n}" for n in GRADIENTS)), map(np.stack, zip(*rows, strict=True)), strict=True)
    )
    for name in "qkv":
        d = found[f"d{name}"]
        found[f"d{name}"] = d.reshape(B, T, x[name].shape[2], -1, d.shape[-1]).sum(3)
    if "log_decay" in x and x["log_decay"].ndim < 4:
        found["dlog_decay"] = found["dlog_decay"].sum((0, 1, 3) if x["log_decay"].ndim == 1 else 3)
    return {n: found[n] for n in (*FORWARD, *(f"d{n}" for n in x))}


def planted(problem: Problem, fill: float) -> dict[str, np.ndarray]:
    """The learned arrays with `fill` in every slot that holds no token."""
    B, T = problem.valid.shape
    empty = ~problem.valid

    def plant(name, x):
        if name == "initial_state" or x.ndim == 1:
            return x
        return np.where(empty.reshape(B, T, *(1,) * (x.ndim - 2)), np.asarray(fill, x.dtype), x)

    return {name: plant(name, x) for name, x in problem.learned.items()}


def assert_close(found, problem, case, impl):
    """1e-5 of the largest; the rule of tests.cases for narrow dtypes and a step per token over many tokens.

    It multiplies with a rounded exp(g) each time, which at 1 - 1e-6 adds up to more than 1e-5 in 1000 steps.
    """
    right = expected(problem)
    naive = expected(problem, np.float32)
    # A quotient's gradients cancel, at H = 1 to nothing.
    sizes = expected(problem, absolute=True) if case.normalize else right
    for name, x in found.items():
        # The state and its gradient are float32 and so is the log decay, whatever q, k and v are; gradients
        # and outputs of these are rounded to their dtype.
        dtype = jnp.dtype(case.dtype) if name in ("y", "dq", "dk", "dv") else jnp.float32
        assert x.dtype == dtype, name
        size, error = cases.largest(sizes[name]), cases.largest(x.astype(np.float64) - right[name])
        assert np.isfinite(x).all(), name
        allowed = 1e-5 * size
        if impl == "recurrent" or case.chunk == 1:
            allowed = max(allowed, 2 * cases.largest(naive[name] - right[name]))
        if dtype != jnp.float32:
            rounded = naive[name].astype(dtype).astype(np.float64)
            allowed = cases.tolerance(cases.largest(rounded - right[name]), dtype, size)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}"


def check(case: Case, *impls: str):
    """Implementations against the truth; what empty slots hold and what comes later change no bit."""
    problem = make(case)
    for impl in impls:
        run = compiled(problem, impl)
        found = run(planted(problem, np.nan), problem.dy, problem.dstate)
        assert_close(found, problem, case, impl)
        assert_array_equal(found["y"][~problem.valid], 0)
        for name in "qkv":
            assert_array_equal(found[f"d{name}"][~problem.valid], 0)
        if not problem.valid.all():
            other = run(planted(problem, -3.0), problem.dy, problem.dstate)
            for name, x in found.items():
                assert_array_equal(x, other[name], err_msg=name)
        if case.T > 2:
            t = 2 * case.T // 3
            later = {
                n: x if n == "initial_state" or x.ndim == 1
                else np.concatenate([x[:, :t], (x[:, t:] * 1e3).astype(x.dtype)], 1)
                for n, x in planted(problem, np.nan).items()
            }  # fmt: skip
            dy = np.where(np.arange(case.T)[:, None, None] < t, problem.dy, 0).astype(problem.dy.dtype)
            after = run(later, dy, 0 * problem.dstate)
            assert_array_equal(after["y"][:, :t], found["y"][:, :t])
            for name in set(GRADIENTS[:4]) & set(problem.learned):
                if problem.learned[name].ndim > 1:
                    assert_array_equal(after[f"d{name}"][:, t:], 0)


FAST = [Case(**row) for row in pairwise(FACTORS_FAST, seed=1)]  # of the first seeds the fewest rows
SLOW = [Case(**row) for row in pairwise(FACTORS_SLOW)]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_chunked_against_the_recurrence_in_float64(case):
    check(case, "chunked")


@pytest.mark.parametrize("impl", ["recurrent", "quadratic"])
@pytest.mark.parametrize("case", FAST[::2], ids=str)
def test_the_readable_forms_against_the_recurrence_in_float64(case, impl):
    check(case, impl)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST[1::2] + SLOW, ids=str)
def test_against_the_recurrence_in_float64_slow(case):
    # Dense weights per channel of a thousand tokens would be gigabytes.
    short = case.T <= 130 or case.decay != "channel"
    check(case, *implementations()[: 3 if short else 2])


def test_the_readable_forms_meet_every_value_of_every_factor():
    for name, values in FACTORS_FAST.items():
        assert {repr(getattr(case, name)) for case in FAST[::2]} == set(map(repr, values)), name


def small(**changes):
    """(case, problem) of no segments, float32."""
    case = Case(**changes)
    return case, make(case)


@pytest.mark.parametrize(
    "decay", ["head", "channel", *(pytest.param(x, marks=pytest.mark.slow) for x in (None, "token"))]
)
def test_pieces_with_the_state_carried_are_the_whole(decay):
    case, problem = small(T=40, decay=decay, segments="ragged", normalize=True)
    state, pieces = problem.learned["initial_state"], []
    segments = np.where(problem.valid, 0, -1)
    whole, last = scanned(problem.learned, problem.fixed | {"segment_ids": segments}, "chunked")
    for a, b, impl in ((0, 17, "chunked"), (17, 18, "recurrent"), (18, 40, "quadratic")):
        piece = {
            n: x if n == "initial_state" or x.ndim == 1 else x[:, a:b] for n, x in problem.learned.items()
        }
        fixed = problem.fixed | {"segment_ids": segments[:, a:b], "positions": None}
        y, state = scanned(piece | {"initial_state": state}, fixed, impl)
        pieces.append(y)
    assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert_allclose(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", implementations())
def test_empty_slots_leave_the_state_bit_for_bit(impl):
    case, problem = small(T=20, decay="channel")
    empty = {n: x if n == "initial_state" else np.full_like(x, np.nan) for n, x in problem.learned.items()}
    y, state = scanned(empty, problem.fixed | {"positions": np.full(20, -1)}, impl)
    assert_array_equal(state, problem.learned["initial_state"])
    assert_array_equal(y, 0)
    # Neither do they say which document the initial state is of.
    segments = np.where(np.arange(20) < 5, -1, 7)
    some = {n: x if n == "initial_state" else x[:, 5:] for n, x in problem.learned.items()}
    found = scanned(problem.learned, problem.fixed | {"segment_ids": segments}, impl)
    right = scanned(some, problem.fixed, impl)
    assert_allclose(found[0][:, 5:], right[0], rtol=1e-5, atol=1e-5)
    assert_allclose(found[1], right[1], rtol=1e-5, atol=1e-5)


def test_a_hidden_token_may_overflow():
    """Products with later tokens, infinite or not, are never used."""
    case, problem = small(T=16, decay="token", strength="weak")
    for impl in ("chunked", "recurrent"):
        run = compiled(problem, impl)
        before = run(problem.learned, problem.dy, problem.dstate)
        huge = {n: x.copy() for n, x in problem.learned.items()}
        huge["q"][:, :8], huge["k"][:, 12:] = huge["q"][:, :8] * 1e20, 1e30
        huge["q"][:, 8:] = 0
        after = run(huge, np.where(np.arange(16)[:, None, None] < 8, problem.dy, 0), problem.dstate * 0)
        assert_allclose(after["y"][:, :8], before["y"][:, :8] * 1e20, rtol=1e-4, atol=1e15)
        assert all(np.isfinite(x).all() for x in after.values())


@pytest.mark.parametrize("decay", [pytest.param("token", marks=pytest.mark.slow), "channel"])
def test_vmap_and_scan_over_the_op(decay):
    case, problem = small(T=12, chunk=5, decay=decay, segments="packed")
    fixed = problem.fixed | {"segment_ids": None, "positions": None}

    def loss(learned, impl):
        y, state = scan(learned, fixed, impl)
        return (y * y).sum() + (state * state).sum()

    def grad(learned, impl):
        return jax.grad(loss)(learned, impl)

    stacked = jax.tree.map(lambda x: np.stack([x, x * np.float32(0.5)]), problem.learned)
    mapped = jax.jit(jax.vmap(functools.partial(grad, impl="chunked")))(stacked)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, grad(x, "chunked")), 0, xs)[1])(stacked)
    alone = jax.jit(functools.partial(grad, impl="recurrent"))(jax.tree.map(lambda x: x[1], stacked))
    for name, right in alone.items():
        size = float(jnp.abs(right).max())
        assert_allclose(mapped[name][1], right, atol=1e-5 * size, rtol=0)
        assert_allclose(scanned[name][1], right, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_gradients_in_float64(impl):
    case, problem = small(T=7, chunk=3, decay="channel", strength="-inf", widths=(3, 2), segments="packed")
    problem.learned["log_decay"] = np.maximum(problem.learned["log_decay"], -3)
    with jax.enable_x64(True):
        learned = {n: jnp.asarray(x, jnp.float64) for n, x in problem.learned.items()}
        check_grads(jax.jit(lambda x: scan(x, problem.fixed, impl)), (learned,), order=1, modes=["rev"])


def test_explain_and_the_choice():
    case, problem = small(T=1, decay="token")
    x = problem.learned
    assert explain(x["q"], x["k"], x["v"]).chosen == "recurrent"
    wide = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    why = explain(wide, wide, wide, log_decay=wide)
    assert why.chosen == "chunked" and "T = 4096" in str(why)
    assert explain(wide, wide, wide).reasons["quadratic"] == "O(T^2)"
    with pytest.raises(NotImplementedError, match="'quadratic' cannot run this call: the weights"):
        explain(wide, wide, wide, log_decay=wide, impl="quadratic")
    assert quadratic._MOST_ELEMENTS < 4096**2 * 64 * 8


ONES = np.ones((2, 6, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": ONES[0]}, r"q must be \[B, T, N, H\] without empty axes, got \(6, 4, 3\)"),
        ({"k": ONES.astype(int)}, "k must be floating point, got int"),
        ({"v": [1.0]}, "v must be an array"),
        ({"k": ONES[:, :5]}, r"do not fit \[B,T,N,H\]"),
        ({"k": ONES[:, :, :3]}, r"heads of q, k, v must divide the largest of them, got \[4, 3, 4\]"),
        ({"log_decay": ONES[:, :, :3, 0]}, r"log_decay must be \[N\].*got \(2, 6, 3\)"),
        ({"log_decay": ONES[0, 0, 0, :2] > 0}, "log_decay must be floating point, got bool"),
        ({"log_decay": ONES[0, 0, :, 0]}, "log_decay must be <= 0 .*, got 1.0"),
        ({"log_decay": -ONES * np.nan}, "log_decay must be <= 0 .*, got nan"),
        ({"log_decay": 0.5}, "log_decay must be an array or None, got float"),
        ({"initial_state_BNHM": ONES}, r"initial_state_BNHM must be \[2, 4, 3, 3\], got \(2, 6, 4, 3\)"),
        ({"initial_state_BNHM": ONES[:, :4], "normalize": True}, r"\[2, 4, 3, 4\] \(its last column is z"),
        ({"initial_state_BNHM": jnp.ones((2, 4, 3, 3), jnp.bfloat16)}, "must be float32, got bfloat16"),
        ({"segment_ids": np.zeros((2, 5), int)}, r"segment_ids must be \[2, 6\] or \[6\]"),
        ({"positions": np.zeros(6)}, "positions must be integers, got float64"),
        ({"normalize": 1}, "normalize must be True or False, got 1"),
        ({"scale": jnp.ones(())}, "scale must be a finite Python number"),
        ({"scale": np.inf}, "scale must be a finite Python number"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
        ({"chunk_size": 8, "impl": ChunkedScanConfig()}, "both set the chunk: give one of them"),
        ({"impl": "fast"}, "unknown impl 'fast'; there are recurrent, chunked, quadratic"),
    ],
)  # fmt: skip
def test_errors(changes, message):
    arguments = {"q": ONES, "k": ONES, "v": ONES} | changes
    arrays = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message) as caught:
        decay_scan(*arrays, **arguments)
    assert "\n" not in str(caught.value)


def test_ids_of_any_integer_type():
    """Ids of unsigned types are ids; those that int32 would take for an empty slot are refused."""
    right = decay_scan(ONES, ONES, ONES, segment_ids=np.array([1, 1, 1, 7, 7, 7]))
    for dtype in (np.uint8, np.uint32, np.uint64, np.int64):
        found = decay_scan(ONES, ONES, ONES, segment_ids=np.array([1, 1, 1, 7, 7, 7], dtype))
        assert_array_equal(found, right)
    lowest = np.array([-(2**31), 0, 1, 2, 3, 4], np.int32)
    assert_array_equal(decay_scan(ONES, ONES, ONES, positions=lowest)[:, 0], 0)
    for ids in (np.array([0, 0, 0, 1, 1, 2**31]), jnp.full(6, 3_000_000_000, jnp.uint32)):
        with pytest.raises(ValueError, match="segment_ids must fit int32, got"):
            decay_scan(ONES, ONES, ONES, segment_ids=ids)


def test_a_log_decay_is_not_read_in_empty_slots():
    log_decay = -ONES[..., 0].copy()
    log_decay[:, 2] = np.inf
    positions = np.array([0, 1, -1, 2, 3, 4])
    y = decay_scan(ONES, ONES, ONES, log_decay=log_decay, positions=positions)
    log_decay[:, 2] = 0
    assert_array_equal(y, decay_scan(ONES, ONES, ONES, log_decay=log_decay, positions=positions))


@pytest.mark.parametrize(
    ("case", "n"),
    [
        (Case(T=20, segments="ragged", decay="channel"), 7),
        (Case(T=5, normalize=True, segments="ragged", heads=(4, 2, 2)), 5),
        (Case(T=1, decay="head"), 1),
    ],
    ids=str,
)
def test_past_states_equal_float64_and_so_do_their_gradients(case, n):
    """The states before the last n slots are those after the slots in front of each."""
    problem = make(case)
    (B, T), R, rng = problem.valid.shape, n + 2, np.random.default_rng(2)
    slots = np.stack([rng.permutation(R)[:n] for _ in range(B)])
    weights = rng.standard_normal((B, n, *problem.dstate.shape[1:])).astype(np.float32)
    ring = np.full((B, R, *problem.dstate.shape[1:]), np.nan, np.float32)
    dropped = np.where((np.arange(B) == 0)[:, None] & (np.arange(n) == 0), R + 3, slots)
    kept = np.flatnonzero(dropped[0] < R)

    @jax.jit
    def run(learned):
        def call(learned):
            y, state, full = scan(learned, problem.fixed | {"past_states": (ring, dropped)}, None)
            return y, state, jnp.take_along_axis(full, slots[..., None, None, None], axis=1), full

        out, pull = jax.vjp(call, learned)
        return out, pull((problem.dy, problem.dstate, weights, jnp.zeros_like(ring)))[0]

    (y, state, past, full), gradients = run(planted(problem, np.nan))
    assert np.isnan(full).all((2, 3, 4)).sum() == 2 * B + 1, "places that hold no state are as they were"
    right = expected(problem)
    for j in range(n):
        shorter = dataclasses.replace(
            problem, valid=problem.valid & (np.arange(T) < T - n + j), dy=0 * problem.dy,
            dstate=np.where(dropped[:, j, None, None, None] < R, weights[:, j], 0),
        )  # fmt: skip
        before = expected(shorter)
        rows = slice(0 if j in kept else 1, None)
        size = cases.largest(before["state"])
        assert_allclose(past[rows, j], before["state"][rows], rtol=0, atol=1e-5 * size)
        right = {name: x + before[name] if name[0] == "d" else x for name, x in right.items()}
    found = {"y": y, "state": state} | {f"d{name}": x for name, x in gradients.items()}
    for name in found:
        assert_allclose(
            found[name], right[name], rtol=0, atol=1e-5 * cases.largest(right[name]), err_msg=name
        )


def test_past_states_that_do_not_fit():
    problem = make(Case(T=4))
    good = (jnp.zeros((2, 3, 2, 8, 5)), jnp.zeros((2, 2), jnp.int32))
    for past, options, message in [
        (3, {}, r"past_states must be a pair of arrays \(ring_BRNHM, slot_Bn\), got 3"),
        (good, {"return_state": False}, "past_states needs return_state=True"),
        ((good[0][:, :, :1], good[1]), {}, r"ring must be float32 .* got float32 \[2, 3, 1, 8, 5\]"),
        ((good[0].astype(jnp.bfloat16), good[1]), {}, "ring must be float32 .* got bfloat16"),
        ((good[0], jnp.zeros((2, 5), int)), {}, r"1 <= n <= T = 4, got int32 \[2, 5\]"),
        ((good[0], jnp.zeros((2, 2))), {}, r"slots must be integers .* got float32"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            scan(problem.learned, problem.fixed | {"past_states": past} | options, None)
    for n, chosen in ((4, "recurrent"), (1, "chunked")):
        told = explain(
            *(problem.learned[x] for x in "qkv"),
            return_state=True,
            past_states=(good[0], np.zeros((2, n), int)),
        )
        assert told.chosen == chosen
    calls = functools.partial(scan, fixed=problem.fixed | {"past_states": (good[0], np.zeros((2, 1), int))})
    with pytest.raises(NotImplementedError, match="impl='chunked' of decay_scan has no forward-mode"):
        jax.jvp(lambda learned: calls(learned, impl="chunked"), (problem.learned,), (problem.learned,))
