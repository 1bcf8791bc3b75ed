"""Ops called outside of `jax.jit` are compiled once: a second call, or gradient, compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.masks import Causal, SlidingWindow
from attention_jax.ops.decay_scan import decay_scan
from attention_jax.ops.delta_rule import delta_rule
from attention_jax.ops.selected import selected_attention
from attention_jax.ops.softmax import ChunkedConfig, dot_product_attention

B, T, N, H = 1, 24, 2, 8
Q, K, V = (jax.random.normal(jax.random.key(i), (B, T, N, H)) / 4 for i in range(3))
SMALL = ChunkedConfig(query_tile=16, key_tile=16, key_unit=8)

OPS = {
    "softmax": lambda q: dot_product_attention(q, K, V, mask=Causal(), impl=SMALL),
    "decay_scan": lambda q: decay_scan(q, K, V, log_decay=-jnp.abs(V[..., 0]), impl="chunked", chunk_size=8),
    "delta_rule": lambda q: delta_rule(q, K, V, jax.nn.sigmoid(V[..., 0]), impl="chunked", chunk_size=8),
    "selected": lambda q: selected_attention(
        q, K, V, jnp.zeros((B, T, N, 1), jnp.int32), block_size=8, impl="gathered"
    ),
}


@pytest.fixture(scope="module")
def compiled():
    """How many programs have been compiled."""
    count = [0]

    def listen(event, duration, **_):
        count[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count[0]
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", OPS)
def test_a_second_call_and_its_gradient_compile_nothing(compiled, name):
    def both():
        return OPS[name](Q), jax.grad(lambda q: (OPS[name](q) ** 2).sum())(Q)

    start = compiled()
    first = both()
    between = compiled()
    second = both()
    assert between > start and compiled() == between
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_masks_that_differ_are_programs_of_their_own(compiled):
    windows = [dot_product_attention(Q, K, V, mask=SlidingWindow(n), impl=SMALL) for n in (3, 4)]
    assert np.abs(windows[0] - windows[1]).max() > 1e-3
    before = compiled()
    again = dot_product_attention(Q, K, V, mask=SlidingWindow(3), impl=SMALL)
    assert compiled() == before
    np.testing.assert_array_equal(again, windows[0])


def test_within_a_jit_the_call_is_no_function_of_its_own():
    text = jax.jit(OPS["softmax"]).lower(Q).as_text()
    assert "_run" not in text
