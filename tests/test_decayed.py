"""Retention, GLA, lightning attention and Mamba-2, beyond the contract of tests/test_mixers.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.mixers import Context, GLAConfig, LightningConfig, Mamba2Config, RetentionConfig, recurrent
from attention_jax.model import ModelConfig, init_params
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.reference.decayed import recurrence
from train.optimizer import decay_mask

D_MODEL = 32
SMALL_MAMBA2 = Mamba2Config(head_dim=16, state_dim=8)
CONFIGS = {
    "retention": Row(RetentionConfig(), slow=True),
    "gla": Row(GLAConfig()),
    "lightning": Row(LightningConfig(slope_factor=0.7), slow=True),
    "mamba2": Row(SMALL_MAMBA2),
}


def built(config, **options):
    return config.build(D_MODEL, nnx.Rngs(1), causal=True, **options)


@pytest.mark.parametrize("kind", marks.params(CONFIGS))
def test_bfloat16_keeps_decays_and_state_in_float32(kind, monkeypatch):
    x = jax.random.normal(jax.random.key(2), (1, 24, D_MODEL)).astype(jnp.bfloat16)
    ctx = Context(positions_BT=jnp.arange(24)[None])
    scan, decays = recurrent.decay_scan, []

    def recorded(*args, log_decay, **options):
        decays.append(log_decay)
        return scan(*args, log_decay=log_decay, **options)

    monkeypatch.setattr(recurrent, "decay_scan", recorded)
    outputs = []
    for dtype in (jnp.bfloat16, jnp.float32):

        def run(x, dtype=dtype):
            mixer = built(CONFIGS[kind].value, dtype=dtype)
            return *mixer.mix(x.astype(dtype), mixer.init_state(1, 24), ctx=ctx)[:2], decays.pop()

        y, state, log_decay = jax.jit(run)(x)
        assert y.dtype == dtype and state.matrix_BNHM.dtype == log_decay.dtype == jnp.float32
        assert (log_decay != log_decay.astype(jnp.bfloat16)).any()  # nor were they rounded on the way
        outputs.append(np.asarray(y, np.float32))
    assert np.abs(outputs[0] - outputs[1]).max() < 0.03 * np.abs(outputs[1]).max()


def test_the_norm_of_retention_removes_the_papers_divisors():
    """Equations 5 and 8's normalisations, written out, change nothing after the group norm."""
    rng = np.random.default_rng(3)
    T, gamma = 12, 1 - 2.0**-5
    q, k, v = rng.normal(size=(3, T, 1, 8)).astype(np.float64)
    plain = recurrence(q, k / np.sqrt(8), v, np.full(q.shape, gamma))[:, 0]
    decay = np.array([[gamma ** (t - s) if s <= t else 0.0 for s in range(T)] for t in range(T)])
    decay /= np.sqrt(decay.sum(1, keepdims=True))
    scores = q[:, 0] @ k[:, 0].T / np.sqrt(8) * decay
    scores /= np.maximum(np.abs(scores.sum(1, keepdims=True)), 1)

    def norm(o):
        return (o - o.mean(-1, keepdims=True)) / o.std(-1, keepdims=True)

    assert_allclose(norm(scores @ v[:, 0]), norm(plain), rtol=1e-9)


def test_mamba2_starts_as_published():
    config = Mamba2Config(head_dim=1, state_dim=1)
    mixer = config.build(512, nnx.Rngs(0), causal=True, kernel_init=nnx.initializers.zeros_init())
    rates, steps = np.exp(mixer.A_log[...]), np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert rates.size == 1024
    assert 1 <= rates.min() < 1.1 and 15.9 < rates.max() <= 16 and abs(rates.mean() - 8.5) < 0.5
    assert 0.999e-3 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1001
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.15  # log-uniform: the median is the middle decade
    assert_array_equal(mixer.D[...], 1)


def test_what_no_weight_decay_reaches():
    config = ModelConfig(
        vocab_size=7, d_model=D_MODEL, num_layers=4, mixers=tuple(row.value for row in CONFIGS.values())
    )
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    decayed, kept = set(), set()
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(shapes["stacks"])):
        (decayed if decays else kept).add("/".join(key.key for key in path if key.key not in "0123"))
    mixers = {name for name in decayed if name.startswith("mixer/")}
    assert {name.rsplit("/")[-1] for name in decayed} == {"kernel"} and "mixer/convolution/kernel" in mixers
    assert {name for name in kept if name.startswith("mixer/")} == {
        "mixer/A_log", "mixer/D", "mixer/convolution/bias", "mixer/decay_up/bias", "mixer/dt_bias",
        "mixer/norm/bias", "mixer/norm/scale",
    }  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_is_not_causal_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} is causal only: its state .*; use kind softmax") as error:
        ModelConfig(d_model=D_MODEL, mixers=(CONFIGS[kind].value,), causal=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetentionConfig(value_dim=0), "value_dim must be >= 1, got 0"),
        (lambda: RetentionConfig(first_exponent=0.0), "first_exponent must be > 0 and <= 24, got 0.0"),
        (lambda: RetentionConfig(last_exponent=25.0), "last_exponent must be > 0 and <= 24, got 25.0"),
        (
            lambda: RetentionConfig(num_heads=21),
            "num_heads 21 give the last head a decay .*; set last_exponent",
        ),
        (lambda: built(RetentionConfig(num_heads=5)), "d_model 32 is not divisible by num_heads 5"),
        (lambda: built(RetentionConfig(head_dim=5)), "head_dim 5 is odd"),
        (lambda: GLAConfig(decay_rank=0), "decay_rank must be >= 1, got 0"),
        (lambda: GLAConfig(decay_temperature=0.0), "decay_temperature must be from 0.01 to 10000, got 0.0"),
        (lambda: built(GLAConfig(num_heads=32)), "not divisible by 2 num_heads = 64; set head_dim"),
        (lambda: built(GLAConfig(num_heads=3, head_dim=4)), "not divisible by num_heads 3; set value_dim"),
        (lambda: LightningConfig(slope_factor=0.0), "slope_factor must be from 1e-06 to 1000, got 0.0"),
        (lambda: built(LightningConfig(head_dim=4, rope=RoPE(width=6))), "RoPE width 6 exceeds head_dim 4"),
        (lambda: Mamba2Config(convolution=0), "convolution must be >= 1, got 0"),
        (lambda: Mamba2Config(dt_min=0.2), "dt_min 0.2 and dt_max 0.1 must satisfy"),
        (
            lambda: Mamba2Config(dt_limit_low=2.0, dt_limit_high=1.0),
            "dt_limit_low 2.0 must be >= 0 and below",
        ),
        (
            lambda: RetentionConfig(impl="reference"),
            "unknown impl 'reference'; choose from recurrent, chunked",
        ),
        (lambda: built(Mamba2Config(head_dim=48)), "head_dim 48 does not divide expand d_model = 64"),
        (lambda: built(Mamba2Config(head_dim=16, groups=3)), "groups 3 does not divide the 4 heads"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_bad_calls():
    x, ids = jnp.zeros((1, 3, D_MODEL)), jnp.arange(3)[None]

    def shapes(config, cached, ctx):
        mixer = built(config)
        return mixer.mix(x, mixer.init_state(1, 8) if cached else None, ctx=ctx).y

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: shapes(*arguments))

    refused("needs ctx.positions_BT", SMALL_MAMBA2, True, Context())
    refused("one document per row", SMALL_MAMBA2, True, Context(positions_BT=ids, segment_ids_BT=ids))
