"""Patterns that are not functions of distance: global tokens, random blocks, predicates, arrays.

Longformer and BigBird are expressions of these and of the regular patterns. `bounds` is exact for `Global`
and `Dense`, and for `RandomBlocks` if the positions are NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention_jax.about import About
from attention_jax.masks.algebra import MOST_PINNED, CacheSpan, Mask, Recipe, as_integer, like, natural
from attention_jax.masks.patterns import BlockLocal, SlidingWindow


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """q in positions or k in positions: global tokens attend to all tokens, and all tokens attend to them.

    Beltagy et al. 2020 (arXiv 2004.05150). `positions` are sorted and deduplicated.
    """

    about = About(
        "Global tokens", "arXiv 2004.05150", "O(T positions)", cache="pinned keys and a ring up to the last"
    )

    positions: tuple[int, ...]

    def __post_init__(self):
        given = (self.positions,) if isinstance(self.positions, int) else self.positions
        for position in given:
            natural("Global positions", position, most=_LAST_GLOBAL)
        if not given:
            raise ValueError("Global needs at least one position")
        object.__setattr__(self, "positions", tuple(sorted({int(p) for p in given})))

    def keep(self, q_pos, k_pos):
        return self._is_global(q_pos) | self._is_global(k_pos)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        q, k = self._count(q_lo, q_hi), self._count(k_lo, k_hi)
        return (q > 0) | (k > 0), (q == q_hi - q_lo + 1) | (k == k_hi - k_lo + 1)

    def cache_span(self):
        # A global query attends to all earlier keys, which are at most `positions[-1]` positions back.
        return CacheSpan(self.positions[-1] + 1, self.positions)

    def _is_global(self, x):
        runs = _runs(self.positions)
        if len(runs) > _UNROLLED:
            table = np.zeros(self.positions[-1] + 2, bool)
            table[list(self.positions)] = True
            return _look_up(table, x) & (x >= 0)
        found = [(x >= lo) & (x <= hi) if lo < hi else x == lo for lo, hi in runs]
        return functools.reduce(lambda a, b: a | b, found)

    def _count(self, lo, hi):
        """The number of global positions in [lo, hi]."""
        runs = _runs(self.positions)
        if len(runs) > _UNROLLED:
            below = np.searchsorted(self.positions, np.arange(self.positions[-1] + 2)).astype(np.int32)
            return _look_up(below, hi + 1) - _look_up(below, lo)
        return sum(_clip(hi + 1, a, b + 1) - _clip(lo, a, b + 1) for a, b in runs)


_LAST_GLOBAL = 2**24  # a table has an entry for each position up to the last global one
_MOST_DRAWN = 64  # each random block of a block is compared one by one
_UNROLLED = 64  # the most runs of global positions that are compared one by one; more runs use a table


@functools.cache
def _runs(positions: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Sorted positions as inclusive intervals of consecutive positions."""
    runs: list[tuple[int, int]] = []
    for p in positions:
        if runs and runs[-1][1] == p - 1:
            runs[-1] = (runs[-1][0], p)
        else:
            runs.append((p, p))
    return tuple(runs)


def _clip(x, lo: int, hi: int):
    """x clipped to [lo, hi] with arithmetic and comparisons only."""
    return lo + as_integer(x > lo, x) * (x - lo) - as_integer(x > hi, x) * (x - hi)


def _look_up(table: np.ndarray, x):
    """table[min(x, last index)] for NumPy or traced x >= 0."""
    at = _clip(x, 0, table.size - 1)
    return table[at] if _is_numpy(x) else jnp.asarray(table)[at]


def _is_numpy(*arrays: Any) -> bool:
    return all(isinstance(x, (np.ndarray, np.generic, int)) for x in arrays)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Mask):
    """Each block attends to `count` random earlier blocks, which also attend to it.

    Block i draws one block from each of `count` equal strata of [first, i - skip), by an integer hash of
    (seed, i, stratum). The drawn blocks are distinct, do not depend on the sequence length, and lie in the
    past, so that an intersection with `Causal()` keeps them. Empty strata, near the start, draw no block.
    """

    about = About("Random blocks", "arXiv 2007.14062", "O(T count block)", cache="all keys")

    block: int
    count: int
    seed: int = 0
    skip: int = 0
    first: int = 0

    def __post_init__(self):
        natural("RandomBlocks block", self.block, 1)
        natural("RandomBlocks count", self.count, 1, _MOST_DRAWN)
        natural("RandomBlocks seed", self.seed, most=2**32 - 1)
        natural("RandomBlocks skip", self.skip)
        natural("RandomBlocks first", self.first)

    def keep(self, q_pos, k_pos):
        return self._drawn(q_pos // self.block, k_pos // self.block)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        q_lo, q_hi, k_lo, k_hi = (x // self.block for x in (q_lo, q_hi, k_lo, k_hi))
        if not _is_numpy(q_lo, q_hi, k_lo, k_hi):
            # While tracing, the number of blocks in a rectangle is unknown: be exact for single blocks only.
            drawn = self._drawn(q_lo, k_lo)
            one = (q_lo == q_hi) & (k_lo == k_hi)
            return drawn | (one == False), drawn & one  # noqa: E712
        if _is_grid(q_lo, q_hi, k_lo, k_hi):
            any_kept = self._any_drawn(q_lo[:, 0], q_hi[:, 0], k_lo[0], k_hi[0])
            any_kept |= self._any_drawn(k_lo[0], k_hi[0], q_lo[:, 0], q_hi[:, 0]).T
            i, j = np.nonzero(any_kept)
            all_kept = np.zeros_like(any_kept)
            all_kept[i, j] = self._cells(q_lo[i, 0], q_hi[i, 0], k_lo[0, j], k_hi[0, j])[1]
            return any_kept, all_kept
        return self._cells(q_lo, q_hi, k_lo, k_hi)

    def _cells(self, q_lo, q_hi, k_lo, k_hi):
        """(any, all) over rectangles of blocks, evaluated block by block."""
        rows, columns = (int(np.max(hi - lo, initial=0)) + 1 for lo, hi in ((q_lo, q_hi), (k_lo, k_hi)))
        any_kept = all_kept = None
        for i in range(rows):
            q = np.minimum(q_lo + i, q_hi)
            for j in range(columns):
                drawn = self._drawn(q, np.minimum(k_lo + j, k_hi))
                any_kept, all_kept = (
                    (drawn, drawn) if any_kept is None else (any_kept | drawn, all_kept & drawn)
                )
        return any_kept, all_kept

    def _any_drawn(self, lo_A, hi_A, lo_B, hi_B) -> np.ndarray:
        """True [A, B] if a block in [lo_A, hi_A] drew a block in [lo_B, hi_B]; the B intervals are ascending.

        The intervals that contain a drawn block are consecutive, so that only true entries are visited.
        """
        found = np.zeros((lo_A.size, lo_B.size), bool)
        for i in range(int(np.max(hi_A - lo_A)) + 1):
            for r in range(self.count):
                drawn_A = self._draw(np.minimum(lo_A + i, hi_A), r)
                start_A = np.searchsorted(hi_B, drawn_A, "left")
                stop_A = np.searchsorted(lo_B, drawn_A, "right")
                for step in range(int(np.max(stop_A - start_A))):
                    at = np.nonzero(start_A + step < stop_A)[0]
                    found[at, start_A[at] + step] = True
        return found

    def _drawn(self, a, b):
        """True if block a drew block b or block b drew block a."""
        pairs = [pair for r in range(self.count) for pair in ((self._draw(a, r), b), (self._draw(b, r), a))]
        if not _is_numpy(a, b):
            return functools.reduce(lambda x, y: x | y, (x == y for x, y in pairs))
        # Block maps are large: reuse two arrays, since allocating new ones costs more than the comparison.
        found = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), bool)
        one = np.empty_like(found)
        for x, y in pairs:
            found |= np.equal(x, y, out=one)
        return found

    def _draw(self, i, stratum: int):
        """The block that block i draws from a stratum; -2^30 or less if the stratum is empty."""
        span = _clip(i - self.skip - self.first, 0, 2**24)
        lo, hi = stratum * span // self.count, (stratum + 1) * span // self.count
        size = hi - lo
        # The hash has 24 bits, so that all values fit int32 and are >= 0.
        drawn = self.first + lo + _hash(self.seed, stratum, i) % (size + as_integer(size == 0, size))
        if isinstance(i, np.ndarray):
            drawn = drawn.astype(i.dtype)  # comparisons of one dtype are twice as fast
        return drawn * as_integer(size > 0, drawn) - as_integer(size == 0, drawn) * 2**30


def _is_grid(q_lo, q_hi, k_lo, k_hi) -> bool:
    """True for a column of q intervals and a row of k intervals, both ascending, as in a static block map."""
    if not (np.ndim(q_lo) == np.ndim(k_lo) == 2 and q_lo.shape[1] == k_lo.shape[0] == 1):
        return False
    if q_lo.shape != q_hi.shape or k_lo.shape != k_hi.shape:
        return False
    return all((np.diff(x, axis=0 if x.shape[1] == 1 else 1) >= 0).all() for x in (q_lo, q_hi, k_lo, k_hi))


def _hash(seed: int, stratum: int, x):
    """24 bits of a full-avalanche hash (lowbias32, Wellons 2018), equal for NumPy and traced arrays."""
    start = (seed * 0x9E3779B9 + stratum * 0x85EBCA6B + 0x27220A95) & 0xFFFFFFFF
    if _is_numpy(x):
        h = (np.asarray(x, np.int64) * 0x01000193 ^ start) & 0xFFFFFFFF
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x6BA68B) & 0xFFFFFFFF
        return (h ^ (h >> 16)) & 0xFFFFFF
    h = x.astype(jnp.uint32) * jnp.uint32(0x01000193) ^ jnp.uint32(start)
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x6BA68B)
    return ((h ^ (h >> 16)) & jnp.uint32(0xFFFFFF)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """fn(q, k), a user-defined relation: elementwise, using comparisons, integer arithmetic, & and | only.

    It has no bounds and no cache span: every block is evaluated, and a cache keeps all keys. For speed, write
    a Mask class with `bounds` (docs/extend.md). Two predicates are equal if their functions are equal.
    """

    about = About("A user's predicate", "", "O(T^2)", cache="all keys")

    fn: Callable[[Any, Any], Any]

    def __post_init__(self):
        if not callable(self.fn):
            raise ValueError(f"Predicate needs a function of (q, k) positions, got {self.fn!r}")

    def __repr__(self):
        return f"Predicate({getattr(self.fn, '__name__', self.fn)})"

    def keep(self, q_pos, k_pos):
        return self.fn(q_pos, k_pos) & like(q_pos, k_pos)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """array[q, k], a boolean array [T, S] over positions; pairs outside the array are not kept.

    The array is copied, made read-only, and compared by its digest. For masks that differ by batch row or
    head, pass an array to `dot_product_attention(mask=...)`.
    """

    about = About("A boolean array", "", "O(T^2) by blocks", cache="all keys")

    array: np.ndarray | Sequence[Sequence[bool]]

    def __post_init__(self):
        array = np.array(self.array)
        if array.ndim != 2 or array.dtype != bool or not array.size:
            raise ValueError(f"Dense needs a boolean array [T, S], got {array.dtype} {array.shape}")
        array.flags.writeable = False
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "_digest", hashlib.sha256(np.packbits(array).tobytes()).hexdigest())

    def _identity(self):
        return self.array.shape, self._digest

    def __eq__(self, other):
        return isinstance(other, Dense) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def __repr__(self):
        T, S = self.array.shape
        return f"Dense({T} x {S}, {self._digest[:8]})"

    def keep(self, q_pos, k_pos):
        T, S = self.array.shape
        inside = (q_pos >= 0) & (q_pos < T) & (k_pos >= 0) & (k_pos < S)
        return self._take(self.array, q_pos, k_pos) & inside

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        # `area[i, j]` is the number of kept pairs in [0, i) x [0, j).
        area = np.pad(self.array, ((1, 0), (1, 0))).astype(np.int32).cumsum(0).cumsum(1, dtype=np.int32)
        kept = (
            self._take(area, q_hi + 1, k_hi + 1) - self._take(area, q_lo, k_hi + 1)
            - self._take(area, q_hi + 1, k_lo) + self._take(area, q_lo, k_lo)
        )  # fmt: skip
        return kept > 0, kept == (q_hi - q_lo + 1) * (k_hi - k_lo + 1)

    @staticmethod
    def _take(table, i, j):
        i, j = _clip(i, 0, table.shape[0] - 1), _clip(j, 0, table.shape[1] - 1)
        return table[i, j] if _is_numpy(i, j) else jnp.asarray(table)[i, j]


@dataclasses.dataclass(frozen=True)
class Longformer(Recipe):
    """SlidingWindow(window // 2 + 1, right=window // 2) | Global(positions) (arXiv 2004.05150)."""

    about = About(
        "Longformer",
        "arXiv 2004.05150",
        "O(T (window + positions))",
        cache="ring of window / 2 + 1 or up to the last global key, pinned keys",
    )

    window: int
    positions: tuple[int, ...]

    def __post_init__(self):
        natural("Longformer window", self.window, 1)
        object.__setattr__(self, "positions", Global(self.positions).positions)

    @property
    def expression(self):
        half = self.window // 2
        return SlidingWindow(half + 1, right=half) | Global(self.positions)


@dataclasses.dataclass(frozen=True)
class BigBird(Recipe):
    """Block window | global blocks | random blocks (Zaheer et al. 2020, arXiv 2007.14062).

    block: positions per block. window_blocks: odd, the number of blocks in the window centred on a block.
    global_blocks: the number of blocks at the start that attend to all blocks and that all blocks attend to.
    random_blocks: the number of random blocks before the window that each block draws (see `RandomBlocks`).
    """

    about = About(
        "BigBird", "arXiv 2007.14062", "O(T block (window + global + random blocks))", cache="all keys"
    )

    block: int
    window_blocks: int = 3
    global_blocks: int = 1
    random_blocks: int = 1
    seed: int = 0

    def __post_init__(self):
        natural("BigBird block", self.block, 1)
        natural("BigBird window_blocks", self.window_blocks, 1)
        natural("BigBird global_blocks", self.global_blocks)
        natural("BigBird global_blocks block", self.global_blocks * self.block, most=MOST_PINNED)
        natural("BigBird window", self.window_blocks * self.block)
        natural("BigBird random_blocks", self.random_blocks, most=_MOST_DRAWN)
        natural("BigBird seed", self.seed, most=2**32 - 1)
        if self.window_blocks % 2 == 0:
            raise ValueError(f"BigBird window_blocks must be odd, got {self.window_blocks}")

    @property
    def expression(self):
        half = self.window_blocks // 2
        mask = BlockLocal(self.block, half)
        if self.global_blocks:
            mask = mask | Global(tuple(range(self.global_blocks * self.block)))
        if self.random_blocks:
            mask = mask | RandomBlocks(self.block, self.random_blocks, self.seed, half, self.global_blocks)
        return mask
