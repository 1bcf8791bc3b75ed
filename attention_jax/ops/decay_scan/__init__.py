"""Linear attention with decay: `decay_scan` and its implementations."""

from attention_jax.ops.decay_scan.api import decay_scan, decay_weights, explain
from attention_jax.ops.decay_scan.chunked import ChunkedScanConfig

__all__ = ["ChunkedScanConfig", "decay_scan", "decay_weights", "explain"]
