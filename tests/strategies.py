"""Random mask expressions with what they must mean, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from attention_jax.masks import (
    BlockLocal,
    Chunked,
    Dilated,
    Global,
    Prefix,
    RandomBlocks,
    Sinks,
    SlidingWindow,
    Strided,
)
from tests.cases import MASKS, MaskCase
from tests.reference import masks as truth


def _leaves():
    small, wide = st.integers(1, 9), st.integers(0, 8)
    made = [
        (SlidingWindow, truth.sliding_window, (st.integers(1, 12), wide)),
        (Sinks, truth.sinks, (small,)),
        (Prefix, truth.prefix, (small,)),
        (Dilated, truth.dilated, (small, small)),
        (Strided, truth.strided, (small,)),
        (Chunked, truth.chunked, (small,)),
        (BlockLocal, truth.block_local, (small, st.integers(0, 2))),
        (Global, truth.named, (st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),)),
        (RandomBlocks, truth.random_blocks, (small, st.integers(1, 3), wide, *[st.integers(0, 2)] * 2)),
    ]
    fixed = [MASKS[name] for name in ("full", "causal", "odd", "dense", "predicate")]
    leaves = st.sampled_from(fixed)
    for mask, formula, arguments in made:
        leaves |= st.tuples(*arguments).map(
            lambda x, mask=mask, formula=formula: MaskCase(mask(*x), formula(*x))
        )
    return leaves


def _grow(inner):
    pair = st.tuples(inner, inner)
    return (
        pair.map(lambda x: MaskCase(x[0].mask & x[1].mask, truth.both(x[0].truth, x[1].truth)))
        | pair.map(lambda x: MaskCase(x[0].mask | x[1].mask, truth.either(x[0].truth, x[1].truth)))
        | inner.map(lambda x: MaskCase(~x.mask, truth.negated(x.truth)))
    )


expressions = st.recursive(_leaves(), _grow, max_leaves=6)
