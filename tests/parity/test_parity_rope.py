"""RoPE's frequencies and factors against transformers' functions that make them."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from attention_jax.positions import DynamicNTK, LinearScaling, Llama3, LongRoPE, RoPE, YaRN
from tests.parity import peers

WIDTH = 32
_SHORT = tuple(1 + 0.05 * i for i in range(WIDTH // 2))
_LONG = tuple(1 + 0.7 * i for i in range(WIDTH // 2))


def _yarn(original: int, factor: float, **options):
    """transformers' parameters and ours, which name them alike but for the original length."""
    theirs = {"factor": factor, "original_max_position_embeddings": original} | options
    return "yarn", theirs, YaRN(factor=factor, original_length=original, **options), None


def _dynamic(factor: float, length: int):
    return (
        "dynamic",
        {"factor": factor},
        DynamicNTK(factor=factor, original_length=512, length=length),
        length,
    )


def _longrope(length: int, **options):
    theirs = {"short_factor": list(_SHORT), "long_factor": list(_LONG)} | options
    ours = LongRoPE(short_factor=_SHORT, long_factor=_LONG, original_length=512, length=length, **options)
    return "longrope", theirs | {"original_max_position_embeddings": 512}, ours, length


# kind, transformers' parameters, our scaling, the length that transformers is told.
CASES = {
    "linear": ("linear", {"factor": 4.0}, LinearScaling(factor=4.0), None),
    "dynamic-short": _dynamic(2.0, 300),
    "dynamic-long": _dynamic(2.0, 5000),
    "dynamic-4": _dynamic(4.0, 999),
    "yarn": _yarn(512, 8.0),
    "yarn-4096": _yarn(4096, 32.0),
    "yarn-beta": _yarn(512, 8.0, beta_fast=16.0, beta_slow=2.0),
    "yarn-exact-ends": _yarn(512, 8.0, truncate=False),
    "yarn-attention-factor": _yarn(512, 8.0, attention_factor=1.3),
    "yarn-mscales": _yarn(512, 40.0, mscale=0.707, mscale_all_dim=1.0),
    "llama3": (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
        Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=512), None,
    ),
    "llama3-32": (
        "llama3",
        {"factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 9.0,
         "original_max_position_embeddings": 8192},
        Llama3(factor=32.0, low_freq_factor=1.5, high_freq_factor=9.0, original_length=8192), None,
    ),
    # transformers takes the factor from max_position_embeddings, 512 here: given, so that both are the same.
    "longrope-short": _longrope(300, attention_factor=1.2),
    "longrope-long": _longrope(4000, attention_factor=1.2),
}  # fmt: skip


@pytest.mark.parametrize("theta", [100.0, 1e4, 5e5])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor_are_those_of_transformers(name, theta, measured):
    kind, parameters, scaling, length = CASES[name]
    config = LlamaConfig(
        hidden_size=4 * WIDTH, num_attention_heads=4, head_dim=WIDTH, max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": theta} | parameters,
    )  # fmt: skip
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    rope = RoPE(theta=theta, scaling=scaling)
    mine = rope.frequencies(WIDTH)
    frequencies = float(np.abs(mine / theirs.numpy().astype(np.float64) - 1).max())
    factors = peers.error(np.array([rope.attention_factor]), np.array([factor]))
    measured(
        f"rope-{name} (theta {theta:g})", source="transformers", bounds=[1e-6, 1e-6],
        errors={"frequencies": frequencies, "attention factor": factors},
    )  # fmt: skip
    assert frequencies <= 1e-6 and factors <= 1e-6, (frequencies, factors)
