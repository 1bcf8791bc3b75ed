"""Multi-head latent attention: keys and values are projections of a small latent, and only that is cached.

    c_t = RMSNorm(x_t W_dkv)  [R],   k_r,t = RoPE(x_t W_kr)  [P]  (one for all heads)
    k_n,t = [c_t W_uk_n ; k_r,t],   v_n,t = c_t W_uv_n,   q_n,t = [q^C_n ; RoPE(q^R_n)]
    y = W_o concat_n softmax(q_n k_n^T * scale + mask) v_n,   scale = 1 / sqrt(H + P)

DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434). The cache holds [c ; k_r], R + P numbers per token. Decoding
absorbs the up-projections: q^C_n W_uk_n^T is multiplied with c directly, so that attention has one kv head of
width R + P whose values are its first R features, and W_uv is applied to the output. For many new tokens the
keys are expanded instead, which takes fewer operations per pair.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, KVCache, empty_kv_cache
from attention_jax.layers import RMSNorm, fused_linear, kernel_rows
from attention_jax.masks import Full, Mask
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    EXPANDED,
    KVView,
    check_positive,
    check_scores,
    enter,
    merge_heads,
    positions_of,
    split_heads,
    update_cache,
    zero_invalid,
)
from attention_jax.positions import RoPE

# The most new tokens for which a call with a cache absorbs the up-projections instead of expanding cached keys.
_ABSORB_UP_TO = 8


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig(MixerConfig):
    """Multi-head latent self-attention; `kind: mla`."""

    about = About(
        "Multi-head latent attention",
        "arXiv 2405.04434",
        "O(T^2)",
        cache="latent_dim + rotary_dim per token, by the mask",
    )
    takes_mask = True

    kind: Literal["mla"] = "mla"  #: the mixer
    num_heads: int = 4  #: heads (N)
    latent_dim: int = 64  #: width of the cached latent (R)
    query_latent_dim: int | None = None  #: width of a latent for the queries; null: a direct projection
    head_dim: int = 32  #: width of the content part of a head (H)
    rotary_dim: int = 16  #: width of the rotary part (P), even, shared by the keys of all heads; 0: none
    value_dim: int | None = None  #: width of a head's values (M); null: head_dim
    mask: Mask | str = Full()  #: attention mask; a causal model adds Causal()
    rope: RoPE | None = RoPE()  #: rotary position embedding of the rotary part; null: shared, but not rotated
    softcap: float | None = None  #: cap c: replaces a score x by c tanh(x / c); null: off
    scale: float | None = None  #: multiplies q.k; null: 1 / sqrt(head_dim + rotary_dim), times YaRN's factor
    norm_eps: float = 1e-6  #: added to the mean square of the norms of the latents
    use_bias: bool = (
        False  #: biases in the projections to the latents and the output, DeepSeek's attention_bias
    )
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    dropout: float = 0.0  #: on the attention probabilities
    impl: str | None = None  #: implementation of the attention op by name; null: the best

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "latent_dim", "query_latent_dim", "head_dim", "value_dim")
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and >= 0, got {self.rotary_dim}")
        check_scores(self)

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        if self.rotary_dim and self.rope is not None:
            self.rope.rotated_width(self.rotary_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> KVCache:
        """An empty cache of R + P numbers per token, with the slots that the mask needs."""
        del d_model
        width, mask = self.latent_dim + self.rotary_dim, self.restricted(causal).mask
        return empty_kv_cache(batch, capacity, 1, width, None, mask=mask, options=cache)


class LatentAttention(Mixer):
    """Softmax self-attention over a cached latent."""

    config_type = LatentAttentionConfig

    def setup(self, parts: Parts) -> None:
        """Create the projections to the latents and to the heads, the norms of the latents and out."""
        config, D = self.config, self.d_model
        N, R, H, P = config.num_heads, config.latent_dim, config.head_dim, config.rotary_dim
        self.value_dim = M = config.value_dim or H
        norm = {"epsilon": config.norm_eps, "dtype": self.dtype, "rngs": parts.rngs}
        use_bias = {"use_bias": config.use_bias}
        if config.query_latent_dim is not None:
            self.q_down = parts.linear(D, config.query_latent_dim, **use_bias)
            self.q_latent_norm = RMSNorm(config.query_latent_dim, **norm)
        self.q = parts.linear(config.query_latent_dim or D, N * (H + P))
        self.kv_down = parts.linear(D, R, **use_bias)
        self.kv_latent_norm = RMSNorm(R, **norm)
        if P:
            self.k_rotary = parts.linear(D, P, **use_bias)
        self.k_up = parts.linear(R, N * H)
        self.v_up = parts.linear(R, N * M)
        self.out = parts.out(N * M, D, use_bias=config.biased_output)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the KVCache of latents with x appended.

        The captured keys and values are per head in the expanded form and the latents in the absorbed form.
        """
        T = x_BTD.shape[1]
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        q_BTNH = self._queries(x_BTD, ctx)
        absorb = state is not None and T <= _ABSORB_UP_TO
        # The cache holds one head [latent ; rotary key], without values, which are a part of it.
        view, state = update_cache(state, ctx, self._latents(x_BTD, ctx)[:, :, None], None)
        y_BTNM, aux = (self._absorbed if absorb else self._expanded)(q_BTNH, view, ctx)
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNM)), ctx), state, aux)

    def _queries(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        config = self.config
        if config.query_latent_dim is not None:
            x_BTD = self.q_latent_norm(self.q_down(x_BTD))
        q_BTNH = split_heads(self.q(x_BTD), config.head_dim + config.rotary_dim)
        if not config.rotary_dim or config.rope is None:
            return q_BTNH
        content, rotary = jnp.split(q_BTNH, [config.head_dim], axis=-1)
        rotary = config.rope.queries(rotary, positions_of(ctx, x_BTD.shape[1]))
        return jnp.concatenate([content, rotary], axis=-1)

    def _latents(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """[c ; k_r] of the new tokens, [B, T, R + P]."""
        if not self.config.rotary_dim:
            return self.kv_latent_norm(self.kv_down(x_BTD))
        down, rotary = fused_linear([self.kv_down, self.k_rotary], x_BTD)
        if self.config.rope is not None:
            rotary = self.config.rope.keys(rotary[:, :, None], positions_of(ctx, x_BTD.shape[1]))[:, :, 0]
        return jnp.concatenate([self.kv_latent_norm(down), rotary], axis=-1)

    def _expanded(self, q_BTNH: jax.Array, view: KVView, ctx: Context):
        """Attention with a key and a value per head, computed from the latents, of a long cache in blocks."""
        in_blocks = view.overflow_BT is not None and view.k_BSKH.shape[1] > EXPANDED and not ctx.capture
        if in_blocks:
            return view.attend_expanded(q_BTNH, ctx, self._expand, self.value_dim, **self._options()), {}
        k_BSNH, v_BSNM = self._expand(view)
        return view.attend(q_BTNH, ctx, k=k_BSNH, v=v_BSNM, **self._options())

    def _expand(self, view: KVView) -> tuple[jax.Array, jax.Array]:
        """The keys [B, S, N, H + P] and the values [B, S, N, M] of the latents."""
        N, R = self.config.num_heads, self.config.latent_dim
        latent_BSR = self._latent_part(view)
        k_up, v_up = fused_linear([self.k_up, self.v_up], latent_BSR)
        k_BSNH = rearrange(k_up, "b s (n h) -> b s n h", n=N)
        if self.config.rotary_dim:
            rotary_BS1P = view.k_BSKH[..., R:].astype(k_BSNH.dtype)
            shape = (*k_BSNH.shape[:3], rotary_BS1P.shape[-1])
            k_BSNH = jnp.concatenate([k_BSNH, jnp.broadcast_to(rotary_BS1P, shape)], axis=-1)
        return k_BSNH, rearrange(v_up, "b s (n m) -> b s n m", n=N)

    def _absorbed(self, q_BTNH: jax.Array, view: KVView, ctx: Context):
        """Attention of absorbed queries to the latents: K = 1, and v is a part of k."""
        config = self.config
        N, R, H = config.num_heads, config.latent_dim, config.head_dim
        k_up_NHR = rearrange(kernel_rows(self.k_up), "(n h) r -> n h r", n=N)
        v_up_NMR = rearrange(kernel_rows(self.v_up), "(n m) r -> n m r", n=N)
        # Kernels prepared for decoding may be stored in a wider dtype than that of the computation.
        q_BTNH, rotary = q_BTNH[..., :H].astype(k_up_NHR.dtype), q_BTNH[..., H:]
        q_BTNR = jnp.einsum("btnh,nhr->btnr", q_BTNH, k_up_NHR).astype(self.dtype)
        q_BTNE = jnp.concatenate([q_BTNR, rotary], axis=-1)
        # The values are the keys' first R features. Cutting them out would copy the cache for every token.
        y_BTNE, aux = view.attend(q_BTNE, ctx, v=view.k_BSKH, **self._options())
        y_BTNR = y_BTNE[..., :R]
        if "values" in aux:
            aux["values"] = self._latent_part(view)[:, :, None]
        y_BTNM = jnp.einsum("btnr,nmr->btnm", y_BTNR.astype(v_up_NMR.dtype), v_up_NMR)
        return y_BTNM.astype(self.dtype), aux

    def _latent_part(self, view: KVView) -> jax.Array:
        """c [B, S, R] with empty slots set to 0, since it is multiplied before the op masks them."""
        latent_BSR = view.k_BSKH[:, :, 0, : self.config.latent_dim].astype(self.dtype)
        valid_BS = view.valid_BS
        return latent_BSR if valid_BS is None else jnp.where(valid_BS[..., None], latent_BSR, 0)

    def _options(self) -> dict[str, Any]:
        config = self.config
        scale = config.scale
        if scale is None:
            # With YaRN, both parts of the score are scaled by mscale^2, as in the published models.
            rotated = config.rotary_dim and config.rope is not None
            scale = config.rope.softmax_factor if rotated else 1.0
            scale = scale * (config.head_dim + config.rotary_dim) ** -0.5
        names = ("mask", "softcap", "impl", "dropout")
        return {name: getattr(config, name) for name in names} | {"scale": scale}
