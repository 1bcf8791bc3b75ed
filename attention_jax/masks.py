"""Masks: functions of positions, never arrays.

A `Mask` is a frozen, hashable relation between a query position and a key position. It answers three
questions, and everything else (the dense reference, the block lists of the kernels, the decode row, the
cache, the density, the picture) follows from them:

    keep(q_pos, k_pos)                 may this query see this key?           elementwise
    bounds(q_lo, q_hi, k_lo, k_hi)     (any, all) over a rectangle            block logic, inclusive bounds
    retention()                        which past keys may still be needed?   cache size

`keep` and `bounds` use comparisons, integer arithmetic, `&` and `|` only, so that they run unchanged on
NumPy arrays, on traced arrays and inside a kernel. Negation is written `== False`, because `~` on
booleans does not lower inside a Mosaic kernel.

Patterns are relations, not causal by themselves; a causal model intersects them with `Causal()`.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a NumPy array, a jax array, a tracer or a kernel value: the algebra does not care


class Retention(NamedTuple):
    """What a cache must keep for queries at or after the newest key.

    lookback: the newest `lookback` positions may be needed (a query's own included); None keeps all.
    pins: positions needed for ever, whatever their age.
    """

    lookback: int | None
    pins: tuple[int, ...] = ()


class Mask:
    """Base of all masks. Subclasses are frozen dataclasses of plain Python values."""

    def keep(self, q_pos: Array, k_pos: Array) -> Array:
        """Boolean, elementwise over the broadcast shapes: may `q_pos` attend to `k_pos`?"""
        raise NotImplementedError

    def bounds(self, q_lo: Array, q_hi: Array, k_lo: Array, k_hi: Array) -> tuple[Array, Array]:
        """(any, all) of `keep` over [q_lo, q_hi] x [k_lo, k_hi], all inclusive, elementwise.

        Exact for leaves; for composites `any` may be True and `all` False without need, never the
        reverse. A user predicate that brings none is (True, False) everywhere.
        """
        anywhere = _like(q_lo, q_hi, k_lo, k_hi)
        return anywhere, anywhere == False  # noqa: E712

    def retention(self) -> Retention:
        """What a cache must keep. The default keeps everything."""
        return Retention(None)

    @property
    def causal(self) -> bool:
        """True where it is certain that no key after the query is ever kept."""
        return False

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

    def density(self, T: int, S: int | None = None, *, block: int = 128) -> float:
        """The fraction of kept pairs over positions 0..T-1 x 0..S-1, exact, in O(partial blocks).

        Blocks that `bounds` decides cost nothing; only undecided ones are evaluated entry by entry.
        """
        S = T if S is None else S
        kept = 0
        k_lo = np.arange(0, S, block)
        k_hi = np.minimum(k_lo + block, S) - 1
        for q_lo in range(0, T, block):
            q_hi = min(q_lo + block, T) - 1
            some, every = (np.broadcast_to(x, k_lo.shape) for x in self.bounds(q_lo, q_hi, k_lo, k_hi))
            kept += int((k_hi - k_lo + 1)[every].sum()) * (q_hi - q_lo + 1)
            q_pos = np.arange(q_lo, q_hi + 1)[:, None]
            for j in np.flatnonzero(some & ~every):
                k_pos = np.arange(k_lo[j], k_hi[j] + 1)[None]
                kept += int(np.broadcast_to(self.keep(q_pos, k_pos), (len(q_pos), k_pos.size)).sum())
        return kept / (T * S)


def _like(*arrays: Array) -> Array:
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
    known = {cls.__name__: cls for cls in _subclasses(Mask) if cls not in (And, Or, Not)}

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
            args = [ast.literal_eval(arg) for arg in node.args]
            kwargs = {kw.arg: ast.literal_eval(kw.value) for kw in node.keywords}
            return known[node.func.id](*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"mask {text!r}: {error}") from None

    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"mask {text!r} is no expression such as 'SlidingWindow(128) & Causal()'") from None
    return build(tree)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__())) - {Mask}


def _natural(name: str, value: int, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair is kept."""

    def keep(self, q_pos, k_pos):
        return _like(q_pos, k_pos)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        everywhere = _like(q_lo, q_hi, k_lo, k_hi)
        return everywhere, everywhere


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """k <= q: a query sees itself and what came before."""

    def keep(self, q_pos, k_pos):
        return k_pos <= q_pos

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        return k_lo <= q_hi, k_hi <= q_lo

    @property
    def causal(self):
        return True


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """-right <= q - k < window: `window` keys, the query's own included, and `right` keys ahead.

    `SlidingWindow(1)` sees itself alone. (Some libraries count window + 1 keys; this one counts keys.)
    """

    window: int
    right: int = 0

    def __post_init__(self):
        _natural("SlidingWindow window", self.window, 1)
        _natural("SlidingWindow right", self.right)

    def keep(self, q_pos, k_pos):
        distance = q_pos - k_pos
        return (distance >= -self.right) & (distance < self.window)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        # q - k takes every integer in [nearest, farthest] over the rectangle.
        nearest, farthest = q_lo - k_hi, q_hi - k_lo
        some = (farthest >= -self.right) & (nearest < self.window)
        every = (nearest >= -self.right) & (farthest < self.window)
        return some, every

    def retention(self):
        return Retention(self.window)

    @property
    def causal(self):
        return self.right == 0


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """k < count: the first `count` positions, kept by every query (StreamingLLM, arXiv 2309.17453)."""

    count: int

    def __post_init__(self):
        _natural("Sinks count", self.count, 1)

    def keep(self, q_pos, k_pos):
        return k_pos + 0 * q_pos < self.count

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        span = 0 * (q_lo + q_hi)
        return k_lo + span < self.count, k_hi + span < self.count

    def retention(self):
        return Retention(0, tuple(range(self.count)))


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

    def retention(self):
        # A key must be needed by all members: (ring_a + pins_a) * (ring_b + pins_b) lies within the
        # smaller ring plus the pins of the members that do not keep everything anyway.
        bounded = [r for r in (m.retention() for m in self.masks) if r.lookback is not None]
        if not bounded:
            return Retention(None)
        return Retention(min(r.lookback for r in bounded), _union(bounded))

    @property
    def causal(self):
        return any(mask.causal for mask in self.masks)


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

    def retention(self):
        each = [mask.retention() for mask in self.masks]
        if any(r.lookback is None for r in each):
            return Retention(None)
        return Retention(max(r.lookback for r in each), _union(each))

    @property
    def causal(self):
        return all(mask.causal for mask in self.masks)


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


def _union(retentions: list[Retention]) -> tuple[int, ...]:
    return tuple(sorted({pin for r in retentions for pin in r.pins}))
