"""From an OpCase to arrays, to the library's answer, to the float64 truth, and the comparison of the two."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from attention_jax.biases import ALiBi
from attention_jax.mixers.forgetting import ForgetBias
from attention_jax.ops.softmax import dot_product_attention
from tests import cases
from tests.reference import masks as truth_masks
from tests.reference import positions as truth_positions
from tests.reference import softmax as truth

# What users compile with, where tests/conftest.py sets quicker compilation for all.
USERS = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
if jax.version.__version_info__ < (0, 11):
    USERS["xla_cpu_use_fusion_emitters"] = True


@dataclasses.dataclass
class Problem:
    """Arrays of one call.

    learned: what is differentiated.
    keep, bias, drop: [B, N, T, S], for the truth.

    bias_gradient: from the truth's d score [B, N, T, S] to the cotangents of the bias's float leaves; with
      magnitude=True of the same sums of absolute values.
    """

    learned: dict[str, Any]
    fixed: dict[str, Any]
    do: np.ndarray
    dlse: np.ndarray
    keep: np.ndarray
    q_valid: np.ndarray
    k_valid: np.ndarray
    scale: float
    softcap: float | None
    bias: np.ndarray | float
    drop: np.ndarray | float
    bias_gradient: Callable[[np.ndarray], list[np.ndarray]] | None
    dtype: Any

    def attend(self, learned: dict[str, Any], impl: Any, **changes):
        """The library's (out, lse)."""
        arguments = self.fixed | {"bias": learned.get("bias", self.fixed.get("bias"))} | changes
        return dot_product_attention(
            learned["q"], learned["k"], learned["v"], sink_logits_N=learned.get("sinks"),
            return_lse=True, impl=impl, **arguments,
        )  # fmt: skip

    def program(self, impl: Any, quick: bool = True):
        """A jitted function of (learned, do, dlse), by default the problem's own: (out, lse, gradients)."""

        @functools.partial(jax.jit, compiler_options=None if quick else USERS)
        def run(learned, do, dlse):
            (out, lse), vjp = jax.vjp(lambda x: self.attend(x, impl), learned)
            return out, lse, vjp((do, dlse))[0]

        def program(learned=None, do=None, dlse=None):
            given = (learned, do, dlse)
            own = (self.learned, self.do, self.dlse)
            found = run(*(b if a is None else a for a, b in zip(given, own, strict=True)))
            return jax.tree.map(np.asarray, found)

        return program

    def truth(self, dtype: Any = np.float64, **options) -> truth.Attention:
        clean = {}
        for name, valid in (("q", self.q_valid), ("k", self.k_valid), ("v", self.k_valid)):
            x = np.asarray(self.learned[name]).astype(dtype)
            clean[name] = np.where(valid[..., None, None], x, 0)
        return truth.Attention(
            **clean, keep=self.keep, scale=self.scale, softcap=self.softcap, bias=self.bias,
            sinks=self.learned.get("sinks"), drop=self.drop, dtype=dtype, **options,
        )  # fmt: skip


@functools.cache
def make(case: cases.OpCase) -> Problem:
    """The arrays of a case, from its seed alone."""
    rng = np.random.default_rng(case.seed)
    (T, S), (H, M), (N, K), B = case.lengths, case.widths, case.heads, case.batch
    dtype = jnp.dtype(case.dtype)

    def normal(*shape, dtype=dtype):
        return rng.normal(size=shape).astype(dtype)

    learned = {"q": normal(B, T, N, H), "k": normal(B, S, K, H), "v": normal(B, S, K, M)}
    if case.sinks:
        learned["sinks"] = normal(N, dtype=np.float32)
    q_pos, k_pos, given = _positions(case, rng)
    q_seg, k_seg, segments = _segments(case, rng)
    keep, masks = _mask(case, rng, q_pos, k_pos)
    q_valid, k_valid = (q_pos >= 0) & (q_seg >= 0), (k_pos >= 0) & (k_seg >= 0)
    keep = keep & q_valid[:, None, :, None] & k_valid[:, None, None, :]
    keep = keep & (q_seg[:, None, :, None] == k_seg[:, None, None, :])
    bias, scores, bias_gradient = _bias(case, rng, q_pos, k_pos)
    fixed = {**masks, "scale": case.scale, "softcap": case.softcap, "segment_ids": segments, **given}
    if isinstance(bias, ALiBi):
        fixed["bias"] = bias
    elif bias is not None:
        learned["bias"] = bias
    drop = 1.0
    if case.dropout:
        key = jax.random.key(case.seed)
        fixed |= {"dropout_rate": case.dropout, "dropout_key": key}
        words = np.asarray(jax.random.key_data(key))
        kept = truth.dropout_keep(words, case.dropout, np.arange(B), np.arange(N), q_pos, k_pos)
        drop = kept / (1 - case.dropout)
    scale = 1 / math.sqrt(H) if case.scale is None else case.scale
    return Problem(
        learned, fixed, normal(B, T, N, M), normal(B, T, N, dtype=np.float32),
        np.broadcast_to(keep, (B, N, T, S)), q_valid, k_valid, scale, case.softcap, scores,
        drop, bias_gradient, dtype,
    )  # fmt: skip


def _positions(case, rng):
    (T, S), B = case.lengths, case.batch
    q, k = np.tile(np.arange(T), (B, 1)), np.tile(np.arange(S), (B, 1))
    if case.positions is None:
        return q, k, {}
    if case.positions == "shifted":
        # The last query and the last key stand at the same position; one row of positions for all.
        top = 3 + max(T, S)
        q, k = q + top - T, k + top - S
        return q, k, {"q_positions": q[0].astype(np.int32), "k_positions": k[:1].astype(np.int32)}
    if case.positions == "left padded":
        pads = rng.integers(0, max(2, min(T, S)), size=(B, 1))
        q, k = np.maximum(q - pads, -1), np.maximum(k - pads, -1)
    else:  # cache: keys of a ring, out of order, some slots empty; queries stand at and after the newest
        order = rng.permuted(np.tile(np.arange(S + 4), (B, 1)), axis=1)[:, :S]
        k = np.where(rng.random((B, S)) < 0.2, -1, order)
        q = q + rng.integers(S // 2, S + 4, size=(B, 1))
    return q, k, {"q_positions": q.astype(np.int32), "k_positions": k.astype(np.int32)}


def _segments(case, rng):
    (T, S), B = case.lengths, case.batch
    if case.segments is None:
        return np.zeros((B, T), int), np.zeros((B, S), int), None
    cuts = np.sort(rng.integers(0, max(T, S) + 1, size=(B, 3)))
    q, k = ((np.arange(n)[None, :, None] >= cuts[:, None, :]).sum(-1) for n in (T, S))
    if case.segments == "ragged":
        q, k = (np.where(rng.random(x.shape) < 0.1, -1, x) for x in (q, k))
        if T == S:
            k = q
    q32, k32 = q.astype(np.int32), k.astype(np.int32)
    return q, k, q32 if T == S else (q32, k32)


def _mask(case, rng, q_pos, k_pos):
    """(keep [B or 1, N or 1, T, S], the arguments); "MASK & array SHAPE" gives a Mask and an array."""
    (T, S), N, B = case.lengths, case.heads[0], case.batch
    keep, given = np.ones((1, 1, T, S), bool), {}
    for name in () if case.mask is None else case.mask.split(" & "):
        if name.startswith("array"):
            shape = cases.ARRAY_SHAPES[name.split()[1]](B, N, T, S)
            array = rng.random(shape) < 0.7
            keep = keep & np.broadcast_to(array, (B, N, T, S))
            given["mask_BNTS" if "mask" in given else "mask"] = array
        else:
            row = cases.MASKS[name]
            keep = keep & truth_masks.table(row.truth, q_pos, k_pos)[:, None]
            given["mask"] = row.mask
    return keep, given


def _bias(case, rng, q_pos, k_pos):
    """(the argument, its scores [B, N, T, S] in float64, its gradient from that of the scores)."""
    (T, S), N, B = case.lengths, case.heads[0], case.batch
    if case.bias is None:
        return None, 0.0, None
    if case.bias == "alibi":
        slopes = np.asarray(truth_positions.ALIBI_SLOPES[N])[None, :, None, None]
        return ALiBi(N), -slopes * np.abs(q_pos[:, None, :, None] - k_pos[:, None, None, :]), None
    if case.bias == "gate":
        return _gate(rng, B, N, T, S)
    if case.bias == "forget":
        return _forget(rng, B, N, T, S)
    shape = cases.ARRAY_SHAPES[case.bias.split()[1]](B, N, T, S)
    array = rng.normal(size=shape).astype(np.float32)

    def gradient(ds, magnitude=False):
        axes = tuple(i for i, n in enumerate((1,) * (4 - len(shape)) + shape) if n == 1 and ds.shape[i] != 1)
        return [ds.sum(axes, keepdims=True).reshape(shape)]

    return array, np.broadcast_to(array.astype(np.float64), (B, N, T, S)), gradient


def _forget(rng, B, N, T, S):
    past, present = (rng.normal(size=(B, n, N)).astype(np.float32) for n in (T, S))
    # As large as the high words, so that no rounding hides where they go.
    low = rng.permuted(present, axis=1)
    q, k = (x.astype(np.float64).swapaxes(1, 2) for x in (past, present + low.astype(np.float64)))

    def gradient(ds, magnitude=False):
        by_key = (1 if magnitude else -1) * ds.sum(2).swapaxes(1, 2)
        return [ds.sum(3).swapaxes(1, 2), by_key, np.zeros_like(by_key)]

    return ForgetBias(past, present, low), q[..., None] - k[:, :, None], gradient


def _gate(rng, B, N, T, S):
    weight, past, present = (rng.normal(size=x).astype(np.float32) for x in ((N,), (B, T), (B, S)))
    ids = np.arange(B, dtype=np.int32)
    w = weight.astype(np.float64)[None, :, None, None]
    gate = past.astype(np.float64)[:, None, :, None] - present[:, None, None, :] + ids[:, None, None, None]

    def gradient(ds, magnitude=False):
        if magnitude:
            return [
                (ds * np.abs(gate)).sum((0, 2, 3)),
                (ds * np.abs(w)).sum((1, 3)),
                (ds * np.abs(w)).sum((1, 2)),
            ]
        return [(ds * gate).sum((0, 2, 3)), (ds * w).sum((1, 3)), -(ds * w).sum((1, 2))]

    return cases.Gate(weight, past, present, ids), np.broadcast_to(w * gate, (B, N, T, S)), gradient


def results(attention: truth.Attention, problem: Problem) -> dict[str, np.ndarray]:
    """Outputs and gradients by name."""
    grads = attention.backward(problem.do, problem.dlse)
    found = {"out": attention.out, "lse": attention.lse, **grads}
    if problem.bias_gradient is not None:
        leaves = problem.bias_gradient(grads["bias"])
        found |= {f"bias leaf {i}": leaf for i, leaf in enumerate(leaves)}
    return found


# The orders in which naive results sum the products of a score. The first two suffice nearly always.
_ORDERS = [{"reverse": False}, {"reverse": True}, *({"library": i / 8} for i in range(8))]


@functools.lru_cache(maxsize=2)
def expected(case: cases.OpCase, orders: int = 2) -> dict[str, tuple[np.ndarray, float]]:
    """Name to (the float64 truth, the tolerance of tests.cases) for outputs and gradients."""
    problem = make(case)
    exact = problem.truth()
    wanted = results(exact, problem)
    naive = [
        results(problem.truth(np.float32, rounded=problem.dtype, **order), problem)
        for order in _ORDERS[:orders]
    ]
    magnitudes = exact.magnitudes(problem.do, problem.dlse)
    magnitudes["out"] = np.abs(exact.v) * cases.largest(exact.drop)
    magnitudes["lse"] = np.append(exact.s[np.isfinite(exact.s)], 1.0)
    if problem.bias_gradient is not None:
        leaves = problem.bias_gradient(magnitudes["bias"], magnitude=True)
        magnitudes |= {f"bias leaf {i}": leaf for i, leaf in enumerate(leaves)}
    found = {}
    for name, x in wanted.items():
        finite = np.isfinite(x)
        error = max(cases.largest(y[name][finite] - x[finite]) for y in naive)
        dtype = np.float32 if name == "lse" else problem.dtype
        factor = 2 if name in ("out", "lse") else 3
        found[name] = (x, cases.tolerance(error, dtype, cases.largest(magnitudes[name]), factor))
    return found


def check(case: cases.OpCase, impl: Any, quick: bool = True) -> None:
    """Output, lse and all gradients of an implementation are those of float64, within the tolerance."""
    problem = make(case)
    out, lse, grads = problem.program(impl, quick)()
    assert out.dtype == problem.dtype and lse.dtype == np.float32
    found = {"out": out, "lse": lse}
    found |= {name: grads[name] for name in ("q", "k", "v", "sinks") if name in grads}
    leaves = [x for x in jax.tree.leaves(grads.get("bias")) if x.dtype != jax.dtypes.float0]
    found |= {f"bias leaf {i}": x for i, x in enumerate(leaves)}
    wanted = expected(case)
    assert wanted.keys() - found.keys() <= {"sinks", "bias"}
    for name, x in found.items():
        try:
            assert_close(name, x, *wanted[name])
        except AssertionError:
            assert_close(name, x, *expected(case, len(_ORDERS))[name])


def assert_close(name: str, x: np.ndarray, wanted: np.ndarray, allowed: float) -> None:
    x = x.astype(np.float64)
    assert x.shape == wanted.shape, (name, x.shape, wanted.shape)
    finite = np.isfinite(wanted)
    assert_array_equal(x[~finite], wanted[~finite], err_msg=name)
    error = cases.largest(x[finite] - wanted[finite])
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"
