"""Position encodings against the published formulas in float64, and at their limits."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.positions import (
    DynamicNTK,
    LinearScaling,
    Llama3,
    LongRoPE,
    RoPE,
    Temperature,
    XPos,
    YaRN,
    sinusoidal,
)
from tests.reference import positions as truth

LAYOUTS = ("half", "interleaved")
rotate = jax.jit(RoPE.__call__, static_argnums=0)


def _x(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width, theta", [(None, 10000.0), (6, 10000.0), (2, 500.0), (16, 1e6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope(layout, width, theta, dtype):
    dtype = jnp.dtype(dtype)
    x = _x(2, 9, 3, 16, dtype=dtype)
    positions = np.stack([np.arange(9), np.arange(9) * 37 - 1])
    found = rotate(RoPE(theta, width, layout), x, positions)
    assert found.dtype == dtype
    wanted = truth.rope(x, positions, theta=theta, width=width or 16, layout=layout)
    # Phases are float32: an angle of size a is known to eps a.
    angle = np.finfo(np.float32).eps * positions.max() + float(jnp.finfo(dtype).eps)
    assert_allclose(np.asarray(found, np.float64), wanted, atol=4 * angle * np.abs(x.astype(float)).max())
    if width:
        assert_array_equal(found[..., width:], x[..., width:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_the_difference_of_positions(layout):
    q, k = _x(1, 6, 2, 8), _x(1, 6, 2, 8)[:, ::-1]
    rope = RoPE(layout=layout)

    def scores(shift):
        at = np.arange(6)[None] + shift
        return np.einsum("btnh,bsnh->bnts", rotate(rope, q, at), rotate(rope, k, at))

    assert_allclose(scores(0), scores(200), atol=2e-4)
    assert not np.allclose(scores(0), np.einsum("btnh,bsnh->bnts", q, k), atol=0.1)


def test_layouts_differ_by_a_permutation_of_features():
    x, at = _x(1, 5, 1, 8), np.arange(5)[None]
    interleaved = rotate(RoPE(layout="interleaved"), x, at)
    half = rotate(RoPE(layout="half"), x[..., [0, 2, 4, 6, 1, 3, 5, 7]], at)
    assert_allclose(np.asarray(half)[..., [0, 4, 1, 5, 2, 6, 3, 7]], interleaved, rtol=1e-6, atol=1e-6)


def test_one_row_of_positions_serves_the_batch_and_position_0_is_not_rotated():
    x = _x(3, 5, 2, 8)
    one, all_rows = (
        np.asarray(rotate(RoPE(), x, np.broadcast_to(np.arange(5), n))) for n in ((1, 5), (3, 5))
    )
    assert_allclose(one, all_rows, rtol=1e-6, atol=1e-6)
    assert_array_equal(one[:, 0], x[:, 0])


def test_far_positions_are_distinct_in_bfloat16():
    """bfloat16 holds no integer between 256 and 258: phases must not pass through it."""
    x = np.ones((1, 2, 1, 8), jnp.bfloat16)
    near, next_to_it = np.asarray(rotate(RoPE(), x, np.array([[100_000, 100_001]])))[0]
    wanted = truth.rope(np.ones((1, 2, 1, 8)), [[100_000, 100_001]], theta=1e4, width=8, layout="half")[0]
    assert_allclose(np.asarray(near, float), wanted[0], atol=0.03)
    assert_allclose(np.asarray(next_to_it, float), wanted[1], atol=0.03)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"width": 3}, "RoPE width must be even and >= 2, got 3"),
        ({"width": 0}, "RoPE width must be even and >= 2, got 0"),
        ({"theta": 0.0}, "RoPE theta must be from 1 to 1e15, got 0.0"),
        ({"theta": float("nan")}, "theta must be finite, got nan"),
        ({"theta": float("inf")}, "theta must be finite, got inf"),
        (
            {"layout": "neox"},
            "layout must be one of half, interleaved, got 'neox'",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RoPE(**arguments)


# Configurations as published with models, and what each formula does at its edges.
DEEPSEEK = YaRN(factor=40.0, original_length=4096, mscale_all_dim=1.0)
GPT_OSS = YaRN(factor=32.0, original_length=4096, truncate=False)
LISTS = {"short_factor": (1.0, 1.5, 2.0, 4.0), "long_factor": (1.0, 3.5, 20.0, 64.0), "original_length": 4096}
SCALINGS = {
    "linear": (LinearScaling(factor=4.0), 1e4, 16),
    "dynamic within": (DynamicNTK(factor=2.0, original_length=2048, length=1000), 1e4, 16),
    "dynamic beyond": (DynamicNTK(original_length=2048, length=8192), 1e4, 16),
    "dynamic factor": (DynamicNTK(factor=2.5, original_length=2048, length=3000), 1e4, 128),
    "deepseek-v3": (DEEPSEEK, 1e4, 64),
    "deepseek-v2": (dataclasses.replace(DEEPSEEK, mscale=0.707, mscale_all_dim=0.707), 1e4, 64),
    "mscales apart": (dataclasses.replace(DEEPSEEK, mscale=1.3, mscale_all_dim=0.7), 1e4, 64),
    "gpt-oss": (GPT_OSS, 150000.0, 64),
    "qwen": (YaRN(factor=4.0, original_length=32768), 1e6, 128),
    "yarn factor given": (YaRN(factor=4.0, original_length=512, attention_factor=0.9), 1e4, 32),
    "yarn clamped": (YaRN(factor=4.0, original_length=4096, beta_fast=1e4, beta_slow=1e-3), 500.0, 8),
    "yarn a step": (YaRN(factor=4.0, original_length=6), 1e4, 8),
    "llama-3.1": (Llama3(), 5e5, 128),
    "llama-3.2": (Llama3(factor=32.0), 5e5, 64),
    "llama all": (Llama3(factor=3.0, low_freq_factor=0.2, high_freq_factor=9.0, original_length=64), 1e4, 32),
    "longrope short": (LongRoPE(**LISTS, length=4096), 1e4, 8),
    "longrope long": (LongRoPE(**LISTS, length=131072), 1e4, 8),
    "longrope factor": (LongRoPE(**LISTS, length=100, attention_factor=1.19), 1e4, 8),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_the_published_ones(name):
    scaling, theta, width = SCALINGS[name]
    rope = RoPE(theta, scaling=scaling)
    frequencies, factor = truth.scaled(theta, width, **dataclasses.asdict(scaling))
    found = rope.frequencies(width)
    assert found.dtype == np.float64 and hash(rope) == hash(dataclasses.replace(rope))
    assert_allclose(found, frequencies, rtol=1e-12)
    assert_allclose(rope.attention_factor, factor, rtol=1e-12)
    assert_allclose(RoPE(theta, width, scaling=scaling).frequencies(width + 6), frequencies, rtol=1e-12)


def test_llama_3_1_by_hand():
    """Pair j turns 8192 * 5e5^(-j / 64) / 2 pi times over the original text: 4.19 at 28, 0.997 at 35."""
    found = RoPE(5e5, scaling=Llama3()).frequencies(128)
    plain = 5e5 ** (-np.arange(64) / 64)
    assert_allclose(found[:29], plain[:29], rtol=1e-12)
    assert_allclose(found[35:], plain[35:] / 8, rtol=1e-12)
    # sqrt(2) / 1000 turns 1.8438... times, so 0.28128... of it stays and an eighth of the rest.
    assert_allclose(found[32], 5.2484664e-4, rtol=1e-6)
    assert (found[29:35] < plain[29:35]).all() and (found[29:35] > plain[29:35] / 8).all()


def test_deepseek_and_gpt_oss_by_hand():
    """32 ln(4096 / 64 pi) / ln 1e4 = 10.47 and 32 ln(4096 / 2 pi) / ln 1e4 = 22.5: a ramp from 10 to 23."""
    rope = RoPE(1e4, scaling=DEEPSEEK)
    found = rope.frequencies(64)
    assert_allclose(found[:11], 1e4 ** (-np.arange(11) / 32), rtol=1e-12)
    assert_allclose(found[23:], 1e4 ** (-np.arange(23, 32) / 32) / 40, rtol=1e-12)
    assert_allclose(found[16], 0.0055, rtol=1e-12)  # 0.01 (7/13 + 6/13 / 40)
    assert rope.attention_factor == 1.0
    assert_allclose(rope.softmax_factor, 1.3688879454113936**2, rtol=1e-12)
    assert_allclose(RoPE(150000.0, scaling=GPT_OSS).attention_factor, 1.3465735902799727, rtol=1e-12)
    assert RoPE(150000.0, scaling=GPT_OSS).softmax_factor == RoPE().softmax_factor == 1.0
    # ln(32) / ln(4096) = 5 / 12, as Phi-3's 131072 tokens over 4096.
    assert_allclose(LongRoPE(**LISTS, length=131072).magnitude, math.sqrt(17 / 12), rtol=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [None, DEEPSEEK, dataclasses.replace(GPT_OSS, original_length=30)],
    ids=["none", "deepseek", "gpt"],
)
def test_scaled_rotation(scaling):
    """Features rotate by the scaled frequencies, times the attention factor; the rest of the head stays."""
    x, at = _x(2, 9, 2, 18), np.arange(9)[None] * 31
    rope = RoPE(1e4, 16, "interleaved", scaling)
    given = dataclasses.asdict(scaling) if scaling else None
    wanted = truth.rope(x, at, theta=1e4, width=16, layout="interleaved", scaling=given)
    found = rotate(rope, x, at)
    assert_allclose(found, wanted, atol=2e-4)
    assert_array_equal(found[..., 16:], x[..., 16:])
    assert_array_equal(rope.queries(x, at), rope.keys(x, at))
    assert_allclose(rope.keys(x, at), found, atol=1e-6)


def _scored(rope, q, k, q_at, k_at):
    q, k = rope.queries(q, q_at), rope.keys(k, k_at)
    return np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), np.asarray(k, np.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_xpos(layout):
    rope = RoPE(100.0, 6, layout, xpos=XPos(8.0, 4))
    x, at = _x(2, 9, 2, 8), np.arange(9)[None]
    gain = truth.xpos(at, 6, scale_base=8.0, centre=4)
    options = {"theta": 100.0, "width": 6, "layout": layout}
    assert_allclose(rope.queries(x, at), truth.rope(x, at, gain=gain, **options), rtol=1e-4, atol=1e-5)
    assert_allclose(rope.keys(x, at), truth.rope(x, at, gain=1 / gain, **options), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="call rope.queries or rope.keys"):
        rope(x, at)


def test_xpos_scores_depend_on_the_difference_of_positions_whatever_the_centre():
    q, k, at = _x(1, 6, 2, 8), _x(1, 6, 2, 8)[:, ::-1], np.arange(6)[None]

    def scores(shift, centre):
        return _scored(RoPE(xpos=XPos(16.0, centre)), q, k, at + shift, at + shift)

    wanted = scores(0, 0)
    for shift, centre in ((0, 100), (50, 0), (300, 290)):
        assert_allclose(scores(shift, centre), wanted, rtol=2e-4, atol=2e-4)
    assert not np.allclose(wanted, _scored(RoPE(), q, k, at, at), atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xpos_is_exact_as_far_as_it_reaches_and_nan_beyond(dtype):
    dtype = jnp.dtype(dtype)
    xpos = XPos()
    reach = xpos.reach(dtype)
    assert reach == {"float32": 29178, "bfloat16": 33711, "float16": 1133}[dtype.name]
    rope = RoPE(xpos=xpos)
    # Small and large features, where a scaled product would leave the dtype's range first.
    q, k = (
        np.ones((1, 3, 1, 8)) * np.array([size, 1, 1 / size])[None, :, None, None] for size in (0.25, 4.0)
    )
    near = _scored(rope, q.astype(dtype), k.astype(dtype), np.arange(3)[None], np.arange(3)[None])
    far = np.arange(reach - 2, reach + 1)[None]
    found = _scored(rope, q.astype(dtype), k.astype(dtype), far, far)
    lengths = np.linalg.norm(q, axis=-1)[0, :, 0], np.linalg.norm(k, axis=-1)[0, :, 0]
    # A float32 angle of 30,000 is known to 0.002.
    allowed = max(0.01, 4 * float(jnp.finfo(dtype).eps))
    assert (np.abs(found - near)[0, 0] <= allowed * np.outer(*lengths)).all()
    out, wanted = np.array([[0, reach, reach + 1, 10**6, 2**31 - 1]]), [False, False, True, True, True]
    x = np.ones((1, 5, 1, 8), dtype)
    for turned in (rope.queries(x, out), rope.keys(x, out)):
        assert np.isnan(np.asarray(turned, float)).all((0, 2, 3)).tolist() == wanted
        assert np.isnan(np.asarray(turned, float)).any((0, 2, 3)).tolist() == wanted


def test_xpos_leaves_slots_without_a_token_and_their_gradient_finite():
    rope = RoPE(xpos=XPos(1.0, 10**6))
    at = np.array([[-1, -1, 10**6]])

    @jax.jit
    def there_and_back(x):
        y, vjp = jax.vjp(lambda x: rope.keys(x, at), x)
        return y, vjp(jnp.zeros_like(y))[0]

    for x in there_and_back(_x(1, 3, 1, 4)):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [(8192, 0.1), (3, 0.5), (1, 2.0), (3, 0.5, 0)])
def test_temperature(settings, dtype):
    tune = Temperature(*settings)
    floor = tune.floor
    at = np.array(
        [[0, 1, floor - 2, floor - 1, floor, 5 * floor - 2, 5 * floor - 1, 10**7 * 2 + 1, 2**31 - 2]]
    )
    at = np.maximum(at, 0)
    x = _x(1, 9, 2, 4, dtype=jnp.dtype(dtype))
    factors = [truth.temperature(int(p), floor=floor, scale=tune.scale, offset=tune.offset) for p in at[0]]
    found = jax.jit(tune)(x, at)
    assert found.dtype == x.dtype
    wanted = np.asarray(x, np.float64) * np.array(factors)[None, :, None, None]
    assert_allclose(np.asarray(found, np.float64), wanted, rtol=1e-6 if dtype == "float32" else 0.004)
    # A slot without a token stays finite whatever its position.
    assert_array_equal(tune(x, np.full((1, 9), -7)), x)


def test_sinusoidal():
    at = np.array([[0, 1, 7, 1000], [3, 2, 1, 100_000]])
    found = jax.jit(sinusoidal, static_argnums=1)(at, 10)
    wanted = [[[truth.sinusoid(int(p), i, 10) for i in range(10)] for p in row] for row in at]
    assert found.shape == (2, 4, 10) and found.dtype == jnp.float32
    assert_allclose(found[:, :3], np.array(wanted)[:, :3], atol=1e-6)
    assert_allclose(found[:, 3], np.array(wanted)[:, 3], atol=0.01)  # an angle of size a is known to eps a
    assert np.isfinite(sinusoidal(np.array([[-1, -5]]), 10)).all()
    with pytest.raises(ValueError, match="even width, got 7"):
        sinusoidal(at, 7)


LENGTHS = {"original_length": 64}
TWICE = LENGTHS | {"factor": 2.0}


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (LinearScaling, {"factor": 0.5}, "LinearScaling factor must be from 1 to 1e6, got 0.5"),
        (LinearScaling, {"factor": float("nan")}, "factor must be finite, got nan"),
        (DynamicNTK, LENGTHS | {"length": 0}, "DynamicNTK length must be >= 1, got 0"),
        (YaRN, LENGTHS | {"factor": float("inf")}, "factor must be finite, got inf"),
        (YaRN, {"factor": 2.0, "original_length": 0}, "YaRN original_length must be >= 1, got 0"),
        (YaRN, TWICE | {"beta_slow": 32.0}, "YaRN beta_fast must be above beta_slow, got 32.0"),
        (YaRN, TWICE | {"beta_slow": 0.0}, "YaRN beta_slow must be from 1e-6 to 1e6, got 0.0"),
        (YaRN, TWICE | {"mscale": -1.0}, "YaRN mscale must be from 0 to 100, got -1.0"),
        (YaRN, TWICE | {"attention_factor": 0.0}, "YaRN attention_factor must be from 1e-6 to 1e6, got 0.0"),
        (YaRN, TWICE | {"attention_factor": 1.0, "mscale": 0.5}, "attention_factor excludes mscale"),
        (Llama3, {"low_freq_factor": 0.0}, "Llama3 low_freq_factor must be from 1e-6 to 1e6, got 0.0"),
        (Llama3, {"high_freq_factor": 1.0}, "must be above low_freq_factor 1.0 and at most 1e6, got 1.0"),
        (LongRoPE, LISTS | {"length": 9, "original_length": 1}, "original_length must be >= 2, got 1"),
        (LongRoPE, LISTS | {"length": 9, "long_factor": (0.0,)}, "numbers from 1e-6 to 1e6, got [0.0]"),
        (XPos, {"scale_base": 0.0}, "XPos scale_base must be from 0.1 to 1e9, got 0.0"),
        (XPos, {"centre": -1}, "XPos centre must be >= 0, got -1"),
        (Temperature, {"floor": 0}, "Temperature floor must be >= 1, got 0"),
        (Temperature, {"offset": 2}, "Temperature offset must be 0 or 1, got 2"),
        (Temperature, {"scale": -0.1}, "Temperature scale must be from 0 to 100, got -0.1"),
    ],
)  # fmt: skip
def test_bad_options(kind, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        kind(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scaling, theta, message",
    [
        (LongRoPE(**LISTS, length=9), 1e4, "LongRoPE short_factor must be 2 numbers (RoPE width / 2), got 4"),
        (YaRN(factor=2.0, original_length=64), 1.0, "YaRN RoPE theta must be > 1, got 1.0"),
        (YaRN(factor=2.0, original_length=6, truncate=False), 1e4, "over original_length 6; change these"),
        (YaRN(factor=2.0, original_length=10**9), 10.0, "over original_length 1000000000; change these"),
    ],
)  # fmt: skip
def test_scalings_that_do_not_fit_a_head(scaling, theta, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        RoPE(theta, scaling=scaling).rotated_width(4)
    assert "\n" not in str(error.value)


def test_a_pair_alone_has_no_ntk():
    with pytest.raises(ValueError, match="DynamicNTK needs a RoPE width of at least 4, got 2"):
        RoPE(width=2, scaling=DynamicNTK(original_length=64, length=128)).rotated_width(8)


@pytest.mark.parametrize(
    "width, head_dim, message", [(None, 7, "head_dim 7 is odd"), (10, 8, "10 exceeds head_dim 8")]
)
def test_heads_that_cannot_be_rotated(width, head_dim, message):
    with pytest.raises(ValueError, match=message):
        RoPE(width=width)(jnp.zeros((1, 2, 1, head_dim)), jnp.zeros((1, 2), int))


def test_gradient_is_the_rotation_back():
    x, at = _x(1, 5, 2, 8), np.arange(5)[None] * 7

    @jax.jit
    def there_and_back(x):
        y, vjp = jax.vjp(lambda x: RoPE(width=4)(x, at), x)
        return y, vjp(y)[0]

    y, back = there_and_back(x)
    assert_allclose(back, x, atol=1e-5)
    assert not np.allclose(y, x, atol=0.1)
