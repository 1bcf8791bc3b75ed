"""The mask algebra: masks are functions of positions, not arrays.

A `Mask` is a frozen, hashable relation between a query position and a key position. It has three methods,
from which everything else is derived (the dense reference, the block lists of the kernels, the decoding
mask, the cache, the density, the plot):

    keep(q_pos, k_pos)                 may this query attend to this key?     elementwise
    bounds(q_lo, q_hi, k_lo, k_hi)     (any, all) over a rectangle            block logic, inclusive bounds
    cache_span()                        which past keys may still be needed?   cache size

`keep` and `bounds` use only comparisons, integer arithmetic, `&` and `|`, so that they run unchanged on
NumPy arrays, on traced arrays and inside a kernel. `Dense`, and `Global` with many runs of positions, also
index an array, which kernels load beforehand. Negation is written `== False`, because `~` on booleans does
not lower inside a Mosaic kernel.

A pattern need not be causal; a causal model intersects its masks with `Causal()`.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from attention_jax.about import About
from attention_jax.hints import hint

Array = Any  # a NumPy array, a jax array, a tracer or a value inside a kernel


class CacheSpan(NamedTuple):
    """The keys that a cache must keep for queries at or after the newest key.

    lookback: the newest `lookback` positions may be needed (the query's own included); None keeps all.
    pinned: positions that are always needed, independent of their distance.
    """

    lookback: int | None
    pinned: tuple[int, ...] = ()


class Density(float):
    """A fraction in [0, 1]; `exact` is True if it was counted and False if it was estimated by sampling."""

    exact: bool

    def __new__(cls, value: float, exact: bool = True) -> Density:
        self = super().__new__(cls, value)
        self.exact = exact
        return self

    def __str__(self) -> str:
        return f"{float(self):.2%}" if self.exact else f"~{float(self):.2%} (sampled)"


_EXACT_BLOCKS = 4096  # the most partial blocks that `density` counts entry by entry


class Mask:
    """Base class of all masks. Subclasses are frozen dataclasses of plain Python values.

    Raises: TypeError on construction of a class that is not one: its masks would be equal, or unequal,
    whatever they hold, and equal masks share a compiled program. `masks.check` compares the methods.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        frozen_class(cls)
        return super().__new__(cls)

    about: ClassVar[About | None] = None  # its entry in the catalogue
    plot: ClassVar[Callable[..., Any]]  # mask.plot(T, S=None, ...) -> figure, defined in masks/picture.py

    def keep(self, q_pos: Array, k_pos: Array) -> Array:
        """Boolean, elementwise over the broadcast shapes: may `q_pos` attend to `k_pos`?"""
        raise NotImplementedError

    def bounds(self, q_lo: Array, q_hi: Array, k_lo: Array, k_hi: Array) -> tuple[Array, Array]:
        """(any, all) of `keep` over [q_lo, q_hi] x [k_lo, k_hi], all inclusive, elementwise.

        Exact for leaves. For composites the result is conservative: `any` may be True although no pair is
        kept, and `all` may be False although every pair is kept. The default is (True, False) everywhere.
        """
        anywhere = like(q_lo, q_hi, k_lo, k_hi)
        return anywhere, anywhere == False  # noqa: E712

    def cache_span(self) -> CacheSpan:
        """The keys that a cache must keep. The default keeps all keys."""
        return CacheSpan(None)

    @property
    def prefix(self) -> int | None:
        """The smallest known n such that every kept pair has k <= q or k < n; None if no such n is known.

        0 means causal. A causal model uses a mask with a prefix unchanged, and its loss excludes the targets
        inside the prefix.
        """
        return None

    @property
    def causal(self) -> bool:
        """True if the mask is known never to keep a key after the query."""
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
        """The boolean mask array [..., T, S] for positions [..., T] and [..., S]."""
        return self.keep(q_pos[..., :, None], k_pos[..., None, :])

    def density(self, T: int, S: int | None = None, *, block: int = 128) -> Density:
        """The fraction of kept pairs over positions 0..T-1 x 0..S-1.

        `bounds` classifies the blocks. If at most 4096 are partial (as in a causal mask over 512k tokens),
        those are evaluated entry by entry and the result is exact. Otherwise only 4096 partial blocks, drawn
        with a fixed seed, are evaluated, and the result is an estimate with `exact` False.
        """
        S = T if S is None else S
        if T < 1 or S < 1:
            raise ValueError(f"density: T and S must be >= 1, got {T} and {S}")
        q_lo, k_lo = np.arange(0, T, block)[:, None], np.arange(0, S, block)[None]
        q_hi, k_hi = np.minimum(q_lo + block, T) - 1, np.minimum(k_lo + block, S) - 1
        shape = (q_lo.size, k_lo.size)
        any_kept, all_kept = (np.broadcast_to(x, shape) for x in self.bounds(q_lo, q_hi, k_lo, k_hi))
        kept = int(((q_hi - q_lo + 1) * (k_hi - k_lo + 1))[all_kept].sum())
        undecided = np.flatnonzero(any_kept & ~all_kept)
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


def frozen_class(cls: type) -> None:
    """TypeError unless the class itself is a frozen dataclass; a base class that is one is not enough."""
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise TypeError(
            f"{cls.__name__} is not a frozen dataclass: write @dataclasses.dataclass(frozen=True) above it"
        )


def like(*arrays: Array) -> Array:
    """An all-True boolean array of the broadcast shape, for NumPy and traced arrays."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total == total


def as_integer(condition: Any, x: Any) -> Any:
    """A comparison as 0 or 1 in the type of x, a Python integer or an array."""
    if not hasattr(condition, "astype"):
        return int(condition)
    return condition.astype(getattr(x, "dtype", np.int32))


def _checked(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"a Mask combines with a Mask by & and |, got {type(other).__name__}")
    return other


def _flatten(kind: type, *masks: Mask) -> tuple[Mask, ...]:
    """The members of an And (Or) with nested ones flattened and duplicates removed."""
    flat: list[Mask] = []
    for mask in masks:
        flat.extend(mask.masks if isinstance(mask, kind) else (mask,))
    return tuple(dict.fromkeys(flat))


def parse(text: str) -> Mask:
    """The mask of an expression such as `"SlidingWindow(128) | Sinks(4)"`, the form used in YAML.

    An expression combines calls of Mask classes with literal arguments by & | ~. `str(mask)` is an expression
    that parses to an equal mask. Raises: ValueError for any other text.
    """
    known = {cls.__name__: cls for cls in _subclasses(Mask) if cls not in (And, Or, Not, Recipe)}
    shown = repr(text if len(text) <= 80 else text[:77] + "...")

    def build(node: ast.AST) -> Mask:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            left, right = build(node.left), build(node.right)
            return left & right if isinstance(node.op, ast.BitAnd) else left | right
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~build(node.operand)
        if isinstance(node, ast.Name):
            node = ast.Call(node, [], [])
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise ValueError(f"mask {shown}: only masks combined with & | ~ are allowed")
        if node.func.id not in known:
            names = ", ".join(sorted(known)) + hint("mask", node.func.id, known)
            raise ValueError(f"mask {shown}: unknown mask {node.func.id!r}; choose from {names}")
        try:
            args = [_literal(arg) for arg in node.args]
            kwargs = {kw.arg: _literal(kw.value) for kw in node.keywords}
            return known[node.func.id](*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"mask {shown}: {error}") from None

    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"mask {shown} has {len(text)} characters: an expression has <= {_MOST_CHARACTERS}")
    try:
        with warnings.catch_warnings(action="ignore"):  # such as 1if: Python's words about its own syntax
            tree = ast.parse(text.strip(), mode="eval").body
    except (RecursionError, MemoryError):
        raise ValueError(f"mask {shown} nests too deeply: an expression has <= {_DEEPEST} levels") from None
    except (SyntaxError, ValueError):
        raise ValueError(
            f"mask {shown} cannot be parsed: give an expression such as 'SlidingWindow(128) & Causal()'"
        ) from None
    if (depth := _depth(tree)) > _DEEPEST:
        raise ValueError(
            f"mask {shown} nests {depth} levels of & | ~ and calls: an expression has <= {_DEEPEST}"
        )
    return build(tree)


def _depth(tree: ast.AST) -> int:
    """How many levels of nodes a tree has; a loop, since recursion is what the depth would break."""
    deepest, pending = 0, [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        pending += [(child, depth + 1) for child in ast.iter_child_nodes(node)]
    return deepest


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"arguments must be numbers or tuples of numbers, got {ast.unparse(node)}") from None


def _subclasses(cls: type) -> list[type]:
    """In the order of their definition: of two with one name, as in a notebook, the newer comes later."""
    return [c for below in cls.__subclasses__() for c in (below, *_subclasses(below))]


# An expression that a person writes has one line; each of its masks is evaluated in every block.
_MOST_CHARACTERS, _DEEPEST = 100_000, 50

# Positions are int32: a larger parameter would not fit, and sums in `bounds` would overflow.
_LARGEST = 2**30
#: The most positions that a mask names one by one: a cache keeps each of them.
MOST_PINNED = 2**20


def natural(name: str, value: int, least: int = 0, most: int = _LARGEST) -> None:
    """Raise ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be <= {most}, got {value}")


@dataclasses.dataclass(frozen=True, repr=False)
class And(Mask):
    """Keeps the pairs that all members keep."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' & '.join(map(repr, self.masks))})"

    def keep(self, q_pos, k_pos):
        kept = self.masks[0].keep(q_pos, k_pos)
        for mask in self.masks[1:]:
            kept = kept & mask.keep(q_pos, k_pos)
        return kept

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        any_kept, all_kept = self.masks[0].bounds(q_lo, q_hi, k_lo, k_hi)
        for mask in self.masks[1:]:
            s, e = mask.bounds(q_lo, q_hi, k_lo, k_hi)
            any_kept, all_kept = any_kept & s, all_kept & e
        return any_kept, all_kept

    def cache_span(self):
        # A key is needed only if all members need it: (ring_a + pins_a) & (ring_b + pins_b) is a subset of
        # the smaller ring plus the pins of the members with a bounded lookback.
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
    """Keeps the pairs that any member keeps."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' | '.join(map(repr, self.masks))})"

    def keep(self, q_pos, k_pos):
        kept = self.masks[0].keep(q_pos, k_pos)
        for mask in self.masks[1:]:
            kept = kept | mask.keep(q_pos, k_pos)
        return kept

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        any_kept, all_kept = self.masks[0].bounds(q_lo, q_hi, k_lo, k_hi)
        for mask in self.masks[1:]:
            s, e = mask.bounds(q_lo, q_hi, k_lo, k_hi)
            any_kept, all_kept = any_kept | s, all_kept | e
        return any_kept, all_kept

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
    """Keeps the pairs that the member does not keep."""

    mask: Mask

    def __repr__(self):
        return f"~{self.mask!r}"

    def keep(self, q_pos, k_pos):
        return self.mask.keep(q_pos, k_pos) == False  # noqa: E712

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        any_kept, all_kept = self.mask.bounds(q_lo, q_hi, k_lo, k_hi)
        return all_kept == False, any_kept == False  # noqa: E712


@dataclasses.dataclass(frozen=True)
class Recipe(Mask):
    """Base class of masks that are defined as an expression of other masks."""

    @property
    def expression(self) -> Mask:
        """The equivalent expression of other masks."""
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
