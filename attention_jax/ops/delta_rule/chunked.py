"""The delta rule a chunk of C tokens at a time: matrix products instead of a step per token.

The algebra of `quadratic`, with S the state before the chunk (Yang et al. 2024, arXiv 2406.06484; with decays
arXiv 2412.06464 and, per channel, 2510.26692):

    U = T beta (V - K^< S),  T = (I + beta A)^-1     A_ti = k_t . G_ti k_i for i < t
    Y = Q^< S + P U                                  P_ti = q_t . G_ti k_i for i <= t
    S' = G_C0 S + K^>T U                             K^<_t = G_t0 k_t,  Q^<_t = G_t0 q_t,  K^>_t = G_Ct k_t

All but U, Y and S' is known without S: it is computed for a group of chunks at once, then a short scan
carries S through them. A scan over the groups, each of them a `jax.checkpoint`, keeps one state per group for
the backward, which computes the group once more.

Decays are products of the steps between two tokens and at most 1, whatever they are: every exponent is a sum
of log decays, never a difference of two sums (which would lose small steps next to large ones), and nothing
is divided by a decay. Per channel they cannot be factored out of A at once. Two halves of a chunk can:
G_ti = G_tm G_mi with m the last token of the first half; so A is made of half times half, quarter times
quarter, ..., and small diagonal blocks that sum over the channels pair by pair.

T is made from the inverses of its halves, as is exact for a triangular matrix. Its entries stay as small as
those of the recurrence itself: -T_ti is what a unit change of u_i does to u_t. A power series in A does not:
for beta = 2 and equal keys its terms grow to 1e28 before they cancel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.ops.arguments import positive_integer
from attention_jax.ops.delta_rule.common import DeltaRuleCall
from attention_jax.ops.recurrences import spread


@dataclasses.dataclass(frozen=True)
class ChunkedDeltaConfig:
    """Sizes of "chunked".

    The default chunks were measured on two busy CPU cores at B1 T4096 N8 H64 M64, in milliseconds of
    processor time, forward / with gradients, for chunks of 16, 32 and 64:
      channels that share a decay   59 /  422    59 /  388    79 /  402
      a decay per channel          380 / 2218   469 / 2336   260 / 1002
    """

    #: Tokens of a chunk, best a power of two; None: 64 where each channel has its own decay, else 32.
    chunk_size: int | None = None
    #: Chunks x rows x heads that are prepared together; None: what fits a CPU's caches, 8, or on an
    #: accelerator, which needs work for all its cores, 512 (not measured).
    heads_at_once: int | None = None
    #: Tokens up to which decays per channel are summed pair by pair.
    pairwise: int = 8
    #: Rows up to which a triangle is inverted at once.
    inverse: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                positive_integer(field.name, value)


_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class _Tokens(NamedTuple):
    """Chunks of tokens, [L chunks, B, N, C, ...] or None."""

    q_LBNCH: jax.Array
    k_LBNCH: jax.Array
    v_LBNCM: jax.Array
    beta_LBNC: jax.Array
    log_decay_LBNCH: jax.Array | None
    run_LBNC: jax.Array | None
    entered_LBN1: jax.Array | None  # the document of the state before the chunk


class _Chunk(NamedTuple):
    """What a chunk does to a state, in the symbols of the module; every array [L, B, N, ...]."""

    solve_CC: jax.Array  # T
    target_CM: jax.Array  # beta V
    answer_CH: jax.Array  # beta K^<
    read_CC: jax.Array  # P
    query_CH: jax.Array  # Q^<
    write_CH: jax.Array  # K^>
    keep_H1: jax.Array | None  # G_C0; None keeps all


def attend(call: DeltaRuleCall, config: ChunkedDeltaConfig) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in v's dtype, the last state_BNHM)."""
    B, T, N, _, M = call.sizes
    per_channel = call.log_decay_BTNH is not None and call.log_decay_BTNH.shape[-1] > 1
    C = min(config.chunk_size or (64 if per_channel else 32), T)
    chunks = -(-T // C)
    heads_at_once = config.heads_at_once or (8 if jax.default_backend() == "cpu" else 512)
    groups = -(-chunks // max(1, heads_at_once // (B * N)))
    L = -(-chunks // groups)
    run_BT1 = None if call.run_BT is None else call.run_BT[..., None]
    tokens = (call.q_BTQH, call.k_BTKH, call.v_BTNM, call.beta_BTN, call.log_decay_BTNH, run_BT1)
    tokens = jax.tree.map(lambda x: _filled_up(x, L * C), tokens)
    # The document of the state before each token.
    entered_BT1 = None if run_BT1 is None else jnp.pad(tokens[-1], ((0, 0), (1, 0), (0, 0)))[:, :-1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def group(state_BNHM, tokens):
        chunks = _prepare(config, _load(call, tokens, C))
        state_BNHM, y_LBNCM = jax.lax.scan(_apply, state_BNHM, chunks)
        y_BLCNM = y_LBNCM.transpose(1, 0, 3, 2, 4).astype(call.v_BTNM.dtype)
        return state_BNHM, y_BLCNM.reshape(B, L * C, N, M)

    state_BNHM, y = jax.lax.scan(group, call.state_BNHM, _cut((*tokens, entered_BT1), L * C))
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, N, M)[:, :T], state_BNHM


def _filled_up(x: jax.Array, length: int) -> jax.Array:
    """x [B, T, ...] up to a multiple of `length` with zeros, which leave the state as it is; ids go on."""
    pad = [(0, 0), (0, -x.shape[1] % length)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, mode="edge" if x.dtype == jnp.int32 else "constant")


def _cut(tokens, length: int):
    """Every leaf [B, T, ...] as [pieces, B, length, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0), tokens)


def _load(call: DeltaRuleCall, tokens, C: int) -> _Tokens:
    """A group's slices [B, L C, heads, ...] in the layout and dtype of the computation."""
    N, wide = call.sizes[2], call.state_BNHM.dtype

    def one(x):
        if x is None:
            return None
        x = x.reshape(x.shape[0], -1, C, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, *range(4, x.ndim))

    q, k, v, beta, log_decay, run, entered = map(one, tokens)
    q, k = (spread(x.astype(wide), N, axis=2) for x in (q, k))
    return _Tokens(
        q * call.scale,
        k,
        v.astype(wide),
        beta.astype(wide),
        None if log_decay is None else log_decay.astype(wide),
        run,
        None if entered is None else entered[..., :1],
    )


def _apply(state: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
    """The state [..., H, M] after the chunk, and its outputs [..., C, M]."""
    u_CM = chunk.solve_CC @ (chunk.target_CM - chunk.answer_CH @ state)
    y_CM = chunk.query_CH @ state + chunk.read_CC @ u_CM
    kept = state if chunk.keep_H1 is None else chunk.keep_H1 * state
    return kept + jnp.einsum("...ch,...cm->...hm", chunk.write_CH, u_CM), y_CM


def _prepare(config: ChunkedDeltaConfig, tokens: _Tokens) -> _Chunk:
    """What does not depend on the state, for any number of chunks at once."""
    q, k, v, beta, log_decay, run, entered = tokens
    beta_C1 = beta[..., None]
    if log_decay is None or log_decay.shape[-1] == 1:
        scores_CC, read_CC = _shared_decay_pairs(q, k, log_decay)
    else:
        scores_CC, read_CC = _channel_decay_pairs(config, q, k, log_decay)
    answer, query, write, keep_H1 = k, q, k, None
    if log_decay is not None:
        before, after = jnp.exp(_up_to(log_decay)), jnp.exp(_behind(log_decay))
        answer, query, write = before * k, before * q, after * k
        keep_H1 = before[..., -1, :, None]
    if run is not None:
        same_CC = run[..., :, None] == run[..., None, :]
        scores_CC, read_CC = (jnp.where(same_CC, x, 0) for x in (scores_CC, read_CC))
        first_C1, last_C1 = ((run == x)[..., None] for x in (entered, run[..., -1:]))
        answer, query = (jnp.where(first_C1, x, 0) for x in (answer, query))
        write = jnp.where(last_C1, write, 0)
        keep_H1 = jnp.where(first_C1[..., -1:, :], 1 if keep_H1 is None else keep_H1, jnp.zeros((), k.dtype))
    solve_CC = _unit_lower_inverse(config.inverse, beta_C1 * scores_CC)
    return _Chunk(solve_CC, beta_C1 * v, beta_C1 * answer, read_CC, query, write, keep_H1)


def _ones(C: int, dtype, diagonal: int) -> jax.Array:
    """Ones up to a diagonal of a C x C matrix."""
    return jnp.tri(C, k=diagonal, dtype=dtype)


def _lower(x_CC: jax.Array, diagonal: int) -> jax.Array:
    """x [..., C, C] times 1 up to a diagonal and 0 above it."""
    return x_CC * jnp.broadcast_to(_ones(x_CC.shape[-1], x_CC.dtype, diagonal), x_CC.shape)


def _up_to(x: jax.Array) -> jax.Array:
    """The sum of x [..., C, H] up to each token, its own included."""
    return _exact(_ones(x.shape[-2], x.dtype, 0), x)


def _behind(x: jax.Array) -> jax.Array:
    """The sum of x [..., C, H] over the tokens behind each."""
    return _exact(_ones(x.shape[-2], x.dtype, -1).T, x)


def _shared_decay_pairs(q, k, log_decay) -> tuple[jax.Array, jax.Array]:
    """A and P where channels share a decay [..., C, 1], or there is none."""
    C = k.shape[-2]
    scores_CC, read_CC = (jnp.einsum("...th,...ih->...ti", x, k) for x in (k, q))
    if log_decay is not None:
        # Row t, column i of the product: the sum over i < s <= t.
        steps_CC = _lower(jnp.broadcast_to(log_decay, scores_CC.shape), -1)
        decay_CC = _lower(jnp.exp(_exact(_ones(C, k.dtype, 0), steps_CC)), 0)
        return scores_CC * _lower(decay_CC, -1), read_CC * decay_CC
    return _lower(scores_CC, -1), _lower(read_CC, 0)


def _channel_decay_pairs(config: ChunkedDeltaConfig, q, k, log_decay) -> tuple[jax.Array, jax.Array]:
    """A and P for a decay per channel [..., C, H]."""
    C = k.shape[-2]
    if C % 2 or C <= config.pairwise:
        return _pairwise(q, k, log_decay)
    halves = [x.reshape(*x.shape[:-2], 2, C // 2, x.shape[-1]) for x in (q, k, log_decay)]
    (q0, q1), (k0, k1), (g0, g1) = ((x[..., 0, :, :], x[..., 1, :, :]) for x in halves)
    second, first = jnp.exp(_up_to(g1)), jnp.exp(_behind(g0)) * k0
    corners = (jnp.einsum("...th,...ih->...ti", second * x, first) for x in (k1, q1))
    diagonals = _channel_decay_pairs(config, *halves)
    return tuple(_assemble(x, corner) for x, corner in zip(diagonals, corners, strict=True))


def _pairwise(q, k, log_decay) -> tuple[jax.Array, jax.Array]:
    """The same for few tokens, pair by pair."""
    C = k.shape[-2]
    t, i, s = (jnp.arange(C).reshape(shape) for shape in ((C, 1, 1), (1, C, 1), (1, 1, C)))
    between_PC = ((i < s) & (s <= t)).astype(k.dtype).reshape(C * C, C)  # the steps between each pair
    decay_PH = jnp.exp(_exact(between_PC, log_decay))
    decayed_CCH = decay_PH.reshape(*k.shape[:-2], C, C, -1) * k[..., None, :, :]
    scores_CC, read_CC = ((x[..., :, None, :] * decayed_CCH).sum(-1) for x in (k, q))
    return _lower(scores_CC, -1), _lower(read_CC, 0)


def _assemble(diagonal: jax.Array, corner: jax.Array) -> jax.Array:
    """[[diagonal[0], 0], [corner, diagonal[1]]] from [..., 2, C/2, C/2] and [..., C/2, C/2]."""
    above = jnp.concatenate([diagonal[..., 0, :, :], jnp.zeros_like(corner)], axis=-1)
    below = jnp.concatenate([corner, diagonal[..., 1, :, :]], axis=-1)
    return jnp.concatenate([above, below], axis=-2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unit_lower_inverse(small: int, lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular matrices [..., C, C]; up to `small` rows at once."""
    return _inverse(small, lower)


def _inverse(small: int, lower: jax.Array) -> jax.Array:
    C = lower.shape[-1]
    if C % 2 or C <= small:
        return _small_inverse(lower)
    half = C // 2
    blocks = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], axis=-3)
    inverses = _inverse(small, blocks)
    corner = _exact(_exact(inverses[..., 1, :, :], lower[..., half:, :half]), inverses[..., 0, :, :])
    return _assemble(inverses, -corner)


def _small_inverse(lower: jax.Array) -> jax.Array:
    """The same by inverting diagonal blocks of 1, 2, 4, ... rows, each from the two halves within it."""
    C = lower.shape[-1]
    rows, columns = jnp.arange(C)[:, None], jnp.arange(C)[None]
    inverse = jnp.broadcast_to(jnp.eye(C, dtype=lower.dtype), lower.shape)
    size = 1
    while size < C:
        corner = (rows // (2 * size) == columns // (2 * size)) & (rows // size != columns // size)
        inverse -= _exact(_exact(inverse, jnp.where(corner, lower, 0)), inverse)
        size *= 2
    return inverse


@_unit_lower_inverse.defjvp
def _inverse_jvp(small, primals, tangents):
    """d (I + L)^-1 = -(I + L)^-1 dL (I + L)^-1, which is linear in dL and differentiates to any order."""
    inverse = _unit_lower_inverse(small, *primals)
    return inverse, -_exact(inverse, _exact(_lower(tangents[0], -1), inverse))
