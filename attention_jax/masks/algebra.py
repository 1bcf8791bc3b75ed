"""The mask algebra: functions of positions, never arrays.

A `Mask` is a frozen, hashable relation between a query position and a key position. It answers three
questions, and everything else (the dense reference, the block lists of the kernels, the decode row, the
cache, the density, the picture) follows from them:

    keep(q_pos, k_pos)                 may this query see this key?           elementwise
    bounds(q_lo, q_hi, k_lo, k_hi)     (any, all) over a rectangle            block logic, inclusive bounds
    cache_span()                        which past keys may still be needed?   cache size

`keep` and `bounds` use comparisons, integer arithmetic, `&` and `|` only, so that they run unchanged on
NumPy arrays, on traced arrays and inside a kernel; `Dense`, and `Global` of many runs, also index an array,
which kernels have read beforehand. Negation is written `== False`, because `~` on booleans does not lower
inside a Mosaic kernel.

Patterns are relations, not causal by themselves; a causal model intersects them with `Causal()`.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from attention_jax.about import About

Array = Any  # a NumPy array, a jax array, a tracer or a kernel value: the algebra does not care


class CacheSpan(NamedTuple):
    """What a cache must keep for queries at or after the newest key.

    lookback: the newest `lookback` positions may be needed (a query's own included); None keeps all.
    pinned: positions needed for ever, whatever their age.
    """

    lookback: int | None
    pinned: tuple[int, ...] = ()


class Density(float):
    """A fraction in [0, 1] that knows whether it was counted (`exact`) or sampled."""

    exact: bool

    def __new__(cls, value: float, exact: bool = True) -> Density:
        self = super().__new__(cls, value)
        self.exact = exact
        return self

    def __str__(self) -> str:
        return f"{float(self):.2%}" if self.exact else f"~{float(self):.2%} (sampled)"


_EXACT_BLOCKS = 4096  # undecided blocks that `density` still counts entry by entry


class Mask:
    """Base of all masks. Subclasses are frozen dataclasses of plain Python values."""

    about: ClassVar[About | None] = None  # its line in the catalogue
    plot: ClassVar[Callable[..., Any]]  # mask.plot(T, S=None, ...) -> figure; masks/picture.py defines it

    def keep(self, q_pos: Array, k_pos: Array) -> Array:
        """Boolean, elementwise over the broadcast shapes: may `q_pos` attend to `k_pos`?"""
        raise NotImplementedError

    def bounds(self, q_lo: Array, q_hi: Array, k_lo: Array, k_hi: Array) -> tuple[Array, Array]:
        """(any, all) of `keep` over [q_lo, q_hi] x [k_lo, k_hi], all inclusive, elementwise.

        Exact for leaves; for composites `any` may be True and `all` False without need, never the
        reverse. A user predicate that brings none is (True, False) everywhere.
        """
        anywhere = like(q_lo, q_hi, k_lo, k_hi)
        return anywhere, anywhere == False  # noqa: E712

    def cache_span(self) -> CacheSpan:
        """What a cache must keep. The default keeps everything."""
        return CacheSpan(None)

    @property
    def prefix(self) -> int | None:
        """The smallest n known such that every kept pair has k <= q or k < n; None where there is none.

        0 is causal. A causal model takes such a mask as it is, and its loss skips what a prefix shows.
        """
        return None

    @property
    def causal(self) -> bool:
        """True where it is certain that no key after the query is ever kept."""
        return self.prefix == 0

    def __and__(self, other: Mask) -> Mask:
        masks = _flatten(And, self, _checked(other))
        return And(masks) if len(masks) > 1 else masks[0]

    def __or__(self, other: Mask) -> Mask:
        masks = _flatten(Or, self, _checked(other))
        return Or(masks) if len(masks) > 1 else masks[0]

    def __invert__(self) -> Mask:
        return Not(self)

    def dense(self, q_pos: Array, k_pos: Array) -> Array:
        """The truth table [..., T, S] for positions [..., T] and [..., S]."""
        return self.keep(q_pos[..., :, None], k_pos[..., None, :])

    def density(self, T: int, S: int | None = None, *, block: int = 128) -> Density:
        """The fraction of kept pairs over positions 0..T-1 x 0..S-1.

        Blocks that `bounds` decides cost nothing. Up to 4096 undecided ones (a causal mask of 512k
        tokens) are evaluated entry by entry, and the figure is exact. Of more, 4096 drawn by a fixed
        seed stand for all, and the figure says that it is sampled.
        """
        S = T if S is None else S
        if T < 1 or S < 1:
            raise ValueError(f"density needs lengths >= 1, got {T} and {S}")
        q_lo, k_lo = np.arange(0, T, block)[:, None], np.arange(0, S, block)[None]
        q_hi, k_hi = np.minimum(q_lo + block, T) - 1, np.minimum(k_lo + block, S) - 1
        shape = (q_lo.size, k_lo.size)
        some, every = (np.broadcast_to(x, shape) for x in self.bounds(q_lo, q_hi, k_lo, k_hi))
        kept = int(((q_hi - q_lo + 1) * (k_hi - k_lo + 1))[every].sum())
        undecided = np.flatnonzero(some & ~every)
        chosen = undecided
        if undecided.size > _EXACT_BLOCKS:
            chosen = np.random.default_rng(0).choice(undecided, _EXACT_BLOCKS, replace=False)
        found = 0
        for i, j in zip(*np.unravel_index(chosen, shape), strict=True):
            q_pos = np.arange(q_lo[i, 0], q_hi[i, 0] + 1)[:, None]
            k_pos = np.arange(k_lo[0, j], k_hi[0, j] + 1)[None]
            found += int(np.broadcast_to(self.keep(q_pos, k_pos), (q_pos.size, k_pos.size)).sum())
        share = undecided.size / chosen.size if chosen.size else 0
        return Density((kept + found * share) / (T * S), exact=chosen is undecided)


def like(*arrays: Array) -> Array:
    """An all-True boolean of the broadcast shape, on NumPy and on traced arrays alike."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total == total


def _checked(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"a Mask combines with a Mask by & and |, not with {type(other).__name__}")
    return other


def _flatten(kind: type, *masks: Mask) -> tuple[Mask, ...]:
    """Nested Ands (Ors) become one, and repeated members go: Causal & Causal is Causal once."""
    flat: list[Mask] = []
    for mask in masks:
        flat.extend(mask.masks if isinstance(mask, kind) else (mask,))
    return tuple(dict.fromkeys(flat))


def parse(text: str) -> Mask:
    """The mask an expression describes, as YAML holds it: `"SlidingWindow(128) | Sinks(4)"`.

    Names are those of the Mask classes, arguments are literals, operators are & | ~. `str(mask)` is an
    expression that parses back to an equal mask. ValueError names what is not understood.
    """
    known = {cls.__name__: cls for cls in _subclasses(Mask) - {And, Or, Not, Recipe}}

    def build(node: ast.AST) -> Mask:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            left, right = build(node.left), build(node.right)
            return left & right if isinstance(node.op, ast.BitAnd) else left | right
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~build(node.operand)
        if isinstance(node, ast.Name):
            node = ast.Call(node, [], [])
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise ValueError(f"mask {text!r}: only masks joined by & | ~ are understood")
        if node.func.id not in known:
            raise ValueError(f"mask {text!r}: no mask {node.func.id!r}; there are {', '.join(sorted(known))}")
        try:
            args = [_literal(arg) for arg in node.args]
            kwargs = {kw.arg: _literal(kw.value) for kw in node.keywords}
            return known[node.func.id](*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"mask {text!r}: {error}") from None

    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"mask {text!r} is no expression such as 'SlidingWindow(128) & Causal()'") from None
    return build(tree)


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"arguments are plain numbers, or tuples of them, got {ast.unparse(node)}") from None


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__())) - {Mask}


# Positions are int32: a larger number could not be compared with one, and sums in `bounds` would wrap.
_LARGEST = 2**30


def natural(name: str, value: int, least: int = 0, most: int = _LARGEST) -> None:
    """ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be <= {most}, got {value}")


@dataclasses.dataclass(frozen=True, repr=False)
class And(Mask):
    """Kept where every member keeps."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' & '.join(map(repr, self.masks))})"

    def keep(self, q_pos, k_pos):
        kept = self.masks[0].keep(q_pos, k_pos)
        for mask in self.masks[1:]:
            kept = kept & mask.keep(q_pos, k_pos)
        return kept

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        some, every = self.masks[0].bounds(q_lo, q_hi, k_lo, k_hi)
        for mask in self.masks[1:]:
            s, e = mask.bounds(q_lo, q_hi, k_lo, k_hi)
            some, every = some & s, every & e
        return some, every

    def cache_span(self):
        # A key must be needed by all members: (ring_a + pins_a) * (ring_b + pins_b) lies within the
        # smaller ring plus the pins of the members that do not keep everything anyway.
        bounded = [r for r in (m.cache_span() for m in self.masks) if r.lookback is not None]
        if not bounded:
            return CacheSpan(None)
        return CacheSpan(min(r.lookback for r in bounded), _union(bounded))

    @property
    def prefix(self):
        known = [mask.prefix for mask in self.masks if mask.prefix is not None]
        return min(known) if known else None


@dataclasses.dataclass(frozen=True, repr=False)
class Or(Mask):
    """Kept where any member keeps."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' | '.join(map(repr, self.masks))})"

    def keep(self, q_pos, k_pos):
        kept = self.masks[0].keep(q_pos, k_pos)
        for mask in self.masks[1:]:
            kept = kept | mask.keep(q_pos, k_pos)
        return kept

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        some, every = self.masks[0].bounds(q_lo, q_hi, k_lo, k_hi)
        for mask in self.masks[1:]:
            s, e = mask.bounds(q_lo, q_hi, k_lo, k_hi)
            some, every = some | s, every | e
        return some, every

    def cache_span(self):
        each = [mask.cache_span() for mask in self.masks]
        if any(r.lookback is None for r in each):
            return CacheSpan(None)
        return CacheSpan(max(r.lookback for r in each), _union(each))

    @property
    def prefix(self):
        each = [mask.prefix for mask in self.masks]
        return None if None in each else max(each)


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """Kept where the member does not keep."""

    mask: Mask

    def __repr__(self):
        return f"~{self.mask!r}"

    def keep(self, q_pos, k_pos):
        return self.mask.keep(q_pos, k_pos) == False  # noqa: E712

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        some, every = self.mask.bounds(q_lo, q_hi, k_lo, k_hi)
        return every == False, some == False  # noqa: E712


@dataclasses.dataclass(frozen=True)
class Recipe(Mask):
    """Base of masks that stand for an expression of others."""

    @property
    def expression(self) -> Mask:
        """The masks this one is made of."""
        raise NotImplementedError

    def keep(self, q_pos, k_pos):
        return self.expression.keep(q_pos, k_pos)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        return self.expression.bounds(q_lo, q_hi, k_lo, k_hi)

    def cache_span(self):
        return self.expression.cache_span()

    @property
    def prefix(self):
        return self.expression.prefix


def _union(spans: list[CacheSpan]) -> tuple[int, ...]:
    return tuple(sorted({pin for r in spans for pin in r.pinned}))
