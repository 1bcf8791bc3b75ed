"""Masks: relations between a query and a key position, and their algebra.

`algebra` defines the interface of masks and how they combine, `patterns` and `irregular` the patterns,
`checks` compares what a mask promises with what it keeps, and `picture` plots them.
"""

from attention_jax.masks import picture  # noqa: F401 (it defines `Mask.plot`)
from attention_jax.masks.algebra import And, CacheSpan, Density, Mask, Not, Or, Recipe, parse
from attention_jax.masks.checks import check
from attention_jax.masks.irregular import (
    BigBird,
    Dense,
    Global,
    Longformer,
    Predicate,
    RandomBlocks,
)
from attention_jax.masks.patterns import (
    BlockLocal,
    Causal,
    Chunked,
    Dilated,
    Full,
    Prefix,
    Sinks,
    SlidingWindow,
    Strided,
)

__all__ = [
    "And",
    "BigBird",
    "BlockLocal",
    "Causal",
    "Chunked",
    "Dense",
    "Density",
    "Dilated",
    "Full",
    "Global",
    "Longformer",
    "Mask",
    "Not",
    "Or",
    "Predicate",
    "Prefix",
    "RandomBlocks",
    "Recipe",
    "CacheSpan",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "check",
    "parse",
]
