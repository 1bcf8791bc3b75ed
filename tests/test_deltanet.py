"""DeltaNet, Gated DeltaNet and KDA, beyond the contract of tests/test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.mixers import Context, DeltaNetConfig, GatedDeltaNetConfig, KDAConfig
from attention_jax.model import ModelConfig

D_MODEL = 32
CONFIGS = {
    "deltanet": DeltaNetConfig(negative_eigenvalues=True, chunk_size=8),
    "gated_deltanet": GatedDeltaNetConfig(num_qk_heads=2, chunk_size=8),
    "kda": KDAConfig(negative_eigenvalues=True, chunk_size=8),
}

each_kind = pytest.mark.parametrize("kind", CONFIGS)


def built(config, **options):
    return config.build(D_MODEL, nnx.Rngs(1), causal=True, **options)


@each_kind
def test_bfloat16_keeps_decays_and_state_in_float32(kind):
    """Over 96 tokens the decays' product would be far off, were the decays rounded to bfloat16."""
    x = np.random.default_rng(2).standard_normal((1, 96, D_MODEL)).astype(jnp.bfloat16)
    ctx = Context(positions_BT=np.arange(96)[None])
    outputs, states = [], []
    for dtype in (jnp.bfloat16, jnp.float32):
        mixer = built(CONFIGS[kind], dtype=dtype)
        run = jax.jit(lambda x, mixer=mixer: mixer.mix(x, mixer.init_state(1, 96), ctx=ctx)[:2])
        y, state = run(x.astype(dtype))
        assert y.dtype == dtype and state.matrix_BNHM.dtype == jnp.float32
        outputs.append(np.asarray(y, np.float32))
        states.append(np.asarray(state.matrix_BNHM))
    for rounded, exact in (outputs, states):
        assert np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("config", [GatedDeltaNetConfig(num_heads=256), KDAConfig(num_heads=256)])
def test_decays_start_as_in_mamba_2(config):
    mixer = config.build(1024, nnx.Rngs(0), causal=True, kernel_init=nnx.initializers.zeros_init())
    rates, steps = np.exp(mixer.A_log[...]), np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert rates.size == 256 and 1 <= rates.min() < 1.3 and 15.7 < rates.max() <= 16
    assert 0.999e-3 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1001
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.2  # log-uniform: the median is the middle decade


@pytest.mark.parametrize("kind", [GatedDeltaNetConfig, KDAConfig])
def test_decays_start_as_slowly_as_asked(kind):
    mixer = kind(num_heads=16, dt_min=1e-6, dt_max=1e-5).build(64, nnx.Rngs(0), causal=True)
    steps = np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert 0.99e-6 < steps.min() and steps.max() < 1.01e-5


@each_kind
def test_a_model_that_is_not_causal_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} is causal only: its state .*; use kind softmax") as error:
        ModelConfig(d_model=D_MODEL, mixers=(CONFIGS[kind],), causal=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeltaNetConfig(num_heads=0), "num_heads must be >= 1, got 0"),
        (lambda: DeltaNetConfig(convolution=0), "convolution must be >= 1, got 0"),
        (lambda: DeltaNetConfig(chunk_size=-1), "chunk_size must be >= 1, got -1"),
        (
            lambda: DeltaNetConfig(impl="reference"),
            "unknown impl 'reference'; choose from recurrent, chunked",
        ),
        (lambda: GatedDeltaNetConfig(num_qk_heads=3), "num_qk_heads 3 does not divide num_heads 4"),
        (lambda: KDAConfig(rank=0), "rank must be >= 1, got 0"),
        (lambda: KDAConfig(dt_min=0.0), "dt_min 0.0 and dt_max 0.1 must satisfy 0 < dt_min <= dt_max"),
        (lambda: GatedDeltaNetConfig(dt_max=1e-4), "dt_min 0.001 and dt_max 0.0001 must satisfy 0 < dt_min"),
        (lambda: built(KDAConfig(num_heads=5)), "d_model 32 is not divisible by num_heads 5; set head_dim"),
    ],
)
def test_rejected_calls(make, message):
    with pytest.raises(ValueError, match=message):
        make()
