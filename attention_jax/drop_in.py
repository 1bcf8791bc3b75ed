"""Drop-in replacements for the `dot_product_attention` functions of JAX and Flax.

- `dot_product_attention` has the signature of `jax.nn.dot_product_attention`.
- `nnx_attention_fn` is an `attention_fn` of `flax.nnx.MultiHeadAttention`.
- `linen_attention_fn` is an `attention_fn` of `flax.linen.MultiHeadDotProductAttention`.

All three differ from the originals as follows:

- A query without any visible key returns 0 with gradient 0; the originals return the mean of all values.
- Scores, softmax and sums are float32 for inputs of at most 32 bits and float64 for float64, and the weights
  are not rounded to the dtype of the inputs before they are multiplied with the values.
- A key that is masked out by the key lengths, or by a mask that is the same for all heads and queries, is
  never read: it may hold NaN or Inf.
- An axis of length 0 raises ValueError.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype as promote_linen
from flax.nnx.nn.dtypes import promote_dtype as promote_nnx

from attention_jax.dtypes import wider
from attention_jax.masks import Causal, Full, Mask, SlidingWindow
from attention_jax.ops import softmax
from attention_jax.ops.softmax.api import Impl, implementations

# JAX calls its plain XLA implementation "xla"; the equivalent here is "chunked".
_IMPLEMENTATIONS = {None: None, "xla": "chunked"}


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any | None = None,
    mask: Any | None = None,
    *,
    scale: Any | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any | None = None,
    key_value_seq_lengths: Any | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Impl = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with the arguments of `jax.nn.dot_product_attention`; the module docstring lists differences.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H]; K divides N.
      value: [B, S, K, M] or [S, K, M]; unlike in JAX, M may differ from H.
      bias: added to the scores, of any numeric dtype, broadcastable to [B, N, T, S].
      mask: boolean, broadcastable to [B, N, T, S]; True means that the pair takes part in attention.
      scale: multiplies the scores, 1 / sqrt(H) by default. A traced scale is rounded to the query's dtype and
        multiplies the query, so that it is differentiable as in JAX.
      is_causal: query t attends to keys 0 .. t; query 0 and key 0 have the same position.
      query_seq_lengths: int [B]; queries at or past the length return 0.
      key_value_seq_lengths: int [B]; keys at or past the length are masked out.
      local_window_size: (left, right), the numbers of keys before and after the query's own position, or one
        int for both.
      implementation: None chooses by platform and size. "xla" is a plain XLA program with O(T) memory
        (impl="chunked"), "cudnn" is NVIDIA's library. Any `impl` of this library's op is accepted too.
      return_residual: also return the log-sum-exp of each query's scores, [B, T, N] or [T, N] in the key's
        dtype, without a gradient. For a query without a visible key it is -inf (in JAX, a large negative
        number).

    Returns:
      [B, T, N, M] or [T, N, M] in the query's dtype, or (output, residual) with `return_residual`.

    Raises:
      ValueError: inconsistent arguments.
      NotImplementedError: the named implementation does not support this call; there is no fallback.
    """
    impl = _implementation(implementation)
    shape = jnp.shape(query)
    query, key, value = (_four_axes(*x) for x in (("query", query), ("key", key), ("value", value)))
    scale, query = _scale(scale, query)
    arguments = _op_arguments(
        query, key, bias, mask, _pattern(is_causal, local_window_size),
        _lengths("query_seq_lengths", query_seq_lengths, query.shape[0]),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, query.shape[0]),
    )  # fmt: skip
    found = softmax.dot_product_attention(
        query, key, value, scale=scale, return_lse=return_residual, impl=impl, **arguments
    )
    if not return_residual:
        return found.reshape(*shape[:-1], found.shape[-1])
    out, lse = found
    residual = jax.lax.stop_gradient(lse.astype(key.dtype))
    return out.reshape(*shape[:-1], out.shape[-1]), residual.reshape(shape[:-1])


def nnx_attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any | None = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable = promote_nnx,
    is_causal: bool = False,
) -> jax.Array:
    """`flax.nnx.dot_product_attention` as `nnx.MultiHeadAttention(attention_fn=nnx_attention_fn)` calls it.

    query [batch..., T, N, H], key [batch..., S, K, H] and value [batch..., S, K, M] have any number of batch
    axes; bias and mask broadcast to [batch..., N, T, S]; the result is [batch..., T, N, M]. Dropout is
    independent for each entry and uses different random bits than Flax. `precision` is ignored: float32
    products always use the highest precision.

    With `module` (sow_weights=True) the weights before dropout, [batch..., N, T, S], are computed separately
    and sown.

    Raises:
      NotImplementedError: dropout with broadcast_dropout=True.
      ValueError: inconsistent arguments.
    """
    del precision
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    sow = None if module is None else functools.partial(module.sow, nnx.Intermediate)
    dropout = _dropout(dropout_rate, dropout_rng, deterministic, broadcast_dropout)
    return _any_batch(query, key, value, bias, mask, _pattern(is_causal, None), dropout, sow)


def linen_attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any | None = None,
    precision: Any = None,
    module: Any | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
) -> jax.Array:
    """`flax.linen.dot_product_attention` as `nn.MultiHeadDotProductAttention(attention_fn=...)` calls it.

    Shapes, dropout, `precision` and `module` are as in `nnx_attention_fn`. The softmax is float32 or wider;
    `force_fp32_for_softmax` is ignored.

    Raises:
      NotImplementedError: dropout with broadcast_dropout=True; a custom einsum or dot_general.
      ValueError: inconsistent arguments.
    """
    del precision, force_fp32_for_softmax
    products = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, given in products.items():
        if given is not None:
            raise NotImplementedError(f"{name} is not supported: scores are computed by blocks; pass None")
    query, key, value = promote_linen(query, key, value, dtype=dtype)
    sow = None if module is None else functools.partial(module.sow, "intermediates")
    dropout = _dropout(dropout_rate, dropout_rng, deterministic, broadcast_dropout)
    return _any_batch(query, key, value, bias, mask, Full(), dropout, sow)


def _implementation(name: Impl) -> Impl:
    if name is not None and not isinstance(name, str):
        return name  # a config, or what the op refuses
    if name in _IMPLEMENTATIONS:
        return _IMPLEMENTATIONS[name]
    if name not in implementations():
        allowed = ", ".join(dict.fromkeys([*filter(None, _IMPLEMENTATIONS), *implementations()]))
        raise ValueError(f"implementation must be None or one of {allowed}, got {name!r}")
    return name


def _four_axes(name: str, x: Any) -> jax.Array:
    """x with leading axes of length 1 added, up to four axes."""
    x = jnp.asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 axes, got {x.shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _scale(scale: Any, query: jax.Array) -> tuple[Any, jax.Array]:
    """The scale for the op, a Python number, and the query, which is multiplied by a traced scale."""
    if not isinstance(scale, jax.core.Tracer):
        return scale, query
    if scale.ndim:
        raise ValueError(f"scale must be one number, got an array of shape {scale.shape}")
    return 1.0, (wider(query) * scale).astype(query.dtype)


def _pattern(is_causal: bool, window: Any) -> Mask:
    """The mask of is_causal and local_window_size."""
    pattern = Causal() if is_causal else Full()
    if window is None:
        return pattern
    sides = (window, window) if isinstance(window, numbers.Integral) else window
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(n, numbers.Integral) and n >= 0 for n in sides)
    ):
        raise ValueError(
            f"local_window_size must be an int >= 0, a pair (left, right) of them or None, got {window!r}"
        )
    left, right = map(int, sides)
    return SlidingWindow(left + 1, 0 if is_causal else right)


def _lengths(name: str, x: Any, B: int) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (B,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [{B}], one per batch row, got {x.dtype} {x.shape}")
    return x


def _op_arguments(query, key, bias, mask, pattern: Mask, q_lengths, k_lengths) -> dict[str, Any]:
    """mask, bias and positions for the op, from four-axis queries and keys and the caller's mask arguments.

    A mask that is the same for all heads and queries marks valid keys, like lengths. It is converted to key
    positions, so that no [T, S] array is needed. Any other mask becomes an array that includes the pattern.
    """
    sizes = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    bias, mask = _scores("bias", bias, sizes), _scores("mask", mask, sizes)
    q_positions, k_positions = _positions(q_lengths, sizes[2]), _positions(k_lengths, sizes[3])
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}; pass an additive mask as bias")
    if mask is not None and mask.shape[1:3] == (1, 1):
        known = jnp.arange(sizes[3], dtype=jnp.int32) if k_positions is None else k_positions
        k_positions, mask = jnp.where(mask[:, 0, 0], known, -1), None
    elif mask is not None and pattern != Full():
        mask = mask & pattern.dense(*(jnp.arange(n, dtype=jnp.int32) for n in sizes[2:]))
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        bias = wider(bias)
    return {
        "mask": pattern if mask is None else mask,
        "bias": bias,
        "q_positions": q_positions,
        "k_positions": k_positions,
    }


def _scores(name: str, x: Any, sizes: tuple[int, int, int, int]) -> jax.Array | None:
    if x is None:
        return None
    x = _four_axes(name, x)
    if any(n not in (1, size) for n, size in zip(x.shape, sizes, strict=True)):
        raise ValueError(f"{name} {x.shape} does not broadcast to [B, N, T, S] = {list(sizes)}")
    return x


def _positions(lengths_B: jax.Array | None, length: int) -> jax.Array | None:
    """Positions 0, 1, 2, ..., and -1 (invalid) at or past each row's length; None if all slots are valid."""
    if lengths_B is None:
        return None
    slots = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(slots < lengths_B[:, None], slots, -1)


def _dropout(rate: float, rng: Any, deterministic: bool, broadcast: bool) -> dict[str, Any]:
    """The op's dropout arguments from Flax's."""
    if deterministic or rate == 0:
        return {}
    if broadcast:
        raise NotImplementedError(
            "broadcast_dropout=True (the same dropout for all rows and heads) is not supported: pass "
            "broadcast_dropout=False"
        )
    if rng is None:
        raise ValueError(f"dropout_rate={rate} with deterministic=False needs a dropout_rng")
    return {"dropout_rate": rate, "dropout_key": rng}


def _any_batch(query, key, value, bias, mask, pattern: Mask, dropout: dict[str, Any], sow) -> jax.Array:
    """Attention over any number of batch axes; calls sow(name, weights) if `sow` is not None."""
    batch = query.shape[:-3]
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        raise ValueError(
            f"batch axes of query {query.shape}, key {key.shape} and value {value.shape} must be equal"
        )
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    mask = None if mask is None else jnp.asarray(mask).astype(bool)
    bias, mask = (_one_batch_axis(x, batch) for x in (bias, mask))
    arguments = _op_arguments(q, k, bias, mask, pattern, None, None)
    if sow is not None:
        weights = softmax.attention_weights(q, k, **arguments).astype(query.dtype)
        sow("attention_weights", weights.reshape(*batch, *weights.shape[1:]))
    out = softmax.dot_product_attention(q, k, v, **arguments, **dropout)
    return out.reshape(*query.shape[:-1], out.shape[-1])


def _one_batch_axis(x: Any, batch: tuple[int, ...]) -> jax.Array | None:
    """x, broadcastable to [batch..., N, T, S], with its batch axes merged into one."""
    if x is None:
        return None
    x = jnp.asarray(x)
    front = x.shape[:-3]
    if len(front) > len(batch) or any(
        n not in (1, size) for n, size in zip(front[::-1], batch[::-1], strict=False)
    ):
        raise ValueError(f"a bias or mask {x.shape} does not broadcast to batch axes {list(batch)}")
    if math.prod(front) > 1:
        x = jnp.broadcast_to(x, batch + x.shape[-3:])
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
