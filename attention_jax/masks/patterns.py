"""Regular patterns: leaves of the mask algebra, each a relation between a query and a key position.

The docstring of each class begins with its formula, in positions q, k >= 0. `bounds` is exact for each of
them. Patterns compose with & | ~, and a causal model intersects them with `Causal()`.
"""

from __future__ import annotations

import dataclasses

from attention_jax.about import About
from attention_jax.masks.algebra import MOST_PINNED, CacheSpan, Mask, as_integer, like, natural


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Keeps every pair."""

    about = About("Full", "arXiv 1706.03762", "O(T^2)", cache="all keys")

    def keep(self, q_pos, k_pos):
        return like(q_pos, k_pos)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        everywhere = like(q_lo, q_hi, k_lo, k_hi)
        return everywhere, everywhere


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """k <= q: a query attends to itself and to earlier positions."""

    about = About("Causal", "arXiv 1706.03762", "O(T^2 / 2)", cache="all keys")

    def keep(self, q_pos, k_pos):
        return k_pos <= q_pos

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        return k_lo <= q_hi, k_hi <= q_lo

    @property
    def prefix(self):
        return 0


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """-right <= q - k < window: `window` keys up to and including the query's own, and `right` later keys.

    `window` counts keys: `SlidingWindow(1)` attends to itself only. Some libraries count window + 1 keys.
    """

    about = About("Sliding window", "arXiv 2004.05150", "O(T window)", cache="ring of window")

    window: int
    right: int = 0

    def __post_init__(self):
        natural("SlidingWindow window", self.window, 1)
        natural("SlidingWindow right", self.right)

    def keep(self, q_pos, k_pos):
        distance = q_pos - k_pos
        return (distance >= -self.right) & (distance < self.window)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        # q - k takes every integer in [nearest, farthest] over the rectangle.
        nearest, farthest = q_lo - k_hi, q_hi - k_lo
        any_kept = (farthest >= -self.right) & (nearest < self.window)
        all_kept = (nearest >= -self.right) & (farthest < self.window)
        return any_kept, all_kept

    def cache_span(self):
        return CacheSpan(self.window)

    @property
    def prefix(self):
        return 0 if self.right == 0 else None


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """q - k in {0, s, 2s, ..., (window - 1) s}: `window` keys, `stride` = s apart (arXiv 2004.05150)."""

    about = About(
        "Dilated window",
        "arXiv 2004.05150",
        "O(T window stride) by blocks",
        cache="ring of (window - 1) stride + 1",
    )

    window: int
    stride: int

    def __post_init__(self):
        natural("Dilated window", self.window, 1)
        natural("Dilated stride", self.stride, 1)
        natural("Dilated (window - 1) stride", self._reach)

    @property
    def _reach(self) -> int:
        return (self.window - 1) * self.stride

    def keep(self, q_pos, k_pos):
        distance = q_pos - k_pos
        return (distance >= 0) & (distance <= self._reach) & (distance % self.stride == 0)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        nearest, farthest = q_lo - k_hi, q_hi - k_lo
        # The first multiple of the stride that is >= 0 and >= nearest.
        first = as_integer(nearest > 0, nearest) * ((nearest + self.stride - 1) // self.stride) * self.stride
        any_kept = (first <= farthest) & (first <= self._reach)
        all_kept = (nearest >= 0) & (farthest <= self._reach)
        if self.stride > 1:
            all_kept = all_kept & (nearest == farthest) & (nearest % self.stride == 0)
        return any_kept, all_kept

    def cache_span(self):
        return CacheSpan(self._reach + 1)

    @property
    def prefix(self):
        return 0


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """k % stride == 0 or k == q: every stride-th key, and the query's own (arXiv 1904.10509)."""

    about = About("Strided", "arXiv 1904.10509", "O(T^2) by blocks", cache="all keys")

    stride: int

    def __post_init__(self):
        natural("Strided stride", self.stride, 1)

    def keep(self, q_pos, k_pos):
        return (k_pos % self.stride == 0) | (k_pos == q_pos)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        first = (k_lo + self.stride - 1) // self.stride  # the first multiple >= k_lo, over stride
        multiples = k_hi // self.stride - first + 1
        any_kept = (multiples > 0) | ((q_lo <= k_hi) & (k_lo <= q_hi))
        others = k_hi - k_lo + 1 - multiples
        # A single key that is not a multiple is kept only by the query at the same position.
        own = (q_lo == q_hi) & (q_lo >= k_lo) & (q_lo <= k_hi) & (q_lo % self.stride > 0)
        return any_kept, (others == 0) | ((others == 1) & own)


@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
    """q // size == k // size: a query attends within its own chunk, as in Llama 4's local layers.

    Also called block-diagonal attention.
    """

    about = About("Chunked, block-diagonal", "Llama 4 model card", "O(T size)", cache="ring of size")

    size: int

    def __post_init__(self):
        natural("Chunked size", self.size, 1)

    def keep(self, q_pos, k_pos):
        return q_pos // self.size == k_pos // self.size

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        q_lo, q_hi, k_lo, k_hi = (x // self.size for x in (q_lo, q_hi, k_lo, k_hi))
        return (q_lo <= k_hi) & (k_lo <= q_hi), (q_lo == k_hi) & (k_lo == q_hi)

    def cache_span(self):
        return CacheSpan(self.size)


@dataclasses.dataclass(frozen=True)
class BlockLocal(Mask):
    """|q // block - k // block| <= neighbours: the query's block and `neighbours` blocks on either side."""

    about = About(
        "Block-local",
        "arXiv 1802.05751",
        "O(T block (2 neighbours + 1))",
        cache="ring of (neighbours + 1) block",
    )

    block: int
    neighbours: int = 1

    def __post_init__(self):
        natural("BlockLocal block", self.block, 1)
        natural("BlockLocal neighbours", self.neighbours)
        natural("BlockLocal block (neighbours + 1)", self.block * (self.neighbours + 1))

    def keep(self, q_pos, k_pos):
        apart = q_pos // self.block - k_pos // self.block
        return (apart <= self.neighbours) & (apart >= -self.neighbours)

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        q_lo, q_hi, k_lo, k_hi = (x // self.block for x in (q_lo, q_hi, k_lo, k_hi))
        any_kept = (q_lo - k_hi <= self.neighbours) & (k_lo - q_hi <= self.neighbours)
        all_kept = (q_hi - k_lo <= self.neighbours) & (k_hi - q_lo <= self.neighbours)
        return any_kept, all_kept

    def cache_span(self):
        return CacheSpan((self.neighbours + 1) * self.block)


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """k < count: every query attends to the first `count` positions (StreamingLLM, arXiv 2309.17453)."""

    about = About("Attention sinks", "arXiv 2309.17453", "O(T count)", cache="count pinned keys")

    count: int

    def __post_init__(self):
        natural("Sinks count", self.count, 1, MOST_PINNED)

    def keep(self, q_pos, k_pos):
        return k_pos + 0 * q_pos < self.count

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        span = 0 * (q_lo + q_hi)
        return k_lo + span < self.count, k_hi + span < self.count

    def cache_span(self):
        return CacheSpan(0, tuple(range(self.count)))


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """k < length: every query attends to the whole prefix; `Prefix(n) | Causal()` is prefix-LM.

    The relation is that of `Sinks`, but a causal model attends bidirectionally within a prefix, and its loss
    excludes the targets inside it (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1).
    """

    about = About("Prefix (prefix-LM)", "arXiv 1910.10683", "O(T length)", cache="length pinned keys")

    length: int

    def __post_init__(self):
        natural("Prefix length", self.length, 1, MOST_PINNED)

    def keep(self, q_pos, k_pos):
        return k_pos + 0 * q_pos < self.length

    def bounds(self, q_lo, q_hi, k_lo, k_hi):
        span = 0 * (q_lo + q_hi)
        return k_lo + span < self.length, k_hi + span < self.length

    def cache_span(self):
        return CacheSpan(0, tuple(range(self.length)))

    @property
    def prefix(self):
        return self.length
