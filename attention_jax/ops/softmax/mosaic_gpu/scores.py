"""From q . k to exponents inside a kernel: scale, softcap, bias, mask, dropout, for both directions.

z = (softcap(q . k * scale) + bias) * log2 e,   -inf where masked
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.masks import Full
from attention_jax.ops.softmax.common import SoftmaxCall, dropout_keep
from attention_jax.ops.softmax.mosaic_gpu.bias import TracedBias, trace_bias
from attention_jax.ops.softmax.mosaic_gpu.config import GROUP, WORD
from attention_jax.ops.softmax.mosaic_gpu.elementwise import LOG2E, K, Q, Traced, tanh, trace
from attention_jax.ops.softmax.mosaic_gpu.schedule import Side

MOST_VECTORS = 8  # that shared memory holds beside the tiles of every kernel, bits counted as one

# A finite start for the running maximum: -inf - -inf never appears, and 2^(z - LOWEST) is 0 for z = -inf.
LOWEST = -3.4028234663852886e38

Vector = Callable[[], jax.Array]  # loaded from memory where it is called


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What happens to the scores of a call, all of it known while tracing.

    table: the mask cannot be computed in a kernel, which reads it as bits (`bits.py`) with those of a boolean
    array; `keep` then keeps all. length: the number of keys where positions are implicit, else None.
    """

    keep: Traced
    bias: TracedBias | None
    dropout: Traced | None
    scale: float
    softcap: float | None
    dropout_rate: float
    positions: bool
    segments: bool
    length: int | None
    table: bool
    bits: bool

    def operands(self, B: int, N: int, q: Side, k: Side) -> dict[str, list[jax.Array]]:
        """The arrays `HopperTile` reads from global memory, beside bits and the bias's scalars."""
        traced = {"keep": self.keep, "dropout": self.dropout}
        found = {name: [] if t is None else t.scalars(B, N) for name, t in traced.items()}
        return found | {"q": q.vectors, "k": k.vectors}

    @property
    def foldable(self) -> bool:
        """The exponent is q . k times a positive constant, which the exponential's multiply-add takes in."""
        return self.softcap is None and self.bias is None and self.scale > 0

    @property
    def vectors(self) -> int:
        """What a tile reads per token, of the side of which it reads more."""
        return self.positions + self.segments + self.keep.vectors + _vectors(self.bias)

    @property
    def learned(self) -> bool:
        """The bias has a gradient."""
        return self.bias is not None and bool(self.bias.pulls)

    @property
    def mask_operations(self) -> int:
        """A measure of the registers that the mask takes; a division is many operations."""
        return sum(8 if eqn.primitive.name in ("div", "rem") else 1 for eqn in self.keep.inner)

    @property
    def changed(self) -> bool:
        """Something is done to a score before its exponential."""
        return self.softcap is not None or self.bias is not None

    def needs_position(self, masked: bool) -> bool:
        """Whether a step must know where its tile lies."""
        return masked or self.bias is not None or self.dropout is not None


def scores_of(call: SoftmaxCall) -> Scores | str:
    """The recipe of a call, or why a kernel cannot follow it."""

    def keep(b, n, q, k):
        return jnp.reshape(call.mask.keep(q, k), ())

    def drop(b, n, q, k):
        words, rate = call.dropout_words, call.dropout_rate
        return jnp.reshape(dropout_keep(words, rate, b[None], n[None], q[None, None], k[None, None]), ())

    _, _, S, *_ = call.sizes
    positions = call.q_positions_BT is not None or call.k_positions_BS is not None
    segments, array = call.q_segments_BT is not None, call.mask_BNTS is not None
    bias = None if call.bias is None else trace_bias(call.bias)
    if isinstance(bias, str):
        return bias
    kept = trace(keep, "the mask", look_up=True)
    read = positions + segments + _vectors(bias)
    table = isinstance(kept, str) or read + array + kept.vectors > MOST_VECTORS
    if read + (table or array) > MOST_VECTORS:
        return f"bias {type(call.bias).__name__}: {read} numbers to be read per token > {MOST_VECTORS - 1}"
    parts = [
        trace(lambda b, n, q, k: Full().keep(q, k), "no mask") if table else kept,
        bias,
        None if call.dropout_rate == 0 else trace(drop, "dropout"),
    ]
    for part in parts:
        if isinstance(part, str):
            return part
    return Scores(
        *parts, call.scale, call.softcap, call.dropout_rate, positions, segments,
        None if positions or segments else S, table, table or array,
    )  # fmt: skip


def _vectors(bias: TracedBias | None) -> int:
    return 0 if bias is None else bias.score.vectors


@dataclasses.dataclass(frozen=True)
class HopperTile:
    """A tile of scores in registers: q . k, [queries, keys], or transposed (q_axis 1).

    q_vectors, k_vectors: the tile's positions and segments where they are given, then what the mask looks up,
    then what the bias reads of tokens; q_start, k_start: its first token indices; bits: vectors of words
    along axis 0, each for 32 of axis 1.
    Vectors are functions, called as late as possible, since registers are short.
    """

    scores: Scores
    refs: dict[str, list[Any]]
    batch: jax.Array
    head: jax.Array
    q_start: jax.Array
    k_start: jax.Array
    q_vectors: list[Vector]
    k_vectors: list[Vector]
    shape: tuple[int, int]
    q_axis: int
    layouts: tuple[Any, Any]  # of vectors along axis 0 and axis 1
    bits: list[Vector]

    def _index(self, start: jax.Array, axis: int) -> jax.Array:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        iota = lax.broadcasted_iota(jnp.int32, (self.shape[axis],), 0)
        return plgpu.layout_cast(iota, self.layouts[axis]) + start

    @property
    def q_positions(self) -> jax.Array:
        return self.q_vectors[0]() if self.scores.positions else self._index(self.q_start, self.q_axis)

    @property
    def k_positions(self) -> jax.Array:
        return self.k_vectors[0]() if self.scores.positions else self._index(self.k_start, 1 - self.q_axis)

    def _run(self, name: str, traced: Traced) -> jax.Array:
        scalars = [ref[self.batch, self.head] for ref in self.refs[name]]
        looked = self._looked(name, traced)
        return traced.tile(scalars, *self._at, looked)

    @property
    def _at(self) -> tuple:
        """Where the tile lies, for `Traced.tile`."""
        return lambda: self.q_positions, lambda: self.k_positions, self.shape, self.q_axis

    def _looked(self, name: str, traced: Traced) -> tuple[list[Vector], list[Vector]]:
        """What a function looks up, of queries and of keys."""
        first = self.scores.positions + self.scores.segments
        found = []
        for side, vectors in ((Q, self.q_vectors), (K, self.k_vectors)):
            start = first + (self.scores.keep.reads(side) if name == "bias" else 0)
            found.append(vectors[start : start + traced.reads(side)])
        return tuple(found)

    def bias_gradients(self, pulls: list[Traced], d_score: jax.Array) -> list[jax.Array]:
        """For each of some learned arguments of the bias its gradient, as a tile that is yet to be summed."""
        if not pulls:
            return []
        score = self.scores.bias.score
        looked = dict(zip((Q, K), map(iter, self._looked("bias", score)), strict=True))
        given = [lambda ref=ref: ref[self.batch, self.head] for ref in self.refs["bias"]]
        given += [next(looked[kind]) for kind in score.looked.values()]
        given.append(lambda: d_score)
        return [pull.tile((), *self._at, given=given) for pull in pulls]

    def _set(self) -> jax.Array:
        """True where the entry's bit is set."""
        column = self._index(jnp.int32(0), 1)

        def spread(x, axis=1):
            return lax.broadcast_in_dim(x, self.shape, (axis,))

        word = spread(self.bits[0](), 0)
        for i, x in enumerate(self.bits[1:], 1):
            word = jnp.where(spread(column // WORD) >= i, spread(x(), 0), word)
        return lax.bitwise_and(lax.shift_right_logical(word, spread(column % WORD)), 1) != 0

    def _pair(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(
            lax.broadcast_in_dim(x, self.shape, (axis,))
            for x, axis in ((q, self.q_axis), (k, 1 - self.q_axis))
        )

    def kept(self) -> jax.Array | None:
        """Which entries the mask, validity and segments keep; None: all."""
        found = []
        always = self.scores.keep.constant
        if always is None or not always:
            found.append(self._run("keep", self.scores.keep))
        if self.scores.bits:
            found.append(self._set())
        if self.scores.positions:
            q, k = self._pair(self.q_positions, self.k_positions)
            found.append(jnp.minimum(q, k) >= 0)
        if self.scores.segments:
            at = int(self.scores.positions)
            q, k = self._pair(self.q_vectors[at](), self.k_vectors[at]())
            found.append(q == k)
        # The blocks of the lists may be those of two warpgroups.
        block = math.lcm(2 * GROUP, self.shape[1 - self.q_axis])
        if self.scores.length is not None and self.scores.length % block:
            within = self._index(jnp.int32(0), 1 - self.q_axis) < self.scores.length - self.k_start
            found.append(lax.broadcast_in_dim(within, self.shape, (1 - self.q_axis,)))
        return functools.reduce(jnp.logical_and, found) if found else None

    def along_queries(self, x: jax.Array) -> jax.Array:
        """A value per query, on the tile."""
        return lax.broadcast_in_dim(x, self.shape, (self.q_axis,))

    def surviving(self) -> jax.Array:
        """True where dropout keeps an entry."""
        return self._run("dropout", self.scores.dropout)

    def exponents(self, qk: jax.Array, masked: bool) -> tuple[jax.Array, float, jax.Array | None]:
        """(z, factor, slope): base-2 exponents are z * factor; the softcap's derivative, None without one."""
        scores, slope = self.scores, None
        factor = scores.scale * LOG2E
        z = qk
        if not scores.foldable:
            if scores.softcap is None:
                z = qk * scores.scale
            else:
                capped = tanh(qk, scores.scale / scores.softcap)
                slope = 1.0 - capped * capped
                z = capped * scores.softcap
            if scores.bias is not None:
                z = z + self._run("bias", scores.bias.score)
            factor = LOG2E
        kept = self.kept() if masked else None
        if kept is not None:
            z = jnp.where(kept, z, -jnp.inf)
        return z, factor, slope
