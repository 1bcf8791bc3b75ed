"""Rows of T tokens from documents, by arithmetic on indices.

A split is one array of tokens and its spans: span i holds the `counts[i]` pairs (token p, target p + 1) for
p from `starts[i]`. No pair crosses documents, so no token is predicted from another document. A piece is a
run of pairs of one span in one row; it is a segment of its own, its positions start at 0, and its tokens do
not attend to what is before it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


class Piece(NamedTuple):
    """`length` pairs from token `start`; the first `unscored` ones are context only."""

    start: int
    length: int
    unscored: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """tokens [N] of any unsigned or int32 type; starts and counts [D] of its spans, int64."""

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @property
    def pairs(self) -> int:
        """How many tokens can be predicted."""
        return int(self.counts.sum())

    def as_one(self) -> Split:
        """The same tokens as one span, without document boundaries."""
        return Split(self.tokens, np.zeros(1, np.int64), np.array([len(self.tokens) - 1], np.int64))


class Sequential:
    """All pairs once, concatenated in rows of T; only the last row may be partly empty.

    The spans come in a given order, and their concatenation is rotated by `rotation` pairs, so that other
    orders and rotations cut the documents at other places.
    """

    def __init__(self, split: Split, T: int, order: np.ndarray | None = None, rotation: int = 0):
        counts = split.counts if order is None else split.counts[order]
        self._starts = split.starts if order is None else split.starts[order]
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        self._pairs = int(self._ends[-1])
        self._rotation = rotation
        self._T = T
        self.rows = rows_of(self._pairs, T)

    def pieces(self, row: int) -> Iterator[Piece]:
        """The pieces of a row, from left to right."""
        place = row * self._T
        end = min(place + self._T, self._pairs)
        while place < end:
            rotated = (place + self._rotation) % self._pairs
            span = int(np.searchsorted(self._ends, rotated, side="right"))
            length = min(end - place, int(self._ends[span]) - rotated)
            assert length > 0
            yield Piece(int(self._starts[span]) + rotated - int(self._begins[span]), length)
            place += length


def rows_of(pairs: int, T: int) -> int:
    """The number of rows of T that hold so many pairs; the last one may be partly empty."""
    return -(-pairs // T)


def shuffled(split: Split, T: int, seed: int, epoch: int) -> Sequential:
    """The rows of an epoch: in each, documents come in another order and are cut at other places."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(len(split.counts))
    return Sequential(split, T, order, int(rng.integers(split.pairs)))


def shuffled_pairs(pairs: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the numbers below `pairs`, independent for every (seed, epoch)."""
    # The raw bits are the same in every version of NumPy, and among 64 bits there are no ties.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(pairs), kind="stable")


def scoring_rows(split: Split, T: int) -> list[list[Piece]]:
    """Rows that score every pair exactly once, each with enough context.

    A span of up to T pairs is one piece, all scored; such pieces share rows, never cut. A longer one is
    read through windows of T pairs which advance by at most T // 2 and score what no window before scored.
    So a token at offset o of its span (its span's first input has offset 0) is predicted from at least
    min(o, T / 2) tokens before it, from at most T.
    """
    rows: list[list[Piece]] = []
    short: list[Piece] = []
    for start, count in zip(split.starts.tolist(), split.counts.tolist(), strict=True):
        if 0 < count < T:
            short.append(Piece(start, count))
            continue
        window, scored = 0, 0
        while scored < count:
            rows.append([Piece(start + window, T, scored - window)])
            scored = window + T
            window = min(window + max(T // 2, 1), count - T)
    return rows + _best_fit(short, T)


def _best_fit(pieces: Sequence[Piece], T: int) -> list[list[Piece]]:
    """Whole pieces in few rows: longest first, each into the fullest row with enough room."""
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in sorted(pieces, key=lambda p: -p.length):
        fit = bisect.bisect_left(rooms, (piece.length, -1))
        if fit == len(rooms):
            rows.append([])
            room, row = T, len(rows) - 1
        else:
            room, row = rooms.pop(fit)
        rows[row].append(piece)
        if room > piece.length:
            bisect.insort(rooms, (room - piece.length, row))
    return rows


def assemble(tokens: np.ndarray, rows: Sequence[Sequence[Piece]], T: int, *, segments: bool) -> Batch:
    """int32 [B, T]: tokens, targets (-1: not scored), and with `segments` positions and segment_ids.

    Slots without a pair hold token 0, target -1, position -1, segment -1.
    """
    shape = (len(rows), T)
    batch = {"tokens": np.zeros(shape, np.int32), "targets": np.full(shape, -1, np.int32)}
    if segments:
        batch |= {"positions": np.full(shape, -1, np.int32), "segment_ids": np.full(shape, -1, np.int32)}
    for b, pieces in enumerate(rows):
        t = 0
        for segment, (start, length, unscored) in enumerate(pieces):
            end = t + length
            batch["tokens"][b, t:end] = tokens[start : start + length]
            batch["targets"][b, t + unscored : end] = tokens[start + unscored + 1 : start + length + 1]
            if segments:
                batch["positions"][b, t:end] = np.arange(length)
                batch["segment_ids"][b, t:end] = segment
            t = end
    return batch


def pad_sources(split: Split, rows: Sequence[int], S: int) -> Batch:
    """int32 [B, S]: sources, the tokens of spans `rows`, and source_positions (-1: no token).

    A row < 0 is empty. Here `split.counts` are numbers of tokens, each at most S.
    """
    sources = np.zeros((len(rows), S), np.int32)
    positions = np.full((len(rows), S), -1, np.int32)
    for b, row in enumerate(rows):
        if row >= 0:
            start, length = int(split.starts[row]), int(split.counts[row])
            sources[b, :length] = split.tokens[start : start + length]
            positions[b, :length] = np.arange(length)
    return {"sources": sources, "source_positions": positions}
