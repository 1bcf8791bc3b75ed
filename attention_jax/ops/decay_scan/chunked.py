"""Products of matrices, one chunk of C tokens after another: O(T) time and memory, forward and backward.

    y_t = scale * (sum_{s <= t in chunk} P_ts v_s + q_t exp(c_t) S),   P_ts = q_t exp(c_t - c_s) k_s
    S' = exp(c_C) S + sum_s exp(c_C - c_s) k_s v_s^T,   c_t = sum of log decays in the chunk, up to t

(Yang et al. 2024, arXiv 2312.06635; Dao & Gu 2024, arXiv 2405.21060). The forward keeps the state before
every chunk; the backward goes through the chunks from the last to the first and differentiates each anew.
No exponent is ever above 0 and none is a difference of rounded sums (`_token_weights`, `_channel_scores`),
so that every decay from 0 to 1 is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.ops import derivatives, varying
from attention_jax.ops.arguments import positive_integer
from attention_jax.ops.decay_scan.common import DecayScanCall
from attention_jax.ops.recurrences import einsum, spread


@dataclasses.dataclass(frozen=True)
class ChunkedScanConfig:
    """Sizes of "chunked"; the default was measured on a CPU at B1 H8 D64 (docs/results.md)."""

    #: Tokens of a chunk.
    chunk_size: int = 64

    def __post_init__(self) -> None:
        positive_integer("chunk_size", self.chunk_size)


_NO_FORWARD = derivatives.no_forward_mode("chunked", "decay_scan", use="recurrent")


class _Inputs(NamedTuple):
    """What a chunk reads and has gradients for, [B, C, heads, ...]; a constant decay is no part of it."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None


class _Weights(NamedTuple):
    """Decay from token s to t, [b, n, C, C]; from the chunk's start to t; from s to its end; through it.

    The last three end in 1 or H; an entry is None where nothing decays, and `within` also where
    scores are decayed already.
    """

    within: jax.Array | None
    start: jax.Array | None
    end: jax.Array | None
    through: jax.Array | None


def attend(call: DecayScanCall, config: ChunkedScanConfig) -> tuple[jax.Array, jax.Array]:
    """(y_BTNM in call.out_dtype, state_BNHM)."""
    return _attend(config.chunk_size, derivatives.reverse_only(_NO_FORWARD, call))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk_size: int, call: DecayScanCall) -> tuple[jax.Array, jax.Array]:
    return _forward(chunk_size, call)[:2]


def _attend_fwd(chunk_size: int, call: DecayScanCall):
    y_BTNM, state_BNHM, states = _forward(chunk_size, call)
    return (y_BTNM, state_BNHM), (call, states)


def _attend_bwd(chunk_size: int, residuals, cotangents):
    return (_backward(chunk_size, *residuals, *cotangents),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _chunks(chunk_size: int, call: DecayScanCall) -> tuple[int, int, int]:
    """(C, how many chunks, tokens of a shorter one after them)."""
    T = call.sizes[1]
    C = min(chunk_size, T)
    return C, T // C, T % C


def _per_channel(call: DecayScanCall) -> bool:
    return call.log_decay is not None and call.log_decay.ndim == 4


def _is_constant(call: DecayScanCall) -> bool:
    return call.log_decay is not None and call.log_decay.ndim == 1


def _inputs(call: DecayScanCall) -> _Inputs:
    return _Inputs(call.q_BTNH, call.k_BTNH, call.v_BTNM, None if _is_constant(call) else call.log_decay)


def _cut(x: Any, start: Any, C: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, C, axis=1), x)


def _paste(x: Any, piece: Any, start: Any) -> Any:
    def one(whole, part):
        return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)

    return jax.tree.map(one, x, piece)


def _forward(
    chunk_size: int, call: DecayScanCall
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """y, the last state, and the states before whole chunks, [chunks, B, N, H, M], and before the rest."""
    B, T, N, _, M = call.sizes
    C, count, rest = _chunks(chunk_size, call)
    inputs = _inputs(call)

    def chunk(state_BNHM, y_BTNM, start, C, weights):
        piece = _cut(inputs, start, C)
        y_BCNM, state_BNHM = _chunk(call, _keep(call, start, C), state_BNHM, piece, weights)
        return state_BNHM, _paste(y_BTNM, y_BCNM, start)

    weights = _constant_weights(call.log_decay, C) if _is_constant(call) else None

    def body(carry, i):
        return chunk(*carry, i * C, C, weights), carry[0]

    carry = varying.like(call.q_BTNH, (call.state_BNHM, jnp.zeros((B, T, N, M), call.out_dtype)))
    (state_BNHM, y_BTNM), states = lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))
    before_rest = state_BNHM
    if rest:
        weights = _constant_weights(call.log_decay, rest) if _is_constant(call) else None
        state_BNHM, y_BTNM = chunk(state_BNHM, y_BTNM, count * C, rest, weights)
    return y_BTNM, state_BNHM, (states, before_rest)


def _backward(
    chunk_size: int, call: DecayScanCall, states, dy_BTNM: jax.Array, dstate_BNHM: jax.Array
) -> DecayScanCall:
    C, count, rest = _chunks(chunk_size, call)
    inputs = _inputs(call)
    constant = _is_constant(call)

    def chunk(dstate_BNHM, dinputs, state_BNHM, start, C, weights):
        keep = _keep(call, start, C)

        def run(state_BNHM, piece, weights):
            return _chunk(call, keep, state_BNHM, piece, weights)

        _, pull = jax.vjp(run, state_BNHM, _cut(inputs, start, C), weights)
        dstate_BNHM, dpiece, dweights = pull((_cut(dy_BTNM, start, C), dstate_BNHM))
        return dstate_BNHM, _paste(dinputs, dpiece, start), dweights

    def constant_weights(C):
        if not constant:
            return None, lambda dweights: None
        return jax.vjp(lambda log_decay: _constant_weights(log_decay, C), call.log_decay)

    before, before_rest = states
    dinputs = varying.like(call.q_BTNH, jax.tree.map(jnp.zeros_like, inputs))
    dconstant = jnp.zeros_like(call.log_decay) if constant else None
    if rest:
        weights, pull = constant_weights(rest)
        dstate_BNHM, dinputs, dweights = chunk(dstate_BNHM, dinputs, before_rest, count * C, rest, weights)
        dconstant = pull(dweights)[0] if constant else None
    weights, pull = constant_weights(C)

    def body(carry, x):
        dstate_BNHM, dinputs, dweights = carry
        dstate_BNHM, dinputs, more = chunk(dstate_BNHM, dinputs, x[1], x[0] * C, C, weights)
        return (dstate_BNHM, dinputs, jax.tree.map(jnp.add, dweights, more)), None

    carry = varying.like(call.q_BTNH, (dstate_BNHM, dinputs, jax.tree.map(jnp.zeros_like, weights)))
    steps = (jnp.arange(count, dtype=jnp.int32), before)
    (dstate_BNHM, dinputs, dweights), _ = lax.scan(body, carry, steps, reverse=True)
    if constant:
        dconstant = dconstant + pull(dweights)[0]
    # None stands for the zero cotangent of integers.
    return dataclasses.replace(
        call,
        q_BTNH=dinputs.q,
        k_BTNH=dinputs.k,
        v_BTNM=dinputs.v,
        log_decay=dconstant if constant else dinputs.log_decay,
        state_BNHM=dstate_BNHM,
        run_BT=None,
    )


class _Keep(NamedTuple):
    """What of a chunk belongs to one document: pairs [1 or b, 1, C, C]; the rest None without documents."""

    pairs: Any
    start: jax.Array | None = None  # t is of the document of the state before, [b, 1, C, 1]
    end: jax.Array | None = None  # s is of the last document, [b, 1, C, 1]
    through: jax.Array | None = None  # both are the same document, [b, 1, 1]


def _keep(call: DecayScanCall, start: Any, C: int) -> _Keep:
    causal = np.tril(np.ones((1, 1, C, C), bool))
    if call.run_BT is None:
        return _Keep(causal)
    run_BC = _cut(call.run_BT, start, C)
    # The slot before the chunk; the initial state is of the first document, number 0.
    before_B1 = jnp.where(start > 0, _cut(call.run_BT, jnp.maximum(start - 1, 0), 1), 0)
    last_B1 = run_BC[:, -1:]
    return _Keep(
        causal & (run_BC[:, None, :, None] == run_BC[:, None, None, :]),
        (run_BC == before_B1)[:, None, :, None],
        (run_BC == last_B1)[:, None, :, None],
        (before_B1 == last_B1)[:, None],
    )


def _chunk(
    call: DecayScanCall, keep: _Keep, state_BNHM: jax.Array, inputs: _Inputs, weights: _Weights | None
):
    """(y_BCNM, the state after the chunk). weights: those of a constant decay."""
    N = call.sizes[2]
    q, k, v = (jnp.swapaxes(x, 1, 2).astype(call.dtype) for x in inputs[:3])
    q = q * call.scale
    v_BNCM = spread(v, N, 1)
    if _per_channel(call):
        log_decay = spread(jnp.swapaxes(inputs.log_decay, 1, 2), N, 1)
        scores_BNCC, weights = _channel_scores(spread(q, N, 1), spread(k, N, 1), log_decay)
    else:
        # Where q and k share heads, so do their scores.
        heads = math.lcm(q.shape[1], k.shape[1])
        scores_BNCC = spread(einsum("bnth,bnsh->bnts", spread(q, heads, 1), spread(k, heads, 1)), N, 1)
        if inputs.log_decay is not None:
            weights = _token_weights(jnp.swapaxes(inputs.log_decay, 1, 2))
        elif weights is None:
            weights = _Weights(None, None, None, None)
    if weights.within is not None:
        scores_BNCC = scores_BNCC * spread(weights.within, N, 1)
    # Hidden scores may have overflowed: select, since 0 * Inf is NaN.
    y_BNCM = einsum("bnts,bnsm->bntm", jnp.where(keep.pairs, scores_BNCC, 0.0), v_BNCM)
    from_state = _decayed(spread(q, N, 1), weights.start, keep.start)
    y_BNCM = y_BNCM + einsum("bnth,bnhm->bntm", from_state, state_BNHM)
    added_BNHM = einsum("bnsh,bnsm->bnhm", _decayed(spread(k, N, 1), weights.end, keep.end), v_BNCM)
    through = None if weights.through is None else weights.through[..., None]
    keep_through = None if keep.through is None else keep.through[..., None]
    return (
        jnp.swapaxes(y_BNCM, 1, 2).astype(call.out_dtype),
        _decayed(state_BNHM, through, keep_through) + added_BNHM,
    )


def _decayed(x: jax.Array, weight: jax.Array | None, keep: jax.Array | None) -> jax.Array:
    """x with its heads (axis 1) decayed, and 0 where it is not kept."""
    if weight is not None:
        x = x * spread(weight, x.shape[1], 1)
    return x if keep is None else jnp.where(keep, x, 0.0)


def _constant_weights(log_decay_N: jax.Array, C: int) -> _Weights:
    def weight(steps):
        log_decay = log_decay_N.reshape(-1, *(1,) * steps.ndim) * steps.astype(log_decay_N.dtype)[None]
        return jnp.exp(jnp.where(steps > 0, log_decay, 0.0))[None]

    t = np.arange(C)
    return _Weights(
        weight(np.maximum(t[:, None] - t, 0)),
        weight(t + 1)[..., None],
        weight(C - 1 - t)[..., None],
        weight(np.array([C])),
    )


# exp of it is 0 in float32.
_FORGETS_ALL = -128.0


def _token_weights(log_decay_BNC: jax.Array) -> _Weights:
    """Weights of one decay per token and head.

    c_t - c_s would lose what is small to the rounding of what is large: of a decay of 1e-4 each and one of
    1 - 1e-6 after them, the latter. So log decays are cut into a multiple of a power of 2, coarse enough for
    float32 to sum exactly, and a remainder, whose sums are at most C^2 2^-18: up to 512 tokens 1, which keeps
    the accuracy of float32. In longer chunks the remainder is cut once more. Sums from the chunk's start or
    to its end need no difference.
    """
    C = log_decay_BNC.shape[-1]
    log_decay_BNC = jnp.where(log_decay_BNC < _FORGETS_ALL, _FORGETS_ALL, log_decay_BNC)
    upto, behind = (np.tril(np.ones((C, C), log_decay_BNC.dtype), k) for k in (0, -1))

    def between(x_BNC):
        sums_BNC = einsum("ts,bns->bnt", upto, x_BNC)
        return sums_BNC[..., :, None] - sums_BNC[..., None, :]

    within_BNCC, rest_BNC, largest = 0.0, log_decay_BNC, -_FORGETS_ALL
    for _ in range(1 if C <= 512 else 2):
        quantum = 2.0 ** math.ceil(math.log2(C)) * largest * 2.0**-24  # C * largest / quantum <= 2^24
        coarse_BNC = lax.stop_gradient(jnp.round(rest_BNC * (1 / quantum)) * quantum)
        within_BNCC, rest_BNC = within_BNCC + between(coarse_BNC), rest_BNC - coarse_BNC
        largest = quantum / 2
    within_BNCC = within_BNCC + between(rest_BNC)
    return _Weights(
        # Without the diagonal: its gradients, often the largest, would have to cancel.
        jnp.exp(jnp.where(behind > 0, within_BNCC, 0.0)),
        jnp.exp(einsum("ts,bns->bnt", upto, log_decay_BNC))[..., None],
        jnp.exp(einsum("ts,bnt->bns", behind, log_decay_BNC))[..., None],
        jnp.exp(log_decay_BNC.sum(-1, keepdims=True)),
    )


def _channel_scores(q_BNCH: jax.Array, k_BNCH: jax.Array, log_decay_BNCH: jax.Array):
    """Decayed scores [B, N, C, C] and the other weights of a decay per token and channel.

    By halves: a token of a right half sees one of the left half decayed to their border and from it on,
    which is a product of matrices. Sums start at borders, nothing is subtracted.
    """
    C = q_BNCH.shape[2]
    P = 2 ** math.ceil(math.log2(C))
    q, k, g = (jnp.pad(x, ((0, 0), (0, 0), (0, P - C), (0, 0))) for x in (q_BNCH, k_BNCH, log_decay_BNCH))
    B, N, _, H = q.shape
    scores = (q * k).sum(-1).reshape(B, N, P, 1, 1)
    # Sums from the start of its block up to a token, and from behind it to the block's end.
    upto, behind = g.reshape(B, N, P, 1, H), jnp.zeros((B, N, P, 1, H), g.dtype)
    m = 1
    while m < P:
        shape = (B, N, P // (2 * m), 2, m, H)
        upto, behind, qs, ks = (x.reshape(shape) for x in (upto, behind, q, k))
        scores = scores.reshape(*shape[:5], m)
        right_q = qs[:, :, :, 1] * jnp.exp(upto[:, :, :, 1])
        left_k = ks[:, :, :, 0] * jnp.exp(behind[:, :, :, 0])
        cross = einsum("bnjth,bnjsh->bnjts", right_q, left_k)
        scores = jnp.concatenate(
            [
                jnp.concatenate([scores[:, :, :, 0], jnp.zeros_like(cross)], -1),
                jnp.concatenate([cross, scores[:, :, :, 1]], -1),
            ],
            -2,
        )
        left, right = upto[:, :, :, 0, -1:], upto[:, :, :, 1, -1:]
        behind = jnp.concatenate([behind[:, :, :, 0] + right, behind[:, :, :, 1]], 3)
        upto = jnp.concatenate([upto[:, :, :, 0], upto[:, :, :, 1] + left], 3)
        m *= 2
    upto, behind = (x.reshape(B, N, P, H)[:, :, :C] for x in (upto, behind))
    weights = _Weights(None, jnp.exp(upto), jnp.exp(behind), jnp.exp(upto[:, :, -1]))
    return scores.reshape(B, N, P, P)[:, :, :C, :C], weights
