"""Code shared by several mixers: keys with or without a cache, rotations, validity, checks of a call."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from attention_jax.caches import DEFAULT_CACHE, KVCache, empty_kv_cache
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator
from attention_jax.mixers.base import Context, Mixer, MixerConfig, check_encoder_memory
from attention_jax.ops import tokens
from attention_jax.ops.recurrences import document_runs
from attention_jax.ops.softmax import attention_weights, dot_product_attention
from attention_jax.positions import RoPE

_MOST_HEAD_DIM = 2**16


@dataclasses.dataclass(frozen=True)
class SoftmaxMixerConfig(MixerConfig):
    """Base class of configs with num_heads, num_kv_heads, head_dim, a mask and, optionally, rope."""

    takes_mask = True

    @property
    def kv_heads(self) -> int:
        """K, the number of key-value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_width(self, d_model: int) -> int:
        """The head width H; ValueError if it is not an integer."""
        return head_width(d_model, self.num_heads, self.head_dim)

    horizon_key = "rope.scaling.length"

    @property
    def horizon(self) -> int | None:
        """The length for which the frequencies of RoPE were chosen, where its scaling has one; else None."""
        return getattr(getattr(getattr(self, "rope", None), "scaling", None), "length", None)

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        H, rope = self.head_width(d_model), getattr(self, "rope", None)
        if rope is not None:
            rope.rotated_width(H)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> Any:
        """An empty KVCache with the slots that the mask needs."""
        H, mask = self.head_width(d_model), self.restricted(causal).mask
        return empty_kv_cache(batch, capacity, self.kv_heads, H, H, mask=mask, options=cache)


EXPANDED = 2048  # slots of a cache whose keys and values are computed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """The keys and values that the new queries attend to, with their positions and segment ids.

    per_key: further arrays per key, [B, S, ...], as given to `update_cache`. overflow_BT: True for queries whose
    output is NaN: past the capacity, or of a row whose traced rewind could not be honoured.
    """

    k_BSKH: jax.Array
    v_BSKM: jax.Array | None
    per_key: Any
    q_positions_BT: jax.Array | None
    k_positions_BS: jax.Array | None
    segment_ids_BT: jax.Array | None
    overflow_BT: jax.Array | None

    @property
    def valid_BS(self) -> jax.Array | None:
        """True [B or 1, S] for slots that hold a key; None if all do."""
        return tokens.valid_tokens(self.k_positions_BS, self.segment_ids_BT)

    def attend(self, q_BTNH: jax.Array, ctx: Context, *, mask: Any, k=None, v=None, dropout=0.0, **options):
        """Softmax attention to these keys: y_BTNM and the arrays named in `ctx.capture`.

        mask: the layer's own mask, intersected with those of `ctx`. k, v: replace the keys and values of the
        view. options: those of `dot_product_attention`.
        """
        k = (self.k_BSKH if k is None else k).astype(q_BTNH.dtype)
        v = (self.v_BSKM if v is None else v).astype(q_BTNH.dtype)
        call = self._call(ctx, mask) | options
        if ctx.mask_BNTS is not None:
            call["mask_BNTS"] = ctx.mask_BNTS
        y_BTNM = dot_product_attention(q_BTNH, k, v, **call, **dropout_options(dropout, ctx))
        y_BTNM = self._marked(y_BTNM)
        call.pop("impl", None)
        aux = ctx.captured(
            queries=lambda: q_BTNH,
            keys=lambda: k,
            values=lambda: v,
            attention=lambda: attention_weights(q_BTNH, k, **call),
        )
        return y_BTNM, aux

    def attend_expanded(
        self,
        q_BTNH: jax.Array,
        ctx: Context,
        expand: Any,
        value_dim: int,
        *,
        mask: Any,
        dropout=0.0,
        **options,
    ) -> jax.Array:
        """Softmax attention y_BTNM to keys and values that are computed from a cache, `EXPANDED` at a time.

        expand: k, v = expand(view), of the slots in its view. Slots without a token are not expanded. Parts
        are weighed by their shares of the denominator, exp(lse_i) / sum_i exp(lse_i).
        """
        S, (B, T, N, _), cut = self.k_BSKH.shape[1], q_BTNH.shape, jax.lax.dynamic_slice_in_dim
        call = self._call(ctx, mask) | options | dropout_options(dropout, ctx) | {"return_lse": True}

        def attended(part: KVView, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            call["k_positions"] = part.k_positions_BS
            k, v = expand(part)
            y_BTNM, lse_BTN = dot_product_attention(q_BTNH, k, v, **call)
            total_BTN = jnp.logaddexp(carry[1], lse_BTN)
            shift_BTN = jnp.where(total_BTN == -jnp.inf, 0.0, total_BTN)
            shares = (jnp.exp(x - shift_BTN)[..., None] for x in (carry[1], lse_BTN))
            return sum(s * y for s, y in zip(shares, (carry[0], y_BTNM), strict=True)), total_BTN

        def block(carry, i):
            first = jnp.minimum(i * EXPANDED, S - EXPANDED)  # the last block repeats slots, as empty ones
            # Cut in the cache's own order of axes: XLA would copy the whole cache into the other one.
            k_BSKH = cut(self.k_BSKH.swapaxes(1, 2), first, EXPANDED, 2).swapaxes(1, 2)
            positions_BS = cut(self.k_positions_BS, first, EXPANDED, 1)
            fresh_S = first + jnp.arange(EXPANDED, dtype=jnp.int32) >= i * EXPANDED
            positions_BS = jnp.where(fresh_S, positions_BS, -1)
            part = dataclasses.replace(self, k_BSKH=k_BSKH, k_positions_BS=positions_BS)
            return jax.lax.cond((positions_BS >= 0).any(), attended, lambda _, now: now, part, carry), None

        sums = accumulator(q_BTNH)
        empty = (jnp.zeros((B, T, N, value_dim), sums), jnp.full((B, T, N), -jnp.inf, sums))
        (y_BTNM, _), _ = jax.lax.scan(block, empty, jnp.arange(-(-S // EXPANDED), dtype=jnp.int32))
        return self._marked(y_BTNM.astype(q_BTNH.dtype))

    def _call(self, ctx: Context, mask: Any) -> dict[str, Any]:
        """The arguments of `dot_product_attention` that the view determines."""
        return {
            "mask": mask if ctx.mask is None else mask & ctx.mask,
            "segment_ids": self.segment_ids_BT,
            "q_positions": self.q_positions_BT,
            "k_positions": self.k_positions_BS,
        }

    def _marked(self, y_BTNM: jax.Array) -> jax.Array:
        """y with NaN where a position or a count is out of range: as traced values they cannot raise an error."""
        if self.overflow_BT is None:
            return y_BTNM
        return jnp.where(self.overflow_BT[:, :, None, None], jnp.nan, y_BTNM)


def update_cache(
    cache: KVCache | None, ctx: Context, k_BTKH: jax.Array, v_BTKM: jax.Array | None, per_key: Any = None
) -> tuple[KVView, KVCache | None]:
    """The keys and values for the new tokens, their own included, and the cache with them appended.

    Raises: ValueError for a call with a cache but without positions, with segments, or with more tokens than
    the capacity.
    """
    if cache is None:
        positions = ctx.positions_BT
        return KVView(k_BTKH, v_BTKM, per_key, positions, positions, ctx.segment_ids_BT, None), None
    positions_BT = cached_positions(cache.capacity, ctx, *k_BTKH.shape[:2])
    new = (k_BTKH, v_BTKM, positions_BT, per_key)
    # In a ring, more tokens than the spare slots and one overwrite keys that the earliest of them attend to.
    if cache.wraps and k_BTKH.shape[1] > cache.spare + 1:
        view = cache.concat_view(*new)
        new_cache = cache.append_viewed(view, *new)
    else:
        new_cache = cache.append(*new)
        view = new_cache.view()
    overflow_BT = cache.overflow(positions_BT)
    return (
        KVView(view.k_BSKH, view.v_BSKM, view.per_key, positions_BT, view.positions_BS, None, overflow_BT),
        new_cache,
    )


def enter(mixer: Mixer, x_BTD: jax.Array, state: Any, ctx: Context | None) -> tuple[jax.Array, Context]:
    """x with invalid tokens set to 0, and the validated context of the call.

    A NaN in an invalid slot would otherwise reach the gradients of the parameters as 0 * NaN.
    """
    ctx, config = ctx or Context(), mixer.config
    if x_BTD.ndim != 3 or x_BTD.shape[2] != mixer.d_model:
        raise ValueError(f"x must be [B, T, {mixer.d_model}], got {list(x_BTD.shape)}")
    if 0 in x_BTD.shape:
        raise ValueError(
            f"x must hold at least one row and one token, got {list(x_BTD.shape)}: skip the call"
        )
    if config.reads_memory and ctx.memory_BSD is not None:
        check_encoder_memory(ctx, x_BTD.shape[0], mixer.d_model)
    given = [name for name in ("mask", "mask_BNTS") if getattr(ctx, name) is not None]
    if given and not config.takes_mask:
        raise ValueError(f"{config.kind} does not support the mask of a call: ctx.{given[0]} must be None")
    if "mask_BNTS" in given and state is not None:
        raise ValueError(
            "ctx.mask_BNTS covers only the slots of one call and cannot be used with a state: use ctx.mask"
        )
    if config.mixes_whole_row:
        if state is not None:
            raise ValueError(
                f"{config.kind} has no state, since every output depends on the whole row: pass state=None"
            )
        if ctx.segment_ids_BT is not None:
            raise ValueError(
                f"{config.kind} mixes all tokens of a row and does not support packed documents: "
                "ctx.segment_ids_BT must be None; for training set data.packing to stream"
            )
    return zero_invalid(x_BTD, ctx), ctx


def cached_positions(capacity: int, ctx: Context, B: int, T: int) -> jax.Array:
    """The positions [B, T] of a call with a state; ValueError if the context does not allow a state."""
    if ctx.positions_BT is None:
        raise ValueError("a call with a state needs ctx.positions_BT, the positions of its tokens")
    if ctx.segment_ids_BT is not None:
        raise ValueError("a call with a state has one document per row: ctx.segment_ids_BT must be None")
    if T > capacity:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {capacity}")
    return jnp.broadcast_to(ctx.positions_BT, (B, T))


def positions_of(ctx: Context, T: int) -> jax.Array:
    """The positions of the tokens [B or 1, T]: those of the context, or 0, 1, 2, ..."""
    return tokens.positions_or_arange(ctx.positions_BT, T)


def rotate(
    rope: RoPE | None, q_BTNH: jax.Array, k_BTKH: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    """q and k of the same tokens rotated to their positions; unchanged if `rope` is None."""
    if rope is None:
        return q_BTNH, k_BTKH
    positions_BT = positions_of(ctx, q_BTNH.shape[1])
    return rope.queries(q_BTNH, positions_BT), rope.keys(k_BTKH, positions_BT)


def dropout_options(rate: float, ctx: Context) -> dict[str, Any]:
    """The op's dropout arguments; empty if the rate is 0 or the context has no key."""
    if rate == 0 or ctx.dropout_key is None:
        return {}
    return {"dropout_rate": rate, "dropout_key": ctx.dropout_key}


def zero_invalid(y_BTD: jax.Array, ctx: Context) -> jax.Array:
    """y with invalid tokens set to 0, which also removes an output bias and NaN."""
    return tokens.select_valid(y_BTD, valid_tokens(ctx))


def valid_tokens(ctx: Context) -> jax.Array | None:
    """True [B or 1, T] for slots that hold a token; None if all do."""
    return tokens.valid_tokens(ctx.positions_BT, ctx.segment_ids_BT)


def document_starts(ctx: Context) -> jax.Array:
    """True [1 or B, T] for tokens whose segment id differs from that of the token before them.

    `ctx` has segment ids. The first token of a row goes on from a state and starts nothing.
    """
    valid_BT = jnp.broadcast_to(valid_tokens(ctx), ctx.segment_ids_BT.shape)
    return jnp.diff(document_runs(ctx.segment_ids_BT, valid_BT), axis=1, prepend=0) > 0


def split_heads(y_BTE: jax.Array, head_dim: int, norm: Any = None) -> jax.Array:
    """A projection [B, T, heads * H] as [B, T, heads, H], normalised by `norm` unless it is None."""
    y = rearrange(y_BTE, "b t (n h) -> b t n h", h=head_dim)
    return y if norm is None else norm(y)


def merge_heads(y_BTNM: jax.Array) -> jax.Array:
    """y [B, T, N, M] as [B, T, N * M]."""
    return rearrange(y_BTNM, "b t n m -> b t (n m)")


def head_width(d_model: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim, or d_model / num_heads if that is None; ValueError if the quotient is not an integer."""
    if head_dim is not None:
        if not 1 <= head_dim <= _MOST_HEAD_DIM:
            limit = ">= 1" if head_dim < 1 else f"<= {_MOST_HEAD_DIM}"
            raise ValueError(f"head_dim must be {limit}, got {head_dim}")
        return head_dim
    if d_model % num_heads:
        raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}; set head_dim")
    return d_model // num_heads


def check_scores(config: Any) -> None:
    """Raise ValueError unless the options `softcap` and `scale` are numbers that scores can have."""
    check_between(config, "softcap", 0.1, 1e6, "less caps every score at almost 0, and null turns it off")
    check_between(config, "scale", 1e-6, 1e6, "scores vanish or overflow otherwise", zero=True, signed=True)


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless each of the named options is None or >= 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
