"""Linear attention with decay: `decay_scan` and its implementations."""

from attention_jax.ops.decay_scan.api import decay_scan, decay_weights, explain

__all__ = ["decay_scan", "decay_weights", "explain"]
