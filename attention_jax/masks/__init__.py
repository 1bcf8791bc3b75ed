"""Masks: relations between a query and a key position, and their algebra.

`algebra` holds what every mask is and how masks combine, `patterns` the patterns, `picture` their pictures.
"""

from attention_jax.masks.algebra import And, Density, Mask, Not, Or, Recipe, Retention, parse
from attention_jax.masks.patterns import (
    BigBird,
    BlockLocal,
    Causal,
    Chunked,
    Dense,
    Dilated,
    Full,
    Global,
    Longformer,
    Predicate,
    Prefix,
    RandomBlocks,
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
    "Retention",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "parse",
]
