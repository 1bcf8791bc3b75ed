"""Feed-forwards: what a layer does to each token by itself, in kinds that configs choose."""

from attention_jax.feed_forwards.base import FeedForward, FeedForwardConfig, FeedForwardOutput
from attention_jax.feed_forwards.dense import Dense, DenseConfig, FeedForwardWord, UnitConfig
from attention_jax.feed_forwards.experts import Experts, ExpertsConfig
from attention_jax.feed_forwards.router import RouterConfig

__all__ = [
    "Dense",
    "DenseConfig",
    "Experts",
    "ExpertsConfig",
    "FeedForward",
    "FeedForwardConfig",
    "FeedForwardOutput",
    "FeedForwardWord",
    "RouterConfig",
    "UnitConfig",
]
