"""What the linear attention mixers share: projections, the sums over the past or over both sides, the state.

    y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = phi(q_t) . phi(k_s),   over s <= t, or over the whole document

A mixer of this family is a config and a `features` method. Sums over the past are `decay_scan`'s, whose state
[F, M] per head does not grow with the text. In a model that is not causal, what precedes a token and what
follows it are two such scans, the second from the end, both with the token itself, which is taken off once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.caches import LinearState
from attention_jax.layers import fused_linear, head_norm
from attention_jax.mixers.base import Context, Mixer, MixerConfig, MixerOutput, Parts
from attention_jax.mixers.parts import (
    check_positive,
    enter,
    head_width,
    merge_heads,
    split_heads,
    zero_invalid,
)
from attention_jax.mixers.recurrent import scan_options
from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.decay_scan.api import implementations


@dataclasses.dataclass(frozen=True)
class LinearBaseConfig(MixerConfig):
    """The keys that every mixer of this family has, and how large the state is that they ask for."""

    implementations = staticmethod(implementations)

    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    use_bias: bool = False  #: biases in the projections
    output_norm: Literal["rms"] | None = None  #: normalise each head's output, with a learned scale; null: no
    chunk_size: int | None = None  #: tokens in a chunk of the parallel form; null: the op's choice
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
        """Whether weights are divided by their sum."""
        return True

    @property
    def rotates(self) -> bool:
        """Whether numerator and denominator have features of their own."""
        return False

    @property
    def rescales(self) -> bool:
        """Whether the sums have a running scale."""
        return False

    def query_width(self, d_model: int) -> int:
        """Width of a head's queries and keys."""
        return head_width(d_model, self.num_heads, self.head_dim)

    def features(self, d_model: int) -> int:
        """F, the features that phi makes of a head's query."""
        raise NotImplementedError

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        super().check(d_model, causal=causal)  # sums over both sides are as exact as sums over the past
        head_width(d_model, self.num_heads, self.head_dim)

    def init_state(self, d_model, batch, capacity, *, causal=True, dtype=jnp.float32) -> LinearState:
        """Empty sums, the same for any `capacity`; ValueError in a model that is not causal."""
        del capacity, dtype  # sums are float32 whatever is added to them
        if not causal:
            raise ValueError(f"{self.kind} keeps no state where causal is false: later tokens matter too")
        columns = head_width(d_model, self.num_heads, self.head_dim) + (self.normalized and not self.rotates)
        shape = (batch, self.num_heads, self.features(d_model))
        return LinearState(
            jnp.zeros((*shape, columns), jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32) if self.rotates else None,
            jnp.full((batch, self.kv_heads), -jnp.inf, jnp.float32) if self.rescales else None,
        )


class Features(NamedTuple):
    """phi of queries and keys, float32, with what else the sums need.

    rotated: q and k of the numerator where they differ from the denominator's. log_decay_BTK: how the sums'
    scale shrinks at each token, where it does, and log_scale_BK: where it stands after the last one.
    """

    q_BTNF: jax.Array
    k_BTKF: jax.Array
    rotated: tuple[jax.Array, jax.Array] | None = None
    log_decay_BTK: jax.Array | None = None
    log_scale_BK: jax.Array | None = None


class LinearBase(Mixer):
    """Projections, sums and state; a subclass gives `features`."""

    def setup(self, parts: Parts) -> None:
        """q, k, v, out and the norm of a head's output."""
        config, D = self.config, self.d_model
        N, K = config.num_heads, config.kv_heads
        self.head_dim = M = head_width(D, N, config.head_dim)
        self.query_width = H = config.query_width(D)
        for name, width in {"q": N * H, "k": K * H, "v": K * M}.items():
            setattr(self, name, parts.linear(D, width, use_bias=config.use_bias))
        self.out = parts.out(N * M, D, use_bias=config.use_bias)
        self.y_norm = head_norm(config.output_norm, M, dtype=self.dtype, rngs=parts.rngs)
        self.normalize, self.scale = config.normalized, 1.0

    def features(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, state: LinearState | None, ctx: Context
    ) -> Features:
        """phi of queries and keys; a row that holds no token may get anything finite."""
        raise NotImplementedError

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y [B, T, D] and the LinearState with x appended.

        Captured queries and keys are their features; the captured weights are those of the new tokens among
        themselves, without what the state brings.
        """
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
            y_BTNM, state = self._past(phi, v_BTKM, state, options)
        else:
            y_BTNM = self._both_sides(phi, v_BTKM, options)
        y_BTNM = y_BTNM.astype(v_BTKM.dtype)
        y_BTNM = y_BTNM if self.y_norm is None else self.y_norm(y_BTNM)
        return MixerOutput(zero_invalid(self.out(merge_heads(y_BTNM)), ctx), state, aux)

    def _weights(self, phi: Features, options: dict) -> jax.Array:
        """w_ts of the tokens among themselves, [B, N, T, S], as the values meet them."""
        ids = {name: options.get(name) for name in ("positions", "segment_ids")}
        pair = (phi.q_BTNF, phi.k_BTKF) if phi.rotated is None else phi.rotated
        if not self.causal:
            w_BNTS = _bidirectional_weights(*pair, ids)
            if not self.normalize:
                return self.scale * w_BNTS
            whole = w_BNTS if phi.rotated is None else _bidirectional_weights(phi.q_BTNF, phi.k_BTKF, ids)
            return _quotient(w_BNTS, whole.sum(-1, keepdims=True))
        call = {"log_decay": phi.log_decay_BTK} | ids
        if phi.rotated is None:
            return decay_weights(*pair, normalize=self.normalize, scale=self.scale, **call)
        whole = decay_weights(phi.q_BTNF, phi.k_BTKF, **call)
        return _quotient(decay_weights(*pair, **call), whole.sum(-1, keepdims=True))

    def _past(self, phi: Features, v_BTKM: jax.Array, state: LinearState | None, options: dict):
        """Sums over s <= t, and the state after the last token (None for None)."""
        options |= {"log_decay": phi.log_decay_BTK, "return_state": True}
        sums = weights = None
        if state is not None:
            sums, weights = state.sums_BNFM, state.weights_BNF1
        if phi.rotated is None:
            q_BTNF, k_BTKF = phi.q_BTNF.astype(v_BTKM.dtype), phi.k_BTKF.astype(v_BTKM.dtype)
            y_BTNM, sums = decay_scan(
                q_BTNF, k_BTKF, v_BTKM, initial_state_BNHM=sums, normalize=self.normalize, scale=self.scale,
                **options,
            )  # fmt: skip
        else:
            # In float32, so that their quotient is rounded once.
            v_BTKM = v_BTKM.astype(jnp.float32)
            y_BTNM, sums = decay_scan(*phi.rotated, v_BTKM, initial_state_BNHM=sums, **options)
            ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
            z_BTN1, weights = decay_scan(
                phi.q_BTNF, phi.k_BTKF, ones_BTK1, initial_state_BNHM=weights, **options
            )
            y_BTNM = _quotient(y_BTNM, z_BTN1)
        return y_BTNM, None if state is None else state.append(sums, weights, phi.log_scale_BK)

    def _both_sides(self, phi: Features, v_BTKM: jax.Array, options: dict) -> jax.Array:
        """Sums over the whole document."""
        v_BTKM = v_BTKM.astype(jnp.float32)
        ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
        if not self.normalize:
            return self.scale * _bidirectional(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
        if phi.rotated is None:
            v_BTKM = jnp.concatenate([v_BTKM, ones_BTK1], axis=-1)
            y_BTNM = _bidirectional(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
            return _quotient(y_BTNM[..., :-1], y_BTNM[..., -1:])
        y_BTNM = _bidirectional(*phi.rotated, v_BTKM, options)
        return _quotient(y_BTNM, _bidirectional(phi.q_BTNF, phi.k_BTKF, ones_BTK1, options))


def _bidirectional(q_BTNF: jax.Array, k_BTKF: jax.Array, v_BTKM: jax.Array, options: dict) -> jax.Array:
    """sum_s (q_t . k_s) v_s over the tokens s of t's document."""
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
    """q_t . k_s where s holds a token of t's document, else 0: [B, N, T, S]."""
    k_BTNF = jnp.repeat(k_BTKF, q_BTNF.shape[2] // k_BTKF.shape[2], axis=2)
    w_BNTS = jnp.einsum("btnf,bsnf->bnts", q_BTNF, k_BTNF, precision=jax.lax.Precision.HIGHEST)
    for x_BT in ids.values():
        if x_BT is not None:
            valid_BT = x_BT >= 0
            w_BNTS = jnp.where((valid_BT[:, None, :, None] & valid_BT[:, None, None, :]), w_BNTS, 0.0)
    if (x_BT := ids["segment_ids"]) is not None:
        w_BNTS = jnp.where(x_BT[:, None, :, None] == x_BT[:, None, None, :], w_BNTS, 0.0)
    return w_BNTS


def _quotient(y: jax.Array, z: jax.Array) -> jax.Array:
    """y / z, and 0 where no weight is > 0 (relu features may share no support with any key)."""
    y, z = y.astype(jnp.float32), z.astype(jnp.float32)
    some = z > 0
    return jnp.where(some, y / jnp.where(some, z, 1.0), 0.0)
