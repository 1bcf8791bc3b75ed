"""From logits to tokens: penalties and bias, then temperature, top-k, top-p and min-p, then a draw.

Work that few requests need stands behind `lax.cond` on whether any row needs it, so that a greedy step is one
argmax. It changes no bit of the other rows.

The logits may have K rows [B*K, V] for each of the B rows of options: those of a row stand one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.dtypes import accumulator, wider
from attention_jax.generation.arrays import SamplingArrays, pack
from attention_jax.generation.sampling import TOP_LOGPROBS, Sampling


def sample(logits_BV: jax.Array, sampling: Sampling | SamplingArrays, keys_B: jax.Array) -> jax.Array:
    """A token per row, int32 [B], by temperature and filters, drawn with the key of the row.

    sampling: one for all rows, or arrays of one per row from `pack`. A row whose largest logit is NaN or
    infinite has no distribution and gives -1.

    Raises: ValueError for logits that are not floating point [B, V], and for a `Sampling` with options that
    need more than the logits: `adjust` applies them.
    """
    shape, dtype = jnp.shape(logits_BV), jnp.result_type(logits_BV)
    if len(shape) != 2 or not shape[1] or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"logits must be floating point [B, V], got {dtype} {list(shape)}")
    if isinstance(sampling, Sampling):
        if sampling.penalised or sampling.logit_bias or sampling.min_tokens:
            raise ValueError(
                "sample applies temperature and filters alone: apply penalties, logit_bias and min_tokens by "
                "adjust(...), and pass the others here"
            )
        row = pack([sampling], shape[1])
        sampling = jax.tree.map(lambda x: jnp.broadcast_to(x, (shape[0], *x.shape[1:])), row)
    logits_BV = jnp.asarray(logits_BV, accumulator(dtype))
    return choose(logits_BV, sampling, lambda: keys_B)


def adjust(
    logits_BV: jax.Array,
    arrays: SamplingArrays,
    prompt_BV: jax.Array,
    counts_BV: jax.Array,
    generated_B: jax.Array,
) -> jax.Array:
    """The logits after penalties, biases, and the ban of stop ids before `min_tokens`.

    prompt_BV: True for ids in the prompt. counts_BV: int32, how often each id is in the output. generated_B:
    int32, the number of tokens in the output.
    """
    return adjust_by(logits_BV, arrays, lambda: (prompt_BV, counts_BV), generated_B)


def adjust_by(
    logits_BV: jax.Array,
    arrays: SamplingArrays,
    seen: Callable[[], tuple[jax.Array, jax.Array]],
    generated_B: jax.Array,
) -> jax.Array:
    """`adjust`, where `seen()` computes prompt_BV and counts_BV only if a row needs them."""
    early_B = generated_B < _repeated(arrays.min_tokens_B, len(generated_B))

    def adjusted(z_BV, arrays=arrays):
        arrays = _repeated(arrays, len(z_BV))
        prompt_BV, counts_BV = seen()
        seen_BV, counts = prompt_BV | (counts_BV > 0), counts_BV.astype(z_BV.dtype)
        repetition, presence, frequency = (
            x[:, None].astype(z_BV.dtype)
            for x in (arrays.repetition_B, arrays.presence_B, arrays.frequency_B)
        )
        penalised_BV = jnp.where(z_BV > 0, z_BV / repetition, z_BV * repetition)
        z_BV = jnp.where(seen_BV, penalised_BV, z_BV)
        z_BV = z_BV - frequency * counts - presence * (counts > 0).astype(z_BV.dtype)
        rows_B1 = jnp.arange(z_BV.shape[0])[:, None]
        # mode="drop": an id of V stands for no bias.
        z_BV = z_BV.at[rows_B1, arrays.bias_ids_BJ].add(arrays.bias_BJ.astype(z_BV.dtype), mode="drop")
        banned = early_B[:, None] & (arrays.stop_ids_BE >= 0)
        stops_BE = jnp.where(banned, arrays.stop_ids_BE, z_BV.shape[1])
        return z_BV.at[rows_B1, stops_BE].set(-jnp.inf, mode="drop")

    needed = jnp.any(arrays.penalised_B | arrays.biased_B) | jnp.any(early_B)
    return jax.lax.cond(needed, adjusted, lambda z_BV: z_BV, logits_BV)


def choose(logits_BV: jax.Array, arrays: SamplingArrays, make_keys: Callable[[], jax.Array]) -> jax.Array:
    """A token per row, int32 [B], -1 without a distribution; `make_keys` is called where a row is drawn."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn(arrays=arrays):
        arrays = _repeated(arrays, len(logits_BV))
        # Relative to the largest: a quotient by a small temperature would overflow, and be rounded more.
        z_BV = (logits_BV - largest_B1) * arrays.rate_B[:, None].astype(logits_BV.dtype)
        return jnp.where(arrays.greedy_B, best_B, _draw(z_BV, arrays, make_keys()))

    token_B = jax.lax.cond(jnp.all(arrays.greedy_B), lambda: best_B, drawn)
    return jnp.where(jnp.isfinite(largest_B1[:, 0]), token_B, -1)


def _draw(logits_BV: jax.Array, arrays: SamplingArrays, keys_B: jax.Array) -> jax.Array:
    """Draws from logits of which each row's largest is 0."""
    draw, keys_B = jax.vmap(jax.random.categorical), threefry(keys_B)
    needed_B = arrays.filtered_B & (arrays.greedy_B == False)  # noqa: E712

    def filtered():
        sorted_BV, order_BV = keep(logits_BV, arrays)
        token_B = jnp.take_along_axis(order_BV, draw(keys_B, sorted_BV)[:, None], axis=-1)[:, 0]
        return jnp.where(needed_B, token_B.astype(jnp.int32), plain_B)

    plain_B = draw(keys_B, logits_BV).astype(jnp.int32)
    return jax.lax.cond(jnp.any(needed_B), filtered, lambda: plain_B)


def threefry(keys: jax.Array) -> jax.Array:
    """PRNG keys of threefry2x32, the same ones or made of the first two words of others.

    Under `vmap`, keys of "rbg" and "unsafe_rbg" draw the numbers of all rows from the key of the first, so
    that a token would depend on the other requests of its batch.
    """
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
        keys = jax.random.wrap_key_data(keys)
    if str(jax.random.key_impl(keys)) == "threefry2x32":
        return keys
    return jax.random.wrap_key_data(jax.random.key_data(keys)[..., :2], impl="threefry2x32")


def _repeated(x: Any, rows: int) -> Any:
    """The arrays with each row repeated, `rows` in total."""
    return jax.tree.map(lambda x: x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0), x)


def keep(logits_BV: jax.Array, arrays: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """The logits in descending order, -inf for those that a filter drops, and their ids."""
    # In sorted order each filter keeps a prefix, so that ties cannot keep more tokens than requested.
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    place_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    sorted_BV = jnp.where(place_V[None] < arrays.top_k_B[:, None], sorted_BV, -jnp.inf)
    sorted_BV = jnp.where(nucleus(sorted_BV, arrays.top_p_B, arrays.rest_p_B), sorted_BV, -jnp.inf)
    least_B1 = arrays.log_min_p_B[:, None].astype(sorted_BV.dtype)
    return jnp.where(sorted_BV >= least_B1, sorted_BV, -jnp.inf), order_BV


def nucleus(sorted_BV: jax.Array, top_p_B: jax.Array, rest_p_B: jax.Array) -> jax.Array:
    """True for the tokens, in descending order, before which less than top_p of the probability lies.

    Sums over many tokens are rounded: a cumulative sum reaches 1 long before the last of 100,000. The
    smaller of the two parts decides, in which the rounding is relative to the smaller of top_p and
    rest_p = 1 - top_p. A negative rest_p keeps every token.
    """
    top_p_B1, rest_p_B1 = (x[:, None].astype(sorted_BV.dtype) for x in (top_p_B, rest_p_B))
    mass_BV = jnp.exp(sorted_BV)  # unnormalised: the first is 1
    total_B1 = mass_BV.sum(-1, keepdims=True)
    before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
    from_here_BV = jax.lax.cumsum(mass_BV, axis=1, reverse=True)
    return jnp.where(top_p_B1 <= 0.5, before_BV < top_p_B1 * total_B1, from_here_BV > rest_p_B1 * total_B1)


def log_probabilities(
    logits_BV: jax.Array, token_B: jax.Array, arrays: SamplingArrays
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B] of the tokens, and ids int32 and values [B, M] of the most probable M = 20, in float32 or wider.

    All are 0 if no row wants any.
    """
    B, V = logits_BV.shape
    M = min(TOP_LOGPROBS, V)

    def wanted():
        values_BV = jax.nn.log_softmax(wider(logits_BV), axis=-1)
        top_BM, ids_BM = jax.lax.top_k(values_BV, M)
        chosen_B1 = jnp.take_along_axis(values_BV, jnp.maximum(token_B, 0)[:, None], axis=-1)
        return chosen_B1[:, 0], ids_BM.astype(jnp.int32), top_BM

    def unwanted():
        sums = accumulator(logits_BV)
        return jnp.zeros((B,), sums), jnp.zeros((B, M), jnp.int32), jnp.zeros((B, M), sums)

    return jax.lax.cond(jnp.any(arrays.logprobs_B >= 0), wanted, unwanted)
