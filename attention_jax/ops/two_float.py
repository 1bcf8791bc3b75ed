"""Sums of float32 numbers kept as two float32 numbers each, so that differences of long sums stay accurate.

    x = high + low,   high = fl(x),   |low| <= ulp(high) / 2

A pair holds about 48 bits. The difference of two running sums in float32 has the resolution of the sums,
2^-24 |c|, however small it is itself; that of pairs, (high_t - high_s) + (low_t - low_s), errs by
2^-24 |c_t - c_s| and 2^-46 |c|. The error of a float32 addition is a float32 number, and is kept (Knuth 1969,
"The Art of Computer Programming", volume 2, section 4.2.2; for sums of pairs Dekker 1971, "A floating-point
technique for extending the available precision").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.dtypes import wider
from attention_jax.ops import varying


class TwoFloat(NamedTuple):
    """high + low, float32 or float64 arrays of one shape. The gradient of the number is that of `high`."""

    high: jax.Array
    low: jax.Array


def zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> TwoFloat:
    """0 of that shape; the two arrays share no buffer."""
    return TwoFloat(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def add(a: TwoFloat, b: TwoFloat) -> TwoFloat:
    """a + b. Rounding errors are constants to a derivative, as they are for any float32 sum."""
    total = a.high + b.high
    part = total - a.high
    error = (a.high - (total - part)) + (b.high - part) + (a.low + b.low)
    error = lax.stop_gradient(error)
    high = total + error
    return TwoFloat(high, lax.stop_gradient(error - (high - total)))


def running_sum(
    x_BTN: jax.Array, starts_BT: jax.Array | None = None, before_BN: TwoFloat | None = None
) -> TwoFloat:
    """The sum of x [B, T, N] up to each token, its own included, as a TwoFloat [B, T, N].

    starts_BT: boolean [1 or B, T], where the sum starts anew; None: nowhere. before_BN: the sum that the
    tokens in front of the first start go on from; None: 0.

    Computed in ceil(log2 T) steps that double the span of every sum (Hillis & Steele 1986, "Data parallel
    algorithms"). Spans end at their token and not at multiples of their length, so that a sum has the same
    bits wherever in a row it starts.
    """
    x_BTN = wider(x_BTN)
    T = x_BTN.shape[1]
    index_1T = jnp.arange(T, dtype=jnp.int32)[None]
    # The first token of the sum that each token belongs to; -1: the sum goes on from `before_BN`.
    first_BT = jnp.full_like(index_1T, -1)
    if starts_BT is not None:
        first_BT = lax.cummax(jnp.where(starts_BT, index_1T, -1), axis=1)
    past_BT1 = (index_1T - jnp.maximum(first_BT, 0))[..., None]

    def double(sums_BTN, span):
        earlier_BTN = jax.tree.map(lambda x: jnp.roll(x, span, axis=1), sums_BTN)
        both_BTN = add(earlier_BTN, sums_BTN)
        return jax.tree.map(lambda new, old: jnp.where(past_BT1 >= span, new, old), both_BTN, sums_BTN), None

    spans = 2 ** jnp.arange((T - 1).bit_length(), dtype=jnp.int32)
    single_BTN = varying.like(x_BTN, TwoFloat(x_BTN, jnp.zeros_like(x_BTN)))
    sums_BTN, _ = lax.scan(double, single_BTN, spans)
    if before_BN is None:
        return sums_BTN
    all_BTN = add(TwoFloat(*(x_BN[:, None] for x_BN in before_BN)), sums_BTN)
    return jax.tree.map(lambda new, own: jnp.where(first_BT[..., None] < 0, new, own), all_BTN, sums_BTN)
