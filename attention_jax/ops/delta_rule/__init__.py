"""The delta rule: a linear recurrence that corrects what the state answers to a key. `delta_rule`."""

from attention_jax.ops.delta_rule.api import delta_rule, delta_weights, explain
from attention_jax.ops.delta_rule.chunked import ChunkedDeltaConfig

__all__ = ["ChunkedDeltaConfig", "delta_rule", "delta_weights", "explain"]
