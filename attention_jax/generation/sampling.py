"""Sampling of tokens from logits: temperature, then top-k, top-p and min-p."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

# The smallest normal number of float32: a processor may round smaller ones to 0, such as the reciprocal of a
# larger temperature than its own.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options, applied in this order: temperature, top-k, top-p, min-p.

    temperature: divides the logits; 0 selects the largest logit (greedy).
    top_k: keep the k most probable tokens. top_p: keep the fewest most probable tokens with a total
    probability of at least p (Holtzman et al. 2020, arXiv 1904.09751); 1 keeps all. min_p: keep tokens of at
    least min_p times the largest probability (arXiv 2407.01082). Of equally probable tokens those of the
    smallest ids are kept.

    Raises: ValueError for an option of another type or outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        temperature = _number("temperature", self.temperature)
        if not 0 <= temperature <= 1 / _SMALLEST:
            raise ValueError(f"temperature must be in [0, {1 / _SMALLEST:.3g}], got {self.temperature}")
        if 0 < temperature < _SMALLEST:
            raise ValueError(
                f"temperature {self.temperature} is below {_SMALLEST:.3g}, the smallest normal float32; 0 "
                "selects the largest logit"
            )
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral):
                raise ValueError(f"top_k must be an integer >= 1, got {self.top_k!r}")
            if self.top_k < 1:
                raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < _number(name, value) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """A token per row, int32 [B], sampled with the key of the row.

    A row whose largest logit is NaN or infinite has no distribution and gives -1. Raises: ValueError for
    logits that are not floating point [B, V].
    """
    shape, dtype = jnp.shape(logits_BV), jnp.result_type(logits_BV)
    if len(shape) != 2 or not shape[1] or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"logits must be floating point [B, V], got {dtype} {list(shape)}")
    logits_BV = jnp.asarray(logits_BV, jnp.promote_types(dtype, jnp.float32))
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        # Relative to the largest: a quotient by a small temperature would overflow, and be rounded more.
        token_B = _draw((logits_BV - largest_B1) / float(sampling.temperature), sampling, keys_B)
    return jnp.where(jnp.isfinite(largest_B1[:, 0]), token_B, -1).astype(jnp.int32)


def _draw(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """Draws from logits of which each row's largest is 0."""
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p in (None, 1) and sampling.min_p is None:
        return draw(keys_B, logits_BV)
    sorted_BV, order_BV = _kept(logits_BV, sampling)
    return jnp.take_along_axis(order_BV, draw(keys_B, sorted_BV)[:, None], axis=-1)[:, 0]


def _kept(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The logits in descending order, -inf for those that a filter drops, and their ids."""
    # In sorted order each filter keeps a prefix, so that ties cannot keep more tokens than requested.
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        sorted_BV = sorted_BV.at[:, sampling.top_k :].set(-jnp.inf)
    if sampling.top_p not in (None, 1):
        sorted_BV = jnp.where(_nucleus(sorted_BV, float(sampling.top_p)), sorted_BV, -jnp.inf)
    if sampling.min_p is not None:
        sorted_BV = jnp.where(sorted_BV >= math.log(sampling.min_p), sorted_BV, -jnp.inf)
    return sorted_BV, order_BV


def _nucleus(sorted_BV: jax.Array, top_p: float) -> jax.Array:
    """True for the tokens, in descending order, before which less than top_p of the probability lies.

    Sums over many tokens are rounded: a cumulative sum reaches 1 long before the last of 100,000. The
    smaller of the two parts decides, in which the rounding is relative to the smaller of top_p and 1 - top_p.
    """
    mass_BV = jnp.exp(sorted_BV)  # unnormalised: the first is 1
    total_B1 = mass_BV.sum(-1, keepdims=True)
    if top_p <= 0.5:
        before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
        return before_BV < top_p * total_B1
    from_here_BV = jax.lax.cumsum(mass_BV, axis=1, reverse=True)
    return from_here_BV > (1 - top_p) * total_B1


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)
