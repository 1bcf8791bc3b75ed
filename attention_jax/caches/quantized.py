"""Key-value caches of 8 or 4 bits per number, and the choice between them and `KVCache`.

    scale = max |x| / q,   code = round(x / scale) in [-q, q],   x ~ code * scale,   q = 127 (int8), 7 (int4)

A scale is a float32 number of one token and head, over the features of its key or value. Rounding is to the
nearest, ties to even, so that |x - code * scale| <= scale / 2. A zero vector has scale 0 and is exact. A NaN
or Inf makes the scale NaN or Inf, and all features of its vector NaN.

The newest `residual` tokens can also be kept in full precision, as in Liu et al. 2024, "KIVI: A Tuning-Free
Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750), whose scales are shared by many tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from attention_jax.caches.base import State
from attention_jax.caches.kv import HeldKeys, KVCache
from attention_jax.caches.options import DEFAULT_CACHE, CacheOptions
from attention_jax.masks import Mask, SlidingWindow

_STATIC = {"static": True}
_LARGEST = {"int8": 127, "int4": 7}


def empty_kv_cache(
    *sizes: int | None, options: CacheOptions = DEFAULT_CACHE, **layout: Any
) -> KVCache | QuantizedKVCache:
    """The empty cache that the options choose; the arguments are those of `KVCache.empty`."""
    cls = KVCache if options.quantize is None else QuantizedKVCache
    return cls.empty(*sizes, options=options, **layout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKVCache(State):
    """A `KVCache` whose keys and values are codes, and one of the newest tokens in full precision.

    codes: k and v hold codes, int8 [B, S, K, H], or uint8 [B, S, K, ceil(H / 2)] with two codes a byte.
      `per_key` holds float32 scales [B, S, K] and, under "given", the further arrays as they are.
    recent: a ring of the newest `residual` tokens and the spare ones, or None.
    dtype: that of the keys and values that `view` returns. widths: H and M, which the codes of 4 bits need.
    """

    codes: KVCache
    recent: KVCache | None
    quantize: Literal["int8", "int4"] = dataclasses.field(metadata=_STATIC)
    residual: int = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    widths: tuple[int, int | None] = dataclasses.field(metadata=_STATIC)

    @staticmethod
    def empty(
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        *,
        mask: Mask,
        options: CacheOptions,
        value_heads: int | None = None,
        per_key: Any = None,
    ) -> QuantizedKVCache:
        """An empty cache; the arguments are those of `KVCache.empty`, with `options.quantize` set."""
        quantize, dtype = options.quantize, options.storage_dtype
        value_heads = value_heads or kv_heads
        stored = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "value_heads": value_heads}
        plain = options.unquantized()
        scales = {"k": jax.ShapeDtypeStruct((kv_heads,), jnp.float32)}
        if value_dim is not None:
            scales["v"] = jax.ShapeDtypeStruct((value_heads,), jnp.float32)
        codes = KVCache.empty(
            **stored,
            head_dim=_code_width(head_dim, quantize),
            value_dim=None if value_dim is None else _code_width(value_dim, quantize),
            mask=mask,
            options=plain,
            per_key={"scales": scales, "given": per_key},
        )
        code_dtype = jnp.int8 if quantize == "int8" else jnp.uint8
        codes = dataclasses.replace(
            codes,
            keys_BKSH=jnp.zeros(codes.keys_BKSH.shape, code_dtype),
            values_BKSM=None if value_dim is None else jnp.zeros(codes.values_BKSM.shape, code_dtype),
        )
        recent = None
        if options.residual:
            window = SlidingWindow(options.residual)
            recent = KVCache.empty(
                **stored, head_dim=head_dim, value_dim=value_dim, mask=window, options=plain
            )
        return QuantizedKVCache(codes, recent, quantize, options.residual, dtype, (head_dim, value_dim))

    @property
    def positions_BS(self) -> jax.Array:
        """The position of each slot."""
        return self.codes.positions_BS

    @property
    def newest_B(self) -> jax.Array:
        """The position of each row's newest token."""
        return self.codes.newest_B

    @property
    def capacity(self) -> int:
        """The largest position + 1."""
        return self.codes.capacity

    @property
    def ring(self) -> int:
        """The number of slots in the ring of codes."""
        return self.codes.ring

    @property
    def wraps(self) -> bool:
        """True if the ring of codes is shorter than the capacity."""
        return self.codes.wraps

    @property
    def spare(self) -> int:
        """The slots of the ring of codes beyond the lookback of its mask."""
        return self.codes.spare

    @property
    def lost_B(self) -> jax.Array:
        """True for rows whose traced rewind could not be honoured; their outputs are NaN."""
        return self.codes.lost_B

    def append(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> QuantizedKVCache:
        """The cache with the tokens at positions_BT written, as `KVCache.append`."""
        recent = self.recent
        return dataclasses.replace(
            self,
            codes=self.codes.append(*self._coded(k_BTKH, v_BTKM, positions_BT, per_key)),
            recent=None if recent is None else recent.append(k_BTKH, v_BTKM, positions_BT),
        )

    def rewind(self, n_B: jax.Array) -> QuantizedKVCache:
        """The cache without the last n_B[i] tokens of each row i, as `KVCache.rewind`.

        With `residual`, the ring of the newest tokens limits a rewind to `spare` tokens, too, since older
        ones are no longer held in full precision.
        """
        codes, recent = self.codes.rewind(n_B), self.recent
        if recent is not None:
            recent = recent.rewind(n_B)
            codes = codes.mark_lost(recent.lost_B)
        return dataclasses.replace(self, codes=codes, recent=recent)

    def grown(self, empty: QuantizedKVCache) -> QuantizedKVCache:
        """The same codes in the slots of a larger empty cache of the same mixer."""
        recent = None if self.recent is None else self.recent.grown(empty.recent)
        return dataclasses.replace(empty, codes=self.codes.grown(empty.codes), recent=recent)

    def mark_lost(self, rows_B: jax.Array) -> QuantizedKVCache:
        """The cache with these rows lost, boolean [B]: the output of their later tokens is NaN."""
        return dataclasses.replace(self, codes=self.codes.mark_lost(rows_B))

    def newest_per_key(self) -> tuple[Any, jax.Array]:
        """`per_key` of each row's newest token, and whether it is held, as `KVCache.newest_per_key`."""
        per_key, held_B = self.codes.newest_per_key()
        return per_key["given"], held_B

    def overflow(self, positions_BT: jax.Array) -> jax.Array:
        """True for tokens whose output must be NaN, as `KVCache.overflow`."""
        return self.codes.overflow(positions_BT)

    def view(self) -> HeldKeys:
        """The keys and values in `dtype`: of the newest `residual` tokens as given, else from codes."""
        return self._view(self.newest_B)

    def concat_view(
        self, k_BTKH: jax.Array, v_BTKM: jax.Array | None, positions_BT: jax.Array, per_key: Any = None
    ) -> HeldKeys:
        """The slots concatenated with new tokens, as `KVCache.concat_view`.

        Every token has the precision that it has in the view of the cache with the new tokens appended.
        """
        newest_B = jnp.maximum(self.newest_B, positions_BT.max(1))
        held = self._view(newest_B)
        k_codes, v_codes, _, extras = self._coded(k_BTKH, v_BTKM, positions_BT, per_key)
        new = HeldKeys(*self._decoded(k_codes, v_codes, extras["scales"]), positions_BT, per_key)
        if self.recent is not None:
            recent_BT11 = (positions_BT > newest_B[:, None] - self.residual)[..., None, None]

            def precise(decoded: jax.Array, given: jax.Array) -> jax.Array:
                return jnp.where(recent_BT11, given.astype(self.dtype), decoded)

            v_BTKM = None if v_BTKM is None else precise(new.v_BSKM, v_BTKM)
            new = new._replace(k_BSKH=precise(new.k_BSKH, k_BTKH), v_BSKM=v_BTKM)
        return jax.tree.map(lambda old, x: jnp.concatenate([old, x.astype(old.dtype)], axis=1), held, new)

    def append_viewed(
        self, view: HeldKeys, k_BTKH: Any, v_BTKM: Any, positions_BT: jax.Array, per_key: Any = None
    ) -> QuantizedKVCache:
        """`append` of tokens that `view` has decoded: they are not coded twice."""
        del view
        return self.append(k_BTKH, v_BTKM, positions_BT, per_key)

    def _coded(self, k_BTKH, v_BTKM, positions_BT, per_key):
        """The arguments of `codes.append`."""
        k_codes, k_scale_BTK = _encode(k_BTKH, self.quantize)
        scales, v_codes = {"k": k_scale_BTK}, None
        if v_BTKM is not None:
            v_codes, scales["v"] = _encode(v_BTKM, self.quantize)
        return k_codes, v_codes, positions_BT, {"scales": scales, "given": per_key}

    def _decoded(self, k_codes, v_codes, scales) -> tuple[jax.Array, jax.Array | None]:
        """Keys and values in `dtype`."""
        k_BSKH = _decode(k_codes, scales["k"], self.widths[0]).astype(self.dtype)
        if v_codes is None:
            return k_BSKH, None
        return k_BSKH, _decode(v_codes, scales["v"], self.widths[1]).astype(self.dtype)

    def _view(self, newest_B: jax.Array) -> HeldKeys:
        """The view, where the newest tokens end at newest_B."""
        codes, recent = self.codes.view(), self.recent
        k_BSKH, v_BSKM = self._decoded(codes.k_BSKH, codes.v_BSKM, codes.per_key["scales"])
        view = HeldKeys(k_BSKH, v_BSKM, codes.positions_BS, codes.per_key["given"])
        if recent is None:
            return view
        slots_BR = self.codes.slot_of(recent.positions_BS)
        found_BR = jnp.take_along_axis(codes.positions_BS, slots_BR, axis=1) == recent.positions_BS
        newest_BR = (
            found_BR & (recent.positions_BS >= 0) & (recent.positions_BS > newest_B[:, None] - self.residual)
        )
        # mode="drop": the scatter ignores the out-of-range slots of tokens that are not among the newest.
        slots_BR = jnp.where(newest_BR, slots_BR, codes.positions_BS.shape[1])
        rows_B1 = jnp.arange(slots_BR.shape[0])[:, None]

        def overlay(decoded: jax.Array, given: jax.Array) -> jax.Array:
            return decoded.at[rows_B1, slots_BR].set(given, mode="drop")

        return view._replace(
            k_BSKH=overlay(k_BSKH, recent.k_BSKH),
            v_BSKM=None if v_BSKM is None else overlay(v_BSKM, recent.v_BSKM),
        )


def _code_width(width: int, quantize: str) -> int:
    return width if quantize == "int8" else -(-width // 2)


def _encode(x: jax.Array, quantize: str) -> tuple[jax.Array, jax.Array]:
    """The codes of x [..., H], and their float32 scales [...]."""
    x, largest = x.astype(jnp.float32), _LARGEST[quantize]
    scale = jnp.abs(x).max(-1) / largest
    usable = (scale > 0) & jnp.isfinite(scale)
    # The codes of an unusable scale are 0: 0 * 0 is 0, and 0 times NaN or Inf is NaN.
    codes = jnp.where(usable[..., None], jnp.round(x / jnp.where(usable, scale, 1)[..., None]), 0)
    codes = jnp.clip(codes, -largest, largest).astype(jnp.int8)
    if quantize == "int8":
        return codes, scale
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]).astype(jnp.uint8) & 15
    return codes[..., ::2] | codes[..., 1::2] << 4, scale


def _decode(codes: jax.Array, scale: jax.Array, width: int) -> jax.Array:
    """float32 [..., width]; of two codes in a byte, the low bits hold the first."""
    if codes.dtype == jnp.uint8:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        pairs = pairs.reshape(*codes.shape[:-1], -1)[..., :width]
        codes = (pairs ^ 8).astype(jnp.int8) - 8  # the sign of 4 bits in two's complement
    return codes.astype(jnp.float32) * scale[..., None]
