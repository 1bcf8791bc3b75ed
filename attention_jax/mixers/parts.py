"""What the mixers of the softmax family share: keys with or without a cache, head norms, validity."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.caches import KVCache
from attention_jax.choices import check_choices
from attention_jax.masks import Causal, Mask, parse
from attention_jax.mixers.base import Context
from attention_jax.ops.softmax import dot_product_attention
from attention_jax.ops.softmax.api import implementations


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys and values the new queries attend to, with what tells the op where everything stands.

    `extra` is what each key brought along: [B, S, ...], as given to `recall`.
    """

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    extra: Any
    q_positions_BT: jax.Array | None
    k_positions_BS: jax.Array | None
    segment_ids_BT: jax.Array | None
    lost_BT: jax.Array | None  # queries past the capacity: their output is NaN

    @property
    def valid_BS(self) -> jax.Array | None:
        """True [B or 1, S] where a slot holds a key; None where all do."""
        return valid_tokens(Context(self.k_positions_BS, self.segment_ids_BT))

    def attend(self, q_BTNH: jax.Array, *, k=None, v=None, **options) -> jax.Array:
        """`dot_product_attention` of the queries over these keys; k and v stand in for the held ones."""
        k = self.k_BSKH if k is None else k
        v = self.v_BSKM if v is None else v
        y_BTNM = dot_product_attention(
            q_BTNH, k.astype(q_BTNH.dtype), v.astype(q_BTNH.dtype),
            segment_ids=self.segment_ids_BT,
            q_positions=self.q_positions_BT,
            k_positions=self.k_positions_BS,
            **options,
        )  # fmt: skip
        if self.lost_BT is None:
            return y_BTNM
        # A traced position cannot raise; NaN is seen, a silently shortened context is not.
        return jnp.where(self.lost_BT[:, :, None, None], jnp.nan, y_BTNM)


def recall(
    state: KVCache | None, ctx: Context, k_BTKH: jax.Array, v_BTKM: jax.Array | None, extra: Any = None
) -> tuple[Keys, KVCache | None]:
    """What the new tokens may attend to, themselves included, and the state with them appended.

    Raises: ValueError for a cached call without positions, with segments, or of more tokens than fit.
    """
    if state is None:
        positions = ctx.positions_BT
        return Keys(k_BTKH, v_BTKM, extra, positions, positions, ctx.segment_ids_BT, None), None
    positions_BT = cached_positions(state.capacity, ctx, *k_BTKH.shape[:2])
    new = (k_BTKH, v_BTKM, positions_BT, extra)
    grown = state.append(*new)
    # Appending may overwrite what the first new tokens still see: read old slots and new keys together.
    seen = state.beside(*new) if k_BTKH.shape[1] > 1 and state.wraps else grown
    lost_BT = state.overflow(positions_BT)
    return Keys(seen.k_BSKH, seen.v_BSKM, seen.extra, positions_BT, seen.positions_BS, None, lost_BT), grown


def cached_positions(capacity: int, ctx: Context, B: int, T: int) -> jax.Array:
    """The positions [B, T] of a cached call; ValueError where the context does not fit one."""
    if ctx.positions_BT is None:
        raise ValueError("a cached call needs ctx.positions_BT: where in the stream its tokens stand")
    if ctx.segment_ids_BT is not None:
        raise ValueError("a cached stream holds one document a row: ctx.segment_ids_BT must be None")
    if T > capacity:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {capacity}")
    return jnp.broadcast_to(ctx.positions_BT, (B, T))


def positions_of(ctx: Context, T: int) -> jax.Array:
    """The tokens' positions [B or 1, T]: the context's, or 0, 1, 2, ..."""
    return jnp.arange(T)[None] if ctx.positions_BT is None else ctx.positions_BT


def dropout_options(rate: float, ctx: Context) -> dict[str, Any]:
    """The op's dropout arguments: none where the rate is 0 or the context has no key."""
    if rate == 0 or ctx.dropout_key is None:
        return {}
    return {"dropout_rate": rate, "dropout_key": ctx.dropout_key}


def zero_invalid(y_BTD: jax.Array, ctx: Context) -> jax.Array:
    """y with the rows of invalid tokens selected to 0 (an output bias or their own NaN stays out)."""
    valid_BT = valid_tokens(ctx)
    if valid_BT is None:
        return y_BTD
    return jnp.where(valid_BT[..., None], y_BTD, jnp.zeros((), y_BTD.dtype))


def valid_tokens(ctx: Context) -> jax.Array | None:
    """True [B or 1, T] where a slot holds a token; None where all do."""
    parts = [ids >= 0 for ids in (ctx.positions_BT, ctx.segment_ids_BT) if ids is not None]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


class L2Norm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) over a head's features, without parameters (Llama 4's QK norm)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def head_norm(kind: Literal["rms", "l2"] | None, head_dim: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
    """The norm of queries or keys [..., H]: RMS with a learned scale, L2 without, or None."""
    if kind is None:
        return None
    return nnx.RMSNorm(head_dim, dtype=dtype, rngs=rngs) if kind == "rms" else L2Norm()


def split_heads(y_BTE: jax.Array, head_dim: int, norm: Any = None) -> jax.Array:
    """A projection [B, T, heads * H] as [B, T, heads, H], normalised where a norm is given."""
    y = y_BTE.reshape(*y_BTE.shape[:2], -1, head_dim)
    return y if norm is None else norm(y)


def head_width(d_model: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim, or d_model / num_heads; ValueError where that is no whole number."""
    if head_dim is not None:
        if head_dim < 1:
            raise ValueError(f"head_dim must be >= 1, got {head_dim}")
        return head_dim
    if d_model % num_heads:
        raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}; set head_dim")
    return d_model // num_heads


def parse_mask(config: Any) -> None:
    """A frozen config's `mask` as a Mask where it was given as an expression; ValueError for neither."""
    if isinstance(config.mask, str):
        object.__setattr__(config, "mask", parse(config.mask))
    if not isinstance(config.mask, Mask):
        raise ValueError(f"mask must be a Mask or its expression, got {type(config.mask).__name__}")


def within(mask: Mask, causal: bool) -> Mask:
    """The mask a layer of such a model runs: a causal one adds Causal() where no prefix says otherwise."""
    return mask & Causal() if causal and mask.prefix is None else mask


def build_within(config: Any, module: type, d_model: int, rngs: nnx.Rngs, causal: bool, options: dict) -> Any:
    """The checked module(d_model, config) of a config with a mask, in a model that is causal or not."""
    config.check(d_model, causal=causal)
    return module(
        d_model, dataclasses.replace(config, mask=within(config.mask, causal)), rngs=rngs, **options
    )


def check_heads(num_heads: int, num_kv_heads: int | None) -> None:
    """ValueError for head counts that cannot be."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_kv_heads {kv_heads} does not divide num_heads {num_heads}")


def check_options(config: Any) -> None:
    """ValueError for what configs of many mixers share and cannot be: head counts, dropout, words, `impl`.

    An `impl` is one that the mixer's op has; whether it runs a call is known later.
    """
    if hasattr(config, "num_heads"):
        check_heads(config.num_heads, getattr(config, "num_kv_heads", None))
    if not 0 <= (dropout := getattr(config, "dropout", 0.0)) < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    check_choices(config)
    known = getattr(config, "implementations", implementations)()
    if config.impl not in (None, *known):
        raise ValueError(f"unknown impl {config.impl!r}; there are {', '.join(known)}")


def refuse_causal(name: str, reason: str, causal: bool) -> None:
    """ValueError where a mixer that cannot be causal meets a causal model."""
    if causal:
        raise ValueError(f"{name} cannot be causal: {reason}; model.causal is true, set it to false")


def refuse_state(name: str, state: Any) -> None:
    """ValueError where a mixer that cannot be causal is asked to go on from a state."""
    if state is not None:
        raise ValueError(f"{name} has no state: every output depends on the whole row; call it without one")


def check_whole_row(name: str, ctx: Context) -> None:
    """ValueError where a mixer that mixes all of a row is given several documents."""
    if ctx.segment_ids_BT is not None:
        raise ValueError(
            f"{name} mixes all tokens of a row and cannot keep its documents apart: ctx.segment_ids_BT must be "
            "None; in training set data.packing to stream"
        )
