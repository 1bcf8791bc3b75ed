"""Code shared by the linear attention mixers: projections, causal and bidirectional sums, the state.

    y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = phi(q_t) . phi(k_s),   over s <= t, or over the whole document

A mixer of this family consists of a config and a `features` method. Causal sums are computed by `decay_scan`,
whose state is a matrix [F, M] per head. In a model that is not causal, one scan runs forward and one backward;
both include the token itself, whose contribution is subtracted once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.caches import DEFAULT_CACHE, LinearState, keep_in_ring
from attention_jax.dtypes import wider
from attention_jax.layers import fused_linear, head_norm
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    check_positive,
    enter,
    head_width,
    merge_heads,
    split_heads,
    valid_tokens,
    zero_invalid,
)
from attention_jax.mixers.recurrent import scan_options
from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.decay_scan.api import implementations


@dataclasses.dataclass(frozen=True)
class LinearBaseConfig(MixerConfig):
    """Options of all mixers of this family, and the size of their state."""

    implementations = staticmethod(implementations)
    normalizer_eps: ClassVar[float] = 0.0  # a subclass may make it an option

    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    use_bias: bool = False  #: biases in the projections
    out_bias: bool | None = None  #: a bias in the output projection; null: use_bias
    output_norm: Literal["rms"] | None = (
        None  #: normalise the output of each head, with a learned scale; null: off
    )
    norm_eps: float = 1e-6  #: added to the mean square of the output norm
    chunk_size: int | None = None  #: tokens per chunk of the parallel form; null: chosen by the op
    impl: str | None = None  #: implementation of decay_scan by name; null: the best

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "chunk_size")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def normalized(self) -> bool:
        """True if weights are divided by their sum."""
        return True

    @property
    def rotates(self) -> bool:
        """True if the numerator has rotated features, unlike the denominator."""
        return False

    @property
    def rescales(self) -> bool:
        """True if the sums have a running scale, `LinearState.log_scale_BK`."""
        return False

    def query_width(self, d_model: int) -> int:
        """The width of the queries and keys of a head."""
        return head_width(d_model, self.num_heads, self.head_dim)

    def feature_count(self, d_model: int) -> int:
        """F, the number of features that phi returns per head."""
        raise NotImplementedError

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit such a model."""
        super().check(d_model, causal=causal)  # all of them support bidirectional models
        head_width(d_model, self.num_heads, self.head_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, cache=DEFAULT_CACHE) -> LinearState:
        """Sums of 0, independent of `capacity`; ValueError in a model that is not causal."""
        del capacity
        if not causal:
            raise ValueError(
                f"{self.kind} has no state in a bidirectional model (causal: false), where outputs depend on "
                "later tokens: pass state=None"
            )
        columns = head_width(d_model, self.num_heads, self.head_dim) + (self.normalized and not self.rotates)
        return LinearState.empty(
            (batch, self.num_heads, self.feature_count(d_model), columns),
            separate_weights=self.rotates,
            scaled_heads=self.kv_heads if self.rescales else None,
            options=cache,
        )


class Features(NamedTuple):
    """phi of queries and keys, float32, and further inputs of the sums.

    rotated: q and k of the numerator, if they differ from those of the denominator. log_decay_BTK: the change of
    the logarithmic scale of the sums at each token, if they are scaled. log_scale_BK: the scale after the last
    token. past_log_scale_BTK: the scale before each token.
    """

    q_BTNF: jax.Array
    k_BTKF: jax.Array
    rotated: tuple[jax.Array, jax.Array] | None = None
    log_decay_BTK: jax.Array | None = None
    log_scale_BK: jax.Array | None = None
    past_log_scale_BTK: jax.Array | None = None


class LinearBase(Mixer):
    """Base class with projections, sums and state; a subclass implements `features`."""

    def setup(self, parts: Parts) -> None:
        """Create q, k, v, out and the norm of the head outputs."""
        config, D = self.config, self.d_model
        N, K = config.num_heads, config.kv_heads
        self.head_dim = M = head_width(D, N, config.head_dim)
        self.query_width = H = config.query_width(D)
        for name, width in {"q": N * H, "k": K * H, "v": K * M}.items():
            setattr(self, name, parts.linear(D, width, use_bias=config.use_bias))
        self.out = parts.out(N * M, D, use_bias=config.biased_output)
        self.y_norm = head_norm(
            config.output_norm, N, M, epsilon=config.norm_eps, dtype=self.dtype, rngs=parts.rngs
        )
        self.normalize, self.scale, self.epsilon = config.normalized, 1.0, config.normalizer_eps

    def features(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, state: LinearState | None, ctx: Context
    ) -> Features:
        """phi of queries and keys; invalid tokens may get any finite value."""
        raise NotImplementedError

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the LinearState with x appended.

        The captured queries and keys are their features. The captured weights are those among the new tokens
        only, without the contribution of the state.
        """
        return self._mix(x_BTD, state, ctx)

    def _mix(
        self, x_BTD: jax.Array, state: Any, ctx: Context | None, seen_BT: jax.Array | None = None
    ) -> MixerOutput:
        """`mix`; seen_BT: True for the slots that `rewind` counts, by default those that hold a token."""
        x_BTD, ctx = enter(self, x_BTD, state, ctx)
        options = scan_options(state, ctx, *x_BTD.shape[:2])
        options |= {"chunk_size": self.config.chunk_size, "impl": self.config.impl}
        q, k, v = fused_linear([self.q, self.k, self.v], x_BTD)
        q_BTNH, k_BTKH = split_heads(q, self.query_width), split_heads(k, self.query_width)
        v_BTKM = split_heads(v, self.head_dim)
        phi = self.features(q_BTNH, k_BTKH, state, ctx)
        aux = ctx.captured(
            queries=lambda: phi.q_BTNF,
            keys=lambda: phi.k_BTKF,
            values=lambda: v_BTKM,
            attention=lambda: self._weights(phi, options),
        )
        if self.causal:
            seen_BT = valid_tokens(ctx) if seen_BT is None else seen_BT
            y_BTNM, state = self._past(phi, v_BTKM, state, options, seen_BT)
        else:
            y_BTNM = self._bidirectional_sums(phi, v_BTKM, options)
        y_BTNM = y_BTNM.astype(v_BTKM.dtype)
        y_BTNM = y_BTNM if self.y_norm is None else self.y_norm(y_BTNM)
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNM)), ctx), state, aux)

    def _weights(self, phi: Features, options: dict) -> jax.Array:
        """The final weights w_ts among the new tokens, [B, N, T, S], that multiply the values."""
        ids = {name: options.get(name) for name in ("positions", "segment_ids")}
        pair = (phi.q_BTNF, phi.k_BTKF) if phi.rotated is None else phi.rotated
        if not self.causal:
            w_BNTS = _bidirectional_weights(*pair, ids)
            if not self.normalize:
                return self.scale * w_BNTS
            whole = w_BNTS if phi.rotated is None else _bidirectional_weights(phi.q_BTNF, phi.k_BTKF, ids)
            return _quotient(w_BNTS, whole.sum(-1, keepdims=True), self.epsilon)
        call = {"log_decay": phi.log_decay_BTK} | ids
        if phi.rotated is None and not (self.normalize and self.epsilon):
            return decay_weights(*pair, normalize=self.normalize, scale=self.scale, **call)
        whole = decay_weights(phi.q_BTNF, phi.k_BTKF, **call)
        return _quotient(decay_weights(*pair, **call), whole.sum(-1, keepdims=True), self.epsilon)

    def _past(
        self,
        phi: Features,
        v_BTKM: jax.Array,
        state: LinearState | None,
        options: dict,
        seen_BT: jax.Array | None,
    ):
        """Sums over s <= t, and the state after the last token (None if `state` is None)."""
        options |= {"log_decay": phi.log_decay_BTK, "return_state": True}
        sums = weights = slot_Bn = None
        if state is not None:
            sums, weights, _ = state.view()
            slot_Bn = state.past_slots(seen_BT, v_BTKM.shape[1])
        rings = (None, None, None) if slot_Bn is None else state.past.arrays
        sums_past, weights_past = (None if x is None else (x, slot_Bn) for x in rings[:2])
        options["past_states"] = sums_past
        z_states = (None, None)
        if phi.rotated is None and self.normalize and self.epsilon:
            # The op has no epsilon: the sum of the weights is one more value, as it is in the state.
            v_BTKM = wider(v_BTKM)
            v_BTKM = jnp.concatenate([v_BTKM, jnp.ones_like(v_BTKM[..., :1])], axis=-1)
            y_BTNM, *states = decay_scan(phi.q_BTNF, phi.k_BTKF, v_BTKM, initial_state_BNHM=sums, **options)
            y_BTNM = _quotient(y_BTNM[..., :-1], y_BTNM[..., -1:], self.epsilon)
        elif phi.rotated is None:
            q_BTNF, k_BTKF = phi.q_BTNF.astype(v_BTKM.dtype), phi.k_BTKF.astype(v_BTKM.dtype)
            y_BTNM, *states = decay_scan(
                q_BTNF, k_BTKF, v_BTKM, initial_state_BNHM=sums, normalize=self.normalize, scale=self.scale,
                **options,
            )  # fmt: skip
        else:
            # In float32, so that only the quotient is rounded.
            v_BTKM = wider(v_BTKM)
            y_BTNM, *states = decay_scan(*phi.rotated, v_BTKM, initial_state_BNHM=sums, **options)
            ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
            options["past_states"] = weights_past
            z_BTN1, *z_states = decay_scan(
                phi.q_BTNF, phi.k_BTKF, ones_BTK1, initial_state_BNHM=weights, **options
            )
            y_BTNM = _quotient(y_BTNM, z_BTN1, self.epsilon)
        if state is None:
            return y_BTNM, None
        new = (states[0], z_states[0], phi.log_scale_BK)
        if slot_Bn is None:
            return y_BTNM, state.append(*new)
        log_scale = rings[2]
        if log_scale is not None:
            past_BnK = phi.past_log_scale_BTK[:, -slot_Bn.shape[1] :]
            log_scale = keep_in_ring(log_scale, past_BnK, slot_Bn)
        rings = (states[1], z_states[1], log_scale)
        return y_BTNM, state.append(*new, rings=rings, valid_BT=seen_BT)

    def _bidirectional_sums(self, phi: Features, v_BTKM: jax.Array, options: dict) -> jax.Array:
        """Sums over the whole document."""
        v_BTKM = wider(v_BTKM)
        ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
        if not self.normalize:
            return self.scale * _bidirectional(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
        if phi.rotated is None:
            v_BTKM = jnp.concatenate([v_BTKM, ones_BTK1], axis=-1)
            y_BTNM = _bidirectional(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
            return _quotient(y_BTNM[..., :-1], y_BTNM[..., -1:], self.epsilon)
        y_BTNM = _bidirectional(*phi.rotated, v_BTKM, options)
        z_BTN1 = _bidirectional(phi.q_BTNF, phi.k_BTKF, ones_BTK1, options)
        return _quotient(y_BTNM, z_BTN1, self.epsilon)


def _bidirectional(q_BTNF: jax.Array, k_BTKF: jax.Array, v_BTKM: jax.Array, options: dict) -> jax.Array:
    """sum_s (q_t . k_s) v_s over the tokens s of the document of t."""
    ids = {name: options.get(name) for name in ("positions", "segment_ids")}
    options = {name: x for name, x in options.items() if name not in ids}
    past_BTNM = decay_scan(q_BTNF, k_BTKF, v_BTKM, **ids, **options)
    flipped = (jnp.flip(x, axis=1) for x in (q_BTNF, k_BTKF, v_BTKM))
    ids = {name: None if x is None else jnp.flip(x, axis=1) for name, x in ids.items()}
    future_BTNM = jnp.flip(decay_scan(*flipped, **ids, **options), axis=1)
    groups = q_BTNF.shape[2] // k_BTKF.shape[2]
    k_BTNF, v_BTNM = (jnp.repeat(x, groups, axis=2) for x in (k_BTKF, v_BTKM))
    own_BTN1 = jnp.sum(q_BTNF * k_BTNF, axis=-1, keepdims=True)
    return past_BTNM + future_BTNM - own_BTN1 * v_BTNM


def _bidirectional_weights(q_BTNF: jax.Array, k_BTKF: jax.Array, ids: dict) -> jax.Array:
    """q_t . k_s if s is a valid token of the document of t, else 0: [B, N, T, S]."""
    k_BTNF = jnp.repeat(k_BTKF, q_BTNF.shape[2] // k_BTKF.shape[2], axis=2)
    w_BNTS = jnp.einsum("btnf,bsnf->bnts", q_BTNF, k_BTNF, precision=jax.lax.Precision.HIGHEST)
    for x_BT in ids.values():
        if x_BT is not None:
            valid_BT = x_BT >= 0
            w_BNTS = jnp.where((valid_BT[:, None, :, None] & valid_BT[:, None, None, :]), w_BNTS, 0.0)
    if (x_BT := ids["segment_ids"]) is not None:
        w_BNTS = jnp.where(x_BT[:, None, :, None] == x_BT[:, None, None, :], w_BNTS, 0.0)
    return w_BNTS


def _quotient(y: jax.Array, z: jax.Array, epsilon: float) -> jax.Array:
    """y / (z + epsilon), and 0 if all weights are 0 (relu features may have no support in common with any key)."""
    y, z = wider(y), wider(z)
    none = z <= 0  # False for NaN, which must be seen
    z = z + epsilon if epsilon else z
    return jnp.where(none, 0.0, y / jnp.where(none, 1.0, z))
