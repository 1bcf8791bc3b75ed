"""Feed-forwards: what a layer does to each token by itself, in kinds that configs choose."""

from attention_jax.feed_forwards.base import FeedForward, FeedForwardConfig, FeedForwardOutput
from attention_jax.feed_forwards.dense import Dense, DenseConfig, FeedForwardWord, UnitConfig

__all__ = [
    "Dense",
    "DenseConfig",
    "FeedForward",
    "FeedForwardConfig",
    "FeedForwardOutput",
    "FeedForwardWord",
    "UnitConfig",
]
