"""dot_product_attention against float64, in every implementation, and what it promises beyond numbers."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.biases import ALiBi
from attention_jax.masks import Causal, Full, SlidingWindow
from attention_jax.ops.softmax import (
    ChunkedConfig,
    MosaicGPUConfig,
    MosaicTPUConfig,
    api,
    dot_product_attention,
    explain,
)
from attention_jax.ops.softmax.common import dropout_keep
from tests import marks, problems, promises
from tests.cases import (
    FACTORS_FAST,
    FACTORS_SLOW,
    IMPLEMENTATIONS,
    TILED,
    OpCase,
    covering_cases,
    fast_cases,
)
from tests.reference import softmax as truth

# Tiles of 16 queries x 1 or 2 units of 8 keys: short rows then have tiles of every kind.
SMALL = ChunkedConfig(query_tile=16, key_tile=16, key_unit=8)
SMALL_IMPLEMENTATIONS = tuple(SMALL if x == "chunked" else x for x in IMPLEMENTATIONS)
each_implementation = pytest.mark.parametrize("impl", SMALL_IMPLEMENTATIONS, ids=IMPLEMENTATIONS)
# The reference has no tiles, lists or backward of its own that a transformation could meet.
chunked_first = pytest.mark.parametrize(
    "impl",
    [x if x == SMALL else pytest.param(x, marks=pytest.mark.slow) for x in SMALL_IMPLEMENTATIONS],
    ids=IMPLEMENTATIONS,
)


FAST = fast_cases()
SLOW = covering_cases(FACTORS_SLOW, tries=4)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_forward_lse_and_gradients(case):
    problems.check(case, SMALL)


# Without tiles lengths matter little: every value is there, not every pair.
@pytest.mark.parametrize(
    "case",
    [c if i % 3 == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(FAST)],
    ids=str,
)
def test_forward_lse_and_gradients_of_the_reference(case):
    problems.check(case, "reference")


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_forward_lse_and_gradients_exhaustively(case, impl):
    problems.check(case, impl)


@pytest.mark.parametrize("case", marks.params(TILED), ids=str)
def test_the_real_tile_sizes_compiled_as_users_do(case):
    problems.check(case, "chunked", quick=False)


def test_the_truth_against_finite_differences():
    case = OpCase((5, 7), (3, 2), (4, 2), "window 7 right 4", "gate", softcap=2.0, sinks=True, dropout=0.3,
                  segments="packed")  # fmt: skip
    problem = problems.make(case)
    exact = problem.truth()
    grads = exact.backward(problem.do, problem.dlse)
    rng, step = np.random.default_rng(0), 1e-6

    def value(**moved):
        arrays = {"q": exact.q, "k": exact.k, "v": exact.v, "bias": exact.bias, "sinks": exact.sinks} | moved
        found = truth.Attention(
            **arrays, keep=problem.keep, scale=problem.scale, softcap=2.0, drop=problem.drop
        )
        rows = np.isfinite(found.lse)
        return (found.out * problem.do).sum() + (found.lse[rows] * problem.dlse[rows]).sum()

    for name, gradient in grads.items():
        direction = rng.normal(size=gradient.shape)
        x = getattr(exact, name)
        slope = value(**{name: x + step * direction}) - value(**{name: x - step * direction})
        np.testing.assert_allclose((gradient * direction).sum(), slope / (2 * step), rtol=1e-7, err_msg=name)


def test_the_covering_arrays_cover_every_pair():
    for factors, found in ((FACTORS_FAST, FAST), (FACTORS_SLOW, SLOW)):
        for a, b in itertools.combinations(factors, 2):
            met = {(repr(getattr(c, a)), repr(getattr(c, b))) for c in found}
            assert met == {(repr(x), repr(y)) for x in factors[a] for y in factors[b]}
    for name, values in FACTORS_FAST.items():
        assert {repr(getattr(c, name)) for c in FAST[::3]} == set(map(repr, values)), name
    # One case per pair of values of the two longest factors is the least there can be.
    longest, second = sorted(map(len, FACTORS_SLOW.values()))[-1:-3:-1]
    assert len(FAST) <= 30 and len(SLOW) <= longest * second + 6


@each_implementation
def test_a_large_score_common_to_all_keys_changes_nothing(impl):
    promises.a_large_common_score_changes_nothing(impl)


@each_implementation
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_a_key_give_zero_and_pass_no_gradient(impl, sinks):
    promises.rows_without_a_key_give_zero(impl, sinks)


@each_implementation
@pytest.mark.parametrize("case", [promises.HOLES, promises.RING], ids=["holes", "ring"])
def test_what_an_invalid_slot_holds_changes_no_bit(case, impl):
    promises.an_invalid_slot_changes_no_bit(impl, case)


@each_implementation
@pytest.mark.parametrize("case", promises.SEEN, ids=lambda case: case.mask)
def test_a_hidden_key_changes_no_bit_and_gets_no_gradient(case, impl):
    promises.a_hidden_key_changes_no_bit(impl, case)


@each_implementation
def test_a_hidden_key_may_be_as_large_as_its_dtype(impl):
    promises.a_hidden_key_may_be_as_large_as_its_dtype(impl)


def _probabilities(impl, *, batch=2, rate=0.5):
    """P [B, N, T, S] after dropout, read through values that are the identity, and the hash's own bits."""
    T, S, N, K = 20, 24, 4, 2
    rng = np.random.default_rng(0)
    q_positions, k_positions = rng.permutation(100)[:T], rng.permutation(100)[:S]
    q, k = rng.normal(size=(batch, T, N, 8)), rng.normal(size=(batch, S, K, 8))
    v = np.broadcast_to(np.eye(S)[None, :, None], (batch, S, K, S))
    key = jax.random.key(5)
    out = jax.jit(
        lambda *x: dot_product_attention(
            *x, q_positions=q_positions, k_positions=k_positions, impl=impl, dropout_rate=rate,
            dropout_key=key,
        ),
    )(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))  # fmt: skip
    bits = truth.dropout_keep(
        np.asarray(jax.random.key_data(key)),
        rate,
        np.arange(batch),
        np.arange(N),
        q_positions[None],
        k_positions[None],
    )
    return np.asarray(out).swapaxes(1, 2), bits


@pytest.mark.parametrize("tile", [8, pytest.param(16, marks=pytest.mark.slow), 256])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_bits_are_a_fixed_hash_of_key_row_head_and_positions(impl, tile):
    if impl == "reference" and tile != 8:
        pytest.skip("has no tiles")
    if impl == "chunked":
        impl = ChunkedConfig(query_tile=tile, key_tile=4 * tile, key_unit=tile)
    found, bits = _probabilities(impl)
    assert_array_equal(found > 0, bits)
    alone, _ = _probabilities(impl, batch=1)
    assert_array_equal(alone > 0, bits[:1])


def test_dropout_bits_are_fair_and_independent():
    rate, n = 0.3, 64
    words = np.asarray(jax.random.key_data(jax.random.key(0)))
    axes = [jnp.arange(8), jnp.arange(8), jnp.arange(n)[None], jnp.arange(n)[None]]
    kept = np.asarray(dropout_keep(words, rate, *axes)).astype(float)
    sigma = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma
    for axis in range(4):
        others = tuple(a for a in range(4) if a != axis)
        spread = kept.mean(others).std()
        assert spread < 2 * sigma * kept.shape[axis] ** 0.5, f"axis {axis} of B, N, T, S"
    centred = kept - (1 - rate)
    other_key = np.asarray(dropout_keep(words + 1, rate, *axes)) - (1 - rate)
    shifted = [np.roll(centred, 1, axis) for axis in range(4)] + [centred.swapaxes(2, 3), other_key]
    off_diagonal = ~np.eye(n, dtype=bool)
    for i, other in enumerate(shifted):
        product = (centred * other)[..., off_diagonal] if i == 4 else centred * other
        assert abs(product.mean()) < 5 * rate * (1 - rate) / product.size**0.5 * (2**0.5 if i == 4 else 1), i


def test_dropout_keeps_the_expectation():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, 4)) for i in range(3))
    attend = functools.partial(dot_product_attention, q, k, v, mask=Causal(), impl="reference")
    keys = jax.random.split(jax.random.key(3), 400)
    drawn = jax.jit(jax.vmap(lambda key: attend(dropout_rate=0.25, dropout_key=key)))(keys)
    drawn, plain = np.asarray(drawn), np.asarray(jax.jit(attend)())
    assert (np.abs(drawn.mean(0) - plain) < 5 * drawn.std(0) / 400**0.5 + 1e-6).all()


def arrays(T=6, S=6, N=4, K=2, H=8, M=8, B=2, dtype=jnp.float32):
    return [jnp.ones((B, n, heads, w), dtype) for n, heads, w in ((T, N, H), (S, K, H), (S, K, M))]


TRACED = object()
BAD_CALLS = {
    "q of rank 3": (lambda q, k, v: (q[0], k, v), {}, "q must be .B, T, N, H."),
    "an empty axis": (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, "without empty axes"),
    "a list": (lambda q, k, v: ([1.0], k, v), {}, "q must be an array"),
    "integers": (lambda q, k, v: (q, k, v.astype(int)), {}, "v must be floating point, got int32"),
    "batch sizes": (lambda q, k, v: (q[:1], k, v), {}, "do not fit"),
    "widths": (lambda q, k, v: (q[..., :4], k, v), {}, "do not fit"),
    "key and value lengths": (lambda q, k, v: (q, k, v[:, :3]), {}, "do not fit"),
    "heads that do not divide": (lambda q, k, v: (q[:, :, :3], k, v), {}, "2 kv heads do not divide 3"),
    "more kv heads than heads": (lambda q, k, v: (q[:, :, :1], k, v), {}, "2 kv heads do not divide 1"),
    "dtypes": (lambda q, k, v: (q, k.astype(jnp.bfloat16), v), {}, "differ in dtype.*cast them"),
    "an additive mask": ({"mask": np.zeros((6, 6), np.float32)}, "boolean array, got float32; use bias"),
    "a mask class": ({"mask": Causal}, "mask must be a Mask or a boolean array"),
    "a tuple of masks": ({"mask": (Causal(), Full())}, "mask must be a Mask or a boolean array"),
    "a mask's shape": ({"mask": np.ones((5, 6), bool)}, r"does not broadcast to .* \(2, 4, 6, 6\)"),
    "a mask of rank 5": ({"mask": np.ones((1, 1, 1, 6, 6), bool)}, "does not broadcast"),
    "a Mask for an array": ({"mask_BNTS": Causal()}, "mask_BNTS must be a boolean array, got Causal"),
    "the array's shape": ({"mask": Causal(), "mask_BNTS": np.ones((5, 6), bool)}, "mask_BNTS .* does not"),
    "a boolean bias": ({"bias": np.ones((6, 6), bool)}, "use mask= for booleans"),
    "a bias class": ({"bias": ALiBi}, "bias must be a Bias or an array"),
    "a bias's shape": ({"bias": np.ones((3, 6, 6), np.float32)}, "does not broadcast"),
    "ALiBi of other heads": ({"bias": ALiBi(8)}, r"num_heads 8\b.* 4 heads.*use ALiBi\(4\)"),
    "a traced scale": ({"scale": TRACED}, "scale must be a Python number"),
    "a scale of two numbers": ({"scale": np.ones(2)}, "scale must be"),
    "scale nan": ({"scale": float("nan")}, "scale must be finite, got nan"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be finite and > 0"),
    "softcap text": ({"softcap": "2"}, "softcap must be a Python number"),
    "sinks per kv head": ({"sink_logits_N": jnp.zeros(2)}, "sink_logits_N must be .4."),
    "sinks as a list": ({"sink_logits_N": [0.0] * 4}, "sink_logits_N must be .4."),
    "integer sinks": ({"sink_logits_N": jnp.zeros(4, int)}, "floating point"),
    "segments of rank 3": ({"segment_ids": jnp.zeros((2, 6, 1), int)}, "segment_ids must be"),
    "float segments": ({"segment_ids": jnp.zeros((2, 6))}, "segment_ids must be integers, got float32"),
    "three segments": ({"segment_ids": (jnp.zeros((2, 6), int),) * 3}, "a pair"),
    "half a pair of segments": ({"segment_ids": (jnp.zeros((2, 6), int), None)}, "a pair"),
    "positions of the wrong batch": (
        {"q_positions": jnp.zeros((3, 6), int)},
        r"q_positions must be \[2, 6\]",
    ),
    "positions of the wrong length": (
        {"k_positions": jnp.zeros((2, 5), int)},
        r"k_positions must be \[2, 6\]",
    ),
    "float positions": ({"k_positions": jnp.zeros((2, 6))}, "k_positions must be integers"),
    "positions past int32": ({"q_positions": np.arange(6) + 2**31}, "int32"),
    "rate 1": ({"dropout_rate": 1.0, "dropout_key": 0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
    "a negative rate": ({"dropout_rate": -0.1, "dropout_key": 0}, "dropout_rate must be in"),
    "no key": ({"dropout_rate": 0.1}, "needs a dropout_key"),
    "a seed for a key": ({"dropout_rate": 0.1, "dropout_key": 3}, "dropout_key must be"),
    "many keys": (
        {"dropout_rate": 0.1, "dropout_key": jax.random.split(jax.random.key(0))},
        "dropout_key must be",
    ),
    "a float key": ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2)}, "dropout_key must be"),
    "an unknown impl": ({"impl": "flash"}, "unknown impl 'flash'; there are cudnn, .*, reference, chunked"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_one_line_value_errors(name):
    *change, message = BAD_CALLS[name]
    change, kwargs = change if len(change) == 2 else (lambda *x: x, *change)
    q, k, v = change(*arrays())
    for call in (dot_product_attention, explain):
        with pytest.raises(ValueError, match=message) as error:
            if kwargs.get("scale") is TRACED:
                jax.eval_shape(lambda s, call=call: call(q, k, v, scale=s) and 0, 1.0)
            else:
                call(q, k, v, **kwargs)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_different_lengths_need_a_pair_of_segment_ids():
    with pytest.raises(ValueError, match="T = 3 and S = 6 differ: give segment_ids as a pair"):
        dot_product_attention(*arrays(T=3), segment_ids=jnp.zeros((2, 3), int))


def test_numbers_may_be_numpy_scalars():
    q, k, v = arrays()
    wanted = str(jax.make_jaxpr(functools.partial(dot_product_attention, scale=0.5, softcap=2.0))(q, k, v))
    for kind in (np.float32, np.asarray, jnp.asarray):
        attend = functools.partial(dot_product_attention, scale=kind(0.5), softcap=kind(2.0))
        assert str(jax.make_jaxpr(attend)(q, k, v)) == wanted
        assert explain(q, k, v, scale=kind(0.5), softcap=kind(2.0)).chosen == "reference"


def test_the_choice_is_by_size_and_explained():
    small, large = arrays(), arrays(T=1024, S=1024)
    assert explain(*small).chosen == "reference"
    found = explain(*large, mask=Causal())
    assert found.chosen == "chunked"
    assert "1048576" in found.reasons["reference"] and "order" in found.reasons["chunked"]
    lines = str(found).splitlines()
    assert lines[0] == "forward and backward: chunked" and len(lines) == 1 + len(api.implementations())
    # One query a call (decoding) is dense at any length.
    assert explain(*arrays(T=1, S=2**17)).chosen == "reference"


def test_explain_takes_shapes_in_place_of_arrays():
    shape = jax.ShapeDtypeStruct
    q, k, v = (shape((1, 2**17, 8, 64), jnp.bfloat16) for _ in range(3))
    ids = shape((1, 2**17), jnp.int32)
    found = explain(
        q, k, v, mask=Causal(), bias=ALiBi(8), segment_ids=ids, q_positions=ids, return_lse=True,
        sink_logits_N=shape((8,), jnp.float32), dropout_rate=0.1, dropout_key=jax.random.key(0),
    )  # fmt: skip
    assert found.chosen == "chunked"
    assert explain(q_BTNH=q, k_BSKH=k, v_BSKM=v).chosen == "chunked"
    assert explain(q, k, v, impl="reference").reasons["reference"] == "asked for by name"
    with pytest.raises(TypeError, match="dropuot"):
        explain(q, k, v, dropuot=0.1)


def test_a_named_implementation_never_falls_back(monkeypatch):
    never = dataclasses.replace(
        api._IMPLEMENTATIONS["chunked"], unsupported=lambda call, config: "it is Tuesday"
    )
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunked", never)
    for call in (dot_product_attention, explain):
        with pytest.raises(NotImplementedError, match="'chunked' cannot run this call: it is Tuesday"):
            call(*arrays(), impl="chunked")
    found = explain(*arrays())
    assert found.chosen == "reference" and found.reasons["chunked"] == "it is Tuesday"


def test_a_config_names_its_implementation_and_sets_its_tiles():
    q, k, v = arrays(T=64, S=64)
    programs = [
        str(jax.make_jaxpr(functools.partial(dot_product_attention, mask=Causal(), impl=impl))(q, k, v))
        for impl in ("chunked", ChunkedConfig(), SMALL)
    ]
    assert programs[0] == programs[1] != programs[2]
    assert "f32[16,8]" in programs[2] and "f32[16,8]" not in programs[0]
    found = explain(q, k, v, impl=SMALL)
    assert found.chosen == "chunked" and found.reasons["reference"] == "not asked for"
    with pytest.raises(NotImplementedError, match=r"impl=MosaicGPUConfig\(deterministic=False.* cannot run"):
        dot_product_attention(q, k, v, impl=MosaicGPUConfig(deterministic=False))
    with pytest.raises(ValueError, match="unknown impl 3; there are cudnn, .*chunked, .*ChunkedConfig"):
        dot_product_attention(q, k, v, impl=3)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"query_tile": 0}, "query_tile must be an integer >= 1, got 0"),
        ({"key_tile": 2.0}, "key_tile must be an integer >= 1, got 2.0"),
        ({"key_tile": 300}, "key_tile 300 is no multiple of key_unit 256"),
        ({"max_waste": float("inf")}, "max_waste must be a finite"),
    ],
)
def test_tile_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        ChunkedConfig(**sizes)


@pytest.mark.parametrize("sizes", [0, 128, (128,), (128, 128, 128), "xy"])
def test_blocks_of_the_tpu_are_pairs(sizes):
    with pytest.raises(ValueError, match=r"^forward must be (a pair \(queries, keys\) or None|an integer)"):
        MosaicTPUConfig(forward=sizes)
    assert hash(MosaicTPUConfig(backward=[128, 256])) == hash(MosaicTPUConfig(backward=(128, 256)))


def test_the_choice_asks_no_implementation_behind_the_chosen_one(monkeypatch):
    asked = []
    for name, x in api._IMPLEMENTATIONS.items():

        def refusal(*call, name=name, x=x):
            asked.append(name)
            return x.unsupported(*call)

        monkeypatch.setitem(api._IMPLEMENTATIONS, name, dataclasses.replace(x, unsupported=refusal))
    dot_product_attention(*arrays())
    assert asked == ["cudnn", "mosaic_tpu", "reference"]  # mosaic_gpu is never chosen
    asked.clear()
    explain(*arrays())
    assert asked == list(api._IMPLEMENTATIONS)


BOTH = [
    OpCase((40, 56), (8, 8), (4, 2), "sink window & array BNTS", segments="ragged", softcap=2.0, batch=2),
    OpCase((40, 40), (8, 8), (2, 2), "causal & array B11S", "gate", positions="left padded", batch=2),
]


@each_implementation
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_a_mask_and_a_boolean_array_are_intersected(case, impl):
    problems.check(case, impl)


def test_two_boolean_arrays_are_intersected():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, 4)) for i in range(3))
    a, b = (jax.random.bernoulli(jax.random.key(i), 0.6, shape) for i, shape in ((3, (6, 6)), (4, (2, 6, 6))))
    found = dot_product_attention(q, k, v, mask=a, mask_BNTS=b)
    assert_array_equal(found, dot_product_attention(q, k, v, mask=a & b))
    assert (found != dot_product_attention(q, k, v, mask=a)).any()


@each_implementation
def test_lse_is_returned_on_request_and_changes_nothing(impl):
    q, k, v = arrays()
    out, lse = dot_product_attention(q, k, v, return_lse=True, impl=impl)
    assert lse.shape == (2, 6, 4) and lse.dtype == jnp.float32
    assert_array_equal(dot_product_attention(q, k, v, impl=impl), out)


@chunked_first
def test_vmap_over_calls(impl):
    """Masked with positions that differ by call, differentiated: equal to a loop."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (np.asarray(jax.random.normal(key, (3, 1, 20, 2, 8))) for key in keys)
    positions = np.arange(20)[None] - np.array([0, 3, 11])[:, None]

    def loss(q, k, v, at):
        out = dot_product_attention(
            q,
            k,
            v,
            mask=SlidingWindow(6, 2),
            q_positions=at,
            k_positions=at,
            softcap=3.0,
            bias=ALiBi(2),
            impl=impl,
        )
        return (out**2).sum()

    gradient = jax.value_and_grad(loss, (0, 1, 2))
    together = jax.jit(jax.vmap(gradient))(q, k, v, positions)
    alone = jax.jit(gradient)
    each = [alone(*x) for x in zip(q, k, v, positions, strict=True)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *each)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), together, stacked)


@chunked_first
def test_scan_and_checkpoint(impl):
    """Layers in a scan, rematerialised, under grad under jit: equal to plain layers one by one."""
    x = jax.random.normal(jax.random.key(0), (1, 20, 2, 8))
    scales = jnp.array([0.5, 1.0, 2.0])

    def layer(x, scale):
        return x + dot_product_attention(x * scale, x, x, mask=Causal(), impl=impl)

    def scanned(x):
        return (jax.lax.scan(lambda x, s: (jax.checkpoint(layer)(x, s), None), x, scales)[0] ** 2).sum()

    def plain(x):
        for scale in scales:
            x = layer(x, scale)
        return (x**2).sum()

    found, wanted = (jax.jit(jax.grad(f))(x) for f in (scanned, plain))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_hessian_vector_products():
    """Forward-mode over the gradient differentiates both passes of `chunked`, its 2^x of bits included."""
    shapes = ((1, 20, 2, 8), (1, 20, 1, 8), (1, 20, 1, 8), (1, 2, 20, 20), (2,))
    keys = jax.random.split(jax.random.key(0), 2 * len(shapes))
    point, direction = (
        [jax.random.normal(key, shape) for key, shape in zip(keys[i::2], shapes, strict=True)] for i in (0, 1)
    )

    def loss(impl, arguments):
        q, k, v, bias, sinks = arguments
        out, lse = dot_product_attention(
            q, k, v, mask=SlidingWindow(9), bias=bias, sink_logits_N=sinks, softcap=3.0, return_lse=True,
            impl=impl,
        )  # fmt: skip
        return (out**2).sum() + jnp.sin(lse).sum()

    def product(impl):
        gradient = jax.grad(functools.partial(loss, impl))
        return jax.jit(lambda x, dx: jax.jvp(gradient, (x,), (dx,))[1])(point, direction)

    for found, wanted in zip(product(SMALL), product("reference"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
