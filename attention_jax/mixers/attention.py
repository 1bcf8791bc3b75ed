"""Softmax attention as a mixer: MHA, GQA and MQA, self- and cross-attention, with any mask.

    y = W_o concat_n softmax(q_n k_g(n)^T * scale + bias + mask) v_g(n),   g(n) = n // (num_heads / num_kv_heads)

Vaswani et al. 2017 (arXiv 1706.03762); MQA: Shazeer 2019 (1911.02150); GQA: Ainslie et al. 2023 (2305.13245).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, KVCache, MemoryCache, empty_kv_cache
from attention_jax.layers import fused_linear
from attention_jax.masks import Global, Mask
from attention_jax.masks.algebra import And, Or, Recipe
from attention_jax.mixers.base import Context, MixerOutput, Parts
from attention_jax.mixers.parts import KVView, enter, merge_heads, positions_of, update_cache, zero_invalid
from attention_jax.mixers.softmax_parts import BiasedAttention, BiasedAttentionConfig


@dataclasses.dataclass(frozen=True)
class AttentionConfig(BiasedAttentionConfig):
    """Self-attention; `kind: softmax`."""

    about = About(
        "Softmax attention: MHA, GQA, MQA",
        "arXiv 1706.03762, 1911.02150, 2305.13245",
        "O(T^2)",
        cache="by the mask",
    )

    kind: Literal["softmax"] = "softmax"  #: the mixer
    #: further projections q, k and v for the queries at the mask's Global positions, as in Longformer; the keys and
    #: values of the cache double
    global_projections: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.global_projections and not self.global_positions:
            raise ValueError(
                f"global_projections needs a mask with Global positions, such as Longformer(64, (0,)), got {self.mask}"
            )

    @property
    def global_positions(self) -> tuple[int, ...]:
        """The positions of the mask's `Global` members, which have projections of their own."""
        return tuple(sorted(_global_positions(self.mask)))

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> KVCache:
        """An empty KVCache with the slots that the mask needs; K further heads for global projections."""
        widths = self.head_width(d_model), self.value_width(d_model)
        heads, mask = self.kv_heads * (2 if self.global_projections else 1), self.restricted(causal).mask
        return empty_kv_cache(batch, capacity, heads, *widths, mask=mask, options=cache)


class Attention(BiasedAttention):
    """Multi-head softmax self-attention."""

    config_type = AttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, out, the parameters of the options, and global projections."""
        super().setup(parts)
        config = self.config
        if config.global_projections:
            N, K, H, M = config.num_heads, config.kv_heads, self.head_dim, self.value_dim
            for name, width in (("q", N * H), ("k", K * H), ("v", K * M)):
                setattr(self, f"{name}_global", parts.linear(self.d_model, width, use_bias=config.use_bias))

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache with x appended.

        With global projections, the captured queries, keys and values are the others.
        """
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        if self.config.global_projections:
            y_BTNH, state, aux = self._with_global_queries(x_BTD, state, ctx)
        else:
            q_BTNH, k_BTKH, v_BTKH, _ = self._project(x_BTD, ctx)
            view, state = update_cache(state, ctx, k_BTKH, v_BTKH)
            y_BTNH, aux = view.attend(q_BTNH, ctx, **self._options())
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNH)), ctx), state, aux)

    def _with_global_queries(self, x_BTD: jax.Array, state: Any, ctx: Context):
        """y [B, T, N, H] before the output projection, the state, and the captured arrays."""
        K, positions = self.config.kv_heads, self.config.global_positions
        q_BTNH, *plain, rest = self._project(x_BTD, ctx, self.q_global, self.k_global, self.v_global)
        further = (self._keys(rest[1], ctx), self._values(rest[2]))
        view, state = update_cache(
            state, ctx, *(jnp.concatenate(pair, axis=2) for pair in zip(plain, further, strict=True))
        )
        options = self._options()
        at_BT = jnp.broadcast_to(positions_of(ctx, x_BTD.shape[1]), x_BTD.shape[:2])
        is_global_BT = jnp.isin(at_BT, jnp.array(positions, at_BT.dtype))
        y_BTNH, aux = view.attend(q_BTNH, ctx, k=view.k_BSKH[:, :, :K], v=view.v_BSKM[:, :, :K], **options)
        # The other queries are empty slots of the second call, which can skip them.
        keys_BS = at_BT if view.k_positions_BS is None else view.k_positions_BS
        of_global = dataclasses.replace(
            view, q_positions_BT=jnp.where(is_global_BT, at_BT, -1), k_positions_BS=keys_BS
        )
        y_global, aux_global = of_global.attend(
            self._queries(rest[0], ctx), ctx.fold_key(1),
            k=view.k_BSKH[:, :, K:], v=view.v_BSKM[:, :, K:], **options,
        )  # fmt: skip
        if "attention" in aux:
            chosen = is_global_BT[:, None, :, None]
            aux["attention"] = jnp.where(chosen, aux_global["attention"], aux["attention"])
        return jnp.where(is_global_BT[:, :, None, None], y_global, y_BTNH), state, aux


def _global_positions(mask: Mask) -> set[int]:
    if isinstance(mask, Global):
        return set(mask.positions)
    members = (
        (mask.expression,) if isinstance(mask, Recipe) else mask.masks if isinstance(mask, And | Or) else ()
    )
    return set().union(*map(_global_positions, members))


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig(AttentionConfig):
    """Attention over an encoder's memory; `kind: cross`."""

    about = About("Cross-attention", "arXiv 1706.03762", "O(T S)", "O(T + S)", "the memory's keys, once")
    reads_memory = True
    takes_mask = False  # the mask of a call is about the tokens of the row, not about those of the memory

    kind: Literal["cross"] = "cross"  #: the mixer

    def __post_init__(self):
        super().__post_init__()
        for name in ("global_projections", "value_dim"):
            if getattr(self, name):
                raise ValueError(f"cross does not support {name}: leave it out")

    def restricted(self, causal: bool) -> CrossAttentionConfig:
        """The config itself: a causal model attends to the whole memory."""
        del causal
        return self

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> MemoryCache:
        """An empty MemoryCache, which the first call fills from `ctx.memory_BSD`."""
        del capacity, causal
        H = self.head_width(d_model)
        return MemoryCache.empty(batch, self.kv_heads, H, dtype=cache.storage_dtype)


class CrossAttention(Attention):
    """Multi-head softmax attention over `ctx.memory_BSD`, an encoder's output."""

    config_type = CrossAttentionConfig

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the MemoryCache, filled from the context if it was empty.

        Raises: ValueError if neither the state nor the context has a memory, or both have one.
        """
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        if state is not None and state.positions_BS.shape[1]:
            if ctx.memory_BSD is not None:
                raise ValueError(
                    "the state of cross-attention holds the memory of the first call: ctx.memory_BSD must be None"
                )
            memory = state
        elif ctx.memory_BSD is None:
            raise ValueError("cross-attention needs ctx.memory_BSD, the output of an encoder")
        else:
            memory = self._memory(ctx.memory_BSD, ctx.memory_positions_BS, state)
        state = None if state is None else memory
        q_BTNH = self._queries(self.q(x_BTD), ctx)
        k, v, k_positions_BS, _ = memory.view()
        view = KVView(k, v, None, ctx.positions_BT, k_positions_BS, None, None)
        y_BTNH, aux = view.attend(q_BTNH, ctx, **self._options())
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNH)), ctx), state, aux)

    def _memory(self, memory_BSD, positions_BS, state: MemoryCache | None) -> MemoryCache:
        """The projected memory; with a state, in the dtype of the state and with explicit positions."""
        ctx = Context(positions_BT=positions_BS)
        k, v = fused_linear([self.k, self.v], zero_invalid(memory_BSD, ctx))
        k_BSKH, v_BSKH = self._keys(k, ctx), self._values(v)
        if state is None:
            return MemoryCache.of(k_BSKH, v_BSKH, positions_BS)
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(memory_BSD.shape[1]), memory_BSD.shape[:2])
        return state.append(k_BSKH, v_BSKH, jnp.broadcast_to(positions_BS, memory_BSD.shape[:2]))
