"""A call whose rows or heads are split over a mesh is the call on one device, biases and dropout included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import Row

ROOT = Path(__file__).parent.parent


# Fast: heads with slopes of their own behind one kv head, dropout of rows and heads, kernels.
CASES = [
    Row("rows: chunked", slow=True),
    Row("heads: chunked", slow=True),
    Row("rows and heads, dropout: chunked"),
    Row("one kv head: chunked"),
    Row("rows and heads: chunked", slow=True),
    Row("rows over all: chunked", slow=True),
    Row("rows and heads, dropout: reference", slow=True),
    Row("rows and heads: mosaic_tpu"),
    Row("auto rows: chunked", slow=True),
    Row("auto heads: chunked", slow=True),
    Row("auto rows and heads, dropout: chunked"),
    Row("auto one kv head: chunked", slow=True),
    Row("auto rows over all: chunked", slow=True),
    Row("auto softmax", slow=True),
    Row("auto mla", slow=True),
    Row("auto forgetting", slow=True),
    Row("auto differential", slow=True),
    Row("auto gla", slow=True),
    Row("auto gated_deltanet", slow=True),
]


def names(slow: bool) -> list[str]:
    return [row.value for row in CASES if row.slow == slow]


def seen(*names: str) -> dict:
    """What `tests/on_mesh.py` sees; a process of its own, since jax counts its devices once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_mesh", *names], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return seen(*names(slow=False), "errors")


def check(cases: dict, expected: list[str]) -> None:
    assert list(cases) == expected
    for name, case in cases.items():
        assert case["outputs"] <= 1e-6, name
        assert case["gradients"] <= 1e-5, name  # sums over rows are taken in another order
        assert case["sharding"], name
        assert case.get("gathers", []) == [], name


def test_a_mesh_changes_no_number(found):
    check({name: case for name, case in found.items() if name != "errors"}, names(slow=False))


@pytest.mark.slow
def test_a_mesh_changes_no_number_however_it_splits():
    check(seen(*names(slow=True)), names(slow=True))


def test_what_cannot_be_split_is_refused(found):
    along_queries, kv_heads, explained = found["errors"]
    assert along_queries == (
        "q is sharded over its axis T by mesh axis 'data': only batch rows and heads can be"
    )
    assert kv_heads == "2 kv heads cannot be split over the 4 shards of the query heads ('model')"
    assert "split by shard_map: rows over 'data', heads over 'model'" in explained
