"""The TPU kernels without a TPU: numerics in the interpreter, cross-compilation, refusals, block lists."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.biases import ALiBi, ArrayBias, T5Bias
from attention_jax.masks import Causal, Dense, Global, SlidingWindow
from attention_jax.mixers.forgetting import ForgetBias
from attention_jax.ops.softmax import api, blocks, mosaic_tpu
from attention_jax.ops.softmax.mosaic_tpu import steps
from attention_jax.ops.softmax.mosaic_tpu.bias import mask_refusal, split
from scripts import kernel_report
from tests import aot
from tests.cases import MASKS, REAL_SHAPES, Gate, tpu_cases

# Where there is a `make kernels`, which needs a newer jax, these run there.
in_make_kernels = pytest.mark.kernels if jax.version.__version_info__ >= (0, 11, 2) else lambda test: test

CASES = tpu_cases()


def interpret(*what: str, timeout: float = 550) -> None:
    found = aot.run(*what, module="tests.interpret_tpu", timeout=timeout)
    assert [line["checked"] for line in found] == [x for x in what if not x.startswith("--")]


@in_make_kernels
def test_numerics_in_the_interpreter():
    interpret(*(str(number) for number, case in enumerate(CASES) if not case.slow))


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("number", [number for number, case in enumerate(CASES) if case.slow])
def test_numerics_in_the_interpreter_exhaustively(number):
    """Most take seconds, the longest a quarter of an hour beside other jobs."""
    interpret(str(number), timeout=1800)


@pytest.mark.slow
def test_a_backward_in_parts():
    """dQ of case 0 takes 64 KiB, a quarter of the chip's memory is 32."""
    interpret("--vmem=131072", "0")


@pytest.mark.slow
def test_a_language_model_with_the_kernels_inside():
    interpret("model")


@pytest.mark.slow
def test_what_every_implementation_promises():
    interpret("promises")


needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def _check_compiled(found: list[dict], names: list[str]) -> None:
    assert [line["name"] for line in found] == names
    for line in found:
        assert line["kernels"] == 2, line
        assert line["collectives"] == 0, line
        assert line["temporary"] < 8 * 2**30, line


@needs_compiler
def test_a_real_layer_compiles_for_a_chip_and_for_a_slice():
    names = ["llama 8b 32k", "2x2 llama 1b 4k"]
    _check_compiled(aot.run("v5e:2x2", *names, timeout=300), names)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_real_layers_compile(topology):
    names = [*REAL_SHAPES, "2x2 llama 8b 4k"]
    _check_compiled(aot.run(topology, *names, timeout=580), names)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_live_block_costs_no_more_than_in_splash_attention():
    """The first of our bodies is that of full blocks, nearly all of a long sequence."""
    rows = kernel_report.report("v5e:2x2", 2048, 128)
    first = {(row["system"], row["kernel"]): row["bodies"][0] for row in rows}
    for key in ("bundles", "spills"):
        cost = {name: body[key] for name, body in first.items()}
        assert cost["ours", "attention_forward"] <= cost["splash", "splash_mha_fwd"], key
        two = cost["splash", "splash_mha_dq"] + cost["splash", "splash_mha_dkv"]
        assert cost["ours", "attention_backward"] <= two, key


def make_call(T=256, S=256, N=4, K=2, H=64, M=64, dtype=jnp.bfloat16, **options):
    """A checked call over shapes alone."""
    found = []
    arrays = [jax.ShapeDtypeStruct(x, dtype) for x in ((1, T, N, H), (1, S, K, H), (1, S, K, M))]

    def check(q, k, v):
        found.append(api._checked_call(q, k, v, **options))
        return 0

    jax.eval_shape(check, *arrays)
    return found[0]


REFUSED = {
    "float16": ("float16", {"dtype": jnp.float16}),
    "320 wide": ("320 wide", {"H": 320}),
    "T5's table of buckets": ("T5Bias", {"bias": T5Bias(np.zeros((32, 4), np.float32), False)}),
    "a dense bias": ("dense bias", {"bias": np.zeros((256, 256), np.float32)}),
    "a table of positions where they are given": (
        "positions are given",
        {"mask": Global(tuple(range(0, 400, 2))), "q_positions": np.arange(256, dtype=np.int32)},
    ),
    "an array over far too many positions": (
        "no array beyond", {"mask": Dense(np.ones((2, 2), bool)), "T": 2**15, "S": 2**15}
    ),
    "lists longer than scalar memory": ("scalar memory", {"mask": Causal(), "T": 2**18, "S": 2**18}),
    "dQ in too many parts": ("sweeps", {"mask": SlidingWindow(8), "T": 2**21, "S": 2**21}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_thing(name):
    named, options = REFUSED[name]
    with mosaic_tpu.forced(True):
        assert named in mosaic_tpu.unsupported(make_call(**options))


def test_without_a_tpu_the_platform_is_the_reason():
    assert mosaic_tpu.unsupported(make_call()) == f"needs a TPU, the call runs on a {jax.default_backend()}"
    with mosaic_tpu.forced(True):
        assert mosaic_tpu.unsupported(make_call(mask=Causal(), bias=ALiBi(4))) is None


def test_every_mask_of_the_table_runs_or_becomes_an_array():
    tables = {"dense", "global many"}
    for name, case in MASKS.items():
        assert (mask_refusal(case.mask) is not None) == (name in tables), name


@pytest.mark.parametrize("static", [True, False], ids=["static", "at run time"])
@pytest.mark.parametrize("G, parts", [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_steps_visit_every_live_block_once(static, G, parts):
    rng = np.random.default_rng(G + parts)
    forward_steps = steps.forward_steps
    backward_steps = functools.partial(steps.backward_steps, G=G, parts=parts)
    if not static:
        forward_steps, backward_steps = map(_as_a_program, (forward_steps, backward_steps))
    for share in (0.0, 0.2, 0.7, 1.0):
        any_kept = rng.random((1 if static else 3, 4, 5)) < share
        all_kept = any_kept & (rng.random(any_kept.shape) < 0.5)
        block_map = blocks.BlockMap(*(x if static else jnp.asarray(x) for x in (any_kept, all_kept)))
        forward, backward = forward_steps(block_map), backward_steps(block_map)
        for b in range(len(any_kept)):
            rows = _read(forward, b)
            _check_rows(rows, any_kept[b], all_kept[b], [row[0] for row in rows], range(4))
            rows = _read(backward, b)
            per_part = 4 * G // parts
            keys = [(q // per_part, k) for q, k, *_ in rows]
            tiled = [np.tile(x, (G, 1)) for x in (any_kept[b], all_kept[b])]
            _check_rows(rows, *tiled, keys, [(p, k) for p in range(parts) for k in range(5)])
            _check_closing(rows, range(4 * G))
        assert steps.forward_length(block_map) == forward.length
        assert steps.backward_length(block_map, G, parts) == backward.length


def _as_a_program(make):
    """`make` with its lists made at run time, for maps of one shape."""
    length = []

    @jax.jit
    def lists(any_kept, all_kept):
        found = make(blocks.BlockMap(any_kept, all_kept))
        length[:] = [found.length]
        return found.q_blocks, found.k_blocks, found.flags, found.closing

    return lambda block_map: steps.Steps(*lists(block_map.any_kept, block_map.all_kept), *length)


def _read(found: steps.Steps, b: int) -> list[tuple[int, ...]]:
    """The steps of a batch row that do something."""
    rows = list(zip(*(np.asarray(x).reshape(-1, found.length)[b].tolist() for x in found.lists), strict=True))
    alive = [row for row in rows if row[2]]
    assert rows[: len(alive)] == alive
    # What is left over moves no block.
    assert all(row[:2] == alive[-1][:2] and row[3:] == alive[-1][3:] for row in rows[len(alive) :])
    return alive


def _check_rows(rows, any_kept, all_kept, accumulators, wanted) -> None:
    """Live blocks once each, by kind; every accumulator opened and closed once, in one run of steps."""
    for kind, chosen in ((steps.FULL, all_kept), (steps.PARTIAL, any_kept & ~all_kept)):
        visited = sorted((q, k) for q, k, flags, *_ in rows if flags & kind)
        assert visited == sorted(zip(*map(np.ndarray.tolist, np.nonzero(chosen)), strict=True))
    assert list(dict.fromkeys(accumulators)) == list(wanted)
    for at, row in enumerate(rows):
        assert bool(row[2] & steps.FIRST) == (at == 0 or accumulators[at - 1] != accumulators[at])
        last = at == len(rows) - 1 or accumulators[at + 1] != accumulators[at]
        assert bool(row[2] & steps.LAST) == last


def _check_closing(rows, wanted) -> None:
    """Every query block is opened at its first step and closed at its last; `closing` names the next."""
    order = [row[0] for row in rows]
    for at, (q, _, flags, closing) in enumerate(rows):
        assert bool(flags & steps.OPENS) == (q not in order[:at])
        assert bool(flags & steps.CLOSES) == (q not in order[at + 1 :])
        assert closing == next(row[0] for row in rows[at:] if row[2] & steps.CLOSES)
    assert sorted(set(order)) == list(wanted)


@pytest.mark.parametrize("lengths", [(7, 11), (4, 4), pytest.param((1, 3), marks=pytest.mark.slow)], ids=str)
def test_a_split_bias_is_the_bias(lengths):
    """Also where lengths coincide with one another and with the number of heads."""
    (T, S), N, B = lengths, 4, 2
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q_pos, k_pos = (rng.integers(0, 50, (B, n)).astype(np.int32) for n in (T, S))
    biases = [
        ALiBi(N), Gate(normal(N), normal(B, T), normal(B, S), np.arange(B, dtype=np.int32)),
        ForgetBias(normal(B, T, N), normal(B, S, N), normal(B, S, N)), ArrayBias(normal(1, N, 1, S)),
        ArrayBias(normal(1, 1, 1, 1)), ALiBi(N, 0.3, 3.0, rounding="bfloat16"),
    ]  # fmt: skip
    for bias in biases:
        cut = split(bias)
        outside = cut.outside(bias, N, jnp.asarray(q_pos), jnp.asarray(k_pos))
        wanted = np.broadcast_to(bias.score(jnp.arange(N), q_pos, k_pos), (B, N, T, S))
        for b in range(B):
            for n in range(N):
                given = [x[min(b, len(x) - 1), n] for x in outside]
                found = cut.inside(given, q_pos[b][:, None], k_pos[b][None])
                found = np.broadcast_to(found, (T, S))
                np.testing.assert_allclose(found, wanted[b, n], 1e-6, 1e-6, err_msg=type(bias).__name__)
