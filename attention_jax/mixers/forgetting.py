"""Forgetting attention: softmax attention whose scores decay by data-dependent forget gates.

    f_t = sigmoid(w_f x_t + b_f) per head,   c_t = sum_{l <= t} log f_l
    o_n = softmax(q_n k^T * scale + (c_t - c_s) + mask) v
    y = W_o concat_n o_n,   or with the options of the paper's Pro block W_o (sigmoid(x W_g) * concat_n RMSNorm(o_n))

Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate" (arXiv 2503.02130). The decay
is a `Bias` with leaves per query and per key, so that every implementation evaluates it block by block; the
cache stores c_s with each key. By default there is no position encoding, as in the paper.

c starts at 0 in every document and is a pair of float32 numbers: a float32 sum over 65,536 tokens that keep
half each has a resolution of 2^-9, and so would have every difference. c_t - c_s errs by 2^-24 of itself and
2^-46 |c_t|.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.biases import Axes, Bias
from attention_jax.caches import (
    DEFAULT_CACHE,
    HeldKeys,
    KVCache,
    QuantizedKVCache,
    State,
    empty_kv_cache,
    storable,
)
from attention_jax.choices import check_between
from attention_jax.dtypes import accumulator
from attention_jax.layers import head_norm
from attention_jax.layers.norms import ACTIVATIONS
from attention_jax.mixers.base import Context, MixerOutput, Parts
from attention_jax.mixers.parts import (
    document_starts,
    enter,
    merge_heads,
    update_cache,
    valid_tokens,
    zero_invalid,
)
from attention_jax.mixers.softmax_parts import SelfAttention, SelfAttentionConfig
from attention_jax.ops import two_float
from attention_jax.ops.two_float import TwoFloat

storable(TwoFloat)


@dataclasses.dataclass(frozen=True)
class ForgettingAttentionConfig(SelfAttentionConfig):
    """Self-attention with forget gates; `kind: forgetting`. Causal models only."""

    about = About(
        "Forgetting attention", "arXiv 2503.02130", "O(T^2)", cache="by the mask, and a sum per key and head"
    )
    direction = "causal"
    reason = "its forget gates accumulate over past tokens"

    kind: Literal["forgetting"] = "forgetting"  #: the mixer
    gate_bias: float = 0.0  #: initial bias of the forget gates; larger values start with a longer memory
    output_gate: Literal["sigmoid", "silu"] | None = (
        None  #: gate the output by sigmoid(x W) or silu(x W); null: off
    )
    #: normalise the output of each head before the gate: rms (one learned scale) or rms_per_head; null: off
    output_norm: Literal["rms", "rms_per_head"] | None = None
    norm_eps: float = 1e-6  #: added to the mean square of the output norm

    def __post_init__(self):
        super().__post_init__()
        check_between(
            self, "gate_bias", -16, 16, "the sigmoid of more is 0 or 1 in float32 and passes no gradient"
        )

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)
        if self.mask.prefix:
            raise ValueError(
                f"forgetting cannot attend bidirectionally within a prefix: mask {self.mask}; use kind softmax"
            )

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> ForgettingState:
        """An empty cache and a sum of 0."""
        N, H, mask = self.num_heads, self.head_width(d_model), self.restricted(causal).mask
        per_key = TwoFloat(*[jax.ShapeDtypeStruct((N,), cache.sum_dtype)] * 2)
        held = empty_kv_cache(batch, capacity, self.kv_heads, H, H, mask=mask, options=cache, per_key=per_key)
        return ForgettingState(held, two_float.zeros((batch, N), cache.sum_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgetBias(Bias):
    """c_t - c_s, the log of the decay from key s to query t, up to a rounding error that a row shares.

    queries_BTN: the high words of c_t [B, T, N]. keys_BSN, keys_low_BSN: both words of c_s [B, S, N]. The low
    word of c_t would shift all scores of a query alike, by less than the rounding of its high word, and the
    softmax is invariant to such a shift. The low words get no gradient: that of c belongs to the high words.
    """

    queries_BTN: Any
    keys_BSN: Any
    keys_low_BSN: Any

    def axes(self):
        return Axes(batch=0, query=1), Axes(batch=0, key=1), Axes(batch=0, key=1)

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        # Indices are always in range; the default mode would add a fill with NaN.
        q_BNT, k_BNS, low_BNS = (
            jnp.take(x, heads_N, axis=2, mode="clip").transpose(0, 2, 1)
            for x in (self.queries_BTN, self.keys_BSN, jax.lax.stop_gradient(self.keys_low_BSN))
        )
        # The high words first: their difference is exact where it is small.
        return (q_BNT[..., None] - k_BNS[:, :, None]) - low_BNS[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgettingState(State):
    """The cache, with the two words of c_s [B, S, N] per key, and c [B, N] of the newest token."""

    cache: KVCache | QuantizedKVCache
    total_BN: TwoFloat

    def append(self, k_BTKH, v_BTKM, positions_BT: jax.Array, c_BTN: TwoFloat) -> ForgettingState:
        """The state with tokens appended; c_BTN continues from `total_BN`."""
        return self.with_cache(self.cache.append(k_BTKH, v_BTKM, positions_BT, c_BTN), positions_BT, c_BTN)

    def with_cache(self, cache: Any, positions_BT: jax.Array, c_BTN: TwoFloat) -> ForgettingState:
        """The state of tokens that `cache` already holds: `total_BN` is c of the last valid one.

        Not c of the last slot: of a zero added to a sum in another order, the low word may differ.
        """
        T = positions_BT.shape[1]
        last_B = jnp.where(positions_BT >= 0, jnp.arange(T), -1).max(1)
        index_B11 = jnp.maximum(last_B, 0)[:, None, None]

        def newest(c_BTN: jax.Array, total_BN: jax.Array) -> jax.Array:
            c_BN = jnp.take_along_axis(c_BTN, index_B11, axis=1)[:, 0]
            return jnp.where(last_B[:, None] >= 0, c_BN.astype(total_BN.dtype), total_BN)

        return ForgettingState(cache, jax.tree.map(newest, c_BTN, self.total_BN))

    def rewind(self, n_B: jax.Array) -> ForgettingState:
        """The state without the last n_B[i] tokens of each row i: the sum is that of the newest token kept.

        Raises: ValueError, as `KVCache.rewind`.
        """
        cache = self.cache.rewind(n_B)
        c_BN, held_B = cache.newest_per_key()
        kept_B = jnp.asarray(n_B) == 0

        def restore(c_BN: jax.Array, total_BN: jax.Array) -> jax.Array:
            # Without a newest token, the row is empty, or its next outputs are NaN.
            c_BN = jnp.where(held_B[..., None], c_BN, 0.0)
            return jnp.where(kept_B[:, None], total_BN, c_BN)

        return ForgettingState(cache, jax.tree.map(restore, c_BN, self.total_BN))

    def grown(self, empty: ForgettingState) -> ForgettingState:
        """The same state with the slots of a larger empty one."""
        return dataclasses.replace(self, cache=self.cache.grown(empty.cache))

    def view(self) -> HeldKeys:
        """The cached keys and values, with c as `per_key`."""
        return self.cache.view()


class ForgettingAttention(SelfAttention):
    """Softmax self-attention with forget gates."""

    config_type = ForgettingAttentionConfig

    def setup_gates(self, parts: Parts) -> None:
        """Create the forget gate, the output gate and the norm of the head outputs."""
        config, N, H = self.config, self.config.num_heads, self.head_dim
        # Sums over the whole context need at least float32 for any dtype of the layers.
        gate_bias = nnx.initializers.constant(config.gate_bias)
        gate = {"use_bias": True, "dtype": accumulator(self.dtype), "bias_init": gate_bias}
        self.gate = parts.linear(self.d_model, N, **gate)
        gated, options = config.output_gate is not None, {"dtype": self.dtype, "rngs": parts.rngs}
        self.output_gate = parts.linear(self.d_model, N * H, use_bias=config.use_bias) if gated else None
        self.output_norm = head_norm(config.output_norm, N, H, epsilon=config.norm_eps, **options)

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the ForgettingState with x appended."""
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        gates = () if self.output_gate is None else (self.output_gate,)
        q_BTNH, k_BTKH, v_BTKH, gates = self._project(x_BTD, ctx, *gates)
        log_f_BTN = jax.nn.log_sigmoid(self.gate(x_BTD))
        valid_BT = valid_tokens(ctx)
        if valid_BT is not None:
            log_f_BTN = jnp.where(valid_BT[..., None], log_f_BTN, 0.0)
        starts_BT = None
        if ctx.segment_ids_BT is not None:
            starts_BT = document_starts(ctx)
            # Of two runs of tokens with one id, the second has sums of its own and must not see the first.
            numbers_BT = jnp.where(valid_BT, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), -1)
            ctx = dataclasses.replace(ctx, segment_ids_BT=numbers_BT)
        c_BTN = two_float.running_sum(log_f_BTN, starts_BT, None if state is None else state.total_BN)
        cache = None if state is None else state.cache
        view, cache = update_cache(cache, ctx, k_BTKH, v_BTKH, c_BTN)
        y_BTNH, aux = view.attend(q_BTNH, ctx, bias=ForgetBias(c_BTN.high, *view.per_key), **self._options())
        y_BTE = merge_heads(y_BTNH if self.output_norm is None else self.output_norm(y_BTNH))
        for gate_BTE in gates:
            y_BTE = y_BTE * ACTIVATIONS[self.config.output_gate](gate_BTE)
        y_BTD = zero_invalid(self.out(y_BTE), ctx)
        if state is not None:
            state = state.with_cache(cache, view.q_positions_BT, c_BTN)
        return MixerOutput(y_BTD, state, aux)
