"""The mask algebra against the formulas of the masks, with NumPy and traced arrays."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from attention_jax import masks
from attention_jax.masks import (
    And,
    BigBird,
    BlockLocal,
    CacheSpan,
    Causal,
    Chunked,
    Dense,
    Dilated,
    Full,
    Global,
    Longformer,
    Mask,
    Predicate,
    Prefix,
    RandomBlocks,
    Sinks,
    SlidingWindow,
    Strided,
    parse,
)
from tests.cases import LEAVES, MASKS, Odd
from tests.reference import masks as truth
from tests.strategies import expressions

each_mask = pytest.mark.parametrize("row", MASKS.values(), ids=MASKS.keys())
# No deadline: the machine's load is not a property of the code.
quietly = settings(max_examples=150, deadline=None)


def _table(mask: Mask, q, k) -> np.ndarray:
    q, k = np.asarray(q), np.asarray(k)
    found = mask.dense(q, k)
    assert found.dtype == bool
    return np.broadcast_to(found, (*q.shape[:-1], q.shape[-1], k.shape[-1]))


@each_mask
def test_truth_table(row):
    q, k = np.arange(0, 45), np.arange(-2, 50)
    wanted = truth.table(row.truth, q, k)
    assert_array_equal(_table(row.mask, q, k), wanted)
    traced = jax.jit(row.mask.dense)(q, k)
    assert traced.dtype == bool
    assert_array_equal(np.broadcast_to(traced, wanted.shape), wanted)
    for at in ((0, 0), (3, 40), (40, 3)):
        assert bool(row.mask.keep(*at)) == bool(row.truth(*at))


@given(expressions)
@quietly
def test_truth_tables_of_expressions(row):
    positions = np.arange(24)
    assert_array_equal(_table(row.mask, positions, positions), truth.table(row.truth, positions, positions))


def test_a_window_counts_keys():
    assert _table(SlidingWindow(4), [10], np.arange(20)).sum() == 4
    assert _table(SlidingWindow(4), [10], [10]).all()
    assert_array_equal(np.flatnonzero(_table(SlidingWindow(2, 3), [10], np.arange(20))), np.arange(9, 14))


def _rectangles(n):
    """All [q_lo, q_hi] x [k_lo, k_hi] within 0..n-1, as four arrays that broadcast to [r, r]."""
    lo, hi = np.triu_indices(n)
    return lo[:, None], hi[:, None], lo[None], hi[None]


def _some_and_every(table, n):
    """By summed-area table: whether any, whether all entries of each rectangle are kept."""
    area = np.pad(table.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    q_lo, q_hi, k_lo, k_hi = _rectangles(n)
    kept = area[q_hi + 1, k_hi + 1] - area[q_lo, k_hi + 1] - area[q_hi + 1, k_lo] + area[q_lo, k_lo]
    return kept > 0, kept == (q_hi - q_lo + 1) * (k_hi - k_lo + 1)


@each_mask
def test_a_mask_keeps_its_promises(row):
    """Equality and hash, keep, bounds, cache span, prefix and text, for NumPy and traced arrays."""
    masks.check(row.mask, 40)


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "traced"])
@pytest.mark.parametrize("name", [name for name, row in MASKS.items() if row.exact])
def test_bounds_of_leaves_are_exact(name, numpy):
    n, row = 16, MASKS[name]
    positions = np.arange(n)
    any_kept, all_kept = _some_and_every(truth.table(row.truth, positions, positions), n)
    bounds = row.mask.bounds if numpy else jax.jit(row.mask.bounds)
    some, every = (np.broadcast_to(x, any_kept.shape) for x in bounds(*_rectangles(n)))
    assert_array_equal(some, any_kept)
    assert_array_equal(every, all_kept)


@each_mask
def test_bounds_of_integers_are_those_of_arrays(row):
    for corners in ((0, 3, 5, 5), (7, 9, 2, 8), (40, 43, 0, 3)):
        found = row.mask.bounds(*corners), row.mask.bounds(*map(np.array, corners))
        assert_array_equal(*(np.broadcast_arrays(*pair) for pair in found))


@given(expressions)
@quietly
def test_bounds_of_expressions_are_conservative(row):
    n = 14
    positions = np.arange(n)
    any_kept, all_kept = _some_and_every(truth.table(row.truth, positions, positions), n)
    some, every = (np.broadcast_to(x, any_kept.shape) for x in row.mask.bounds(*_rectangles(n)))
    assert not (any_kept & ~some).any() and not (every & ~all_kept).any()


@given(expressions, st.lists(st.integers(0, 10**6), min_size=4, max_size=4), st.integers(0, 40))
@quietly
def test_bounds_far_out(row, corners, size):
    """Single pairs, and small rectangles far from the origin; a single pair of leaves is decided exactly."""
    q_lo, k_lo = corners[0], corners[1] if corners[2] % 2 else corners[0] + corners[3] % 30 - 15
    k_lo = max(k_lo, 0)
    q_hi, k_hi = q_lo + size % 7, k_lo + size
    table = truth.table(row.truth, np.arange(q_lo, q_hi + 1), np.arange(k_lo, k_hi + 1))
    some, every = row.mask.bounds(np.array([q_lo]), np.array([q_hi]), np.array([k_lo]), np.array([k_hi]))
    assert some.all() or not table.any()
    assert not every.all() or table.all()


@pytest.mark.parametrize(
    "mask, live, full",
    [
        (Causal() & SlidingWindow(128), 64 + 63, 0),
        ((SlidingWindow(512) | Sinks(4)) & Causal(), 64 + 63 + 62 + 61 + 60 + 59, 63 + 62 + 61),
        (~~Causal(), 64 * 65 // 2, 64 * 63 // 2),
        (~Causal() & Causal(), 64, 0),
    ],
    ids=str,
)
def test_bounds_of_composites_leave_few_blocks_undecided(mask, live, full):
    """(True, False) everywhere would be conservative too, and useless."""
    lo = np.arange(0, 8192, 128)
    some, every = mask.bounds(lo[:, None], lo[:, None] + 127, lo[None], lo[None] + 127)
    assert (some.sum(), every.sum()) == (live, full)


def test_a_predicate_without_bounds_decides_nothing():
    zero = np.zeros((2, 3), int)
    some, every = Odd().bounds(zero, zero, zero, zero)
    assert_array_equal(some, np.ones((2, 3), bool))
    assert_array_equal(every, np.zeros((2, 3), bool))


def _check_cache_span(row, n=26):
    lookback, pins = row.mask.cache_span()
    if lookback is None:
        return
    assert list(pins) == sorted(set(pins))
    for newest in range(n):
        k = np.arange(newest + 1)
        forgotten = k[(k <= newest - lookback) & ~np.isin(k, pins)]
        later = np.arange(newest, newest + n)
        assert not truth.table(row.truth, later, forgotten).any(), (newest, lookback, pins)


@given(expressions)
@quietly
def test_cache_span_of_expressions_is_sound(row):
    _check_cache_span(row)


@pytest.mark.parametrize(
    "mask, wanted",
    [
        (Full(), (None, ())),
        (Causal(), (None, ())),
        (Odd(), (None, ())),
        (~SlidingWindow(3), (None, ())),
        (SlidingWindow(9), (9, ())),
        (SlidingWindow(9, 5), (9, ())),
        (Sinks(3), (0, (0, 1, 2))),
        (SlidingWindow(9) | Sinks(2), (9, (0, 1))),
        (SlidingWindow(9) | SlidingWindow(5), (9, ())),
        (SlidingWindow(9) & SlidingWindow(5, 2), (5, ())),
        ((SlidingWindow(9) | Sinks(2)) & Causal(), (9, (0, 1))),
        (SlidingWindow(9) | Causal(), (None, ())),
        (Dilated(3, 4), (9, ())),
        (Chunked(8), (8, ())),
        (BlockLocal(4), (8, ())),
        (BlockLocal(4, 0), (4, ())),
        (Strided(4), (None, ())),
        (Global((2, 5)), (6, (2, 5))),
        (Prefix(3), (0, (0, 1, 2))),
        (Longformer(8, (0,)) & Causal(), (5, (0,))),
        (BigBird(4), (None, ())),
        (BigBird(4, random_blocks=0), (8, (0, 1, 2, 3))),
    ],
    ids=str,
)
def test_cache_span_keeps_no_more_than_needed(mask, wanted):
    assert mask.cache_span() == CacheSpan(*wanted)


@given(expressions)
@quietly
def test_causal_is_never_claimed_wrongly(row):
    positions = np.arange(20)
    if row.mask.causal:
        assert not np.triu(truth.table(row.truth, positions, positions), 1).any()
    assert (row.mask & Causal()).causal


@pytest.mark.parametrize(
    "mask, causal",
    [
        (Causal(), True),
        (SlidingWindow(4), True),
        (SlidingWindow(4, 1), False),
        (Full(), False),
        (Sinks(1), False),
        (Causal() | Sinks(1), False),
        (Causal() | SlidingWindow(3), True),
        (Full() & Causal(), True),
        (~Causal(), False),
        (Dilated(3, 2), True),
        (Prefix(3) | Causal(), False),
        (Prefix(3) & Causal(), True),
        (BigBird(4) & Causal(), True),
    ],
    ids=str,
)
def test_causal(mask, causal):
    assert mask.causal is causal


@given(expressions)
@quietly
def test_a_mask_is_causal_beyond_its_prefix(row):
    if row.mask.prefix is None:
        return
    table = truth.table(row.truth, np.arange(20), np.arange(20))
    assert not np.triu(table, 1)[:, row.mask.prefix :].any()


@pytest.mark.parametrize(
    "mask, prefix",
    [
        (Prefix(3), 3),
        (Prefix(3) | Causal(), 3),
        (Prefix(3) | Prefix(5) | SlidingWindow(2), 5),
        (Prefix(3) | SlidingWindow(2, 1), None),
        (Prefix(3) & Full(), 3),
        (Sinks(3) | Causal(), None),
        (~Prefix(3), None),
    ],
    ids=str,
)
def test_prefix(mask, prefix):
    assert mask.prefix == prefix


@given(expressions)
@quietly
def test_str_parses_back(row):
    if "Dense" in str(row.mask) or "Predicate" in str(row.mask):
        return  # they hold an array, a function
    assert parse(str(row.mask)) == row.mask
    assert hash(parse(str(row.mask))) == hash(row.mask)


@pytest.mark.parametrize(
    "text, mask",
    [
        ("Causal", Causal()),
        (" SlidingWindow(128) | Sinks(4) ", SlidingWindow(128) | Sinks(4)),
        ("SlidingWindow(window=3, right=2) & Causal()", SlidingWindow(3, 2) & Causal()),
        ("~Sinks(1) & Causal | SlidingWindow(2)", (~Sinks(1) & Causal()) | SlidingWindow(2)),
        ("~(Sinks(1) & Causal)", ~(Sinks(1) & Causal())),
        ("Global([3, 1])", Global((1, 3))),
        ("Longformer(6, (0, 4))", Longformer(6, (0, 4))),
        ("BigBird(block=8, random_blocks=2)", BigBird(8, random_blocks=2)),
        ("Dense([[True, False], [False, True]])", Dense(np.eye(2, dtype=bool))),
    ],
)
def test_parse(text, mask):
    assert parse(text) == mask


@pytest.mark.parametrize(
    "text, message",
    [
        ("Casual()", "unknown mask 'Casual'; choose from .*Causal"),
        ("SlidingWindow(0)", "window must be an integer >= 1, got 0"),
        ("SlidingWindow(-3)", "window must be an integer >= 1, got -3"),
        ("SlidingWindow(True)", "got True"),
        ("SlidingWindow(1.5)", "got 1.5"),
        ("SlidingWindow(2, right=-1)", "right must be an integer >= 0, got -1"),
        ("SlidingWindow()", "missing"),
        ("SlidingWindow(2, left=1)", "left"),
        ("Sinks(0)", "count must be an integer >= 1"),
        ("Chunked(0)", "Chunked size must be an integer >= 1, got 0"),
        ("Dilated(2, 0)", "Dilated stride must be an integer >= 1, got 0"),
        ("Strided(0)", "Strided stride must be an integer >= 1, got 0"),
        ("BlockLocal(4, -1)", "BlockLocal neighbours must be an integer >= 0, got -1"),
        ("Global(())", "Global needs at least one position"),
        ("Global((3, -1))", "Global positions must be an integer >= 0, got -1"),
        ("Prefix(0)", "Prefix length must be an integer >= 1"),
        ("BigBird(4, window_blocks=2)", "BigBird window_blocks must be odd, got 2"),
        ("Longformer(0, (1,))", "Longformer window must be an integer >= 1"),
        ("Dense([[1, 0]])", "Dense needs a boolean array .T, S., got int64"),
        ("Predicate(3)", "Predicate needs a function"),
        ("Recipe()", "unknown mask 'Recipe'"),
        ("And((Causal(),))", "unknown mask 'And'"),
        ("Causal() and Sinks(2)", "combined with & | ~"),
        ("Causal() ^ Sinks(2)", "combined with & | ~"),
        ("Causal().keep(1, 2)", "combined with & | ~"),
        ("__import__('os')", "unknown mask '__import__'"),
        ("SlidingWindow(open('x'))", r"arguments must be numbers or tuples of numbers, got open\('x'\)"),
        ("SlidingWindow(10**9)", r"arguments must be numbers or tuples of numbers, got 10 \*\* 9"),
        ("SlidingWindow(2147483648)", "SlidingWindow window must be <= 1073741824, got 2147483648"),
        ("Dilated(100000, 100000)", r"Dilated \(window - 1\) stride must be <= 1073741824, got 9999900000"),
        ("BigBird(8, seed=4294967296)", "BigBird seed must be <= 4294967295, got 4294967296"),
        ("Causal() &", "cannot be parsed: give an expression"),
        ("", "cannot be parsed: give an expression"),
        ("Causal()\nSinks(1)", "cannot be parsed: give an expression"),
        ("3", "combined with & | ~"),
    ],
)
def test_what_is_no_mask_is_a_one_line_error(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("combine", [lambda m: m & 3, lambda m: m | np.ones(2, bool), lambda m: m & Causal])
def test_masks_combine_with_masks_only(combine):
    with pytest.raises(TypeError, match="a Mask combines with a Mask by & and |"):
        combine(Causal())


def test_random_blocks_are_as_many_as_asked_and_the_same_at_any_length():
    mask, count = BigBird(4, window_blocks=3, global_blocks=2, random_blocks=3, seed=11), 3
    for i in range(40):
        drawn = truth.draws(i, count, 11, 1, 2)
        assert len(drawn) == min(count, max(i - 1 - 2, 0))
        seen = _table(RandomBlocks(4, count, 11, 1, 2), [4 * i], np.arange(0, 4 * i, 4))[0]
        assert set(np.flatnonzero(seen)) == drawn
    whole = _table(mask, np.arange(96), np.arange(96))
    assert_array_equal(whole, whole.T)
    assert_array_equal(_table(mask, np.arange(40), np.arange(40)), whole[:40, :40])
    assert (_table(mask & Causal(), np.arange(96), np.arange(96)).sum(1) > 0).all()
    other = _table(dataclasses.replace(mask, seed=12), np.arange(96), np.arange(96))
    assert (whole != other).any()


def test_dense_is_equal_by_content_and_keeps_a_copy():
    array = np.eye(3, dtype=bool)
    mask = Dense(array)
    array[0, 1] = True
    assert mask == Dense(np.eye(3, dtype=bool)) != Dense(array)
    assert not mask.keep(0, 1) and not mask.array.flags.writeable
    assert Dense(np.ones((2, 8), bool)) != Dense(np.ones((4, 4), bool))


def test_a_predicate_is_equal_where_its_function_is():
    def far(q, k):
        return q - k > 3

    assert Predicate(far) == Predicate(far) != Predicate(lambda q, k: q - k > 3)
    assert str(Predicate(far)) == "Predicate(far)"


@each_mask
def test_masks_are_frozen_hashable_values(row):
    assert {row.mask: 1}[dataclasses.replace(row.mask)] == 1
    for field in dataclasses.fields(row.mask):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(row.mask, field.name, 1)


def test_masks_that_differ_are_not_equal():
    found = [row.mask for row in MASKS.values()]
    assert len(set(found)) == len(found)
    assert SlidingWindow(3) != SlidingWindow(3, 1) and Causal() != Full()


def test_combining_flattens_and_drops_repetitions():
    a, b, c = Causal(), SlidingWindow(3), Sinks(2)
    assert (a & b) & c == a & (b & c) == And((a, b, c))
    assert a & a == a and a | a == a and (a & b) & a == a & b
    assert (a | b) & c != a | (b & c)


def test_a_mask_is_a_static_argument():
    """Equal masks share one compiled program."""
    traces = []

    def count(q, mask):
        traces.append(mask)
        return mask.dense(q, q).sum()

    count = jax.jit(count, static_argnums=1)
    for _ in range(3):
        assert count(jnp.arange(9), SlidingWindow(2) & Causal()) == 17
    assert len(traces) == 1


@pytest.mark.parametrize("T, S, block", [(1, 1, 128), (40, 40, 8), (37, 53, 16), (53, 37, 128), (64, 16, 7)])
@each_mask
def test_density_is_the_dense_mean(row, T, S, block):
    wanted = truth.table(row.truth, np.arange(T), np.arange(S)).mean()
    assert row.mask.density(T, S, block=block) == pytest.approx(wanted, abs=1e-12)


def test_density_of_a_long_row_is_exact_and_square_by_default():
    n = 2**15
    assert Causal().density(n) == (n + 1) / (2 * n)
    assert SlidingWindow(128).density(n) == (128 * n - 128 * 127 // 2) / n**2


def test_density_of_many_undecided_blocks_is_sampled_and_says_so():
    T = 16384
    sampled = Predicate(lambda q, k: (q + k) % 4 == 0).density(T)
    assert not sampled.exact and str(sampled).startswith("~25.0")
    assert Causal().density(T).exact and str(Causal().density(T)) == "50.00%"
    assert Causal().density(T) == (T + 1) / (2 * T)
    with pytest.raises(ValueError, match="T and S must be >= 1, got 0"):
        Causal().density(0)


def test_the_table_has_every_leaf():
    every = {getattr(masks, name) for name in masks.__all__}
    leaves = {c for c in every if isinstance(c, type) and issubclass(c, Mask)}
    leaves -= {Mask, masks.And, masks.Or, masks.Not, masks.Recipe}
    assert {type(row.mask) for row in MASKS.values()} >= leaves
    assert {type(row.mask) for row in LEAVES.values()} >= leaves - {Longformer, BigBird}


@dataclasses.dataclass(frozen=True)
class Near(Mask):
    """The keys at most `reach` back, right in all that it promises; each case below breaks one promise."""

    reach: int = 5

    def keep(self, q_pos, k_pos):
        return (k_pos <= q_pos) & (q_pos - k_pos <= self.reach)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        any_kept = (k_lo <= q_hi) & (q_lo - k_hi <= self.reach)
        return any_kept, (k_hi <= q_lo) & (q_hi - k_lo <= self.reach)

    def cache_span(self):
        return CacheSpan(self.reach + 1)

    @property
    def prefix(self):
        return 0


def _broken_bounds(change):
    return lambda self, *corners: tuple(change(found, *corners) for found in Near.bounds(self, *corners))


def _broken_keep(change):
    return lambda self, q_pos, k_pos: change(Near.keep(self, q_pos, k_pos), q_pos, k_pos)


BROKEN = {
    "any": (
        {"bounds": lambda self, q_lo, q_hi, k_lo, k_hi: (k_lo <= q_lo, (k_lo < 0) & (q_lo < 0))},
        r"bounds says any=False of the block q 0..1, k 1..1, but keep\(1, 1\) is True",
    ),
    "all": (
        {"bounds": lambda self, q_lo, q_hi, k_lo, k_hi: (k_lo <= q_hi, k_lo <= q_lo)},
        r"bounds says all=True of the block q 6..6, k 0..0, but keep\(6, 0\) is False",
    ),
    "traced bounds": (
        {"bounds": _broken_bounds(lambda found, *corners: found & isinstance(corners[0], np.ndarray))},
        r"bounds of traced arrays says any=False of the block q 0..0, k 0..0, but keep\(0, 0\) is True",
    ),
    "bounds of integers": (
        {"bounds": _broken_bounds(lambda found, *corners: 1 * found)},
        r"any of bounds must be boolean \[136, 136\], got int64",
    ),
    "one bound": ({"bounds": lambda self, *x: Near.bounds(self, *x)[0]}, r"return \(any, all\), got ndarray"),
    "negated": (
        {"bounds": _broken_bounds(lambda found, *corners: ~(found == False))},  # noqa: E712
        r"bounds uses ~, which does not lower inside a kernel: write == False",
    ),
    "lookback": (
        {"cache_span": lambda self: CacheSpan(5)},
        r"drops key 0 when key 5 is the newest, but keep\(5, 0\) is True",
    ),
    "pins": ({"cache_span": lambda self: CacheSpan(6, (3, 1))}, r"must ascend, got \(3, 1\)"),
    "a negative pin": (
        {"cache_span": lambda self: CacheSpan(6, (-1,))},
        r"must hold integers >= 0",
    ),
    "a tuple": ({"cache_span": lambda self: (6, ())}, "must return a CacheSpan, got tuple"),
    "prefix": (
        {"keep": lambda self, q, k: abs(q - k) < 3, "bounds": Mask.bounds},
        r"prefix is 0: no key after a query from 0 on is kept, but keep\(0, 1\) is True",
    ),
    "a negative prefix": ({"prefix": -1}, "prefix must be an integer >= 0 or None, got -1"),
    "causal": ({"causal": False}, "causal is False and prefix is 0: define prefix alone"),
    "traced keep": (
        {"keep": _broken_keep(lambda found, q, k: found & isinstance(q, np.ndarray))},
        r"keep\(0, 0\) is True of NumPy arrays and False of traced arrays",
    ),
    "keep of integers": (
        {"keep": _broken_keep(lambda found, q, k: 1 * found)},
        "keep must be boolean, got int64",
    ),
    "and": ({"keep": lambda self, q, k: k <= q and k > q - 6}, "keep fails on arrays: The truth value"),
    "numpy only": (
        {"keep": lambda self, q, k: np.less_equal(np.asarray(k), q) & (q - k < 6)},
        "keep cannot be traced: use comparisons",
    ),
    "not elementwise": (
        {"keep": _broken_keep(lambda found, q, k: found & (np.size(q) > 1))},
        r"keep is not elementwise: keep\(0, 0\) is False alone and True in an array",
    ),
    "shape": (
        {"keep": _broken_keep(lambda found, q, k: found.reshape(-1))},
        r"keep of positions \[80, 80\] has the shape \[6400\]",
    ),
    "text": ({"__repr__": lambda self: "Close(5)"}, r"str\(mask\) must be an expression of masks: .*unknown"),
    "another text": ({"__repr__": lambda self: "Causal()"}, r"parse\(str\(mask\)\) is another mask, Causal"),
    "a list": ({}, r"is not hashable: unhashable type: 'list'; use tuples"),
    "identity": (
        {"__eq__": object.__eq__, "__hash__": object.__hash__},
        "two masks with the same fields are not equal",
    ),
    "hash": (
        {"__eq__": lambda self, other: self.reach == other.reach, "__hash__": lambda self: id(self)},
        "two masks with the same fields are not of one hash",
    ),
}


def test_a_mask_that_is_right_in_all_passes():
    masks.check(Near(), 40)
    masks.check(Near(3) | Sinks(2), 40)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name):
    methods, message = BROKEN[name]
    make = dataclasses.dataclass(frozen=True, repr=False, eq="__eq__" not in methods)
    cls = make(type("Broken", (Near,), methods))
    mask = cls([5]) if name == "a list" else cls()
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        masks.check(mask, 40)


def test_a_field_that_equality_ignores_is_named():
    @dataclasses.dataclass(frozen=True)
    class Hidden(Near):
        extra: int = dataclasses.field(default=0, compare=False)

    with pytest.raises(ValueError, match=r"\AHidden: the field extra has compare=False: masks that"):
        masks.check(Hidden())
    with pytest.raises(TypeError, match="check takes a Mask, got type"):
        masks.check(Causal)
    with pytest.raises(ValueError, match="length must be an integer >= 1, got 0"):
        masks.check(Causal(), 0)


def test_a_class_that_is_not_a_frozen_dataclass_is_refused():
    """Its masks would be equal or different whatever they hold."""

    class Plain(Mask):
        def __init__(self, reach):
            self.reach = reach

    class Inherits(Near):
        def keep(self, q_pos, k_pos):
            return k_pos == q_pos

    @dataclasses.dataclass
    class Thawed(Mask):
        reach: int = 3

    for make in (lambda: Plain(3), Inherits, Thawed, Mask):
        message = r"\A(Plain|Inherits|Thawed|Mask) is not a frozen dataclass: write @dataclasses"
        with pytest.raises(TypeError, match=message):
            make()
    assert pickle.loads(pickle.dumps(Causal() & Sinks(2))) == copy.deepcopy(Causal() & Sinks(2))


def test_of_two_classes_with_one_name_text_means_the_newer():
    """As in a notebook whose cell is run again."""

    def define(sign):
        @dataclasses.dataclass(frozen=True)
        class Rerun(Mask):
            def keep(self, q_pos, k_pos):
                return sign * k_pos <= sign * q_pos

        return Rerun

    kinds = [define(sign) for sign in (1, -1, 1, -1)]
    for _ in range(3):
        assert type(parse("Rerun()")) is kinds[-1]
