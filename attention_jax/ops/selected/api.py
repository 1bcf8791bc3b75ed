"""`selected_attention`: softmax attention to the key blocks that each query names.

    out_t = sum_s P_ts v_s,   P = softmax over {s <= t : s // block_size in I_t} of q_t . k_s * scale

The selected branch of native sparse attention, Yuan et al. 2025 (arXiv 2502.11089, equations 11 and 12). What
is seen depends on data, so it is an op of its own and no Mask.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.ops.arguments import finite_number, positive_integer
from attention_jax.ops.dispatch import (
    Explanation,
    Implementation,
    choose,
    evaluate,
    explain_choice,
    explained,
)
from attention_jax.ops.selected import gathered, reference
from attention_jax.ops.selected.common import SelectedCall
from attention_jax.ops.selected.gathered import GatheredConfig
from attention_jax.ops.tokens import per_token, positions_or_arange, segment_pair, valid_tokens

# Up to this many scores per head (T * S) impl=None takes the dense form, as the softmax op does.
_DENSE_UP_TO = 128 * 128
_FEW_QUERIES = 16  # of a decoding step, for which a dense product would read and move the whole cache


def _dense_too_large(call: SelectedCall) -> str | None:
    _, T, S, *_ = call.sizes
    named = call.block_indices_BTKn.shape[-1] * call.block_size
    if T <= _FEW_QUERIES and S > 4 * named:
        return f"T = {T} queries name {named} of S = {S} keys, and it reads all"
    return f"T * S = {T * S} > {_DENSE_UP_TO}: O(T S) work and memory" if T * S > _DENSE_UP_TO else None


# In order of preference. Forward and backward of a call always run in the same implementation.
_IMPLEMENTATIONS = {
    "reference": Implementation(reference.attend, unwanted=_dense_too_large),
    "gathered": Implementation(gathered.attend, config=GatheredConfig()),
}


def selected_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKM: jax.Array,
    block_indices_BTKn: jax.Array,
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    impl: str | GatheredConfig | None = None,
) -> jax.Array:
    """Attention of each query to the tokens up to its own in the blocks that its kv group names.

    Block j of a document holds its positions [j block_size, (j + 1) block_size).

    Args:
      q_BTNH: queries [batch, T, N heads, H].
      k_BSKH: keys [batch, S, K heads, H]; K divides N, and query heads [g N/K, (g+1) N/K) share head g.
      v_BSKM: values [batch, S, K heads, M]; M may differ from H.
      block_indices_BTKn: int, the blocks of each query and kv head. One named twice counts once, one < 0
        or past the query is none.
      block_size: tokens of a block.
      scale: multiplies q . k; 1 / sqrt(H) by default.
      segment_ids: int [B, T], or a pair ([B, T], [B, S]); only equal ids >= 0 see one another.
      q_positions, k_positions: int [B, T] and [B, S], or [T] and [S]; 0, 1, 2, ... by default. A slot
        with position < 0 or segment < 0 holds no token: it is never read, whatever it contains.
      impl: "reference" (dense), "gathered" (O(T n block_size), whatever S is), a `GatheredConfig`
        ("gathered" with these sizes), or None, which chooses; see `explain`.
        "gathered" needs the keys of a document side by side in ascending order (as in packed rows, after
        left padding, and in a cache where slot = position); other rows give NaN.

    Returns:
      out_BTNM in q's dtype, accumulated in float32. A row that sees no key gives 0 and passes no gradient.
      Differentiable in q, k and v; "gathered" has no forward mode and raises NotImplementedError there.

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together.
    """
    call = _checked_call(
        q_BTNH, k_BSKH, v_BSKM, block_indices_BTKn, block_size, scale, segment_ids, q_positions, k_positions
    )
    return evaluate(choose(_IMPLEMENTATIONS, call, impl), None, call)


def selected_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    block_indices_BTKn: jax.Array,
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
) -> jax.Array:
    """The weights with which `selected_attention` adds values, float32 [B, N, T, S], for inspection.

    The arguments are the op's, and so are the ValueErrors. Each row sums to 1, or to 0 where no key is seen.
    The array is made whole, whatever T and S are; it is differentiable in q and k.
    """
    return reference.weights(
        _checked_call(
            q_BTNH, k_BSKH, k_BSKH, block_indices_BTKn, block_size, scale, segment_ids,
            q_positions, k_positions,
        )
    )  # fmt: skip


def explain(*args, impl: str | GatheredConfig | None = None, **kwargs) -> Explanation:
    """What `selected_attention` would run for the same arguments; arrays may be ShapeDtypeStructs."""

    def find(*, impl, **given):
        return explain_choice(_IMPLEMENTATIONS, _checked_call(*given.values()), impl)

    return explained(selected_attention, find, args, kwargs | {"impl": impl})


def _checked_call(q, k, v, blocks, block_size, scale, segment_ids, q_positions, k_positions) -> SelectedCall:
    for name, x, axes in (("q", q, "BTNH"), ("k", k, "BSKH"), ("v", v, "BSKM")):
        if jnp.ndim(x) != 4 or 0 in jnp.shape(x):
            raise ValueError(f"{name} must be [{', '.join(axes)}] without empty axes, got {jnp.shape(x)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape[0] != B or k.shape[3] != H or v.shape[:3] != (B, S, K):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit [B,T,N,H], [B,S,K,H], [B,S,K,M]")
    if N % K:
        raise ValueError(f"{K} kv heads do not divide {N} query heads (axis 2 of [B, T, N, H])")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if jnp.ndim(blocks) != 4 or blocks.shape[:3] != (B, T, K) or not blocks.shape[3]:
        raise ValueError(f"block_indices must be [B, T, K, n] = [{B}, {T}, {K}, n >= 1], got {blocks.shape}")
    if not jnp.issubdtype(blocks.dtype, jnp.integer):
        raise ValueError(f"block_indices must be integers, got {blocks.dtype}")
    q_segments, k_segments = _segments(segment_ids, B, T, S)
    return SelectedCall(
        *map(jnp.asarray, (q, k, v)),
        jnp.asarray(blocks, jnp.int32),
        _positions("q_positions", q_positions, q_segments, B, T),
        _positions("k_positions", k_positions, k_segments, B, S),
        q_segments, k_segments,
        block_size=positive_integer("block_size", block_size),
        scale=1 / math.sqrt(H) if scale is None else finite_number("scale", scale),
    )  # fmt: skip


def _positions(name: str, positions: Any, segments: jax.Array | None, B: int, length: int) -> jax.Array:
    """The given positions, or 0, 1, 2, ...; -1 where there is no segment. [B, length]"""
    positions = positions_or_arange(per_token(name, positions, B, length), length)
    positions = jnp.broadcast_to(positions, (B, length))
    return positions if segments is None else jnp.where(valid_tokens(None, segments), positions, -1)


def _segments(ids: Any, B: int, T: int, S: int) -> tuple[jax.Array | None, jax.Array | None]:
    q, k = segment_pair(ids, B, T, S)
    if q is None or k is None:
        return None, None
    return jnp.broadcast_to(q, (B, T)), jnp.broadcast_to(k, (B, S))


def implementations() -> tuple[str, ...]:
    """The names that `impl` may be."""
    return tuple(_IMPLEMENTATIONS)
