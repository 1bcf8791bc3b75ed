"""Real processes, killed by SIGKILL and started again with the same command, end with the same bits."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from train.run.metrics import TIMING, read_rows

ROOT = Path(__file__).parents[1]
CONFIG = """
steps: 30
log_every: 2
model:
  d_model: 16
  num_layers: 1
  mixers: [{kind: softmax, num_heads: 2}]
  mlp_width: 24
  dropout: 0.1
data: {files: "TEXTS/*.txt", sequence_length: 16, batch_size: 4, validation_fraction: 0.3}
optimizer: {warmup_steps: 5, accumulation_steps: 2}
evaluation: {every: 10, batches: 3, sample_tokens: 12, sample_prompt: "a"}
checkpoint: {every: 5, keep: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small corpus and a config; compiled programs are kept in it between processes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "texts").mkdir()
    words = random.Random(0).choices("the a cat dog sat saw ran on with mat hat".split(), k=1200)
    for part in range(6):
        text = " ".join(words[part * 200 : part * 200 + 200])
        (folder / "texts" / f"{part}.txt").write_text(text)
    (folder / "tiny.yaml").write_text(CONFIG.replace("TEXTS", str(folder / "texts")))
    return folder


def start(place, name, point="never", *overrides):
    """A process that trains in place/name."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    program = str(ROOT / "tests" / "killed_run.py")
    command = [sys.executable, program, point, str(place / f"{name}.batches"), str(place / "tiny.yaml")]
    return subprocess.Popen(
        [*command, f"run_dir={place / name}", *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trained(place, name, point="never", *overrides):
    """(exit status, output) of a process that trains in place/name."""
    process = start(place, name, point, *overrides)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def whole(place):
    """The run that nothing interrupts."""
    status, output = trained(place, "whole")
    assert status == 0, output
    return place / "whole"


def rows_without_times(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def events(folder):
    """(step, tag, value) of every TensorBoard scalar, timing apart, in the order of the files' names."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (length,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + length])
            place += 12 + length + 4
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag not in TIMING]
    return found


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def arrays(folder, step):
    """Path to (dtype, shape, bytes) of every array in a checkpoint."""
    with warnings.catch_warnings(action="ignore"):  # that no shardings are given
        tree = ocp.load(folder / "checkpoints" / step / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in leaves
    }


def assert_same_run(folder, whole):
    assert checkpoints(folder) == checkpoints(whole)
    for step in checkpoints(whole):
        assert arrays(folder, step) == arrays(whole, step)
        info = [json.loads((run / "checkpoints" / step / "info.json").read_text()) for run in (folder, whole)]
        run_dirs = [entry["config"].pop("run_dir") for entry in info]
        assert info[0] == info[1] and run_dirs == [str(folder), str(whole)]
    assert rows_without_times(folder) == rows_without_times(whole)
    assert sorted(events(folder)) == sorted(events(whole))
    for sample in (whole / "samples").iterdir():
        assert (folder / "samples" / sample.name).read_bytes() == sample.read_bytes()
    assert json.loads((folder / "result.json").read_text()) == json.loads((whole / "result.json").read_text())
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def order_of_batches(place, name):
    """Step to hash, from every process of the run; the same step always had the same batch."""
    order = {}
    for line in (place / f"{name}.batches").read_text().splitlines():
        step, digest = line.split()
        assert order.setdefault(int(step), digest) == digest
    return order


def test_the_whole_run(whole):
    rows = rows_without_times(whole)
    assert [row["step"] for row in rows] == [*range(2, 31, 2), 30]
    assert [row["step"] for row in rows if "val/loss" in row] == [10, 20, 30]
    assert [row["step"] for row in rows if "val/bits_per_byte" in row] == [30]
    assert rows[-2]["train/loss"] < rows[0]["train/loss"]
    assert sorted(events(whole)) == sorted(
        (row["step"], name, pytest.approx(value, rel=1e-6))
        for row in rows
        for name, value in row.items()
        if name != "step"
    )
    assert {path.name for path in (whole / "samples").iterdir()} == {
        f"step_{n:06d}.txt" for n in (10, 20, 30)
    }
    for name in ("config.yaml", "versions.json", "run.json"):
        assert (whole / name).stat().st_size


def leftovers(folder):
    return [name for name in checkpoints(folder) if name.startswith("tmp.")]


def test_killed_again_and_again_ends_with_the_same_bits(place, whole):
    """One run, killed at six points and once by SIGTERM; after each the folder is what the point says."""
    folder = place / "killed"

    def killed(point):
        status, output = trained(place, "killed", point)
        assert status == -signal.SIGKILL, output

    killed("save:5")
    assert leftovers(folder) == ["tmp.step_00000005"] == checkpoints(folder)
    killed("evaluating:10")  # starts over, saves step 5
    assert checkpoints(folder) == ["step_00000005"]
    assert read_rows(folder / "metrics.jsonl")[-1]["step"] == 8
    status, output = trained(place, "killed", "sigterm:13")
    assert status == 128 + signal.SIGTERM, output
    assert output.endswith("\nstopped by SIGTERM: step 13 is saved; the same command goes on from there\n")
    assert checkpoints(folder) == ["step_00000010", "step_00000013"]
    killed("orbax:20")
    assert len(leftovers(folder)) == 1 and "step_00000020" not in checkpoints(folder)
    killed("deleting:25")
    assert [name for name in checkpoints(folder) if "deleted" in name]
    killed("row:28")
    assert (folder / "metrics.jsonl").read_bytes().endswith(b'\n{"step": ')
    killed("drawn:30")
    assert "val/bits_per_byte" in read_rows(folder / "metrics.jsonl")[-1]
    assert not (folder / "result.json").exists()
    status, output = trained(place, "killed")
    assert status == 0, output
    assert_same_run(folder, whole)
    assert order_of_batches(place, "killed") == order_of_batches(place, "whole")
    assert sorted(order_of_batches(place, "whole")) == list(range(30))


@pytest.mark.slow
def test_a_hybrid_stack_killed_and_resumed_ends_with_the_same_bits(place):
    mixers = (
        "[{kind: gla, num_heads: 2}, {kind: gated_deltanet, num_heads: 2}, {kind: softmax, num_heads: 2}]"
    )
    hybrid = ["model.num_layers=3", f"model.mixers={mixers}", "steps=20"]
    status, output = trained(place, "hybrid", "never", *hybrid)
    assert status == 0, output
    for point in ("save:10", "row:14", "saved:15"):
        status, output = trained(place, "hybrid_killed", point, *hybrid)
        assert status == -signal.SIGKILL, output
    # Killed before old checkpoints were collected.
    assert checkpoints(place / "hybrid_killed") == [f"step_{n:08d}" for n in (5, 10, 15)]
    status, output = trained(place, "hybrid_killed", "never", *hybrid)
    assert status == 0, output
    assert_same_run(place / "hybrid_killed", place / "hybrid")


@pytest.fixture(scope="module")
def seconds(place, whole):
    """How long a run takes where its programs are compiled."""
    begin = time.perf_counter()
    status, output = trained(place, "timed")
    assert status == 0, output
    return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(place, whole, seconds, seed):
    rng, name = random.Random(seed), f"storm{seed}"
    kills = 0
    for _ in range(60):
        process = start(place, name)
        try:
            # Sooner than a run can end, whatever the machine's speed; at last it may.
            limit = seconds * rng.uniform(0.3, 0.8) if kills < 8 else 300
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output
        break
    assert kills
    assert_same_run(place / name, whole)


def test_a_finished_run_says_so_and_changes_nothing(place, whole):
    def state():
        files = [path for path in whole.rglob("*") if path.is_file() and path.name != "run.lock"]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    status, output = trained(place, "whole")
    assert status == 0
    assert "is finished" in output and "val/bits_per_byte" in output and "--- sample" in output
    assert state() == before
