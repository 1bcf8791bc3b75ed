"""cuDNN as an implementation: what it is asked for is the same function, and the rest is refused by name.

No GPU is needed: the arguments it is given run in jax.nn's plain form here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import ALiBi, Causal, Full, Sinks, SlidingWindow, dot_product_attention, explain
from attention_jax.ops.softmax import library

REAL = jax.nn.dot_product_attention


@pytest.fixture
def gpu(monkeypatch):
    """The call believes that it is on a GPU, and jax.nn runs its plain form."""

    @functools.wraps(REAL)
    def plain(*args, implementation, **options):
        assert implementation == "cudnn"
        # Compiled for a CPU, jax's plain form takes no float16.
        wide = (x.astype(jnp.float32) for x in args)
        return REAL(*wide, implementation="xla", **options).astype(args[0].dtype)

    monkeypatch.setattr(library, "platform", lambda call: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)


def arrays(T=20, S=20, N=4, K=2, H=16, dtype=jnp.float16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, T, N, H), (1, S, K, H), (1, S, K, H)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(1), SlidingWindow(5)], ids=str)
def test_its_arguments_mean_the_same_function(gpu, mask):
    q, k, v = arrays()
    found = dot_product_attention(q, k, v, mask=mask, scale=0.3, impl="cudnn")
    expected = dot_product_attention(q, k, v, mask=mask, scale=0.3, impl="reference")
    np.testing.assert_allclose(found, expected, atol=4e-3)
    assert explain(q, k, v, mask=mask).chosen == "cudnn"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": Causal() | Sinks(3)}, "has no mask"),
        ({"mask": SlidingWindow(4, right=1)}, "has no mask SlidingWindow"),
        ({"mask": jnp.ones((20, 20), bool)}, "a dense mask"),
        ({"bias": ALiBi(4)}, "a bias"),
        ({"bias": jnp.zeros((20, 20))}, "a bias"),
        ({"softcap": 5.0}, "a softcap"),
        ({"sink_logits_N": jnp.zeros(4)}, "sink logits"),
        ({"segment_ids": np.zeros((1, 20), int)}, "positions or segment ids"),
        ({"q_positions": np.arange(20)}, "positions or segment ids"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "dropout by position"),
        ({"return_lse": True}, "log-sum-exp"),
    ],
)
def test_what_it_cannot_do_is_named(gpu, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        dot_product_attention(*arrays(), impl="cudnn", **options)
    assert reason in explain(*arrays(), **options).reasons["cudnn"]


def test_lengths_and_dtypes(gpu):
    with pytest.raises(NotImplementedError, match="aligns a mask of 20 queries and 30 keys otherwise"):
        dot_product_attention(*arrays(S=30), mask=Causal(), impl="cudnn")
    with pytest.raises(NotImplementedError, match="the inputs are float32"):
        dot_product_attention(*arrays(dtype=jnp.float32), impl="cudnn")
    assert explain(*arrays(T=1)).chosen == "reference"


def test_its_own_refusal_is_passed_on(monkeypatch):
    monkeypatch.setattr(library, "platform", lambda call: "gpu")

    def refuse(*args, **options):
        raise ValueError("no engine\n for this")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    assert explain(*arrays(), mask=Causal()).reasons["cudnn"] == "no engine for this"


def test_it_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the call runs on a cpu"):
        dot_product_attention(*arrays(), impl="cudnn")
