"""Dense softmax attention and its hand-written backward.

    x = scale q.k,  s = softcap(x) + bias,  lse = log sum of e^s over what is kept and the sink,
    P = e^(s - lse),  o = (P * D) v

D holds 0 where dropout drops and 1 / (1 - rate) elsewhere. In float64 this is the truth; in float32, with the
operands of every matmul rounded to the inputs' dtype, it is the naive result that errors are compared with.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass
class Attention:
    """One forward; `backward` uses what it kept. q [B,T,N,H], k [B,S,K,H], v [B,S,K,M], rest [B,N,T,S]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    keep: np.ndarray
    scale: float
    softcap: float | None = None
    bias: np.ndarray | float = 0.0
    sinks: np.ndarray | None = None
    drop: np.ndarray | float = 1.0
    dtype: type = np.float64
    rounded: type | None = None
    reverse: bool = False  # sum the products of the scores from the last feature to the first
    library: float | None = None  # or as NumPy's matmul does, from this share of the features on and around

    def __post_init__(self):
        to = lambda x: None if x is None else np.asarray(x).astype(self.dtype)  # noqa: E731
        self.q, self.k, self.v, self.bias, self.sinks, self.drop = map(
            to, (self.q, self.k, self.v, self.bias, self.sinks, self.drop)
        )
        groups = self.q.shape[2] // self.k.shape[2]
        # Query heads [0, G) share kv head 0.
        self.k_n, self.v_n = np.repeat(self.k, groups, axis=2), np.repeat(self.v, groups, axis=2)
        s, self.slope = self._scores(self.reverse)
        sink = -np.inf * np.ones(1, self.dtype) if self.sinks is None else self.sinks
        sink = sink[None, :, None, None]
        top = np.maximum(s.max(-1, keepdims=True), sink)
        top = np.where(np.isneginf(top), self.dtype(0), top)
        e, e_sink = np.exp(s - top), np.exp(sink - top)
        total = e.sum(-1, keepdims=True) + e_sink
        some = total > 0
        total = np.where(some, total, self.dtype(1))
        self.p, self.p_sink = e / total, e_sink / total
        self.s = s
        self.lse = np.where(some, top + np.log(total), self.dtype(-np.inf))[..., 0].transpose(0, 2, 1)
        self.w = self.p * self.drop
        self.out = self._rounded(np.einsum("bnts,bsnm->btnm", self._rounded(self.w), self.v_n))

    def _scores(self, reverse):
        """(scores, -inf where hidden; the softcap's slope)."""
        H = self.q.shape[-1]
        order = np.roll(np.arange(H), -int((self.library or 0) * H))[:: -1 if reverse else 1]
        q, k = self.q[..., order], self.k_n[..., order]
        if self.dtype is np.float64:
            x = np.einsum("btnh,bsnh->bnts", q, k)
        elif self.library is not None:
            x = q.transpose(0, 2, 1, 3) @ k.transpose(0, 2, 3, 1)
        else:  # one product after another, as the textbook sums
            q, k = q.transpose(3, 0, 2, 1)[..., None], k.transpose(3, 0, 2, 1)[..., None, :]
            x = functools.reduce(lambda total, h: total + q[h] * k[h], range(len(q)), self.dtype(0))
        x, slope = x * self.dtype(self.scale), self.dtype(1)
        if self.softcap is not None:
            tanh = np.tanh(x / self.dtype(self.softcap))
            x, slope = self.dtype(self.softcap) * tanh, 1 - tanh**2
        return np.where(self.keep, x + self.bias, self.dtype(-np.inf)), slope

    def _rounded(self, x):
        return x if self.rounded is None else x.astype(self.rounded).astype(self.dtype)

    def _gather_groups(self, x_n):
        B, S, N, H = x_n.shape
        K = self.k.shape[2]
        return x_n.reshape(B, S, K, N // K, H).sum(3)

    def backward(self, do, dlse):
        """{"q", "k", "v", "bias" (BNTS), "sinks"} of the sum of <do, out> + <dlse, lse>."""
        do, dlse = np.asarray(do).astype(self.dtype), np.asarray(dlse).astype(self.dtype)
        # P as a backward recomputes it: from lse and from scores summed in another order.
        lse = self.lse.transpose(0, 2, 1)[..., None]
        s, _ = self._scores(not self.reverse)
        p = np.exp(s - np.where(np.isneginf(lse), np.inf, lse))
        dp = np.einsum("btnm,bsnm->bnts", do, self.v_n) * self.drop
        shift = dlse.transpose(0, 2, 1)[..., None] - (p * dp).sum(-1, keepdims=True)
        ds = p * (dp + shift)
        dx = self._rounded(ds * self.slope) * self.dtype(self.scale)
        return {
            "q": self._rounded(np.einsum("bnts,bsnh->btnh", dx, self.k_n)),
            "k": self._rounded(self._gather_groups(np.einsum("bnts,btnh->bsnh", dx, self.q))),
            "v": self._rounded(
                self._gather_groups(np.einsum("bnts,btnm->bsnm", self._rounded(p * self.drop), do))
            ),
            "bias": ds,
            "sinks": (self.p_sink * shift).sum((0, 2, 3)),
        }

    def magnitudes(self, do, dlse):
        """The largest entry of each gradient computed with absolute values: the scale of its rounding."""
        do, dlse = np.abs(do).astype(self.dtype), np.abs(dlse).astype(self.dtype)
        dp = np.einsum("btnm,bsnm->bnts", do, np.abs(self.v_n)) * self.drop
        shift = dlse.transpose(0, 2, 1)[..., None] + (self.p * dp).sum(-1, keepdims=True)
        ds = self.p * (dp + shift)
        dx = ds * self.slope * abs(self.scale)
        return {
            "q": np.einsum("bnts,bsnh->btnh", dx, np.abs(self.k_n)),
            "k": self._gather_groups(np.einsum("bnts,btnh->bsnh", dx, np.abs(self.q))),
            "v": self._gather_groups(np.einsum("bnts,btnm->bsnm", self.w, do)),
            "bias": ds,
            "sinks": (self.p_sink * shift).sum((0, 2, 3)),
        }


def dropout_keep(words, rate, batch, heads, q_positions, k_positions):
    """The published bits [B, N, T, S]: a chain of `lowbias32` over key, row, head and both positions."""

    def mix(x):
        x = x.astype(np.uint64)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    def chain(state, value):
        return mix(
            ((state + 0x9E3779B9) & 0xFFFFFFFF) ^ (np.asarray(value, np.int64) & 0xFFFFFFFF).astype(np.uint64)
        )

    seed = np.zeros((), np.uint64)
    for word in words:
        seed = chain(seed, word)
    state = mix(seed ^ np.asarray(batch, np.uint64))[:, None, None, None]
    state = chain(state, np.asarray(heads)[None, :, None, None])
    state = chain(state, np.asarray(q_positions)[:, None, :, None])
    bits = chain(state, np.asarray(k_positions)[:, None, None, :])
    return bits >= min(round(rate * 2**32), 2**32 - 1)
