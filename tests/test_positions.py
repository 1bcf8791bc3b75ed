"""RoPE against complex rotation in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.positions import RoPE
from tests.reference import positions as truth

LAYOUTS = ("half", "interleaved")
turn = jax.jit(RoPE.__call__, static_argnums=0)


def _x(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width, theta", [(None, 10000.0), (6, 10000.0), (2, 500.0), (16, 1e6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope(layout, width, theta, dtype):
    dtype = jnp.dtype(dtype)
    x = _x(2, 9, 3, 16, dtype=dtype)
    positions = np.stack([np.arange(9), np.arange(9) * 37 - 1])
    found = turn(RoPE(theta, width, layout), x, positions)
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
        return np.einsum("btnh,bsnh->bnts", turn(rope, q, at), turn(rope, k, at))

    assert_allclose(scores(0), scores(200), atol=2e-4)
    assert not np.allclose(scores(0), np.einsum("btnh,bsnh->bnts", q, k), atol=0.1)


def test_layouts_differ_by_a_permutation_of_features():
    x, at = _x(1, 5, 1, 8), np.arange(5)[None]
    interleaved = turn(RoPE(layout="interleaved"), x, at)
    half = turn(RoPE(layout="half"), x[..., [0, 2, 4, 6, 1, 3, 5, 7]], at)
    assert_allclose(np.asarray(half)[..., [0, 4, 1, 5, 2, 6, 3, 7]], interleaved, rtol=1e-6, atol=1e-6)


def test_one_row_of_positions_serves_the_batch_and_position_0_turns_nothing():
    x = _x(3, 5, 2, 8)
    one, all_rows = (np.asarray(turn(RoPE(), x, np.broadcast_to(np.arange(5), n))) for n in ((1, 5), (3, 5)))
    assert_allclose(one, all_rows, rtol=1e-6, atol=1e-6)
    assert_array_equal(one[:, 0], x[:, 0])


def test_far_positions_are_told_apart_in_bfloat16():
    """bfloat16 holds no integer between 256 and 258: phases must not pass through it."""
    x = np.ones((1, 2, 1, 8), jnp.bfloat16)
    near, next_to_it = np.asarray(turn(RoPE(), x, np.array([[100_000, 100_001]])))[0]
    wanted = truth.rope(np.ones((1, 2, 1, 8)), [[100_000, 100_001]], theta=1e4, width=8, layout="half")[0]
    assert_allclose(np.asarray(near, float), wanted[0], atol=0.03)
    assert_allclose(np.asarray(next_to_it, float), wanted[1], atol=0.03)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"width": 3}, "RoPE width must be even and >= 2, got 3"),
        ({"width": 0}, "RoPE width must be even and >= 2, got 0"),
        ({"theta": 0.0}, "RoPE theta must be > 0 and finite, got 0.0"),
        ({"theta": float("nan")}, "RoPE theta must be > 0 and finite, got nan"),
        ({"theta": float("inf")}, "RoPE theta must be > 0 and finite, got inf"),
        ({"layout": "neox"}, "RoPE layout must be 'half' or 'interleaved', got 'neox'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError) as error:
        RoPE(**arguments)
    assert str(error.value) == message


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
