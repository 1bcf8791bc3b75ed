"""Sampling of tokens from logits: temperature, then top-k, top-p and min-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options, applied in this order: temperature, top-k, top-p, min-p.

    temperature: divides the logits; 0 selects the largest logit (greedy).
    top_k: keep the k most probable tokens. top_p: keep the fewest most probable tokens with a total
    probability of at least p (Holtzman et al. 2020, arXiv 1904.09751). min_p: keep tokens of at least min_p
    times the largest probability (arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """A token per row, int32 [B], sampled with the key of the row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return draw(keys_B, logits_BV).astype(jnp.int32)
    # In sorted order each filter keeps a prefix, so that ties cannot keep more tokens than requested.
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        sorted_BV = sorted_BV.at[:, sampling.top_k :].set(-jnp.inf)
    if sampling.top_p is not None:
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # 0 for the first token, which is always kept
        sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    if sampling.min_p is not None:
        floor_B1 = sorted_BV[:, :1] + jnp.log(sampling.min_p)
        sorted_BV = jnp.where(sorted_BV >= floor_B1, sorted_BV, -jnp.inf)
    index_B1 = draw(keys_B, sorted_BV)[:, None]
    return jnp.take_along_axis(order_BV, index_B1, axis=-1)[:, 0].astype(jnp.int32)
