"""What every implementation of dot_product_attention promises beyond numbers.

Each promise is a function of the op's argument `impl` that asserts it. tests/test_softmax.py calls them for
`reference` and `chunked`, tests/interpret_tpu.py for the interpreted TPU kernels. Both give configs with
small tiles: short rows then have empty, full and partial ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from tests import problems
from tests.cases import OpCase


def a_large_common_score_changes_nothing(impl: Any) -> None:
    """Also in rows of padding, which must not overflow into anybody's gradient: 2^128 and beyond."""
    program = problems.make(OpCase((37, 37), (8, 8), (2, 2), None, "array N11", batch=1)).program(impl)
    learned = dict(problems.make(OpCase((37, 37), (8, 8), (2, 2), None, "array N11", batch=1)).learned)
    plain = program(learned | {"bias": np.zeros((2, 1, 1), np.float32)})
    for offset in (88.75, 89.0, 200.0, -200.0):
        out, lse, grads = program(learned | {"bias": np.full((2, 1, 1), offset, np.float32)})
        np.testing.assert_allclose(out, plain[0], atol=1e-4)
        np.testing.assert_allclose(lse - offset, plain[1], atol=1e-4)
        for name in "qkv":
            np.testing.assert_allclose(grads[name], plain[2][name], atol=1e-4, err_msg=name)


# Rows without keys, invalid slots on both sides, several tiles.
HOLES = OpCase((40, 40), (8, 4), (4, 2), "far past", "array B11S", segments="ragged", positions="left padded")
RING = OpCase(
    (24, 56),
    (8, 16),
    (2, 2),
    "window 7 right 4",
    softcap=2.0,
    sinks=True,
    positions="cache",
    dtype="bfloat16",
)


@functools.cache
def small_program(case: OpCase, impl: Any):
    """The problem's program, compiled once for the promises below."""
    return problems.make(case).program(impl)


def rows_without_a_key_give_zero(impl: Any, sinks: bool) -> None:
    """Output 0, lse -inf or the sink alone, gradient 0, and no gradient to anything else."""
    case = dataclasses.replace(HOLES, sinks=sinks)
    problem, program = problems.make(case), small_program(case, impl)
    out, lse, grads = program()
    blind = ~problem.keep.any(-1).swapaxes(1, 2)
    assert blind.any() and not blind.all()
    assert_array_equal(out[blind], 0)
    if sinks:
        at = np.broadcast_to(problem.learned["sinks"], blind.shape)[blind]
        np.testing.assert_allclose(lse[blind], at, rtol=1e-6)
    else:
        assert_array_equal(lse[blind], -np.inf)
    assert_array_equal(grads["q"][blind], 0)
    louder = program(do=np.where(blind[..., None], 100.0, problem.do).astype(problem.dtype))[2]
    for name in grads:
        assert_array_equal(louder[name], grads[name], err_msg=name)


def an_invalid_slot_changes_no_bit(impl: Any, case: OpCase) -> None:
    """NaN, infinities and the largest number in a slot without a token reach nothing."""
    problem, program = problems.make(case), small_program(case, impl)
    clean = program()
    for poison in (np.nan, np.inf, -np.inf, float(jnp.finfo(problem.dtype).max)):
        learned = dict(problem.learned)
        for name, valid in (("q", problem.q_valid), ("k", problem.k_valid), ("v", problem.k_valid)):
            learned[name] = np.where(valid[..., None, None], learned[name], problem.dtype.type(poison))
            assert name == "q" or not valid.all()
        jax.tree.map(assert_array_equal, program(learned), clean)


SEEN = [
    OpCase((40, 40), (8, 8), (4, 2), "causal", batch=1),
    OpCase((40, 48), (8, 8), (2, 1), "window 7 right 4", softcap=2.0, positions="shifted", batch=1),
    OpCase((40, 40), (8, 8), (2, 2), "array BNTS", segments="packed", sinks=True, batch=2),
]


def a_hidden_key_changes_no_bit(impl: Any, case: OpCase) -> None:
    """Gradients are exactly 0 between queries, and to keys from queries that do not see them."""
    problem = problems.make(case)
    program = problem.program(impl)
    before = program()
    rng = np.random.default_rng(1)
    groups = problem.keep.shape[1] // problem.learned["k"].shape[2]
    T, S = problem.keep.shape[2:]
    partly = [j for j in range(S) if problem.keep[..., j].any() and not problem.keep[..., j].all()]
    assert len(partly) > 20
    for j in partly[:: len(partly) // 4]:
        learned = dict(problem.learned)
        for name in "kv":
            learned[name] = learned[name].copy()
            learned[name][:, j] = 1e3 * rng.normal(size=learned[name][:, j].shape)
        after = program(learned)
        hidden = ~problem.keep[..., j].swapaxes(1, 2)
        rows = ((out, lse, grads["q"]) for out, lse, grads in (before, after))
        for name, x, y in zip(("out", "lse", "dq"), *rows, strict=True):
            assert_array_equal(x[hidden], y[hidden], err_msg=f"{name}, key {j}")
        assert (before[0] != after[0]).any()
    for t in (0, 17, T - 1):
        chosen = (np.arange(T) == t)[None, :, None]
        grads = program(do=problem.do * chosen[..., None], dlse=problem.dlse * chosen)[2]
        assert_array_equal(grads["q"][:, np.arange(T) != t], 0)
        B, N = problem.keep.shape[:2]
        seen = problem.keep[:, :, t].reshape(B, N // groups, groups, S).any(2).swapaxes(1, 2)
        for name in "kv":
            assert_array_equal(grads[name][~seen], 0, err_msg=name)
            assert (grads[name][seen] != 0).any()


def a_hidden_key_may_be_as_large_as_its_dtype(impl: Any) -> None:
    """The products that overflow belong to pairs nobody sees, in the backward too."""
    problem = problems.make(OpCase((36, 37), (8, 8), (2, 2), "causal", softcap=2.0, batch=1))
    program = problem.program(impl)
    before = program()
    learned = dict(problem.learned)
    for name in "kv":
        learned[name] = learned[name].copy()
        learned[name][:, 36] = np.sign(learned[name][:, 36]) * np.finfo(np.float32).max
    jax.tree.map(assert_array_equal, program(learned), before)
