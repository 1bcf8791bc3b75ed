"""What both kernels of the backward do with a tile: its two products, P from the first, dZ from both.

    P = 2^(z - lse),  dZ = P * (dP - delta),  dP = dO V^T

with delta_t = out_t . d out_t - d lse_t (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention_jax.ops.softmax.mosaic_gpu.launch import times
from attention_jax.ops.softmax.mosaic_gpu.scores import HopperTile


def add_rows(totals: list, tiles: list[jax.Array]) -> None:
    """Adds the sums of each tile's rows to its total."""
    for total, x in zip(totals, tiles, strict=True):
        total[...] += x.sum(axis=1)


def gradient(tile: HopperTile, qk, dp, lse, delta, masked: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(P with dropout, d score, d(q . k) / scale) of a tile, by its products and its queries' lse and delta.

    A softcap lies between the last two. d score is for a learned bias; without one it may be NaN if hidden.
    dp, lse, delta: functions, called as late as possible, since registers are short; dp of P with dropout.
    """
    p, share, slope = weights(tile, qk, lse, masked)
    kept = p if share is None else p * share
    dp = dp(kept)
    if share is not None:
        dp = dp * share
    ds = dz = p * (dp - tile.along_queries(delta()))
    # What is hidden (p = 0) may have overflowed, and 0 * Inf is NaN: select.
    if masked and tile.scores.learned:
        ds = dz = jnp.where(p > 0.0, ds, 0.0)
    if slope is not None:
        dz = dz * slope
    if masked and (slope is not None or not tile.scores.learned):
        dz = jnp.where(p > 0.0, dz, 0.0)
    return kept, ds, dz


def weights(tile: HopperTile, qk, lse, masked: bool) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(P, the factor dropout puts on each entry, the softcap's slope); None where there is none."""
    scores = tile.scores
    z, factor, slope = tile.exponents(qk, masked)
    p = jnp.exp2(times(z, factor) - tile.along_queries(lse()))
    share = None
    if scores.dropout is not None:
        share = jnp.where(tile.surviving(), 1 / (1 - scores.dropout_rate), 0.0)
    return p, share, slope


def weights_alone(shape, pair, tile: HopperTile, lse, masked: bool) -> jax.Array:
    """P with dropout, where nothing else is wanted of the scores."""
    p, share, _ = weights(tile, product(shape, *pair), lse, masked)
    return p if share is None else p * share


def handed(tile: HopperTile, qk, lse, masked: bool) -> tuple[jax.Array, jax.Array]:
    """(All that dZ needs of the scores in one array, P with dropout).

    The first is P times the softcap's slope, negative where dropout took the entry.
    """
    p, share, slope = weights(tile, qk, lse, masked)
    kept = p
    if share is not None:
        p = jnp.where(share > 0.0, p, -p)
        kept = jnp.maximum(p, 0.0) * (1 / (1 - tile.scores.dropout_rate))
    if slope is not None:
        # As in `gradient`: a hidden score may have overflowed, and its slope be NaN.
        p = jnp.where(jnp.abs(p) > 0.0, p * slope, 0.0) if masked else p * slope
    return p, kept


def gradient_of_handed(found, dp, delta, dropout_rate: float, masked: bool) -> jax.Array:
    """d(q . k) / scale of a tile from what `handed` gives, as in `gradient`."""
    p = found
    if dropout_rate:
        p = jnp.abs(found)
        dp = jnp.where(found > 0.0, dp * (1 / (1 - dropout_rate)), 0.0)
    dz = p * (dp - delta)
    return jnp.where(p > 0.0, dz, 0.0) if masked else dz


def product(shape: tuple[int, int], a, b) -> jax.Array:
    """a b^T of two tiles in shared memory."""

    def inner(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(inner, plgpu.ACC(shape, jnp.float32))


def both_products(shape, qk_pair, dp_pair, then, third=None):
    """then(q . k, dP as a function of P), products a b^T of shared memory: dP is computed under P.

    third: issues one more product, of P, which is computed under what then does with dP.
    """

    def inner(qk_acc, dp_acc):
        for acc, (a, b) in ((qk_acc, qk_pair), (dp_acc, dp_pair)):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        qk = plgpu.wgmma_accumulator_load(qk_acc, wait_n=1)

        def dp(p):
            if third is not None:
                third(p)
            return plgpu.wgmma_accumulator_load(dp_acc, wait_n=int(third is not None))

        return then(qk, dp)

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(inner, acc, acc)
