"""Native sparse attention (NSA): Yuan et al. 2025 (arXiv 2502.11089).

    o_t = sum_c g^c_t Attn(q_t, K^c_t, V^c_t),   c in {compressed, selected, window},   g_t = sigmoid(W_g x_t)   (5)

    compressed: k^cmp_i = phi(k_{i d}, ..., k_{i d + l - 1}) for every complete block, likewise v; phi is an MLP
                over the features of the block plus an embedding of the offset within the block   (7)
    selected:   the tokens of the n blocks of l' tokens with the largest compressed attention probabilities,
                which are shared by the query heads of a kv group   (9-12, ops/selected/choose.py)
    window:     the last w tokens

As in the paper, each branch projects its own keys and values, and the three branches share the queries. The
gates are one linear layer with an output per head and branch.

Positions: rope rotates q and the keys of the selected and window branches. phi is applied to keys before rope,
so that a compressed key does not depend on the position of its block. It is then rotated to the position of the
last token of the block, so that its scores depend on the distance only.

The selection of blocks has no gradient: phi is trained through the compressed branch only.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import (
    DEFAULT_CACHE,
    CacheOptions,
    HeldKeys,
    KVCache,
    QuantizedKVCache,
    State,
    empty_kv_cache,
    storable,
)
from attention_jax.dtypes import wider
from attention_jax.layers import fused_linear, gelu, linear
from attention_jax.masks import Causal, Full, Mask, SlidingWindow
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    cached_positions,
    check_positive,
    enter,
    head_width,
    merge_heads,
    positions_of,
    split_heads,
    update_cache,
    zero_invalid,
)
from attention_jax.ops.selected import choose_blocks, selected_attention
from attention_jax.ops.selected.compressed import (
    Blocks,
    blocks_of_plain_rows,
    blocks_of_rows,
    completed_blocks,
)
from attention_jax.ops.softmax import dot_product_attention
from attention_jax.ops.tokens import positions_or_arange
from attention_jax.positions import RoPE

# The implementation of the selected branch for each implementation of softmax attention.
_SELECTED_IMPL = {None: None, "reference": "reference", "chunked": "gathered"}


@dataclasses.dataclass(frozen=True)
class NSAConfig(MixerConfig):
    """Native sparse attention; `kind: nsa`. Causal models only."""

    implementations = staticmethod(lambda: tuple(filter(None, _SELECTED_IMPL)))
    about = About(
        "Native sparse attention",
        "arXiv 2502.11089",
        "O(T (T / compress_stride + select_count select_block + window))",
        cache="all keys, compressed keys, ring of window",
    )
    direction = "causal"
    reason = "its three branches attend to past tokens only"

    kind: Literal["nsa"] = "nsa"  #: the mixer
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = (
        None  #: key-value heads (K), a divisor of num_heads; each selects its own blocks; null: num_heads
    )
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    rope: RoPE | None = None  #: rotary position embedding; null: none
    compress_block: int = 32  #: tokens per compressed key (l)
    compress_stride: int = 16  #: distance in tokens between compressed blocks (d), a divisor of l and l'
    compress_width: int | None = None  #: hidden width of the compressing MLP; null: head_dim
    select_block: int = 64  #: tokens of a selected block (l')
    select_count: int = (
        16  #: selected blocks (n), including the first and the last two, which are always selected
    )
    window: int = 512  #: tokens of the window branch, the query's own included (w)
    use_bias: bool = False  #: biases in the projections, the gates and the compressing MLP
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    #: implementation of the attention ops by name, reference or chunked; null: the best for the shape
    impl: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "compress_block", "compress_stride", "compress_width", "select_block", "window")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"compress_stride {self.compress_stride} does not divide {name} {getattr(self, name)}"
                )
        if self.select_count < 3:
            raise ValueError(
                f"select_count must be >= 3, got {self.select_count}: the first and the last two blocks "
                "are always selected"
            )

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        if self.rope is not None:
            self.rope.rotated_width(head_dim)
            if self.rope.xpos is not None:
                raise ValueError("nsa does not support rope.xpos: set it to null")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> NSAState:
        """Empty caches: all tokens for the selected branch, rings for the window and for incomplete blocks."""
        K, H = self.kv_heads, head_width(d_model, self.num_heads, self.head_dim)

        def keys(mask: Mask, options: CacheOptions = cache) -> Any:
            return empty_kv_cache(batch, capacity, K, H, H, mask=mask, options=options)

        blocks = max((capacity - self.compress_block) // self.compress_stride + 1, 1)
        empty = jnp.zeros((batch, blocks, K, H), cache.storage_dtype)
        return NSAState(
            selected=keys(Full()),
            window=keys(SlidingWindow(self.window)),
            # Short, and read once per block: codes would save nothing.
            tail=keys(SlidingWindow(self.compress_block), cache.unquantized()),
            compressed=Compressed(empty, empty.copy(), jnp.full((batch, blocks), -1, jnp.int32)),
        )


@storable
class Compressed(NamedTuple):
    """Compressed keys (rotated to their positions) and values, and the position of each block's last token.

    Entries without a complete block have position -1.
    """

    k_BCKH: jax.Array
    v_BCKH: jax.Array
    positions_BC: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSAState(State):
    """The state of NSA; entry i of `compressed` is block i.

    tail: the keys and values of the compressed branch, before phi, for the last compress_block tokens. With
    `CacheOptions.quantize`, selected and window hold codes, tail and compressed do not.
    """

    selected: KVCache | QuantizedKVCache
    window: KVCache | QuantizedKVCache
    tail: KVCache
    compressed: Compressed

    def append(self, selected: KVCache, window: KVCache, tail: KVCache, compressed: Compressed) -> NSAState:
        """The state after more tokens, from the new states of the branches."""
        return NSAState(selected, window, tail, compressed)

    def rewind(self, n_B: jax.Array) -> NSAState:
        """The state without the last n_B[i] tokens of each row i, and without the blocks that end in them.

        Raises: ValueError, as `KVCache.rewind`.
        """
        branches = {name: getattr(self, name).rewind(n_B) for name in ("selected", "window", "tail")}
        # A row that one branch cannot take back is lost in all of them.
        lost_B = functools.reduce(operator.or_, (cache.lost_B for cache in branches.values()))
        branches = {name: cache.mark_lost(lost_B) for name, cache in branches.items()}
        ends_BC = self.compressed.positions_BC
        ends_BC = jnp.where(ends_BC > branches["selected"].newest_B[..., None], -1, ends_BC)
        return NSAState(**branches, compressed=self.compressed._replace(positions_BC=ends_BC))

    def grown(self, empty: NSAState) -> NSAState:
        """The same state with the slots and blocks of a larger empty one."""

        def into(larger: jax.Array, held: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(larger, held, (0,) * held.ndim)

        return NSAState(
            *(getattr(self, name).grown(getattr(empty, name)) for name in ("selected", "window", "tail")),
            jax.tree.map(into, empty.compressed, self.compressed),
        )

    def view(self) -> tuple[HeldKeys, HeldKeys, HeldKeys, Compressed]:
        """The arrays of the branches: selected, window, tail and compressed."""
        return self.selected.view(), self.window.view(), self.tail.view(), self.compressed


class Compress(nnx.Module):
    """phi: an MLP from the features of the l tokens of a block, plus offset embeddings, to one vector."""

    def __init__(self, block: int, head_dim: int, width: int, *, use_bias: bool, dtype: Any, rngs: nnx.Rngs):
        # Unit gain, independent of the model's init_std: compressed keys start with the variance of keys.
        init = nnx.initializers.lecun_normal()
        common = {"use_bias": use_bias, "dtype": dtype, "kernel_init": init, "rngs": rngs}
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (block, head_dim), jnp.float32))
        self.up = linear(block * head_dim, width, **common)
        self.down = linear(width, head_dim, **common)

    def __call__(self, x_BCKlH: jax.Array) -> jax.Array:
        """The compressed vectors [B, C, K, H] of blocks [B, C, K, l, H]."""
        x_BCKlH = x_BCKlH + self.places[...].astype(x_BCKlH.dtype)[None, None, None]
        return self.down(gelu(self.up(rearrange(x_BCKlH, "b c k l h -> b c k (l h)"))))


class NSA(Mixer):
    """The gated sum of three branches of attention to past tokens."""

    config_type = NSAConfig

    def setup(self, parts: Parts) -> None:
        """Create q, the keys and values of each branch, the gates, the compressing MLPs and out."""
        config, D = self.config, self.d_model
        N, K = config.num_heads, config.kv_heads
        self.head_dim = H = head_width(D, N, config.head_dim)
        use_bias = {"use_bias": config.use_bias}
        self.q = parts.linear(D, N * H, **use_bias)
        (
            self.compressed_k,
            self.compressed_v,
            self.selected_k,
            self.selected_v,
            self.window_k,
            self.window_v,
        ) = (parts.linear(D, K * H, **use_bias) for _ in range(6))
        self.gates = parts.linear(D, 3 * N, **use_bias)
        self.phi_k, self.phi_v = (
            Compress(
                config.compress_block, H, config.compress_width or H,
                dtype=self.dtype, rngs=parts.rngs, **use_bias,
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = parts.out(N * H, D, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the NSAState with x appended.

        The captured keys and values are those of the selected branch. `attention` is not captured, since the
        three branches have separate weights.
        """
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q, ck, cv, sk, sv, wk, wv, gates = fused_linear(
            [self.q, self.compressed_k, self.compressed_v, self.selected_k, self.selected_v, self.window_k,
             self.window_v, self.gates],
            x_BTD,
        )  # fmt: skip
        ck, cv, sk, sv, wk, wv = (split_heads(x, self.head_dim) for x in (ck, cv, sk, sv, wk, wv))
        at_BT = positions_of(ctx, x_BTD.shape[1])
        q_BTNH, sk, wk = (self._rotated(x, at_BT) for x in (split_heads(q, self.head_dim), sk, wk))
        held = (None, None) if state is None else (state.selected, state.window)
        selected, selected_state = update_cache(held[0], ctx, sk, sv)
        window, window_state = update_cache(held[1], ctx, wk, wv)
        if state is None:
            compressed, segment_ids, shift_BT = self._compress_rows(ck, cv, ctx)
        else:
            tail, compressed = self._append_compressed(state, ck, cv, ctx)
            state = state.append(selected_state, window_state, tail, compressed)
            segment_ids = shift_BT = None
        by_branch = (
            *self._coarse_and_selected(q_BTNH, compressed, selected, segment_ids, shift_BT),
            window.attend(q_BTNH, Context(), mask=SlidingWindow(self.config.window), impl=self.config.impl)[
                0
            ],
        )
        gates_BTcN = rearrange(jax.nn.sigmoid(wider(gates)), "b t (c n) -> b t c n", c=3)
        y_BTNH = sum(gates_BTcN[:, :, c, :, None] * wider(by_branch[c]) for c in range(3))
        y_BTD = self.out(merge_heads(y_BTNH.astype(q_BTNH.dtype)))
        aux = ctx.captured(
            queries=lambda: q_BTNH, keys=lambda: selected.k_BSKH, values=lambda: selected.v_BSKM
        )
        return MixerOutput(zero_invalid(y_BTD, ctx), state, aux)

    def _rotated(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return x_BTNH if self.config.rope is None else self.config.rope(x_BTNH, positions_BT)

    def _coarse_and_selected(self, q_BTNH, compressed: Compressed, selected, segment_ids, shift_BT):
        """The outputs of the compressed and the selected branch."""
        B, T, _, H = q_BTNH.shape
        k_BCKH, v_BCKH, ends_BC = compressed
        k_BCKH, v_BCKH = k_BCKH.astype(q_BTNH.dtype), v_BCKH.astype(q_BTNH.dtype)
        coarse_BTNH, lse_BTN = dot_product_attention(
            q_BTNH, k_BCKH, v_BCKH, mask=Causal(), segment_ids=segment_ids,
            q_positions=selected.q_positions_BT, k_positions=ends_BC, return_lse=True, impl=self.config.impl,
        )  # fmt: skip
        given = selected.q_positions_BT
        q_positions_BT = jnp.broadcast_to(positions_or_arange(given, T), (B, T))
        num_blocks = -(-selected.k_BSKH.shape[1] // self.config.select_block)
        blocks_BTKn = choose_blocks(
            q_BTNH, k_BCKH, lse_BTN,
            scale=H**-0.5,
            compress_block=self.config.compress_block,
            compress_stride=self.config.compress_stride,
            select_block=self.config.select_block,
            select_count=self.config.select_count,
            num_blocks=num_blocks,
            q_positions=q_positions_BT,
            k_positions=ends_BC,
            segment_ids=segment_ids,
            shift_BT=shift_BT,
        )  # fmt: skip
        fine_BTNH = selected_attention(
            q_BTNH, selected.k_BSKH.astype(q_BTNH.dtype), selected.v_BSKM.astype(q_BTNH.dtype), blocks_BTKn,
            block_size=self.config.select_block,
            segment_ids=selected.segment_ids_BT,
            q_positions=given,
            k_positions=selected.k_positions_BS,
            impl=_SELECTED_IMPL[self.config.impl],
        )  # fmt: skip
        if given is not None:
            # Blocks are counted for rows that start at position 0. A traced position past them cannot raise.
            beyond_BT = q_positions_BT >= num_blocks * self.config.select_block
            fine_BTNH = jnp.where(beyond_BT[..., None, None], jnp.nan, fine_BTNH)
        return coarse_BTNH, fine_BTNH

    def _compressed(self, k_BSKH: jax.Array, v_BSKH: jax.Array, blocks: Blocks) -> Compressed:
        """phi of the tokens of each block, rotated; 0 for incomplete blocks."""
        complete_BC = blocks.positions_BC >= 0
        rows = jnp.arange(k_BSKH.shape[0])[:, None, None]

        def summary(phi, x_BSKH):
            y_BCKH = phi(jnp.swapaxes(x_BSKH[rows, blocks.tokens_BCl], 2, 3))
            return jnp.where(complete_BC[..., None, None], y_BCKH, jnp.zeros((), y_BCKH.dtype))

        k_BCKH = self._rotated(summary(self.phi_k, k_BSKH), blocks.positions_BC)
        return Compressed(k_BCKH, summary(self.phi_v, v_BSKH), blocks.positions_BC)

    def _compress_rows(self, k_BTKH, v_BTKH, ctx: Context):
        """The compressed keys of whole rows, the segment ids of queries and blocks, and the entry of block 0."""
        B, T = k_BTKH.shape[:2]
        if ctx.positions_BT is None and ctx.segment_ids_BT is None:
            blocks = blocks_of_plain_rows(B, T, self.config.compress_block, self.config.compress_stride)
            return self._compressed(k_BTKH, v_BTKH, blocks), None, None
        positions_BT = jnp.broadcast_to(positions_of(ctx, T), (B, T))
        blocks, segment_ids, shift_BT = blocks_of_rows(
            positions_BT, ctx.segment_ids_BT, self.config.compress_block, self.config.compress_stride
        )
        return self._compressed(k_BTKH, v_BTKH, blocks), segment_ids, shift_BT

    def _append_compressed(self, state: NSAState, k_BTKH, v_BTKH, ctx: Context):
        """The tail with the new tokens appended, and the compressed keys with the newly completed blocks."""
        tail, held = state.tail, state.compressed
        positions_BT = cached_positions(tail.capacity, ctx, *k_BTKH.shape[:2])
        new = (k_BTKH, v_BTKH, positions_BT)
        view = tail.concat_view(*new)
        blocks, number_BC = completed_blocks(
            tail, view, positions_BT, self.config.compress_block, self.config.compress_stride
        )
        k_BSKH, v_BSKH = (x.astype(k_BTKH.dtype) for x in (view.k_BSKH, view.v_BSKM))
        new_compressed = self._compressed(k_BSKH, v_BSKH, blocks)
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        # The scatter drops out-of-range indices, those of incomplete blocks.
        into_BC = jnp.where(blocks.positions_BC >= 0, number_BC, held.positions_BC.shape[1])
        written = (
            old.at[rows_B1, into_BC].set(x.astype(old.dtype), mode="drop")
            for old, x in zip(held, new_compressed, strict=True)
        )
        return tail.append(*new), Compressed(*written)
