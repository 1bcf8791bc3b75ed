"""Tables the tests run over: masks with their truth formulas, cases of the attention op, tolerances.

A new mask is one row of LEAVES: its truth table, bounds, cache span, str / parse, density, and the attention
op in every implementation follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.biases import Axes, Bias
from attention_jax.masks import (
    BigBird,
    BlockLocal,
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
)
from tests.covering import pairwise
from tests.reference import masks as truth

IMPLEMENTATIONS = ("reference", "chunked")


@dataclasses.dataclass(frozen=True)
class Odd(Mask):
    """A user's predicate that brings neither bounds nor a cache span: k and q differ by an odd number."""

    def keep(self, q_pos, k_pos):
        return (q_pos - k_pos) % 2 == 1


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """A mask and what it must mean: `truth(q, k)` on integers or integer arrays.

    exact: `bounds` is exact; leaf: not a composite.
    """

    mask: Mask
    truth: Callable[[Any, Any], Any]
    exact: bool = False
    leaf: bool = False


def _leaf(mask: Mask, formula: Callable) -> MaskCase:
    return MaskCase(mask, formula, exact=True, leaf=True)


_SOME = np.random.default_rng(0).random((13, 11)) < 0.6
_SOME[3:7, 2:9] = True  # a rectangle that is full
_SOME[8:, :5] = False
_MANY = tuple(range(1, 260, 2))


def _same_parity(q, k):
    return (q + k) % 2 == 0


LEAVES = {
    "full": _leaf(Full(), truth.full),
    "causal": _leaf(Causal(), truth.causal),
    "window 1": _leaf(SlidingWindow(1), truth.sliding_window(1)),
    "window 9": _leaf(SlidingWindow(9), truth.sliding_window(9)),
    "window 7 right 4": _leaf(SlidingWindow(7, 4), truth.sliding_window(7, 4)),
    "window 1 right 20": _leaf(SlidingWindow(1, right=20), truth.sliding_window(1, 20)),
    "sinks 3": _leaf(Sinks(3), truth.sinks(3)),
    "dilated": _leaf(Dilated(3, 4), truth.dilated(3, 4)),
    "dilated 1": _leaf(Dilated(5, 1), truth.dilated(5, 1)),
    "strided": _leaf(Strided(5), truth.strided(5)),
    "strided 2": _leaf(Strided(2), truth.strided(2)),
    "chunked": _leaf(Chunked(6), truth.chunked(6)),
    "block local": _leaf(BlockLocal(4), truth.block_local(4, 1)),
    "own block": _leaf(BlockLocal(3, 0), truth.block_local(3, 0)),
    "global": _leaf(Global((0, 7, 8, 9)), truth.named((0, 7, 8, 9))),
    "global many": _leaf(Global(_MANY), truth.named(_MANY)),
    "prefix 6": _leaf(Prefix(6), truth.prefix(6)),
    "dense": _leaf(Dense(_SOME), truth.array(_SOME)),
    # Exact where positions are NumPy; while tracing, for rectangles of one block.
    "random blocks": MaskCase(RandomBlocks(2, 2, 3, 1, 1), truth.random_blocks(2, 2, 3, 1, 1), leaf=True),
    "predicate": MaskCase(Predicate(_same_parity), _same_parity, leaf=True),
}

MASKS = LEAVES | {
    "odd": MaskCase(Odd(), lambda q, k: (q - k) % 2 == 1, leaf=True),
    "sink window": MaskCase(
        (SlidingWindow(9) | Sinks(3)) & Causal(),
        truth.both(truth.either(truth.sliding_window(9), truth.sinks(3)), truth.causal),
    ),
    "causal bidirectional window": MaskCase(
        Causal() & SlidingWindow(7, 4), truth.both(truth.causal, truth.sliding_window(7, 4))
    ),
    "far past": MaskCase(
        ~SlidingWindow(6) & Causal(), truth.both(truth.negated(truth.sliding_window(6)), truth.causal)
    ),
    "future": MaskCase(~Causal(), truth.negated(truth.causal)),
    "not all of both": MaskCase(
        ~(Sinks(5) & (Causal() | SlidingWindow(2, 30))),
        truth.negated(truth.both(truth.sinks(5), truth.either(truth.causal, truth.sliding_window(2, 30)))),
    ),
    "prefix lm": MaskCase(Prefix(6) | Causal(), truth.either(truth.prefix(6), truth.causal)),
    "longformer": MaskCase(Longformer(8, (0, 20)), truth.longformer(8, (0, 20))),
    "bigbird": MaskCase(BigBird(4, 3, 1, 2, 5), truth.bigbird(4, 3, 1, 2, 5)),
    "causal bigbird": MaskCase(
        BigBird(2, 3, 1, 2) & Causal(), truth.both(truth.bigbird(2, 3, 1, 2, 0), truth.causal)
    ),
    "strided window": MaskCase(
        (SlidingWindow(4) | Strided(7)) & Causal(),
        truth.both(truth.either(truth.sliding_window(4), truth.strided(7)), truth.causal),
    ),
    "nothing": MaskCase(Causal() & ~Causal(), lambda q, k: ~truth.full(q, k)),
    "odd past": MaskCase(Odd() & Causal(), truth.both(lambda q, k: (q - k) % 2 == 1, truth.causal)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gate(Bias):
    """weight_n (past_t - present_s) + row_b: a parameter, a leaf per query, per key and per batch row.

    `ids` is an integer leaf: it must travel along and have no gradient.
    """

    weight_N: Any
    past_BT: Any
    present_BS: Any
    ids_B: Any

    def axes(self):
        return (Axes(), Axes(batch=0, query=1), Axes(batch=0, key=1), Axes(batch=0))

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        gate_BTS = self.past_BT[:, :, None] - self.present_BS[:, None, :] + self.ids_B[:, None, None]
        return self.weight_N[heads_N][None, :, None, None] * gate_BTS[:, None]


# Axes of B, N, T, S that an additive array has (the others are 1 or, at the front, missing).
ARRAY_SHAPES = {
    "BNTS": lambda B, N, T, S: (B, N, T, S),
    "11TS": lambda B, N, T, S: (1, 1, T, S),
    "B11S": lambda B, N, T, S: (B, 1, 1, S),
    "1NT1": lambda B, N, T, S: (1, N, T, 1),
    "N11": lambda B, N, T, S: (N, 1, 1),
    "TS": lambda B, N, T, S: (T, S),
    "scalar": lambda B, N, T, S: (),
}


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One call of dot_product_attention, in words; `tests.problems` makes the arrays."""

    lengths: tuple[int, int] = (33, 33)  # T, S
    widths: tuple[int, int] = (24, 24)  # H, M
    heads: tuple[int, int] = (2, 2)  # N, K
    mask: str | None = "causal"  # a row of MASKS, "array <shape>", "<row> & array <shape>", None
    bias: str | None = None  # "alibi", "gate", "forget", "array <shape>", None
    softcap: float | None = None
    sinks: bool = False
    segments: str | None = None  # "packed", "ragged" (some slots invalid), None
    positions: str | None = None  # "shifted", "left padded", "cache", None
    dropout: float = 0.0
    scale: float | None = None
    dtype: str = "float32"
    batch: int = 2
    seed: int = 0
    slow: bool = dataclasses.field(default=False, compare=False)  # runs with the slow tests

    def __str__(self):
        """Only what differs from the default."""
        own = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)
               if f.compare and getattr(self, f.name) != f.default]  # fmt: skip
        return ",".join(own).replace(" ", "") or "default"


# Values of any two rows all meet (tests/covering.py). Tiles are made small there, so that short rows already
# have empty, full, partial and ragged ones; TILED runs the real tile sizes.
FACTORS_FAST = {
    "lengths": [(1, 50), (33, 80), (130, 130)],
    "mask": [None, "sink window", "far past", "array BNTS"],
    "bias": [None, "alibi", "gate", "array B11S"],
    "positions": [None, "shifted", "left padded", "cache"],
    "segments": [None, "packed", "ragged"],
    "widths": [(24, 24), (1, 40), (72, 59)],
    "heads": [(2, 2), (4, 2), (8, 1)],
    "dtype": ["float32", "bfloat16", "float16"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout": [0.0, 0.3],
    "scale": [None, -0.3],
    "batch": [2, 1],
}
FACTORS_SLOW = {
    "lengths": [
        (1, 1),
        (2, 1),
        (3, 7),
        (1, 130),
        (8, 8),
        (16, 16),
        (17, 33),
        (32, 31),
        (64, 64),
        (97, 130),
        (127, 128),
        (65, 40),
        (239, 239),
    ],
    "mask": [None, *MASKS, "array BNTS", "array 11TS", "array B11S", "array N11"],
    "bias": [None, "alibi", "gate", *(f"array {shape}" for shape in ARRAY_SHAPES)],
    "positions": [None, "shifted", "left padded", "cache"],
    "segments": [None, "packed", "ragged"],
    "widths": [
        (1, 1),
        (1, 40),
        (24, 24),
        (40, 72),
        (59, 24),
        (64, 64),
        (72, 59),
        (64, 59),
        (72, 1),
        (128, 1),
        (64, 256),
    ],
    "heads": [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (12, 12)],
    "dtype": ["float32", "bfloat16", "float16"],
    "softcap": [None, 2.0, 50.0],
    "sinks": [False, True],
    "dropout": [0.0, 0.3, 0.9],
    "scale": [None, 1.0, -0.3, 0.0],
    "batch": [1, 2, 3],
}


def covering_cases(factors: dict, tries: int = 30, seed: int = 0) -> list[OpCase]:
    """Cases in which every pair of values of two factors occurs."""
    return [OpCase(seed=i, **row) for i, row in enumerate(pairwise(factors, seed, tries))]


def fast_cases() -> list[OpCase]:
    """The cases of `FACTORS_FAST`."""
    return covering_cases(FACTORS_FAST, seed=6)  # of the first seeds the one with the fewest rows


# fmt: skip
# The real tile sizes, several tiles a row, ragged ends.
TILED = [
    OpCase((1025, 1025), heads=(1, 1), bias="gate", dropout=0.3, batch=1),
    OpCase((1025, 1025), heads=(1, 1), batch=1, slow=True),
    OpCase((513, 513), (8, 8), (2, 2), "causal", "gate", segments="ragged", dropout=0.3, batch=2, slow=True),
    OpCase((799, 1023), (8, 8), (2, 1), None, "alibi", batch=1, slow=True),
    OpCase((600, 1300), (8, 8), (2, 1), "window 9", sinks=True, positions="shifted", batch=1, slow=True),
    OpCase((1023, 799), (40, 24), (4, 2), "far past", "array N11", softcap=2.0, batch=1, slow=True),
    OpCase((2300, 2300), (8, 8), (1, 1), "sink window", batch=1, slow=True),
    OpCase((2048, 2048), (16, 16), (2, 1), "causal", dtype="bfloat16", batch=1, slow=True),
    OpCase((257, 2400), (8, 8), (2, 1), None, positions="cache", batch=2, slow=True),
    OpCase(
        (1300, 1300),
        (8, 8),
        (2, 2),
        "window 7 right 4",
        segments="packed",
        positions="left padded",
        slow=True,
    ),
]

FACTORS_TPU = {
    "lengths": [(130, 130), (1, 150), (260, 140), (129, 300)],
    "mask": [None, "causal", "window 9", "sink window", "far past", "dense", "array BNTS", "array B11S"],
    "bias": [None, "alibi", "gate", "array B11S", "array 1NT1"],
    "positions": [None, "shifted", "left padded", "cache"],
    "segments": [None, "packed", "ragged"],
    "widths": [(24, 24), (1, 40), (64, 59), (136, 16)],
    "heads": [(1, 1), (2, 1), (4, 2)],
    "dtype": ["float32", "bfloat16"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout": [0.0, 0.3],
    "scale": [None, -0.3],
    "batch": [1, 2],
}
# In `make test`: everything at once, and arrays; the pairs come with the slow tests.
_TPU = [
    OpCase((130, 260), (24, 40), (2, 1), "window 7 right 4", "gate", 2.0, True, "packed", "left padded", 0.3),
    OpCase(
        (130, 130), (64, 59), (2, 1), "window 9 & array BNTS", "alibi", None, False, "ragged",
        dtype="bfloat16", batch=1,
    ),
    OpCase(
        (150, 260), (24, 40), (2, 1), "window 7 right 4", "gate", 2.0, True, "packed", "left padded", 0.3,
        slow=True,
    ),
    OpCase(
        (130, 130), (64, 59), (2, 1), "array BNTS", "alibi", None, False, "ragged", dtype="bfloat16",
        slow=True,
    ),
    OpCase((140, 200), (1, 16), (2, 2), None, "array 1NT1", batch=1, slow=True),
]  # fmt: skip


@functools.cache
def tpu_cases() -> tuple[OpCase, ...]:
    """What the TPU kernels are interpreted on; tests/interpret_tpu.py takes a case by its number."""
    pairs = (OpCase(seed=i, slow=True, **row) for i, row in enumerate(pairwise(FACTORS_TPU, tries=10)))
    # An array over positions needs implicit ones.
    possible = (c for c in pairs if c.mask != "dense" or (c.positions is None and c.segments is None))
    return (*_TPU, *possible)


@dataclasses.dataclass(frozen=True)
class RealShape:
    """A layer that kernels are compiled and timed for: sizes are (B, T, S, N, K, H, M)."""

    sizes: tuple[int, int, int, int, int, int, int]
    mask: Mask = Causal()
    softcap: float | None = None
    dtype: str = "bfloat16"


REAL_SHAPES = {
    "llama 1b 4k": RealShape((2, 4096, 4096, 32, 8, 64, 64)),
    "llama 1b 32k": RealShape((2, 32768, 32768, 32, 8, 64, 64)),
    "llama 8b 4k": RealShape((2, 4096, 4096, 32, 8, 128, 128)),
    "llama 8b 32k": RealShape((2, 32768, 32768, 32, 8, 128, 128)),
    "gemma 2 9b local 8k": RealShape((1, 8192, 8192, 16, 8, 256, 256), SlidingWindow(4096) & Causal(), 50.0),
    "latent prefill 4k": RealShape((1, 4096, 4096, 16, 16, 192, 128)),
    "encoder 512": RealShape((8, 512, 512, 12, 12, 64, 64), Full()),
    "float32 1k": RealShape((1, 1024, 1024, 8, 8, 128, 128), dtype="float32"),
    "wide float32 1k": RealShape((1, 1000, 1000, 4, 4, 256, 256), dtype="float32"),
}


def tolerance(naive_error: float, dtype: Any, magnitude: float, factor: float = 2) -> float:
    """What an error against float64 may be: max(factor x the naive error, 4 eps x magnitude).

    factor: 2 for the forward. 3 for gradients: a blocked backward works in base 2, which rounds numbers as
      large as the scores twice more.

    naive_error: the largest error of naive dense results in the same precision: matmul operands and results
      rounded to `dtype`, products of the scores summed in float32 from the first feature to the last or
      back, and where that decides as NumPy's matmul sums them; the backward recomputes P from lse and from
      scores summed in the other order.
    dtype: that of q, k and v, also for the gradients of bias and sinks, which are made from the rounded
      output; lse is float32 whatever the dtype.
    magnitude: the natural size of what was rounded: max |v| for the output; max(1, |scores|) for lse; for
      a gradient its largest entry computed with absolute values throughout, so that cancellation, which no
      precision escapes, is allowed for and nothing else is.
    """
    return max(factor * naive_error, 4 * float(jnp.finfo(dtype).eps) * magnitude)


def largest(x: np.ndarray) -> float:
    """max |x|, 0 for an empty array."""
    return float(np.max(np.abs(x), initial=0.0))
