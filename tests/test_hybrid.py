"""Hybrid stacks, three recurrent layers to one of softmax: they train, and decode what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.generation import Sampling, generate
from attention_jax.mixers import AttentionConfig, GLAConfig, Mamba2Config, RetentionConfig
from attention_jax.model import ModelConfig, apply
from attention_jax.positions import RoPE
from tests.params import random_params
from train.config.sections import OptimizerConfig
from train.optimizer import make_optimizer
from train.step import make_train_step

MIXERS = (
    GLAConfig(num_heads=2),
    Mamba2Config(head_dim=16, state_dim=8),
    RetentionConfig(num_heads=2, value_dim=16),
    AttentionConfig(num_heads=2, rope=RoPE()),
)
# Scanned over two periods, so that states of every kind are stacked.
CONFIG = ModelConfig(
    vocab_size=31, d_model=32, num_layers=8, mixers=MIXERS, mlp_width=48, init_std=0.1, scan_layers=True
)
STEPS = 30


@pytest.mark.slow
def test_a_hybrid_stack_trains():
    """On rows of an arithmetic that the past decides."""
    start, stride = np.random.default_rng(0).integers(1, 31, (2, 8, 1))
    rows = ((start + stride * np.arange(33)) % 31).astype(np.int32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=2)
    step = make_train_step(CONFIG, optimizer, STEPS)
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    opt_state, losses = make_optimizer(optimizer, STEPS).init(params), []
    for i in range(STEPS):
        params, opt_state, metrics = step(params, opt_state, batch, np.int32(i), jax.random.key(0))
        assert bool(metrics["finite"])
        losses.append(float(metrics["train/loss"]))
    assert losses[0] > 3 and losses[-1] < 0.3, losses


def test_a_hybrid_stack_decodes_the_uncached_argmax():
    """64 tokens each of two prompts of different lengths, side by side with left padding."""
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    prompts = [np.array([3, 7, 11, 15, 19]), np.array([9, 4])]
    done = generate(CONFIG, params, prompts, max_new_tokens=64, sampling=Sampling(temperature=0))
    new = [completion.tokens for completion in done]
    whole = [np.concatenate([prompt, tokens]) for prompt, tokens in zip(prompts, new, strict=True)]
    padded = np.stack([np.pad(row, (0, 69 - len(row))) for row in whole])
    best = np.argmax(jax.jit(lambda t: apply(CONFIG, params, t)[0])(padded), -1)
    for prompt, tokens, row in zip(prompts, new, best, strict=True):
        assert len(tokens) == 64 and len(set(tokens.tolist())) > 3
        assert_array_equal(tokens, row[len(prompt) - 1 : len(prompt) + 63])
