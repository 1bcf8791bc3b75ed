"""How many tokens of a prompt are read at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_jax.model import ModelConfig

# The most and the fewest tokens of a piece where none are asked for: shorter ones take longer.
PREFILL_CHUNK, _SHORT_CHUNK = 512, 256


def checked_chunk(config: ModelConfig, chunk: Any, batch: int, cache_bytes: int) -> int:
    """The tokens of a piece; ValueError for no integer >= 1, and for less than the model's prefix.

    None: 512, or as few down to 256 that what a layer computes takes a quarter of weights and caches.
    """
    if chunk is None:
        d, f = config.d_model, config.hidden_width
        per_token = 4 * d + 3 * f  # numbers of a layer, as many as its weights have rows of d_model
        held = config.num_layers * d * per_token + config.vocab_size * d + cache_bytes // 4
        fitting = held // (4 * per_token * batch) // 64 * 64
        return max(min(fitting, PREFILL_CHUNK), _SHORT_CHUNK, config.prefix)
    if isinstance(chunk, bool) or not isinstance(chunk, int | np.integer) or chunk < 1:
        raise ValueError(f"prefill_chunk must be an integer >= 1 or None, got {chunk!r}")
    if chunk < config.prefix:
        raise ValueError(
            f"prefill_chunk {chunk} is smaller than the prefix of {config.prefix} tokens within which the "
            f"mask is bidirectional, which one piece must hold; raise it to {config.prefix}"
        )
    return int(chunk)
