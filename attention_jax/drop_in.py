"""`dot_product_attention` for callers of JAX and Flax: their signatures, computed by this library.

- `dot_product_attention` has the signature of `jax.nn.dot_product_attention`.
- `nnx_attention_fn` is an `attention_fn` of `flax.nnx.MultiHeadAttention`.
- `linen_attention_fn` is an `attention_fn` of `flax.linen.MultiHeadDotProductAttention`.

All three differ from the originals in this:

- A query that sees no key gives 0 and passes no gradient; the originals give the mean of all values.
- Scores, softmax and sums are float32 whatever the inputs are, and the weights are not rounded to the dtype
  of the inputs before they meet the values. float64 inputs are computed in float32 too.
- A key that the key lengths, or a mask that is the same for all heads and queries, hide is never read: it
  may hold NaN or Inf.
- An axis of length 0 is refused.
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

from attention_jax.masks import Causal, Full, Mask, SlidingWindow
from attention_jax.ops import softmax
from attention_jax.ops.softmax.api import implementations

# JAX's name of a plain XLA program is ours for the blocked form: no kernel, no library.
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
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with the arguments of `jax.nn.dot_product_attention`; what differs is said above.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H]; K divides N.
      value: [B, S, K, M] or [S, K, M]; M may differ from H, which JAX refuses.
      bias: added to the scores, of any numeric dtype, broadcastable to [B, N, T, S].
      mask: boolean, broadcastable to [B, N, T, S]; True takes part.
      scale: multiplies the scores, 1 / sqrt(H) by default. A traced one multiplies the query, rounded to the
        query's dtype, so that it is differentiable as in JAX.
      is_causal: query t sees keys up to t (the first query and the first key stand at the same place).
      query_seq_lengths: int [B]; queries from that one on give 0.
      key_value_seq_lengths: int [B]; keys from that one on are not seen.
      local_window_size: (left, right) keys before and after the query's own, or one int for both.
      implementation: None chooses by platform and size. "xla" is a plain XLA program with O(T) memory
        (impl="chunked"), "cudnn" is NVIDIA's library. Any other `impl` of this library's op may be named too.
      return_residual: also return the log-sum-exp of each query's scores, [B, T, N] or [T, N] in the key's
        dtype, without a gradient. It is -inf where no key is seen, a large negative number in JAX.

    Returns:
      [B, T, N, M] or [T, N, M] in the query's dtype, or (that, the residual).

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: a named implementation cannot do this call; it never falls back.
    """
    impl = _implementation(implementation)
    shape = jnp.shape(query)
    query, key, value = (_four_axes(*x) for x in (("query", query), ("key", key), ("value", value)))
    scale, query = _scale(scale, query)
    arguments = _seen(
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
    axes; bias and mask broadcast to [batch..., N, T, S]; the result is [batch..., T, N, M]. Dropout draws
    other bits than Flax's, for each entry on its own. `precision` changes nothing: float32 products always
    have the highest.

    `module` (sow_weights=True) sows the weights before dropout, [batch..., N, T, S], made for that alone.

    Raises:
      NotImplementedError: dropout with broadcast_dropout=True.
      ValueError: arguments that do not fit together.
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

    Shapes, dropout, `precision` and `module` are as in `nnx_attention_fn`. The softmax is float32 whatever
    `force_fp32_for_softmax` says.

    Raises:
      NotImplementedError: dropout with broadcast_dropout=True; an einsum or a dot_general of the caller's.
      ValueError: arguments that do not fit together.
    """
    del precision, force_fp32_for_softmax
    products = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, given in products.items():
        if given is not None:
            raise NotImplementedError(f"{name} is not supported: the scores are never one product; pass None")
    query, key, value = promote_linen(query, key, value, dtype=dtype)
    sow = None if module is None else functools.partial(module.sow, "intermediates")
    dropout = _dropout(dropout_rate, dropout_rng, deterministic, broadcast_dropout)
    return _any_batch(query, key, value, bias, mask, Full(), dropout, sow)


def _implementation(name: str | None) -> str | None:
    if name in _IMPLEMENTATIONS:
        return _IMPLEMENTATIONS[name]
    if name not in implementations():
        allowed = ", ".join(dict.fromkeys([*filter(None, _IMPLEMENTATIONS), *implementations()]))
        raise ValueError(f"implementation must be None or one of {allowed}, got {name!r}")
    return name


def _four_axes(name: str, x: Any) -> jax.Array:
    """x with axes of length 1 in front, up to four."""
    x = jnp.asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 axes, got {x.shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _scale(scale: Any, query: jax.Array) -> tuple[Any, jax.Array]:
    """The scale for the op, a Python number, and the query, which takes up a traced scale."""
    if not isinstance(scale, jax.core.Tracer):
        return scale, query
    if scale.ndim:
        raise ValueError(f"scale must be one number, got an array of shape {scale.shape}")
    return 1.0, (query.astype(jnp.float32) * scale).astype(query.dtype)


def _pattern(is_causal: bool, window: Any) -> Mask:
    """What is_causal and local_window_size keep, as a function of positions."""
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


def _seen(query, key, bias, mask, pattern: Mask, q_lengths, k_lengths) -> dict[str, Any]:
    """mask, bias and positions for the op, from four-axis queries and keys and what restricts them.

    A mask that is one for all heads and queries says which keys exist, as lengths do: slots of their own, so
    that it costs no [T, S] array. Any other mask is an array, and takes up the pattern.
    """
    sizes = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    bias, mask = _scores("bias", bias, sizes), _scores("mask", mask, sizes)
    q_positions, k_positions = _positions(q_lengths, sizes[2]), _positions(k_lengths, sizes[3])
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}; use bias to add")
    if mask is not None and mask.shape[1:3] == (1, 1):
        known = jnp.arange(sizes[3], dtype=jnp.int32) if k_positions is None else k_positions
        k_positions, mask = jnp.where(mask[:, 0, 0], known, -1), None
    elif mask is not None and pattern != Full():
        mask = mask & pattern.dense(*(jnp.arange(n, dtype=jnp.int32) for n in sizes[2:]))
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        bias = bias.astype(jnp.float32)
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
    """0, 1, 2, ... with -1, which is no token, from each row's length on; None where every slot is one."""
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
            "broadcast_dropout=True (the same dropout in all rows and heads) is not supported: pass "
            "broadcast_dropout=False"
        )
    if rng is None:
        raise ValueError(f"dropout_rate={rate} with deterministic=False needs a dropout_rng")
    return {"dropout_rate": rate, "dropout_key": rng}


def _any_batch(query, key, value, bias, mask, pattern: Mask, dropout: dict[str, Any], sow) -> jax.Array:
    """Attention over any number of batch axes; sow(name, weights) where that is not None."""
    batch = query.shape[:-3]
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        raise ValueError(
            f"batch axes of query {query.shape}, key {key.shape} and value {value.shape} must be the same"
        )
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    mask = None if mask is None else jnp.asarray(mask).astype(bool)
    bias, mask = (_one_batch_axis(x, batch) for x in (bias, mask))
    arguments = _seen(q, k, bias, mask, pattern, None, None)
    if sow is not None:
        weights = softmax.attention_weights(q, k, **arguments).astype(query.dtype)
        sow("attention_weights", weights.reshape(*batch, *weights.shape[1:]))
    out = softmax.dot_product_attention(q, k, v, **arguments, **dropout)
    return out.reshape(*query.shape[:-1], out.shape[-1])


def _one_batch_axis(x: Any, batch: tuple[int, ...]) -> jax.Array | None:
    """x, broadcastable to [batch..., N, T, S], with its batch axes as one."""
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
