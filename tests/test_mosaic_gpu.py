"""The Hopper kernels without a GPU: interpreted against float64, cross-compiled to machine code; block lists.

Tests that need a Hopper GPU are marked `gpu`: numerics at real sizes, equal reruns, poison, odd lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.biases import ALiBi, ArrayBias, Axes, Bias, T5Bias
from attention_jax.masks import BigBird, Causal, Dense, Full, Predicate, SlidingWindow
from attention_jax.mixers.forgetting import ForgetBias
from attention_jax.ops.softmax import HopperTileSizes, MosaicGPUConfig, mosaic_gpu
from attention_jax.ops.softmax.blocks import static_map
from attention_jax.ops.softmax.common import SoftmaxCall, dropout_keep
from attention_jax.ops.softmax.mosaic_gpu.bias import trace_bias
from attention_jax.ops.softmax.mosaic_gpu.bits import mask_bits
from attention_jax.ops.softmax.mosaic_gpu.elementwise import K, Q, Traced, trace
from attention_jax.ops.softmax.mosaic_gpu.schedule import block_map, schedule
from attention_jax.ops.two_float import running_sum
from tests import aot_gpu
from tests.cases import MASKS, Gate, OpCase
from tests.covering import pairwise


def _floats(shape):
    return np.random.default_rng(len(shape) + shape[-1]).normal(size=shape).astype(np.float32)


FUSED = MosaicGPUConfig(deterministic=False)
_NEW = jax.version.__version_info__ >= (0, 11, 2)
needs_kernels = pytest.mark.skipif(
    not _NEW, reason=f"the kernels need jax >= 0.11.2, this is {jax.__version__}"
)
needs_compiler = pytest.mark.skipif(
    not _NEW or aot_gpu.missing() is not None, reason=aot_gpu.missing() or "the kernels need jax >= 0.11.2"
)


def run(*arguments: str, limit: int = 500) -> str:
    """The output of a Python module in a process of its own; its error is the test's."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        capture_output=True, text=True, timeout=limit, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def call_of(T=130, S=200, N=4, K=2, H=64, M=64, mask=None, dtype=jnp.bfloat16, **given) -> SoftmaxCall:
    names = {f.name for f in dataclasses.fields(SoftmaxCall)}
    arrays = {"q_BTNH": (1, T, N, H), "k_BSKH": (1, S, K, H), "v_BSKM": (1, S, K, M)}
    arrays = {name: jnp.zeros(shape, dtype) for name, shape in arrays.items()}
    fixed = {"mask": mask or Full(), "scale": 0.1, "softcap": None, "dropout_rate": 0.0}
    return SoftmaxCall(**dict.fromkeys(names) | arrays | fixed | given)


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"dense"}))
def test_a_mask_traced_on_scalars_keeps_what_it_keeps(name):
    mask = MASKS[name].mask
    q, k = jnp.arange(40, dtype=jnp.int32), jnp.arange(30, dtype=jnp.int32)
    wanted = mask.keep(np.arange(40)[:, None], np.arange(30)[None])
    for look_up in (True, False):
        traced = trace(lambda b, n, q, k: mask.keep(q, k), "mask", look_up)
        if name == "global many" and not look_up:
            assert "cannot evaluate" in traced
            break
        assert isinstance(traced, Traced), traced
        scalars = [x[0, 0] for x in traced.scalars(1, 1)]
        looked = [
            [functools.partial(operator.getitem, x, 0) for x in traced.look_up(side, x[None])]
            for side, x in ((Q, q), (K, k))
        ]
        assert look_up or not any(looked)
        at = lambda: q, lambda: k
        assert_array_equal(traced.tile(scalars, *at, (40, 30), 0, looked), wanted)
        assert_array_equal(traced.tile(scalars, *at, (30, 40), 1, looked), wanted.T)
        if not any(looked):
            break  # the other way is the same


def test_what_is_long_is_looked_up_and_does_not_run_in_the_kernel():
    mask = MASKS["causal bigbird"].mask
    inside, read = (trace(lambda b, n, q, k: mask.keep(q, k), "mask", look_up) for look_up in (False, True))
    assert len(inside.inner) > 300 and not inside.looked
    assert len(read.inner) < 30 and len(read.looked) == 8
    assert not trace(lambda b, n, q, k: Causal().keep(q, k), "mask", True).looked
    # Floats are not read per token: such a chain runs in the kernel, however long.
    floats = trace(lambda b, n, q, k: functools.reduce(jnp.add, [q * 0.5] * 9) >= k, "mask", True)
    assert len(floats.inner) > 8 and not floats.looked


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x**-2,
        lambda x: x % 3.0,
        lambda x: jnp.exp(x.astype(jnp.bfloat16)),
        lambda x: lax.select_n((x > 0).astype(jnp.int32), x, x),
    ],
    ids=["power", "remainder", "bfloat16", "select by number"],
)
def test_what_mosaic_does_not_lower_is_refused_when_traced(what):
    found = trace(lambda b, n, q, k: what((q - k).astype(jnp.float32)), "the bias")
    assert isinstance(found, str) and "cannot evaluate entry by entry" in found
    assert isinstance(trace(lambda b, n, q, k: (q - k).astype(bool), "the mask"), Traced)


class _Launched(Exception):
    """In place of a launch: the scratch it was given."""


def shared_bytes(scratch: dict) -> int:
    """What jax makes of scratch: every buffer whole kilobytes, 8 bytes a barrier."""
    total = 0
    for x in jax.tree.leaves(scratch, is_leaf=lambda x: hasattr(x, "num_barriers")):
        if hasattr(x, "num_barriers"):
            total += 8 * math.prod(np.atleast_1d(x.num_barriers).tolist())
        else:
            x = x.inner_aval
            total += -(-x.size * x.dtype.itemsize // 1024) * 1024
    return total


@needs_kernels
@pytest.mark.kernels
@pytest.mark.parametrize("widths", [(256, 256), (192, 256), (192, 192), (96, 96), (64, 64)], ids=str)
def test_shared_memory_holds_what_every_kernel_asks_for(monkeypatch, widths):
    from attention_jax.ops.softmax.mosaic_gpu import backward_fused, backward_kv, backward_q, forward, plan

    def launch(body, operands, outs, scratch, **grid):
        raise _Launched(scratch)

    for module in (forward, backward_q, backward_kv):
        monkeypatch.setattr(module, "launch", launch)
    kernels = {
        "forward": (plan.forward_plan, lambda cut, *rest: forward.forward(cut)),
        "q": (plan.backward_q_plan, backward_q.gradient_q),
        "kv": (plan.backward_kv_plan, backward_kv.gradient_kv),
        "fused": (plan.fused_plan, backward_fused.gradients_fused),
    }
    ids = jnp.zeros((1, 128), jnp.int32)
    slots = dict.fromkeys(("q_positions_BT", "k_positions_BS", "q_segments_BT", "k_segments_BS"), ids)
    array = {"mask_BNTS": jnp.ones((1, 1, 128, 128), bool)}
    forget = ForgetBias(*[jnp.zeros((1, 128, 1))] * 3)
    low_rank = LowRank(*[jnp.zeros((5, 128))] * 2)
    dout, zero = jnp.zeros((1, 128, 1, widths[1]), jnp.bfloat16), jnp.zeros((1, 1, 128))
    for mask, given in (
        (Full(), {}), (BigBird(64, 3, 1, 2), {}), (BigBird(64, 3, 1, 4), slots),
        (BigBird(64, 3, 1, 4), slots | array), (BigBird(64, 3, 1, 2), slots | array), (Causal(), array),
        (Causal(), {"bias": forget}), (BigBird(64, 3, 1, 2), slots | {"bias": forget}),
        (Causal(), slots | array | {"bias": low_rank}),
    ):  # fmt: skip
        call = call_of(128, 128, 1, 1, *widths, mask, **given)
        for name, (make, run) in kernels.items():
            if name == "fused" and "bias" in given:
                continue  # refused: its gradient
            with pytest.raises(_Launched) as launched:
                run(make(call), dout, zero, zero)
            sums = name == "forward" or (name in ("q", "kv") and "bias" in given)
            reduction = plan.REDUCTION if sums else 0
            assert shared_bytes(launched.value.args[0]) + reduction <= plan.SHARED, (name, mask, list(given))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HopperTileSizes(48, 2), "block must be a multiple of 32, got 48"),
        (lambda: HopperTileSizes(64, 0), "stages must be an integer >= 1"),
        (lambda: HopperTileSizes(64, 2, 4), "warpgroups must be 2 or 3, got 4"),
        (lambda: MosaicGPUConfig(fused=HopperTileSizes(64, 2, 3)), "fused takes 2 warpgroups"),
        (lambda: MosaicGPUConfig(fused=128), "fused must be HopperTileSizes or None, got 128"),
        (lambda: MosaicGPUConfig(forward=(64, 2)), r"forward must be HopperTileSizes or None, got \(64, 2\)"),
        (lambda: MosaicGPUConfig(deterministic="no"), "deterministic must be True or False, got 'no'"),
    ],
)
def test_tile_sizes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@needs_kernels
def test_given_tile_sizes_are_those_of_the_plan():
    from attention_jax.ops.softmax.mosaic_gpu import plan

    for make in (plan.forward_plan, plan.backward_q_plan, plan.backward_kv_plan, plan.fused_plan):
        assert make(call_of(), HopperTileSizes(32, 5)).tiles == HopperTileSizes(32, 5)


@needs_kernels
@pytest.mark.parametrize(
    "width, given, warpgroups",
    [
        (64, {}, 3), (96, {"dropout_rate": 0.5}, 3), (128, {}, 2), (256, {}, 2),
        (64, {"mask": BigBird(64, 3, 1, 2)}, 3), (64, {"mask": BigBird(64, 3, 1, 2), "softcap": 3.0}, 2),
    ],
)  # fmt: skip
def test_warpgroups_of_the_forward_and_their_registers(width, given, warpgroups):
    from attention_jax.ops.softmax.mosaic_gpu import backward_q, forward, plan

    words = jnp.zeros(2, jnp.uint32) if "dropout_rate" in given else None
    call = call_of(200, 200, 1, 1, width, width, **{"mask": Causal(), "dropout_words": words} | given)
    made = plan.forward_plan(call)
    assert made.tiles.warpgroups == warpgroups
    assert made.schedule.rows.shape[1] == -(-200 // (64 * warpgroups))
    for kernel in (forward._Kernel, backward_q._QueryKernel):
        computes, loads = kernel.registers[warpgroups]
        assert 128 * (warpgroups * computes + loads) <= 65_536


def test_a_mask_without_a_condition_runs_no_code():
    """Mosaic finds no layout for a tile of booleans that are all made of one."""
    traced = trace(lambda b, n, q, k: Full().keep(q, k), "mask")
    assert traced.constant
    assert trace(lambda b, n, q, k: Causal().keep(q, k), "mask").constant is None


@pytest.mark.parametrize("shape", [(2, 3, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (1, 3, 70, 1)], ids=str)
@pytest.mark.parametrize("by_key", [False, True])
def test_bits_of_a_boolean_array(shape, by_key):
    T, S = 70, 90
    array = np.random.default_rng(0).random(shape) < 0.6
    call = call_of(T=T, S=S, mask_BNTS=jnp.asarray(array))
    own, swept = (128, 96) if by_key else (96, 128)
    words = np.asarray(mask_bits(call, False, by_key, own, swept))
    wanted = np.broadcast_to(array, (*shape[:2], T, S))
    wanted = wanted if by_key else wanted.swapaxes(2, 3)
    assert words.shape == (*shape[:2], swept // 32, own) and words.dtype == np.int32
    i = np.arange(swept)
    found = (words.view(np.uint32)[:, :, i // 32] >> (i % 32)[:, None]) & 1
    assert_array_equal(found[:, :, : wanted.shape[2], : wanted.shape[3]], wanted)
    assert found.sum() == wanted.sum()  # padding is hidden


@pytest.mark.parametrize("by_key", [False, True])
def test_bits_of_a_mask_are_the_same_where_positions_are_given(by_key):
    T, S = 70, 90
    implicit = call_of(T=T, S=S, mask=MASKS["dense"].mask)
    given = dataclasses.replace(
        implicit, q_positions_BT=jnp.arange(T)[None], k_positions_BS=jnp.arange(S)[None]
    )
    words = [mask_bits(call, True, by_key, 128, 128) for call in (implicit, given)]
    assert isinstance(words[0], np.ndarray)  # packed while tracing
    assert_array_equal(*words)
    array = jnp.asarray(np.random.default_rng(0).random((1, 1, T, S)) < 0.5)
    both, alone = (
        mask_bits(dataclasses.replace(implicit, mask_BNTS=array), table, by_key, 128, 128)
        for table in (True, False)
    )
    assert_array_equal(both, words[0] & np.asarray(alone))


def test_blocks_of_a_boolean_array_count_over_heads():
    T, S, q_block, k_block = 70, 90, 32, 16
    array = np.random.default_rng(1).random((2, 3, T, S)) < 0.02
    array[:, :, 32:64, 16:48] = array[1, :, 64:, :80] = True
    found = block_map(call_of(T=T, S=S, mask_BNTS=jnp.asarray(array)), q_block, k_block)
    for b, i, j in np.ndindex(2, 3, 6):
        block = array[b, :, i * q_block : (i + 1) * q_block, j * k_block : (j + 1) * k_block]
        whole = block.shape[2] == k_block
        assert bool(found.any_kept[b, i, j]) == block.any() and bool(found.all_kept[b, i, j]) == (
            block.all() and whole
        )


def test_a_bias_and_dropout_traced_on_scalars():
    q, k, words = jnp.arange(9), jnp.arange(3, 12), jnp.array([3, 4], jnp.uint32)
    bias = ALiBi(4)
    traced = trace(lambda b, n, q, k: bias.score(n[None], q[None, None], k[None, None]).reshape(()), "bias")
    slopes = traced.scalars(2, 4)
    found = traced.tile([x[1, 2] for x in slopes], lambda: q, lambda: k, (9, 9), 0)
    assert_array_equal(found, bias.score(jnp.array([2]), q[None], k[None])[0, 0])

    def keep(b, n, q, k):
        return dropout_keep(words, 0.4, b[None], n[None], q[None, None], k[None, None]).reshape(())

    traced = trace(keep, "dropout")
    found = traced.tile([x[1, 2] for x in traced.scalars(2, 4)], lambda: q, lambda: k, (9, 9), 0)
    assert_array_equal(
        found, dropout_keep(words, 0.4, jnp.array([1]), jnp.array([2]), q[None], k[None])[0, 0]
    )


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["static", "at run time"])
@pytest.mark.parametrize("name", ["causal", "window 9", "longformer", "nothing", "future"])
def test_lists_hold_the_live_blocks_full_ones_first_longest_row_first(name, given, by_key):
    T, S, q_block, k_block = 50, 37, 8, 4
    call = call_of(T=T, S=S, mask=MASKS[name].mask)
    if given:
        call = dataclasses.replace(
            call, q_positions_BT=jnp.arange(T)[None], k_positions_BS=jnp.arange(S)[None]
        )
    found = block_map(call, q_block, k_block)
    keep = np.zeros((-(-T // q_block) * q_block, -(-S // k_block) * k_block), bool)
    keep[:T, :S] = MASKS[name].truth(np.arange(T)[:, None], np.arange(S)[None])
    tiles = keep.reshape(keep.shape[0] // q_block, q_block, -1, k_block).swapaxes(1, 2)
    if by_key:
        found, tiles = found.transpose, tiles.swapaxes(0, 1)
    lists = schedule(found)
    rows, items = np.asarray(lists.rows[0]), np.asarray(lists.items[0])
    assert sorted(rows[:, 0]) == list(range(len(tiles)))
    lengths = rows[:, 3] - rows[:, 1]
    assert (np.diff(lengths) <= 0).all()
    for row, start, full_end, end in rows:
        live = {j for j in range(tiles.shape[1]) if tiles[row, j].any()}
        assert live <= set(items[start:end]) and len(set(items[start:end])) == end - start
        for j in items[start:full_end]:
            # A ragged block of queries may be full: rows of padding are cut when they are stored.
            assert tiles[row, j][keep_rows(tiles[row, j])].all()


def keep_rows(tile: np.ndarray) -> np.ndarray:
    return tile.any(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Bias):
    """sum_r a_rt b_rs, in the dtype of a."""

    a_RT: Any
    b_RS: Any

    def axes(self):
        return Axes(query=1), Axes(key=1)

    def score(self, heads_N, q_pos_BT, k_pos_BS):
        terms = (a[:, None] * b.astype(a.dtype)[None] for a, b in zip(self.a_RT, self.b_RS, strict=True))
        return functools.reduce(jnp.add, terms)[None, None].astype(jnp.float32)


_B, _T, _S, _N = 2, 5, 7, 4
_BIASES = {
    "alibi": ALiBi(_N),
    "gate": Gate(*(_floats(n) for n in ((_N,), (_B, _T), (_B, _S))), np.arange(_B, dtype=np.int32)),
    "forget": ForgetBias(*(_floats((_B, n, _N)) for n in (_T, _S, _S))),
    "low rank": LowRank(_floats((2, _T)), _floats((2, _S))),
    **{str(n): ArrayBias(_floats(n)) for n in ((_B, 1, 1, _S), (1, _N, 1, 1), (1, _N, _T, 1), (1, 1, 1, 1))},
}


@pytest.mark.parametrize("name", _BIASES)
def test_a_bias_with_leaves_is_read_and_differentiated_like_its_score(name):
    bias = _BIASES[name]
    traced = trace_bias(bias)
    shapes = {"q_BTNH": (_B, _T, _N, 8), "k_BSKH": (_B, _S, 2, 8), "v_BSKM": (_B, _S, 2, 8)}
    call = call_of(bias=bias, **{name: jnp.zeros(shape) for name, shape in shapes.items()})
    q, k = jnp.arange(_T), jnp.arange(_S)

    def dense(bias):
        return jnp.broadcast_to(bias.score(jnp.arange(_N), q[None], k[None]), (_B, _N, _T, _S))

    d_score = _floats((_B, _N, _T, _S))
    scalars, of_q, of_k = traced.read(call)
    found = np.zeros((_B, _N, _T, _S), np.float32)
    by_query = [np.zeros((_B, _N, _T + 3), np.float32) for _ in traced.by_query]
    by_key = [np.zeros((_B, _N, _S + 1), np.float32) for _ in traced.by_key]
    for b, n in np.ndindex(_B, _N):
        at = (lambda: q, lambda: k, (_T, _S), 0)
        here = [[x[b if x.shape[0] > 1 else 0, n] for x in xs] for xs in (of_q, of_k)]
        of_tokens = [[functools.partial(lambda x: x, x) for x in xs] for xs in here]
        found[b, n] = traced.score.tile([x[b, n] for x in scalars], *at, of_tokens)
        given = [functools.partial(lambda x: x, x[b, n]) for x in scalars]
        sides = dict(zip((Q, K), map(iter, of_tokens), strict=True))
        given += [next(sides[kind]) for kind in traced.score.looked.values()]
        given.append(functools.partial(lambda x: x, d_score[b, n]))
        for total, pull in zip(by_query, traced.by_query, strict=True):
            total[b, n, :_T] = pull.tile((), *at, given=given).sum(1)
        for total, pull in zip(by_key, traced.by_key, strict=True):
            total[b, n, :_S] = pull.tile((), *at, given=given).sum(0)
    assert_allclose(found, dense(bias), rtol=1e-6, atol=1e-6)
    wanted = jax.vjp(dense, bias)[1](d_score)[0]
    gradient = traced.gradient(call, by_query, by_key)
    assert (jax.tree.structure(gradient) == jax.tree.structure(bias)) == (name != "gate")
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=False):
        assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_what_a_bias_holds_for_an_invalid_token_is_not_read():
    positions = jnp.where(jnp.arange(_S) < 4, jnp.arange(_S), -1)[None]
    keys = _floats((1, 1, 1, _S))
    keys[..., 4:] = np.nan
    call = call_of(_T, _S, bias=ArrayBias(keys), k_positions_BS=positions)
    traced = trace_bias(call.bias)
    _, _, (of_k,) = traced.read(call)
    assert_array_equal(of_k[0, 2], np.where(np.arange(_S) < 4, np.nan_to_num(keys[0, 0, 0]), 0))
    (gradient,) = jax.tree.leaves(traced.gradient(call, [], [jnp.ones((1, 4, _S))]))
    assert_array_equal(gradient[0, 0, 0], np.where(np.arange(_S) < 4, 4, 0))


@pytest.mark.parametrize(
    "reason, changes",
    [
        ("float32", {"dtype": jnp.float32}),
        ("up to 256", {"H": 260}),
        ("up to 256", {"M": 300}),
        (
            "ArrayBias holds an array (1, 1, 130, 200) over queries and keys",
            {"bias": ArrayBias(jnp.zeros((1, 1, 130, 200)))},
        ),
        ("ALiBi uses 'reduce_precision'", {"bias": ALiBi(4, rounding="bfloat16")}),
        ("T5Bias uses 'gather'", {"bias": T5Bias(jnp.zeros((8, 4)), True)}),
        (
            "LowRank: 9 numbers to be read per token > 7",
            {"bias": LowRank(jnp.zeros((9, 130)), jnp.zeros((9, 200)))},
        ),
        (
            "LowRank reads other numbers than float32",
            {"bias": LowRank(jnp.zeros((1, 130), jnp.bfloat16), jnp.zeros((1, 200)))},
        ),
    ],
)
@needs_kernels
def test_what_it_refuses_by_name(reason, changes):
    with mosaic_gpu.any_platform():
        assert reason in mosaic_gpu.unsupported(call_of(**changes))
        assert mosaic_gpu.unsupported(call_of(mask=SlidingWindow(9), bias=ALiBi(4))) is None


@needs_kernels
def test_the_fused_backward_refuses_to_learn_a_bias():
    call = call_of(bias=ArrayBias(jnp.zeros((1, 1, 1, 200))))
    with mosaic_gpu.any_platform():
        assert mosaic_gpu.unsupported(call) is None
        assert "the gradient of bias ArrayBias" in mosaic_gpu.unsupported(call, FUSED)
        assert mosaic_gpu.unsupported(call_of(bias=ALiBi(4)), FUSED) is None


@needs_kernels
def test_no_mask_is_refused():
    def sorted_first(q, k):  # neither elementwise nor traceable on scalars
        return np.sort(np.broadcast_to(q, np.broadcast_shapes(q.shape, k.shape)), axis=0) >= k

    with mosaic_gpu.any_platform():
        for case in MASKS.values():
            assert mosaic_gpu.unsupported(call_of(mask=case.mask)) is None
        assert mosaic_gpu.unsupported(call_of(mask=Predicate(sorted_first))) is None
        assert mosaic_gpu.unsupported(call_of(mask_BNTS=jnp.ones((1, 1, 1, 1), bool))) is None


@pytest.mark.parametrize("version, runs", [(None, True), (12060, True), (12090, False), (13000, True)])
def test_a_cuda_that_miscompiles_is_refused(version, runs):
    found = mosaic_gpu._toolchain(version)
    assert found is None if runs else "this is 12.9.0" in found


@needs_kernels
def test_a_grid_has_so_many_rows():
    shape = jax.ShapeDtypeStruct((1, 65_535 * 64 + 1, 4, 64), jnp.bfloat16)
    assert "up to 4,194,240 tokens" in mosaic_gpu._inputs(call_of(q_BTNH=shape), MosaicGPUConfig())


def test_tanh_runs_without_the_instruction_of_that_name():
    traced = trace(lambda b, n, q, k: jnp.tanh((q - k) * 0.1), "the bias")
    q, k = jnp.arange(40), jnp.arange(30)

    def tile():
        return traced.tile([], lambda: q, lambda: k, (40, 30), 0)

    assert_allclose(tile(), np.tanh((q[:, None] - k[None]) * 0.1), atol=5e-7)
    assert "tanh" not in str(jax.make_jaxpr(tile)())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_hopper_it_says_so():
    assert ("sm_90" if _NEW else "needs jax >= 0.11.2") in mosaic_gpu.unsupported(call_of())


def interpret(case: OpCase, kind: str = "two kernels") -> str:
    return run("tests.mosaic_gpu_run", json.dumps(dataclasses.asdict(case)), kind)


_ALL = OpCase(
    (150, 200), (64, 64), (2, 1), "sink window", "alibi", 2.0, True, "ragged", "left padded", 0.3,
    dtype="bfloat16", batch=1,
)  # fmt: skip


@pytest.mark.kernels
@needs_kernels
@pytest.mark.parametrize(
    "kind, mask", [("two kernels", "sink window"), ("fused", "sink window & array BNTS")]
)
def test_interpreted_with_everything_at_once(kind, mask):
    changes = {"widths": (40, 64), "dtype": "float16"} if mask == "sink window" else {}
    found = interpret(dataclasses.replace(_ALL, mask=mask, **changes), kind)
    assert found.split() == ["fused"] * (kind == "fused")


@pytest.mark.kernels
@needs_kernels
def test_interpreted_fused_with_128_keys():
    """With a mask that looks positions up. What needs more registers (above) has 64 keys a thread block."""
    case = dataclasses.replace(
        _ALL, mask="global many", bias=None, softcap=None, segments=None, dtype="float16"
    )
    assert interpret(case, "fused").split() == ["fused"]


@pytest.mark.kernels
@needs_kernels
@pytest.mark.parametrize("softcap", [2.0, None])  # dQ with two warpgroups, with three
def test_interpreted_with_a_learned_bias(softcap):
    case = dataclasses.replace(_ALL, bias="forget", heads=(4, 2), widths=(64, 40), softcap=softcap)
    assert not interpret(case).split()


@pytest.mark.kernels
@needs_kernels
def test_interpreted_with_keys_that_end_within_a_block():
    """Nothing else hides a key here. All three kernels run with what a width of 64 gives them."""
    case = OpCase((150, 200), (64, 64), (2, 1), mask=None, dtype="bfloat16", batch=1)
    assert not interpret(case).split()


FACTORS = {
    "lengths": [(64, 128), (150, 200), (129, 300), (290, 70)],
    "widths": [(64, 64), (96, 80), (128, 128), (192, 128), (256, 256)],
    "mask": [None, "causal", "sink window", "bigbird", "far past", "array BNTS", "dense", "global many"],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "bias": [None, "alibi"],
    "positions": [None, "shifted", "left padded", "cache"],
    "segments": [None, "packed", "ragged"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout": [0.0, 0.3],
    "dtype": ["bfloat16", "float16"],
    "scale": [None, -0.3],
    "kind": ["two kernels", "fused"],
}


def _slow() -> list:
    rows = pairwise(FACTORS, tries=10)
    return [
        (OpCase(seed=i, batch=1, **{k: v for k, v in row.items() if k != "kind"}), row["kind"])
        for i, row in enumerate(rows)
    ]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("case, kind", _slow(), ids=str)
def test_interpreted_over_all_pairs(case, kind):
    assert interpret(case, kind).split() == ["fused"] * (kind == "fused")


# What runs fused with 128 keys a thread block is not in the array above, and at other widths the same calls.
FUSED_FACTORS = {
    "lengths": FACTORS["lengths"],
    "widths": [(64, 64), (96, 80), (128, 128), (192, 128), (256, 256)],
    "mask": [None, "causal", "sink window", "array BNTS", "global many"],
    "heads": FACTORS["heads"],
    "slots": [
        {},
        {"positions": "left padded"},
        {"segments": "packed", "positions": "cache"},
        {"segments": "ragged"},
    ],
    "sinks": [False, True],
    "dropout": [0.0, 0.3],
    "dtype": FACTORS["dtype"],
    "scale": FACTORS["scale"],
}


def _fused() -> list[OpCase]:
    rows = pairwise(FUSED_FACTORS, tries=10)
    return [OpCase(seed=i, batch=1, **row.pop("slots"), **row) for i, row in enumerate(rows)]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("case", _fused(), ids=str)
def test_interpreted_fused_over_all_pairs(case):
    assert interpret(case, "fused").split() == ["fused"]


# Biases that hold arrays: numbers per head, per query, per key, with their gradients.
BIAS_FACTORS = {
    "bias": ["gate", "forget", "array B11S", "array 1NT1", "array N11"],
    **{name: FACTORS[name] for name in ("lengths", "widths", "heads", "dtype")},
    "mask": [None, "causal", "bigbird", "array BNTS"],
    "slots": FUSED_FACTORS["slots"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout": [0.0, 0.3],
    "batch": [1, 2],
}


def _biased() -> list[OpCase]:
    rows = pairwise(BIAS_FACTORS, tries=10)
    return [OpCase(seed=i, **row.pop("slots"), **row) for i, row in enumerate(rows)]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("case", _biased(), ids=str)
def test_interpreted_learned_biases_over_all_pairs(case):
    assert not interpret(case).split()


def compiled(*names: str, kernels: tuple[str, ...] = aot_gpu.KERNELS) -> list[dict]:
    lines = run("tests.aot_gpu", *names, "--json", "--kernels", *kernels, limit=1800).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    asked = [(name, k) for name in names for k in aot_gpu.CONFIGS[name].kernels if k in kernels]
    assert [(line["name"], line["kernel"]) for line in found] == asked
    return found


def assert_well_compiled(found: dict) -> None:
    what = f"{found['name']}, {found['kernel']}"
    assert found["spills"] == 0 and found["stack"] == 0, f"{what}: {found['spills']} bytes spilled"
    assert not found["serialized"], f"{what}: wgmma is serialized"
    assert found["registers"] * 128 * (found["warpgroups"] + 1) <= 65_536, f"{what}: cannot be launched"
    loads, computes = found["asked"]
    assert 128 * (found["warpgroups"] * computes + loads) <= 65_536, f"{what}: waits for registers for ever"
    if found["code"]:
        assert found["HGMMA"] and found["UTMALDG"], what
        assert found["LDL"] == found["STL"] == 0, f"{what}: local memory"
        assert bool(found["UTMAREDG"]) == (found["kernel"] == "fused"), what


@pytest.mark.kernels
@needs_compiler
def test_compiled_for_an_h100_nothing_spills():
    for found in (
        *compiled("128 causal", kernels=("forward", "fused")),
        *compiled("128 odd lengths", kernels=("forward",)),
        *compiled("128 alibi", kernels=("fused",)),
        # Its layouts have once been searched for without end, of which the interpreter knows nothing.
        *compiled("128 gate", kernels=("q", "kv")),
    ):
        assert_well_compiled(found)


@pytest.mark.kernels
@needs_compiler
def test_differences_of_positions_are_compared_as_signed_numbers():
    for found in compiled("128 where"):
        assert found["compared"] == ["s32"], found["kernel"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("name", aot_gpu.CONFIGS)
def test_every_configuration_compiled_for_an_h100(name):
    for found in compiled(name):
        assert_well_compiled(found)


def test_a_static_map_of_128k_tokens_takes_no_dense_array():
    lists = schedule(static_map(Causal(), 2**17, 2**17, 128, 128))
    assert lists.items.shape == (1, 1024 * 1025 // 2) and lists.rows.shape == (1, 1024, 4)


def _normal(shape, seed, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _real(T=4096, S=4096, N=16, K=4, H=128, mask=None, **given) -> SoftmaxCall:
    call = call_of(8, 8, N, K, H, H, mask or Causal(), scale=H**-0.5, **given)
    q, k, v = _normal((2, T, N, H), 0), _normal((2, S, K, H), 1), _normal((2, S, K, H), 2)
    return dataclasses.replace(call, q_BTNH=q, k_BSKH=k, v_BSKM=v)


def _both_ways(attend, call: SoftmaxCall, do: jax.Array):
    def run(q, k, v, bias):
        return attend(dataclasses.replace(call, q_BTNH=q, k_BSKH=k, v_BSKM=v, bias=bias))

    (out, lse), vjp = jax.vjp(run, call.q_BTNH, call.k_BSKH, call.v_BSKM, call.bias)
    *found, dbias = vjp((do.astype(out.dtype), jnp.zeros_like(lse)))
    return out, lse, *found, *jax.tree.leaves(dbias)


_DENSE = Dense(np.random.default_rng(0).random((4096, 4096)) < 0.5)
_CARD = pairwise(
    {
        "H": [64, 96, 128, 192, 256],
        "lengths": [(4096, 4096), (4001, 3999), (1, 777), (5, 3)],
        "mask": [Causal(), Full(), SlidingWindow(1000), BigBird(64, 3, 1, 2), _DENSE],
        "deterministic": [True, False],
        "dtype": [jnp.bfloat16, jnp.float16],
    }
)


def assert_near(x: np.ndarray, y: np.ndarray, name: str) -> None:
    """Within what bfloat16 rounds, of inputs of size 1; where y is rounding alone, within 1e-5."""
    assert np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y) + 1e-5 * math.sqrt(y.size), name
    assert_allclose(x, y, rtol=0, atol=3e-2 * np.abs(y).max(initial=0) + 1e-4, err_msg=name)


def test_the_cards_tolerance_takes_what_cancels_and_no_error():
    """A query with one key has dP = delta: its dQ is what rounding leaves, as is that of the reference."""
    y = np.full((2, 64), 1e-2)
    noise = 1e-6 * np.sin(np.arange(128)).reshape(2, 64)
    assert_near(noise, -noise, "dq")
    assert_near(y * 1.005, y, "dq")
    for wrong in (y * 1.02, -y, 0 * y):
        with pytest.raises(AssertionError, match="dq"):
            assert_near(wrong, y, "dq")


def assert_as_in_float32(call: SoftmaxCall, deterministic: bool = True) -> None:
    from attention_jax.ops.softmax import chunked

    B, T, _, N, _, _, M = call.sizes
    do = _normal((B, T, N, M), 3)
    attend = functools.partial(mosaic_gpu.attend, config=MosaicGPUConfig(deterministic=deterministic))
    found = jax.jit(functools.partial(_both_ways, attend))(call, do)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == call.q_BTNH.dtype else x, call)
    wanted = jax.jit(functools.partial(_both_ways, chunked.attend))(wide, do.astype(jnp.float32))
    names = ("out", "lse", "dq", "dk", "dv", *[f"dbias {i}" for i in range(len(wanted) - 5)])
    for name, x, y in zip(names, found, wanted, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=name)
        assert_near(x[np.isfinite(y)], y[np.isfinite(y)], name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", _CARD, ids=str)
def test_on_a_card_against_float32_on_the_same_card(case):
    (T, S), H = case["lengths"], case["H"]
    call = jax.tree.map(lambda x: x.astype(case["dtype"]), _real(T, S, H=H, mask=case["mask"]))
    assert_as_in_float32(call, case["deterministic"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "H, deterministic", [(64, True), (128, True), (128, False), (256, True), (256, False)]
)
def test_on_a_card_with_everything_at_once(H, deterministic):
    T = 1000
    segments = jnp.stack([jnp.arange(T) // 300, jnp.where(jnp.arange(T) < 900, 0, -1)]).astype(jnp.int32)
    positions = jnp.where(segments < 0, -1, jnp.arange(T) + 7).astype(jnp.int32)
    both = {"q_segments_BT": segments, "k_segments_BS": segments}
    both |= {"q_positions_BT": positions, "k_positions_BS": positions}
    call = _real(T, T, H=H, **both, sink_logits_N=jnp.linspace(-2.0, 2.0, 16), bias=ALiBi(16))
    words = jnp.array([3, 4], jnp.uint32)
    call = dataclasses.replace(call, softcap=20.0, dropout_rate=0.1, dropout_words=words)
    assert_as_in_float32(call, deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_on_a_card_with_a_bias_that_is_learned(H):
    decay, low = running_sum(-jax.nn.softplus(_normal((2, 1000, 16), 5, jnp.float32)))
    segments = jnp.stack([jnp.arange(1000) // 300, jnp.where(jnp.arange(1000) < 900, 0, -1)]).astype(
        jnp.int32
    )
    both = {"q_segments_BT": segments, "k_segments_BS": segments}
    assert_as_in_float32(_real(1000, 1000, H=H, bias=ForgetBias(decay, decay, low)))
    assert_as_in_float32(_real(1000, 1000, H=H, bias=ForgetBias(decay, decay, low), softcap=20.0, **both))


@pytest.mark.gpu
def test_on_a_card_a_thousand_equal_reruns():
    call, do = _real(2048, 2048), _normal((2, 2048, 16, 128), 3)
    run = jax.jit(functools.partial(_both_ways, mosaic_gpu.attend))
    first = run(call, do)
    same = jax.jit(lambda a, b: jnp.stack([(x == y).all() for x, y in zip(a, b, strict=True)]).all())
    assert all(bool(same(first, run(call, do))) for _ in range(1000))


@pytest.mark.gpu
def test_on_a_card_poison_in_invalid_slots_changes_no_bit():
    valid = jnp.arange(1000) < 900
    segments = jnp.broadcast_to(jnp.where(valid, 0, -1), (2, 1000)).astype(jnp.int32)
    call = _real(1000, 1000, q_segments_BT=segments, k_segments_BS=segments)
    do = _normal((2, 1000, 16, 128), 3)
    run = jax.jit(functools.partial(_both_ways, mosaic_gpu.attend))

    def fill(x, value):
        return jnp.where(valid[None, :, None, None], x, jnp.asarray(value, x.dtype))

    clean, poisoned = (
        run(
            dataclasses.replace(
                call, q_BTNH=fill(call.q_BTNH, a), k_BSKH=fill(call.k_BSKH, b), v_BSKM=fill(call.v_BSKM, c)
            ),
            fill(do, a),
        )
        for a, b, c in ((0, 0, 0), (jnp.nan, jnp.inf, -jnp.inf))
    )
    for x, y in zip(clean, poisoned, strict=True):
        assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
