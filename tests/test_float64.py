"""Computation in float64, in a subprocess with jax_enable_x64: `float64_run.py` says what is compared."""

import json
import os
import subprocess
import sys

import pytest
from flax import nnx

from attention_jax.mixers import make_mixer
from attention_jax.model import ModelConfig

RELATIVE = 1e-10


@pytest.mark.parametrize(
    "rows", [("gated", "mamba2"), pytest.param((), marks=pytest.mark.slow)], ids=["fast", "all"]
)
def test_float64_against_numpy(rows):
    """Nothing between the parameters and the outputs is rounded to float32."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.float64_run", *rows],
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Performer's features are exponentials of squares, whose gradient loses two digits more.
    bounds = {"performer gradient": 10 * RELATIVE}
    wrong = {
        name: value for name, value in found["errors"].items() if not value <= bounds.get(name, RELATIVE)
    }
    assert not wrong, wrong
    assert not found["narrowed"]


def test_float64_needs_64_bits():
    for make in (
        lambda: ModelConfig(vocab_size=5, dtype="float64"),
        lambda: make_mixer("softmax", 8, num_heads=2, dtype="float64", rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match="dtype float64 needs jax's 64-bit mode: set JAX_ENABLE_X64=1"):
            make()
