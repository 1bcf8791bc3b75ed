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
from flax import nnx

from attention_jax.layers import linear, together
from attention_jax.mixers.base import Context
from attention_jax.mixers.parts import check_options, head_norm, head_width, split_heads, zero_invalid
from attention_jax.mixers.recurrent import scan_options
from attention_jax.ops.decay_scan import decay_scan
from attention_jax.ops.decay_scan.api import implementations


@dataclasses.dataclass(frozen=True)
class LinearBaseConfig:
    """The keys that every mixer of this family has."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}
    implementations = staticmethod(implementations)

    kind: str = ""
    num_heads: int = 4  #: query heads (N)
    num_kv_heads: int | None = None  #: key-value heads (K), a divisor of num_heads; null: num_heads
    head_dim: int | None = None  #: width of a head (H); null: d_model / num_heads
    use_bias: bool = False  #: biases in the projections
    output_norm: Literal["rms"] | None = None  #: normalise each head's output, with a learned scale; null: no
    chunk_size: int | None = None  #: tokens in a chunk of the parallel form; null: the op's choice
    impl: str | None = None  #: implementation of decay_scan by name; null: the best

    def __post_init__(self):
        check_options(self)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1, got {self.chunk_size}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of such a model."""
        del causal  # sums over both sides are as exact as sums over the past
        head_width(d_model, self.num_heads, self.head_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """What linear attention keeps of a stream, whatever its length; float32.

    sums_BNFM: sum of phi(k) v^T; where weights are normalised, its last column is the sum of phi(k).
    weights_BNF1: that sum by itself, where the denominator's features are not the numerator's; else None.
    log_scale_BK: the sums stand divided by its exponential; -inf before the first token; else None.
    """

    sums_BNFM: jax.Array
    weights_BNF1: jax.Array | None = None
    log_scale_BK: jax.Array | None = None


class Features(NamedTuple):
    """phi of queries and keys, float32, with what else the sums need.

    turned: q and k of the numerator where they differ from the denominator's. log_decay_BTK: how the sums'
    scale shrinks at each token, where it does, and log_scale_BK: where it stands after the last one.
    """

    q_BTNF: jax.Array
    k_BTKF: jax.Array
    turned: tuple[jax.Array, jax.Array] | None = None
    log_decay_BTK: jax.Array | None = None
    log_scale_BK: jax.Array | None = None


class LinearBase(nnx.Module):
    """Projections, sums and state; a subclass gives `features` and `num_features`."""

    normalize, scale = True, 1.0
    # Whether numerator and denominator have features of their own; whether the sums have a running scale.
    turns = rescales = False

    def __init__(
        self,
        d_model: int,
        config: Any,
        *,
        causal: bool = False,
        query_width: int | None = None,
        dtype: Any = jnp.float32,
        kernel_init=nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init=None,
        rngs: nnx.Rngs,
    ):
        self.config, self.causal, self.dtype = config, causal, dtype
        N = config.num_heads
        self.kv_heads = N if config.num_kv_heads is None else config.num_kv_heads
        self.head_dim = M = head_width(d_model, N, config.head_dim)
        self.query_width = H = M if query_width is None else query_width
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        for name, width in {"q": N * H, "k": self.kv_heads * H, "v": self.kv_heads * M}.items():
            setattr(self, name, linear(d_model, width, kernel_init=kernel_init, **common))
        self.out = linear(N * M, d_model, kernel_init=out_init or kernel_init, **common)
        self.y_norm = head_norm(config.output_norm, M, dtype=dtype, rngs=rngs)

    @property
    def num_features(self) -> int:
        """F, the features that phi makes of a head's query."""
        raise NotImplementedError

    def features(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, state: LinearState | None, ctx: Context
    ) -> Features:
        """phi of queries and keys; a row that holds no token may get anything finite."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: jax.Array, state: LinearState | None = None, *, ctx: Context
    ) -> tuple[jax.Array, LinearState | None]:
        """y [B, T, D] and the state with x appended."""
        # An empty slot's NaN would reach the projections' gradients as 0 * NaN.
        x_BTD = zero_invalid(x_BTD, ctx)
        options = scan_options(state, ctx, *x_BTD.shape[:2])
        options |= {"chunk_size": self.config.chunk_size, "impl": self.config.impl}
        q, k, v = together([self.q, self.k, self.v], x_BTD)
        q_BTNH, k_BTKH = split_heads(q, self.query_width), split_heads(k, self.query_width)
        v_BTKM = split_heads(v, self.head_dim)
        phi = self.features(q_BTNH, k_BTKH, state, ctx)
        if self.causal:
            y_BTNM, state = self._past(phi, v_BTKM, state, options)
        else:
            y_BTNM = self._both_sides(phi, v_BTKM, options)
        y_BTNM = y_BTNM.astype(v_BTKM.dtype)
        y_BTNM = y_BTNM if self.y_norm is None else self.y_norm(y_BTNM)
        return zero_invalid(self.out(y_BTNM.reshape(*y_BTNM.shape[:2], -1)), ctx), state

    def init_state(self, batch: int, capacity: int, *, memory=None, dtype=None) -> LinearState:
        """Empty sums, the same for any `capacity`; ValueError in a model that is not causal."""
        del memory, capacity, dtype  # sums are float32 whatever is added to them
        if not self.causal:
            raise ValueError(
                f"{self.config.kind} keeps no state where causal is false: tokens to come matter"
            )
        columns = self.head_dim + (self.normalize and not self.turns)
        shape = (batch, self.config.num_heads, self.num_features)
        return LinearState(
            jnp.zeros((*shape, columns), jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32) if self.turns else None,
            jnp.full((batch, self.kv_heads), -jnp.inf, jnp.float32) if self.rescales else None,
        )

    def _past(self, phi: Features, v_BTKM: jax.Array, state: LinearState | None, options: dict):
        """Sums over s <= t, and the state after the last token (None for None)."""
        options |= {"log_decay": phi.log_decay_BTK, "return_state": True}
        sums = weights = None
        if state is not None:
            sums, weights = state.sums_BNFM, state.weights_BNF1
        if phi.turned is None:
            q_BTNF, k_BTKF = phi.q_BTNF.astype(v_BTKM.dtype), phi.k_BTKF.astype(v_BTKM.dtype)
            y_BTNM, sums = decay_scan(
                q_BTNF, k_BTKF, v_BTKM, initial_state_BNHM=sums, normalize=self.normalize, scale=self.scale,
                **options,
            )  # fmt: skip
        else:
            # In float32, so that their quotient is rounded once.
            v_BTKM = v_BTKM.astype(jnp.float32)
            y_BTNM, sums = decay_scan(*phi.turned, v_BTKM, initial_state_BNHM=sums, **options)
            ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
            z_BTN1, weights = decay_scan(
                phi.q_BTNF, phi.k_BTKF, ones_BTK1, initial_state_BNHM=weights, **options
            )
            y_BTNM = _quotient(y_BTNM, z_BTN1)
        return y_BTNM, None if state is None else LinearState(sums, weights, phi.log_scale_BK)

    def _both_sides(self, phi: Features, v_BTKM: jax.Array, options: dict) -> jax.Array:
        """Sums over the whole document."""
        v_BTKM = v_BTKM.astype(jnp.float32)
        ones_BTK1 = jnp.ones_like(v_BTKM[..., :1])
        if not self.normalize:
            return self.scale * _two_sided(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
        if phi.turned is None:
            v_BTKM = jnp.concatenate([v_BTKM, ones_BTK1], axis=-1)
            y_BTNM = _two_sided(phi.q_BTNF, phi.k_BTKF, v_BTKM, options)
            return _quotient(y_BTNM[..., :-1], y_BTNM[..., -1:])
        y_BTNM = _two_sided(*phi.turned, v_BTKM, options)
        return _quotient(y_BTNM, _two_sided(phi.q_BTNF, phi.k_BTKF, ones_BTK1, options))


def _two_sided(q_BTNF: jax.Array, k_BTKF: jax.Array, v_BTKM: jax.Array, options: dict) -> jax.Array:
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


def _quotient(y: jax.Array, z: jax.Array) -> jax.Array:
    """y / z, and 0 where no weight is > 0 (relu features may share no support with any key)."""
    y, z = y.astype(jnp.float32), z.astype(jnp.float32)
    some = z > 0
    return jnp.where(some, y / jnp.where(some, z, 1.0), 0.0)
