"""Sums over long rows: every mechanism with running sums or products, against NumPy float64.

A decay between two tokens must not lose accuracy because the row is long, because its gates are strong, or
because another document stands in front. Errors are at most max(2x those of the recurrence in float32, taken
step by step, 4 eps max|v|). 1,024 tokens here, 65,536 among the slow tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attention_jax.biases import ALiBi
from attention_jax.feature_maps import cos_reweighted
from attention_jax.masks import Causal
from attention_jax.mixers import Context, ForgettingAttentionConfig
from attention_jax.ops import two_float
from attention_jax.ops.decay_scan import decay_scan
from attention_jax.ops.delta_rule import delta_rule
from attention_jax.positions import XPos
from tests.reference import decay_scan as truth_scan
from tests.reference import delta_rule as truth_delta

LENGTHS = [1024, pytest.param(65536, marks=pytest.mark.slow)]
EPS = float(np.finfo(np.float32).eps)
LAST = 100  # tokens of the last document of a packed row
D, N = 8, 2


def gates(kind, shape, rng):
    """Log decays <= 0, float32."""
    if kind == "mild":
        g = -1e-4 * rng.exponential(size=shape)
    elif kind == "half":
        g = np.full(shape, np.log(0.5))
    elif kind == "strong":
        g = -20 * rng.exponential(size=shape)
    else:
        g = np.where(rng.random(shape) < 0.01, -30.0, -1e-5)
    return g.astype(np.float32)


KINDS = ("mild", "half", "strong", "rare")


def documents(T):
    """Segment ids [T]: three documents, the last of `LAST` tokens."""
    return ((np.arange(T) >= T // 3).astype(np.int32) + (np.arange(T) >= T - LAST)).astype(np.int32)


def rounded(x):
    return np.asarray(x, np.float32).astype(np.float64)


# ---- pairs of floats


sums = jax.jit(two_float.running_sum)


def exact(total):
    return np.asarray(total.high, np.float64) + np.asarray(total.low, np.float64)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_sum_holds_46_bits(kind, T):
    x = gates(kind, (1, T, N), np.random.default_rng(0))
    starts = (np.diff(documents(T), prepend=0) > 0)[None]
    before = two_float.TwoFloat(np.full((1, N), -3e5, np.float32), np.full((1, N), 1e-2, np.float32))
    total = sums(x, starts, before)
    wanted = np.zeros((1, T, N))
    for first, end in ((0, T // 3), (T // 3, T - LAST), (T - LAST, T)):
        wanted[:, first:end] = np.cumsum(x[:, first:end].astype(np.longdouble), axis=1)
    wanted[:, : T // 3] += exact(before)[:, None]
    assert np.abs(exact(total) - wanted).max() <= 2.0**-44 * np.abs(wanted).max()
    assert_array_equal(total.high, rounded(exact(total)))  # the high word is the sum, rounded
    # The same numbers in another place, behind others or behind zeros: the same bits.
    moved = np.concatenate([np.zeros_like(x[:, :7]), x[:, : T - 7]], axis=1)
    shifted = sums(moved, np.zeros((1, T), bool), two_float.zeros((1, N)))
    plain = sums(x, np.zeros((1, T), bool), two_float.zeros((1, N)))
    for one, other in zip(shifted, plain, strict=True):
        assert_array_equal(one[:, 7:], other[:, : T - 7])
    other = sums(np.roll(x, -(T - LAST), axis=1), np.zeros((1, T), bool), two_float.zeros((1, N)))
    for one, alone in zip(total, other, strict=True):
        assert_array_equal(one[:, T - LAST :], alone[:, :LAST])


def test_the_gradient_of_a_running_sum_is_the_sum_behind():
    x, w = np.random.default_rng(1).standard_normal((2, 1, 300, N), np.float32)
    starts = (documents(300) != np.roll(documents(300), 1))[None]

    def loss(x, before):
        total = two_float.running_sum(x, starts, two_float.TwoFloat(before, jnp.zeros((1, N))))
        return (total.high * w).sum()

    dx, dbefore = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.zeros((1, N)))
    wanted = np.concatenate(
        [w[:, a:b][:, ::-1].cumsum(1, np.float64)[:, ::-1] for a, b in ((0, 100), (100, 200), (200, 300))], 1
    )
    assert np.abs(dx - wanted).max() <= 8 * EPS * np.abs(wanted).max()
    assert_array_equal(dbefore, 0)  # the first token starts a document here


# ---- forgetting attention


class Forgetting:
    """A mixer with gates as x gives them, and its outputs at some tokens in float64."""

    def __init__(self):
        config = ForgettingAttentionConfig(num_heads=N, mask=Causal())
        mixer = config.build(D, nnx.Rngs(0), causal=True)
        self.graphdef, params = nnx.split(mixer)
        self.params = nnx.to_pure_dict(params)
        self.call = jax.jit(self.run)

    def run(self, params, x, state, ctx):
        return nnx.merge(self.graphdef, params).mix(x, state, ctx=ctx)[:2]

    def with_gates(self, kind):
        """Parameters whose gates are mild, ...: by a bias and a factor of x."""
        options = {"mild": (9.0, 0.1), "half": (0.0, 0.0), "strong": (-8.0, 8.0), "rare": (12.0, 8.0)}
        bias, factor = options[kind]
        gate = {"bias": jnp.full(N, bias), "kernel": factor * self.params["gate"]["kernel"]}
        return self.params | {"gate": gate}

    def truth(self, params, x, tokens):
        """y [tokens, D] of one document x [T, D]."""
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        q, k, v, z = (x.astype(np.float64) @ params[name]["kernel"] for name in ("q", "k", "v", "gate"))
        q, k, v = (a.reshape(len(x), N, -1) for a in (q, k, v))
        c = np.cumsum(-np.logaddexp(0, -(z + params["gate"]["bias"])), 0, np.longdouble)
        out = np.zeros((len(tokens), N, v.shape[-1]))
        for i, t in enumerate(tokens):
            scores = np.einsum("nh,snh->sn", q[t], k[: t + 1]) / np.sqrt(q.shape[-1])
            scores += (c[t] - c[: t + 1]).astype(np.float64)
            w = np.exp(scores - scores.max(0))
            out[i] = np.einsum("sn,snm->nm", w / w.sum(0), v[: t + 1])
        return out.reshape(len(tokens), -1) @ params["out"]["kernel"], np.abs(v).max()


@pytest.fixture(scope="module")
def forgetting():
    return Forgetting()


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_is_exact_in_long_rows(kind, T, forgetting):
    """At the end of a row, and in its last document, with others in front or padding in their place."""
    params = forgetting.with_gates(kind)
    x = np.random.default_rng(2).standard_normal((1, T, D)).astype(np.float32)
    ids = documents(T)[None]
    positions = np.concatenate([np.arange(np.sum(ids == i)) for i in range(3)])[None]

    def run(x, segments, positions):
        ctx = Context(segment_ids_BT=segments.astype(np.int32), positions_BT=positions.astype(np.int32))
        return np.asarray(forgetting.call(params, x, None, ctx)[0])[0]

    tokens = np.unique(np.linspace(0, T - 1, 24).astype(int))
    wanted, largest = forgetting.truth(params, x[0], tokens)
    # Twice that of the op alone, for the projections before and after it.
    allowed = 8 * EPS * max(largest, np.abs(wanted).max())
    y = run(x, 0 * ids, np.arange(T)[None])
    assert np.abs(y[tokens] - wanted).max() <= allowed
    packed = run(x, ids, positions)
    wanted, _ = forgetting.truth(params, x[0, T - LAST :], np.arange(LAST))
    assert np.abs(packed[T - LAST :] - wanted).max() <= allowed
    others = np.where(ids[..., None] < 2, 3 * x, x)
    assert_array_equal(run(others, ids, positions)[T - LAST :], packed[T - LAST :])
    padding = np.where(ids < 2, -1, positions)
    padded = run(np.where(ids[..., None] < 2, np.nan, x), 0 * ids, padding)
    assert np.abs(padded[T - LAST :] - packed[T - LAST :]).max() <= allowed
    assert_array_equal(padded[: T - LAST], 0)


def test_forgetting_decodes_as_exactly(forgetting):
    """A prefill of strong gates, then pieces: as the row in one call, where a float32 sum errs by 1e-3."""
    T, rest = 1024, 8
    params = forgetting.with_gates("strong")
    x = np.random.default_rng(3).standard_normal((1, T, D)).astype(np.float32)
    state = ForgettingAttentionConfig(num_heads=N, mask=Causal()).init_state(D, 1, T)
    found = []
    for start, end in ((0, T - rest), *((t, t + 1) for t in range(T - rest, T))):
        y, state = forgetting.call(
            params, x[:, start:end], state, Context(positions_BT=np.arange(start, end, dtype=np.int32)[None])
        )
        found.append(np.asarray(y)[0])
    found = np.concatenate(found)
    tokens = np.arange(T - 32, T)
    wanted, largest = forgetting.truth(params, x[0], tokens)
    assert np.abs(found[tokens] - wanted).max() <= 8 * EPS * max(largest, np.abs(wanted).max())


def test_documents_with_one_id_have_gates_of_their_own(forgetting):
    """Ids 0, 1, 0: the third document does not go on from the first, as in the recurrent mixers."""
    T = 48
    params = forgetting.with_gates("half")
    x = np.random.default_rng(4).standard_normal((1, T, D)).astype(np.float32)
    positions = np.tile(np.arange(16, dtype=np.int32), 3)[None]

    def run(*ids):
        ctx = Context(segment_ids_BT=np.repeat(np.array([ids], np.int32), 16, axis=1), positions_BT=positions)
        return np.asarray(forgetting.call(params, x, None, ctx)[0])

    assert_array_equal(run(0, 1, 0), run(0, 1, 2))


# ---- recurrences


def check(name, found, wanted, naive, largest):
    error = np.abs(np.asarray(found, np.float64) - wanted).max()
    allowed = max(2 * np.abs(naive - wanted).max(), 4 * EPS * largest)
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


scan = jax.jit(decay_scan, static_argnames=("normalize", "impl", "chunk_size"))
delta = jax.jit(delta_rule, static_argnames=("impl", "chunk_size"))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("normalize", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_decay_scan_is_exact_in_long_rows(decay, normalize, T):
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, 1, T, N, D)).astype(np.float32)
    q, k = (np.abs(q), np.abs(k)) if normalize else (q, k)
    ids = documents(T)
    for kind in KINDS:
        shape = {"constant": (N,), "head": (1, T, N), "channel": (1, T, N, D)}[decay]
        g = gates(kind, shape, rng)
        full = np.broadcast_to(g if decay == "channel" else g[..., None], (1, T, N, D))
        for segments in (np.zeros_like(ids), ids):
            rows = (q[0], k[0], v[0], full[0], np.zeros((N, D, D + normalize)), range(T))
            resets = truth_scan.runs(list(range(T)), segments)
            wanted, naive = (
                truth_scan.Row(*rows, resets, normalize=normalize, dtype=dtype).y
                for dtype in (np.float64, np.float32)
            )
            found = scan(q, k, v, log_decay=g, segment_ids=segments, normalize=normalize)
            check(f"{kind} {segments.max() + 1} documents", found[0], wanted, naive, np.abs(v).max())


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_delta_rule_is_exact_in_long_rows(decay, T):
    rng = np.random.default_rng(6)
    q, k, v = rng.standard_normal((3, T, D)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.random(T).astype(np.float32)
    ids = documents(T)
    starts = np.diff(ids, prepend=0) > 0
    for kind in KINDS:
        g = gates(kind, (T, D) if decay == "channel" else (T, 1), rng)
        a = np.broadcast_to(np.exp(g.astype(np.float64)), (T, D))
        wanted, *_ = truth_delta.forward(q, k, v, beta, a, np.zeros((D, D)), starts)
        naive = float32_delta(q, k, v, beta, a.astype(np.float32), starts)
        log_decay = g[None, :, None] if decay == "channel" else g[None]
        arrays = (q[None, :, None], k[None, :, None], v[None, :, None], beta[None, :, None])
        found = delta(*arrays, log_decay=log_decay, segment_ids=ids)
        check(kind, found[0, :, 0], wanted, naive, np.abs(v).max())


def float32_delta(q, k, v, beta, a, starts):
    S, y = np.zeros((D, D), np.float32), np.zeros(v.shape, np.float32)
    for t in range(len(q)):
        S = a[t][:, None] * (0 * S if starts[t] else S)
        S = S + beta[t] * np.outer(k[t], v[t] - S.T @ k[t])
        y[t] = S.T @ q[t]
    return y


def test_a_chunk_of_any_length_keeps_small_decays_beside_large_ones():
    """Sums in a chunk of 2,048 tokens; the default is 64."""
    T = 2048
    rng = np.random.default_rng(7)
    g = np.where(np.arange(T) < T // 2, np.log(0.5), -1e-6 * rng.exponential(size=T)).astype(np.float32)
    ones, one = np.ones((1, T, 1, 1), np.float32), np.zeros((1, T, 1, 1), np.float32)
    one[:, T // 2 + 5] = 1  # the output is its decay
    found = np.asarray(decay_scan(ones, ones, one, log_decay=g[None, :, None], chunk_size=T))[0, :, 0, 0]
    behind = np.arange(T) > T // 2 + 5
    wanted = np.exp(np.cumsum(np.where(behind, g, 0.0), dtype=np.float64)) * (np.arange(T) >= T // 2 + 5)
    assert np.abs(found - wanted).max() <= 4 * EPS


# ---- positions


@pytest.mark.parametrize("scale_base", [64.0, 512.0, 4096.0])
def test_xpos_factors_cancel_as_far_as_it_reaches(scale_base):
    xpos, width = XPos(scale_base), 32
    reach = xpos.reach(np.float32)
    at = np.unique(np.linspace(0, reach, 2000).astype(np.int32))[None]
    zeta = (np.arange(0, width, 2) / width + 0.4) / 1.4
    wanted = np.exp(at[0][:, None] * np.log(zeta) / scale_base)
    gain = np.asarray(xpos.gain(at, width, jnp.float32), np.float64)[0]
    assert np.abs(gain / wanted - 1).max() <= 4 * EPS


def test_alibi_and_cosformer_are_exact_at_65536_positions():
    at = np.arange(65536 - 256, 65536, dtype=np.int32)[None]
    score = np.asarray(ALiBi(8).score(np.arange(8), at[:, -1:], at), np.float64)[0, :, 0]
    assert_array_equal(score, -(2.0 ** -np.arange(1, 9))[:, None] * (65535.0 - at[0]))
    x = np.abs(np.random.default_rng(8).standard_normal((1, 256, 1, 4)).astype(np.float32))
    found = np.asarray(cos_reweighted(x, at, 65536), np.float64)[0, :, 0]
    angles = at[0][:, None] * np.pi / 2 / 65536
    wanted = np.concatenate([x[0, :, 0] * np.cos(angles), x[0, :, 0] * np.sin(angles)], axis=-1)
    assert np.abs(found - wanted).max() <= 4 * EPS * x.max()
