"""Inside a user's own `jax.shard_map`, at its defaults, every op gives what it gives on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# One of each loop and each custom derivative; the others are slow.
FAST = [
    "drop-in", "choose blocks", "softmax reference: padding", "softmax chunked: shared bias and sinks",
    "softmax chunked: dropout", "softmax mosaic_tpu: forgetting", "decay_scan recurrent: head",
    "decay_scan chunked: head", "decay_scan chunked: channel", "delta_rule chunked: channel",
    "selected gathered",
]  # fmt: skip


def seen(*options: str) -> dict[str, dict[str, float]]:
    """What `tests/in_shard_map.py` sees; a process of its own, since jax counts its devices once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.in_shard_map", *options], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, dict[str, float]]) -> None:
    for name, case in found.items():
        assert case["outputs"] <= 1e-6, (name, case)
        assert case["gradients"] <= 1e-5 and case["shared"] <= 1e-5, (name, case)  # sums in another order


def test_ops_inside_shard_map():
    found = seen(*FAST)
    assert list(found) == FAST
    check(found)


@pytest.mark.slow
def test_every_case_inside_shard_map():
    found = seen("all but", *FAST)
    assert len(found) > 25
    check(found)
