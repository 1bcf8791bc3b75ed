"""`check`: whether what a mask says of itself agrees with its `keep`.

Blocks are skipped, caches shortened and programs shared by what a mask promises: a wrong `bounds` or
`cache_span`, or a field that equality ignores, gives wrong numbers without an error. `check` compares every
promise with `keep`, evaluated pair by pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.masks.algebra import CacheSpan, Mask, frozen_class, parse

_SMALL = 16  # every rectangle within so many positions is compared
_SIZES = (1, 2, 4, 7, 8, 16, 32, 64, 128)  # of the square blocks over all positions


def check(mask: Mask, length: int = 64) -> None:
    """Raise ValueError, in one line, if a promise of the mask disagrees with its `keep`.

    Compared for positions 0 .. length - 1, with NumPy and with traced arrays: `keep`, elementwise and
    boolean; `bounds`, over every rectangle of the first 16 positions and over blocks of all of them;
    `cache_span`, for queries up to 2 length; `prefix`; equality and hash; `parse(str(mask))`, if every field
    is a number or a tuple. A `bounds` that claims less than is true (any=True, all=False) is correct.
    length: greater than the distances of the mask.

    Raises: ValueError; TypeError for what is not a mask, or a class that is not a frozen dataclass.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"check takes a Mask, got {type(mask).__name__}")
    frozen_class(type(mask))
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be an integer >= 1, got {length!r}")
    _check_identity(mask)
    keep_TS = _table(mask, length)
    for q_lo, q_hi, k_lo, k_hi in _rectangles(length):
        corners = (q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
        _check_bounds(mask, keep_TS, _call(mask, "bounds", *corners), corners, "")
    _check_traced_bounds(mask, keep_TS, length)
    _check_cache_span(mask, keep_TS, length)
    _check_prefix(mask, keep_TS[:length])
    _check_parse(mask)


def _check_identity(mask: Mask) -> None:
    for field in dataclasses.fields(mask):
        if not field.compare and type(mask).__dataclass_params__.eq:
            raise ValueError(
                f"{_name(mask)}: the field {field.name} has compare=False: masks that differ in it would be "
                "equal, and share a compiled program"
            )
    copy = dataclasses.replace(mask)
    try:
        hashes = hash(mask), hash(copy)
    except TypeError as error:
        raise ValueError(f"{_name(mask)} is not hashable: {error}; use tuples for lists") from None
    if copy != mask or hashes[0] != hashes[1]:
        what = "equal" if copy != mask else "of one hash"
        raise ValueError(
            f"{_name(mask)}: two masks with the same fields are not {what}: every call would compile anew"
        )


def _table(mask: Mask, length: int) -> np.ndarray:
    """`keep` of positions [2 length, 2 length], boolean; ValueError where NumPy and traced arrays differ."""
    positions = np.arange(2 * length)
    keep_TS = _evaluated(mask, "keep", (positions[:, None], positions[None]), (2 * length, 2 * length))
    try:
        traced = jax.jit(mask.dense)(positions.astype(np.int32), positions.astype(np.int32))
    except jax.errors.JAXTypeError:
        raise _untraceable(mask, "keep") from None
    if traced.dtype != bool:
        raise ValueError(f"{_name(mask)}: keep of traced arrays must be boolean, got {traced.dtype}")
    _agree(mask, keep_TS, np.broadcast_to(traced, keep_TS.shape), "of traced arrays")
    some = np.unique(np.linspace(0, 2 * length - 1, 9).astype(int)).tolist()
    single = np.array([[bool(np.all(mask.keep(q, k))) for k in some] for q in some])
    grid = np.ix_(some, some)
    for i, j in np.argwhere(single != keep_TS[grid]):
        raise ValueError(
            f"{_name(mask)}: keep is not elementwise: keep({some[i]}, {some[j]}) is {single[i, j]} alone and "
            f"{keep_TS[some[i], some[j]]} in an array"
        )
    return keep_TS


def _agree(mask: Mask, keep_TS: np.ndarray, other_TS: np.ndarray, what: str) -> None:
    for q, k in np.argwhere(keep_TS != other_TS)[:1]:
        raise ValueError(
            f"{_name(mask)}: keep({q}, {k}) is {keep_TS[q, k]} of NumPy arrays and {other_TS[q, k]} {what}"
        )


def _call(mask: Mask, name: str, *arrays: np.ndarray) -> Any:
    try:
        return getattr(mask, name)(*arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_name(mask)}: {name} fails on arrays: {error}") from None


def _evaluated(mask: Mask, name: str, arrays: tuple, shape: tuple[int, ...]) -> np.ndarray:
    found = _call(mask, name, *arrays)
    if getattr(found, "dtype", None) != np.bool_:
        got = getattr(found, "dtype", type(found).__name__)
        raise ValueError(f"{_name(mask)}: {name} must be boolean, got {got}")
    try:
        return np.broadcast_to(np.asarray(found), shape)
    except ValueError:
        raise ValueError(
            f"{_name(mask)}: {name} of positions {list(shape)} has the shape {list(np.shape(found))}"
        ) from None


def _rectangles(length: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(q_lo, q_hi, k_lo, k_hi) of grids: [Q] intervals of queries by [K] intervals of keys."""
    low, high = np.triu_indices(min(_SMALL, length))
    yield low, high, low, high
    for size in _SIZES:
        if size <= length:
            q_lo = np.arange(0, length, size)
            k_lo = np.arange(size // 3, length, size)  # blocks of keys that begin elsewhere
            yield q_lo, np.minimum(q_lo + size, length) - 1, k_lo, np.minimum(k_lo + size, length) - 1


def _check_traced_bounds(mask: Mask, keep_TS: np.ndarray, length: int) -> None:
    flat: list[list[np.ndarray]] = []
    for q_lo, q_hi, k_lo, k_hi in _rectangles(length):
        q, k = np.indices((q_lo.size, k_lo.size)).reshape(2, -1)
        flat.append([q_lo[q], q_hi[q], k_lo[k], k_hi[k]])
    corners = tuple(np.concatenate(parts).astype(np.int32) for parts in zip(*flat, strict=True))
    try:
        found = jax.jit(mask.bounds)(*corners)
    except jax.errors.JAXTypeError:
        raise _untraceable(mask, "bounds") from None
    _check_bounds(mask, keep_TS, found, corners, " of traced arrays")
    positions = jnp.arange(8)
    for name, arguments in (("keep", (positions,) * 2), ("bounds", (positions,) * 4)):
        program = jax.make_jaxpr(getattr(mask, name))(*arguments)
        if "not" in {equation.primitive.name for equation in program.eqns}:
            raise ValueError(
                f"{_name(mask)}: {name} uses ~, which does not lower inside a kernel: write == False"
            )


def _check_bounds(mask: Mask, keep_TS: np.ndarray, found: Any, corners: tuple, what: str) -> None:
    """ValueError for a rectangle that is called empty or full and is not."""
    q_lo, q_hi, k_lo, k_hi = corners
    area = np.pad(keep_TS.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    kept = area[q_hi + 1, k_hi + 1] - area[q_lo, k_hi + 1] - area[q_hi + 1, k_lo] + area[q_lo, k_lo]
    sizes = (q_hi - q_lo + 1) * (k_hi - k_lo + 1)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"{_name(mask)}: bounds must return (any, all), got {type(found).__name__}")
    for name, value in zip(("any", "all"), found, strict=True):
        if (
            getattr(value, "dtype", None) != np.bool_
            or np.broadcast_shapes(np.shape(value), kept.shape) != kept.shape
        ):
            got = f"{getattr(value, 'dtype', type(value).__name__)} {list(np.shape(value))}"
            raise ValueError(f"{_name(mask)}: {name} of bounds must be boolean {list(kept.shape)}, got {got}")
    any_kept, all_kept = (np.broadcast_to(value, kept.shape) for value in found)
    for wrong, claim, truth in (
        ((kept > 0) & ~any_kept, "any=False", True),
        ((kept < sizes) & all_kept, "all=True", False),
    ):
        if wrong.any():
            # The smallest rectangle says most.
            at = np.unravel_index(np.where(wrong, sizes, sizes.max() + 1).argmin(), kept.shape)
            low_q, high_q, low_k, high_k = (int(np.broadcast_to(x, kept.shape)[at]) for x in corners)
            q, k = np.argwhere(keep_TS[low_q : high_q + 1, low_k : high_k + 1] == truth)[0]
            raise ValueError(
                f"{_name(mask)}: bounds{what} says {claim} of the block q {low_q}..{high_q}, "
                f"k {low_k}..{high_k}, but keep({low_q + q}, {low_k + k}) is {truth}"
            )


def _check_cache_span(mask: Mask, keep_TS: np.ndarray, length: int) -> None:
    span = mask.cache_span()
    if not isinstance(span, CacheSpan):
        raise ValueError(f"{_name(mask)}: cache_span() must return a CacheSpan, got {type(span).__name__}")
    lookback, pinned = span
    numbers = (*pinned, *(() if lookback is None else (lookback,)))
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"{_name(mask)}: cache_span() must hold integers >= 0, got {span}")
    if list(pinned) != sorted(set(pinned)):
        raise ValueError(f"{_name(mask)}: the pinned positions of cache_span() must ascend, got {pinned}")
    if lookback is None:
        return
    # Key k may be gone once the newest key is k + lookback, and is needed by no query from there on.
    for k in sorted(set(range(length)) - set(pinned)):
        later = k + lookback + np.flatnonzero(keep_TS[k + lookback :, k])
        if later.size:
            raise ValueError(
                f"{_name(mask)}: cache_span() drops key {k} when key {k + lookback} is the newest, but "
                f"keep({later[0]}, {k}) is True"
            )


def _check_prefix(mask: Mask, keep_TS: np.ndarray) -> None:
    prefix = mask.prefix
    if mask.causal != (prefix == 0):
        raise ValueError(
            f"{_name(mask)}: causal is {mask.causal} and prefix is {prefix}: define prefix alone"
        )
    if prefix is None:
        return
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"{_name(mask)}: prefix must be an integer >= 0 or None, got {prefix!r}")
    for q, k in np.argwhere(np.triu(keep_TS, 1)[:, prefix:])[:1]:
        raise ValueError(
            f"{_name(mask)}: prefix is {prefix}: no key after a query from {prefix} on is kept, but "
            f"keep({q}, {k + prefix}) is True"
        )


def _check_parse(mask: Mask) -> None:
    if not _is_plain(mask):
        return
    try:
        again = parse(str(mask))
    except ValueError as error:
        raise ValueError(f"{_name(mask)}: str(mask) must be an expression of masks: {error}") from None
    if again != mask:
        raise ValueError(f"{_name(mask)}: parse(str(mask)) is another mask, {again}")


def _is_plain(value: Any) -> bool:
    """Whether a value can be written in an expression: masks of numbers and tuples."""
    if isinstance(value, Mask):
        if "<locals>" in type(value).__qualname__:  # a class inside a function is not known by its text
            return False
        return all(_is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _untraceable(mask: Mask, name: str) -> ValueError:
    return ValueError(
        f"{_name(mask)}: {name} cannot be traced: use comparisons, integer arithmetic, & and | on its "
        "arguments, and == False to negate"
    )


def _name(mask: Mask) -> str:
    text = str(mask)
    return text if len(text) <= 60 and "\n" not in text else type(mask).__name__
