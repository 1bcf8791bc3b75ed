"""`dot_product_attention`: one function, many implementations.

    out_t = sum_s P_ts v_s,   P = softmax over kept s of (softcap(q_t . k_s * scale) + bias_ts)

MHA, GQA and MQA are head counts; local, packed, padded, cached and cross attention are arguments.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.biases import ArrayBias, Bias
from attention_jax.masks import Full, Mask
from attention_jax.ops import sharded
from attention_jax.ops.arguments import is_array
from attention_jax.ops.dispatch import (
    Explanation,
    Implementation,
    choose,
    evaluate,
    explain_choice,
    explained,
)
from attention_jax.ops.softmax import chunked, decode, library, mosaic_gpu, mosaic_tpu, reference
from attention_jax.ops.softmax.chunked_plan import ChunkedConfig
from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu import MosaicGPUConfig
from attention_jax.ops.softmax.mosaic_tpu import MosaicTPUConfig
from attention_jax.ops.tokens import per_token, segment_pair

# Below this many scores per head (T * S) the dense form beats the blocked one on a CPU
# (`scripts/benchmark.py crossover`, docs/results.md).
_DENSE_UP_TO = 128 * 128


def _dense_too_large(call: SoftmaxCall) -> str | None:
    _, T, S, *_ = call.sizes
    if T > 1 and T * S > _DENSE_UP_TO:
        return f"T * S = {T * S} > {_DENSE_UP_TO}: the blocked form is faster and needs O(T) memory"
    return None


def _one_query(call: SoftmaxCall) -> str | None:
    return "T = 1: a row of products, which a fused kernel does not speed up" if call.sizes[1] == 1 else None


def _never_run(call: SoftmaxCall) -> str | None:
    del call
    return "compiled and interpreted, but never run on a card (docs/kernels.md): ask for it by name"


# In order of preference. Forward and backward of a call always run in the same implementation.
_IMPLEMENTATIONS = {
    "cudnn": Implementation(library.attend, library.unsupported, _one_query),
    "mosaic_gpu": Implementation(mosaic_gpu.attend, mosaic_gpu.unsupported, _never_run, MosaicGPUConfig()),
    "mosaic_tpu": Implementation(mosaic_tpu.attend, mosaic_tpu.unsupported, _one_query, MosaicTPUConfig()),
    "decode": Implementation(decode.attend, decode.unsupported, decode.unwanted),
    "reference": Implementation(reference.attend, unwanted=_dense_too_large),
    "chunked": Implementation(chunked.attend, config=ChunkedConfig()),
}
Impl = str | ChunkedConfig | MosaicGPUConfig | MosaicTPUConfig | None


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKM: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    mask_BNTS: jax.Array | None = None,
    bias: Bias | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits_N: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    impl: Impl = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention of queries over keys and values; the layout of `jax.nn.dot_product_attention`.

    Args:
      q_BTNH: queries [batch, T, N heads, H].
      k_BSKH: keys [batch, S, K heads, H]; K divides N, and query heads [g N/K, (g+1) N/K) share head g.
      v_BSKM: values [batch, S, K heads, M]; M may differ from H.
      mask: a `Mask` over positions, or a boolean array as `mask_BNTS`.
      mask_BNTS: a boolean array broadcastable to [B, N, T, S]; True is kept. Beside `mask` a pair is kept
        where both keep it.
      bias: added to the scores after the softcap: a `Bias`, or an array broadcastable to [B, N, T, S].
      scale: multiplies q . k; 1 / sqrt(H) by default.
      softcap: c > 0 turns a score x into c * tanh(x / c), before bias and mask.
      sink_logits_N: a logit per head that joins the denominator only.
      segment_ids: int [B, T], or a pair ([B, T], [B, S]); only equal ids >= 0 see one another.
      q_positions, k_positions: int [B, T] and [B, S], or [T] and [S]; 0, 1, 2, ... by default. A slot
        with position < 0 or segment < 0 holds no token: it is never read, whatever it contains.
      dropout_rate, dropout_key: drops entries of P, scaled by 1 / (1 - rate). The bits depend on (key,
        batch row, head, q position, k position) alone.
      return_lse: also return the log-sum-exp of each row's scores, the sink's included.
      impl: "reference" (dense), "chunked" (blocks, O(T) memory), "decode" (a few queries), "cudnn"
        (NVIDIA's library), "mosaic_tpu" and "mosaic_gpu" (our kernels); a `ChunkedConfig`, `MosaicTPUConfig`
        or `MosaicGPUConfig`, which names its implementation and sets tile sizes and the like; or None, which
        chooses by platform and size; see `explain`.

    Returns:
      out_BTNM in q's dtype, or (out_BTNM, lse_BTN float32 or float64). A row that sees no key gives 0 and lse
      -inf (or the sink), and passes no gradient. Everything accumulates in float32, or in
      float64 where q, k and v are. Every implementation
      has a gradient; "reference" has every derivative, "chunked" also `jax.jvp` of a gradient
      (Hessian-vector products).

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together.
      NotImplementedError: a named `impl` cannot do this call (it never falls back), or the
        implementation has no such derivative.
    """
    call = _checked_call(
        q_BTNH, k_BSKH, v_BSKM, mask, mask_BNTS, bias, scale, softcap, sink_logits_N, segment_ids,
        q_positions, k_positions, dropout_rate, dropout_key, return_lse,
    )  # fmt: skip
    out_BTNM, lse_BTN = evaluate(choose(_IMPLEMENTATIONS, call, impl), sharded.shards(call), call)
    return (out_BTNM, lse_BTN) if return_lse else out_BTNM


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    mask_BNTS: jax.Array | None = None,
    bias: Bias | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits_N: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
) -> jax.Array:
    """The weights with which `dot_product_attention` adds values, float32 [B, N, T, S], for inspection.

    The arguments are the op's, and so are the ValueErrors. Each row sums to 1, to 1 minus the sink's share
    where there are sink logits, and to 0 where no key is seen. Dropout, which the op applies to these, is not
    included. The array is made whole, whatever T and S are; it is differentiable.
    """
    return reference.weights(
        _checked_call(
            q_BTNH, k_BSKH, k_BSKH, mask, mask_BNTS, bias, scale, softcap, sink_logits_N, segment_ids,
            q_positions, k_positions,
        )
    )  # fmt: skip


def explain(*args, impl: Impl = None, **kwargs) -> Explanation:
    """What `dot_product_attention` would run for the same arguments; arrays may be ShapeDtypeStructs."""

    def find(*, impl, **arguments):
        call = _checked_call(*arguments.values())
        shards = sharded.shards(call)
        found = explain_choice(_IMPLEMENTATIONS, call, impl)
        return found if shards is None else dataclasses.replace(found, shards=str(shards))

    return explained(dot_product_attention, find, args, kwargs | {"impl": impl})


def _checked_call(
    q, k, v, mask=None, mask_BNTS=None, bias=None, scale=None, softcap=None, sinks=None, segment_ids=None,
    q_positions=None, k_positions=None, rate=0.0, key=None, return_lse=False,
) -> SoftmaxCall:  # fmt: skip
    for name, x, axes in (("q", q, "BTNH"), ("k", k, "BSKH"), ("v", v, "BSKM")):
        if not is_array(x):
            raise ValueError(f"{name} must be an array [{', '.join(axes)}], got {type(x).__name__}")
        if len(x.shape) != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be [{', '.join(axes)}] without empty axes, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    q, k, v = map(jnp.asarray, (q, k, v))
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape[0] != B or k.shape[3] != H or v.shape[:3] != (B, S, K):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit [B,T,N,H], [B,S,K,H], [B,S,K,M]")
    if N % K:
        raise ValueError(f"{K} kv heads do not divide {N} query heads (axis 2 of [B, T, N, H])")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    q_segments, k_segments = segment_pair(segment_ids, B, T, S)
    mask, mask_BNTS = _mask(mask, mask_BNTS, (B, N, T, S))
    return SoftmaxCall(
        q, k, v,
        per_token("q_positions", q_positions, B, T),
        per_token("k_positions", k_positions, B, S),
        q_segments, k_segments, mask_BNTS,
        _bias(bias, (B, N, T, S)),
        _sinks(sinks, N),
        _dropout_words(rate, key),
        first_row=None,
        first_head=None,
        mask=mask,
        scale=_number("scale", 1 / math.sqrt(H) if scale is None else scale),
        softcap=None if softcap is None else _number("softcap", softcap, positive=True),
        dropout_rate=_rate(rate),
        lse=bool(return_lse),
    )  # fmt: skip


def _number(name: str, value: Any, positive: bool = False) -> float:
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (numbers.Real, np.ndarray, jax.Array)):
        raise ValueError(f"{name} must be a Python number (multiply q by a traced one), got {value!r}")
    if np.ndim(value):
        raise ValueError(f"{name} must be one number, got an array of shape {np.shape(value)}")
    value = float(value)
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' * positive}, got {value}")
    return value


def _rate(rate: Any) -> float:
    rate = _number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
    return rate


def _dropout_words(rate: float, key: jax.Array | None) -> jax.Array | None:
    if _rate(rate) == 0:
        return None
    if key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key")
    if is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return jax.random.key_data(key).reshape(-1)
    if is_array(key) and key.dtype == jnp.uint32 and len(key.shape) == 1:
        return jnp.asarray(key)
    what = f"{key.dtype} {key.shape}" if is_array(key) else type(key).__name__
    raise ValueError(f"dropout_key must be one jax.random.key (or its data, uint32 [n]), got {what}")


def _broadcastable(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(x.shape) > 4 or any(a not in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} {x.shape} does not broadcast to [B, N, T, S] = {shape}")
    return jnp.asarray(x).reshape((1,) * (4 - len(x.shape)) + x.shape)


def _mask(mask: Any, mask_BNTS: Any, shape: tuple[int, ...]) -> tuple[Mask, jax.Array | None]:
    """The Mask, and the array that restricts it further."""
    arrays = []
    for name, x in (("mask", mask), ("mask_BNTS", mask_BNTS)):
        if x is None or (name == "mask" and isinstance(x, Mask)):
            continue
        if not is_array(x) or x.dtype != bool:
            what = getattr(x, "dtype", None) or repr(x)
            allowed = "a Mask or a boolean array" if name == "mask" else "a boolean array"
            raise ValueError(f"{name} must be {allowed}, got {what}; use bias= to add")
        arrays.append(_broadcastable(name, x, shape))
    kept = arrays[0] & arrays[1] if len(arrays) == 2 else arrays[0] if arrays else None
    return mask if isinstance(mask, Mask) else Full(), kept


def _bias(bias: Any, shape: tuple[int, ...]) -> Bias | None:
    if isinstance(bias, Bias):
        bias.check(shape)
    if bias is None or isinstance(bias, Bias):
        return bias
    if not is_array(bias):
        raise ValueError(f"bias must be a Bias or an array, got {bias!r}")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias must be floating point, got {bias.dtype}; use mask= for booleans")
    return ArrayBias(_broadcastable("bias", bias, shape))


def _sinks(sinks: jax.Array | None, N: int) -> jax.Array | None:
    if sinks is None:
        return None
    if not is_array(sinks) or sinks.shape != (N,):
        what = getattr(sinks, "shape", None) or type(sinks).__name__
        raise ValueError(f"sink_logits_N must be [{N}], one per query head, got {what}")
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sink_logits_N must be floating point, got {sinks.dtype}")
    return jnp.asarray(sinks)


def implementations() -> tuple[str, ...]:
    """The names that `impl` may be."""
    return tuple(_IMPLEMENTATIONS)
