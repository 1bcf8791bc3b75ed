"""Caches that grow: the state of a larger capacity, bit for bit, and the same tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.generation import DraftModel, NGram, Sampling, generate, growth, loop
from attention_jax.mixers import AttentionConfig, Context, make_config
from attention_jax.model import ModelConfig
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.params import random_params

B, D, SMALL, LARGE = 2, 16, 16, 40
PROMPTS = [np.arange(19) % 5, np.array([7, 3, 7, 3, 7, 3])]
OPTIONS = {"max_new_tokens": 150, "sampling": Sampling(0)}
NSA = {"compress_block": 4, "compress_stride": 2, "select_block": 4, "select_count": 3, "window": 8}


def _window(mask: str) -> AttentionConfig:
    return AttentionConfig(num_heads=2, mask=mask)


CONFIGS = {
    "full": Row((make_config("softmax", num_heads=2), {})),
    "ring that begins to wrap": Row((_window("SlidingWindow(14) | Sinks(2)"), {"spare": 3})),
    "ring that wraps": Row((_window("SlidingWindow(5)"), {})),
    "mla": Row((make_config("mla", num_heads=2, latent_dim=8, head_dim=8, rotary_dim=4), {}), slow=True),
    "forgetting": Row((make_config("forgetting", num_heads=2), {})),
    "nsa": Row((make_config("nsa", **NSA), {}), slow=True),
    "int8": Row((make_config("softmax", num_heads=2), {"quantize": "int8", "residual": 4, "spare": 2})),
    "recurrent": Row((make_config("gated_deltanet", num_heads=2), {"spare": 2})),
}  # fmt: skip


@pytest.mark.parametrize("name", marks.params(CONFIGS))
def test_a_grown_state_is_one_that_was_large_from_the_start(name):
    """Rows of 13 and 9 tokens; the next token's output, and the state after it, too."""
    config, options = CONFIGS[name].value
    graphdef, params = nnx.split(config.build(D, nnx.Rngs(0), causal=True))
    cache = CacheOptions(**options)
    x = np.random.default_rng(0).standard_normal((B, 14, D), np.float32)
    positions = np.stack([np.arange(13), np.maximum(np.arange(13) - 4, -1)])
    mix = jax.jit(lambda x, s, p: nnx.merge(graphdef, params).mix(x, s, ctx=Context(p))[:2])
    empty = functools.partial(config.init_state, D, B, cache=cache)
    _, small = mix(x[:, :13], empty(SMALL), positions)
    _, large = mix(x[:, :13], empty(LARGE), positions)
    grown = jax.jit(lambda state: state.grown(empty(LARGE)))(small)
    for a, b in zip(jax.tree.leaves(grown), jax.tree.leaves(large), strict=True):
        assert_array_equal(a, b)
    assert jax.tree.structure(grown) == jax.tree.structure(large)
    after = [mix(x[:, 13:], state, positions[:, -1:] + 1) for state in (grown, large)]
    jax.tree.map(assert_array_equal, *after)


@pytest.fixture(scope="module")
def hybrid():
    mixers = (
        AttentionConfig(num_heads=2, rope=RoPE()),
        AttentionConfig(num_heads=2, mask="SlidingWindow(20)"),
    )
    config = ModelConfig(vocab_size=31, d_model=32, num_layers=2, mixers=mixers, init_std=0.3)
    return config, random_params(config)


def test_the_tokens_are_the_same_and_each_size_is_compiled_once(hybrid, monkeypatch):
    config, params = hybrid
    wanted = generate(config, params, PROMPTS, **OPTIONS)
    monkeypatch.setattr(growth, "FIRST_SLOTS", 32)
    before = loop._advance._cache_size()
    found = generate(config, params, PROMPTS, **OPTIONS)
    # 19 + 64 tokens need 128 slots, and 169 need the 192 of the capacity.
    assert loop._advance._cache_size() - before == 1  # 192 slots were compiled above
    for a, b in zip(wanted, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("drafts", ["model", pytest.param("lookup", marks=pytest.mark.slow)])
def test_the_tokens_are_the_same_with_drafts(hybrid, monkeypatch, drafts):
    """The draft model's caches grow, too, or it would propose nothing past them: 2 of 3 tokens are drafts."""
    config, params = hybrid
    if drafts == "model":
        config = dataclasses.replace(config, num_layers=1, mixers=config.mixers[:1])
        params = random_params(config)
    speculation = DraftModel(config, params, 2) if drafts == "model" else NGram(3, shortest=2)
    wanted = generate(config, params, PROMPTS, **OPTIONS)
    monkeypatch.setattr(growth, "FIRST_SLOTS", 32)
    found = generate(config, params, PROMPTS, speculation=speculation, **OPTIONS)
    for a, b in zip(wanted, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)
        assert drafts == "lookup" or b.drafts[1] >= 95


def test_what_grows(hybrid):
    config, _ = hybrid
    first = functools.partial(growth.first_capacity, cache=CacheOptions(), needed=100)
    assert first(config, capacity=700) == 700
    assert first(config, capacity=5000) == 1024
    assert first(config, capacity=5000, needed=1500) == 2048
    window = ModelConfig(vocab_size=31, d_model=32, num_layers=1, mixers=(config.mixers[1],))
    assert first(window, capacity=5000) == 5000
    assert growth.next_capacity(1024, 1025, 5000) == 2048
    assert growth.next_capacity(4096, 4097, 5000) == 5000
